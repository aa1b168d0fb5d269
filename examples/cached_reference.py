"""A cached reference: it runs once, its hidden states stay on disk and its head in memory.

python examples/cached_reference.py
"""

import tempfile

import tiny
import torch

from tdpo_ext import LinearTDPOLoss
from tdpo_ext.integrations.attach import TDPOTargets, attach_tdpo
from tdpo_ext.integrations.cached_reference import CachedReferenceCollator, precompute_reference
from tdpo_ext.integrations.transformers import PreferenceCollator

examples, collate = tiny.tokenized_preferences(), PreferenceCollator(pad_token_id=0)
policy = attach_tdpo(tiny.language_model(), LinearTDPOLoss(beta=0.1, alpha=0.5))

with tempfile.TemporaryDirectory() as folder:
    # Before the first update the policy still equals its reference, so it can serve as one.
    in_order = torch.utils.data.DataLoader(examples, batch_size=3, collate_fn=collate)
    cache, reference = precompute_reference(policy, in_order, folder)

    loader = torch.utils.data.DataLoader(
        examples, batch_size=3, collate_fn=CachedReferenceCollator(collate, cache)
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for epoch in range(20):
        for step, batch in enumerate(loader, start=epoch * len(loader)):
            labels, hidden = batch.pop("labels"), batch.pop("reference_hidden")
            output = policy(**batch, tdpo=TDPOTargets(reference.with_hidden(hidden), labels))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {output.loss.item():.4f}")
