"""FSDP2: parameters, gradients and optimizer sharded over processes, the reference too.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os

import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tdpo_ext import LinearTDPOLoss
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")


def sharded(model: torch.nn.Module, **root: bool) -> torch.nn.Module:
    model.to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model, **root)


# Attach before sharding. The reference's root has no backward to free its gathered weights after:
# let forward free them.
policy = sharded(attach_tdpo(tiny.language_model(), LinearTDPOLoss(beta=0.1, alpha=0.5)))
reference = attach_tdpo(tiny.language_model()).requires_grad_(False)
reference = sharded(reference, reshard_after_forward=True)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

batches = tiny.batches()
steps = len(batches) // processes  # every process takes as many
for step, batch in enumerate(batches[rank::processes][:steps]):
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    with torch.no_grad():
        reference_inputs = reference(**batch, tdpo=HEAD_INPUTS)
    output = policy(**batch, tdpo=TDPOTargets(reference_inputs, labels))
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {output.loss.item():.4f}")

dist.destroy_process_group()
