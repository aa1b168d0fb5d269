"""Import tdpo_ext, print what serves the CPU, and take a step. Argument: compiled or fallback."""

from __future__ import annotations

import sys
import warnings

import torch

import tdpo_ext

expected = sys.argv[1]
cpu = tdpo_ext.backends()["cpu"]
print(tdpo_ext.__file__, cpu)
assert cpu["compiled"] == (expected == "compiled"), cpu

logits = torch.randn(2, 3, 5, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        labels = torch.randint(0, 5, (2, 3))
        tdpo_ext.TDPOLoss()(logits, torch.randn(2, 3, 5), labels).loss.backward()
said = [str(warning.message) for warning in caught if "fallback" in str(warning.message)]
assert len(said) == (expected == "fallback"), said
assert logits.grad is not None
assert bool(logits.grad.isfinite().all())
