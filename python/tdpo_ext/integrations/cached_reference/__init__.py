"""A reference that runs once: its hidden states stay on disk, its head in memory.

    attach_tdpo(reference)
    cache, cached = precompute_reference(reference, loader, folder)
    collate = CachedReferenceCollator(collate, cache)        # batches with reference_hidden
    targets = TDPOTargets(cached.with_hidden(batch["reference_hidden"]), batch["labels"])

The trainers do this themselves: ``TDPOConfig(precompute_ref_log_probs=True)`` with TRL,
``precompute_reference=folder`` with transformers. The files on disk are ``reference_cache``'s.
"""

from tdpo_ext.integrations.cached_reference.batches import CachedReferenceCollator
from tdpo_ext.integrations.cached_reference.fingerprint import reference_fingerprint
from tdpo_ext.integrations.cached_reference.precompute import precompute_reference
from tdpo_ext.integrations.cached_reference.reference import CachedReference
from tdpo_ext.integrations.cached_reference.trainers import cache_reference_of_trainer

__all__ = [
    "CachedReference",
    "CachedReferenceCollator",
    "cache_reference_of_trainer",
    "precompute_reference",
    "reference_fingerprint",
]
