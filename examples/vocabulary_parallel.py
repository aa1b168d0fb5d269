"""Tensor parallel: every process holds a part of the head's rows, and of the logits.

torchrun --nproc-per-node 2 examples/vocabulary_parallel.py
"""

import os

import tiny
import torch
import torch.distributed as dist

import tdpo_ext

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")

# The layers are whole and equal on all processes here; a tensor-parallel plan shards them too.
policy, reference = (tiny.language_model().to(device) for _ in range(2))
own_rows = policy.lm_head.weight.detach().chunk(processes)[rank].clone()
own_rows, reference_rows = torch.nn.Parameter(own_rows), own_rows.clone()
optimizer = torch.optim.AdamW([*policy.model.parameters(), own_rows], lr=1e-3)

for step, batch in enumerate(tiny.batches()):  # the same tokens on all processes
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    with torch.no_grad():
        reference_hidden = reference.model(**batch).last_hidden_state
    # Communicates one all_gather of 36 bytes a token in forward, and one all_reduce of the hidden
    # states' gradient in backward. A ColwiseParallel head's DTensors need no process_group.
    output = tdpo_ext.linear_tdpo_loss(
        policy.model(**batch).last_hidden_state,
        own_rows,
        reference_hidden,
        reference_rows,
        labels,
        process_group=dist.group.WORLD,
    )
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {output.loss.item():.4f}")

dist.destroy_process_group()
