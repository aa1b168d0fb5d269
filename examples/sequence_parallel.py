"""Sequence (context) parallel: every process holds a part of the positions of each sequence.

torchrun --nproc-per-node 2 examples/sequence_parallel.py
"""

import copy

import tiny
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

import tdpo_ext

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
policy = tiny.language_model()
reference = copy.deepcopy(policy).requires_grad_(False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

for step, batch in enumerate(tiny.batches()):
    labels = batch.pop("labels")
    # Shift before splitting: a part's last position is scored against the next part's first label.
    shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    # This example has no ring attention: every process runs all positions and keeps its own.
    with torch.no_grad():
        reference_logits = reference(**batch).logits.tensor_split(processes, dim=1)[rank]
    logits = policy(**batch).logits.tensor_split(processes, dim=1)[rank]
    own_labels = shift_labels.tensor_split(processes, dim=1)[rank]
    stats = tdpo_ext.token_stats(logits, reference_logits, own_labels)
    margin = (stats.policy_logps - stats.reference_logps).sum(-1)
    # This all_reduce sums in backward too. Gradients are averaged over the processes below, as DDP
    # and FSDP do, so every position counts once.
    margin, seq_kl = all_reduce(torch.stack([margin, stats.forward_kl.sum(-1)]))
    loss = tdpo_ext.pair_loss(margin, seq_kl, beta=0.1, alpha=0.5).mean()
    loss.backward()
    for parameter in policy.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= processes
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.4f}")

dist.destroy_process_group()
