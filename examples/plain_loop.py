"""A loop of your own: the model's forward computes the loss, without logits.

python examples/plain_loop.py
"""

import copy

import tiny
import torch

from tdpo_ext import LinearTDPOLoss
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo

policy = tiny.language_model()
reference = copy.deepcopy(policy).requires_grad_(False)
attach_tdpo(policy, LinearTDPOLoss(beta=0.1, alpha=0.5))
attach_tdpo(reference)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

for step, batch in enumerate(tiny.batches()):
    labels = batch.pop("labels")  # -100 on prompt and padding
    with torch.no_grad():
        reference_inputs = reference(**batch, tdpo=HEAD_INPUTS)
    output = policy(**batch, tdpo=TDPOTargets(reference_inputs, labels))
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print({name: round(value.item(), 4) for name, value in output.tdpo.metrics().items()})
    print(f"step {step}: loss {output.loss.item():.4f}")
