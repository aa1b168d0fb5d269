"""The true quantities of a case, and what errors of each are relative to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.parity import truth
from tdpo_ext.parity.cases import HeadInputs, Inputs

STATISTICS = ("policy_logps", "reference_logps", "forward_kl")
SMALLEST_KL = 1e-6
"""Below it errors are relative to this: rounded logits say no more."""


class Wanted(NamedTuple):
    values: dict[str, Tensor]
    sizes: dict[str, Tensor]
    """A number for each row of a quantity.

    Of a statistic it is the statistic; of the logits' gradient the largest term that its row is a
    sum of. A head's gradients are products, sum of dz W or of dz h, whose rounding errors are
    relative to sum of |dz| |W|: it is the largest of these in the row of a token, or of all words.
    """


def of_logits(inputs: Inputs) -> Wanted:
    shape, vocabulary = inputs.labels.shape, inputs.policy.shape[-1]
    rows = [x.double().reshape(-1, vocabulary) for x in (inputs.policy, inputs.reference)]
    found = truth.token_stats(rows[0], rows[1], *(x.flatten() for x in inputs[2:]))
    values = {name: getattr(found, name).view(shape) for name in STATISTICS}
    sizes = {name: x.abs() for name, x in values.items()}
    sizes["forward_kl"] = sizes["forward_kl"].clamp(min=SMALLEST_KL)
    values["gradient"] = found.gradient.view(inputs.policy.shape)
    sizes["gradient"] = found.terms.view(shape)
    return Wanted(values, sizes)


def of_heads(inputs: HeadInputs) -> Wanted:
    blank = (inputs.labels == -100).unsqueeze(-1)
    hidden, weight, reference_hidden, reference_weight = (x.double() for x in inputs[:4])
    hidden, reference_hidden = (x.masked_fill(blank, 0) for x in (hidden, reference_hidden))
    logits = Inputs(hidden @ weight.T, reference_hidden @ reference_weight.T, *inputs[4:])
    values, sizes = of_logits(logits)
    by_logits = values.pop("gradient")
    del sizes["gradient"]
    by_hidden = by_logits @ weight
    by_weight = by_logits.flatten(0, 1).T @ hidden.flatten(0, 1)
    values |= {"gradient of hidden": by_hidden, "gradient of weight": by_weight}
    terms = by_logits.abs()
    sizes["gradient of hidden"] = (terms @ weight.abs()).amax(-1)
    of_weight = terms.flatten(0, 1).T @ hidden.flatten(0, 1).abs()
    sizes["gradient of weight"] = of_weight.amax().expand(by_weight.shape[:-1])
    return Wanted(values, sizes)


def least_size(quantity: str, dtype: torch.dtype, fallback: bool) -> float:
    """No error is relative to less.

    Plain PyTorch subtracts logarithms, so near 0 it promises log p(y) to an absolute error. And
    below the smallest normal number of its dtype nothing keeps its digits.
    """
    if fallback and quantity.endswith("logps"):
        return 1.0
    return torch.finfo(dtype).tiny
