"""The reference runs once; its hidden states are on disk, and only its head stays in memory.

python examples/cached_reference.py
"""

import tempfile

import tiny
import torch

from tdpo_ext import LinearTDPOLoss
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo
from tdpo_ext.integrations.transformers import CachedReference
from tdpo_ext.reference_cache import read_reference_cache, write_reference_cache

policy = tiny.language_model()
batches = tiny.batches(epochs=1)
# All that the numbers depend on: a cache of something else is refused.
fingerprint = {"model": "tiny", "tokenizer": "tiny", "dataset": "tiny, in order", "dtype": "f32"}

with tempfile.TemporaryDirectory() as folder:
    attach_tdpo(policy, LinearTDPOLoss(beta=0.1, alpha=0.5))
    with torch.no_grad():  # before the first update the policy is its own reference
        asked = [{name: x for name, x in batch.items() if name != "labels"} for batch in batches]
        hidden = (policy(**inputs, tdpo=HEAD_INPUTS).hidden for inputs in asked)
        write_reference_cache(folder, hidden, fingerprint)
    reference = CachedReference.of(policy)
    cached = read_reference_cache(folder, fingerprint)  # [tokens, H], mapped, not loaded
    parts = cached.split([batch["input_ids"].numel() for batch in batches])

    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for epoch in range(20):
        for number, (batch, inputs) in enumerate(zip(batches, asked, strict=True)):
            hidden = parts[number].view(*batch["input_ids"].shape, -1).float()
            targets = TDPOTargets(reference.with_hidden(hidden), batch["labels"])
            output = policy(**inputs, tdpo=targets)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {epoch * len(batches) + number}: loss {output.loss.item():.4f}")
