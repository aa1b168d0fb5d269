"""The true quantities of a case, and what errors of each are relative to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.checks import Divergence
from tdpo_ext.parity import truth
from tdpo_ext.parity.cases import HeadInputs, Inputs, upstream_of_divergences

STATISTICS = ("policy_logps", "reference_logps", "forward_kl")
DIVERGENCES: tuple[Divergence, ...] = ("reverse_kl", "policy_entropy", "reference_entropy")
SMALLEST_KL = 1e-6
"""Errors of a smaller KL are relative to this, since rounded logits determine it no better."""


class Wanted(NamedTuple):
    values: dict[str, Tensor]
    sizes: dict[str, Tensor]
    """A number for each row of a quantity, which its errors are relative to.

    For a statistic it is the statistic itself, for an entropy 1 more. For the gradient of the
    logits it is the largest term in the sums of its row. A head's gradients are sums of dz W or
    dz h, whose rounding errors are relative to the sum of |dz| |W| or |dz| |h|: it is the largest
    of these sums in the row of a token (hidden states), or of all vocabulary entries (weight).
    """


def from_logits(inputs: Inputs) -> Wanted:
    shape, vocabulary = inputs.labels.shape, inputs.policy.shape[-1]
    rows = [x.double().reshape(-1, vocabulary) for x in (inputs.policy, inputs.reference)]
    found = truth.token_stats(rows[0], rows[1], *(x.flatten() for x in inputs[2:]))
    values = {name: getattr(found, name).view(shape) for name in STATISTICS}
    sizes = {name: x.abs() for name, x in values.items()}
    sizes["forward_kl"] = sizes["forward_kl"].clamp(min=SMALLEST_KL)
    values["gradient"] = found.gradient.view(inputs.policy.shape)
    sizes["gradient"] = found.terms.view(shape)
    return Wanted(values, sizes)


def divergences_from_logits(inputs: Inputs) -> Wanted:
    shape, vocabulary = inputs.labels.shape, inputs.policy.shape[-1]
    rows = [x.double().reshape(-1, vocabulary) for x in (inputs.policy, inputs.reference)]
    upstream = (x.flatten() for x in upstream_of_divergences(inputs))
    found = truth.divergences(rows[0], rows[1], inputs.labels.flatten(), *upstream)
    values: dict[str, Tensor] = {x: getattr(found, x).view(shape) for x in DIVERGENCES}
    sizes = {name: 1 + x for name, x in values.items()}
    sizes["reverse_kl"] = values["reverse_kl"].clamp(min=SMALLEST_KL)
    values["gradient of divergences"] = found.gradient.view(inputs.policy.shape)
    sizes["gradient of divergences"] = found.terms.view(shape)
    return Wanted(values, sizes)


def from_heads(inputs: HeadInputs) -> Wanted:
    blank = (inputs.labels == -100).unsqueeze(-1)
    hidden, weight, reference_hidden, reference_weight = (x.double() for x in inputs[:4])
    hidden, reference_hidden = (x.masked_fill(blank, 0) for x in (hidden, reference_hidden))
    logits = Inputs(hidden @ weight.T, reference_hidden @ reference_weight.T, *inputs[4:])
    values, sizes = from_logits(logits)
    by_logits = values.pop("gradient")
    del sizes["gradient"]
    by_hidden = by_logits @ weight
    by_weight = by_logits.flatten(0, 1).T @ hidden.flatten(0, 1)
    values |= {"gradient of hidden": by_hidden, "gradient of weight": by_weight}
    terms = by_logits.abs()
    sizes["gradient of hidden"] = (terms @ weight.abs()).amax(-1)
    weight_sizes = terms.flatten(0, 1).T @ hidden.flatten(0, 1).abs()
    sizes["gradient of weight"] = weight_sizes.amax().expand(by_weight.shape[:-1])
    return Wanted(values, sizes)


def least_size(quantity: str, dtype: torch.dtype, fallback: bool) -> float:
    """The smallest size that errors are relative to.

    Plain PyTorch subtracts logarithms, so its error of log p(y) has an absolute bound where log
    p(y) is near 0. Below the smallest normal number of its dtype no number keeps its digits.
    """
    if fallback and quantity.endswith("logps"):
        return 1.0
    return torch.finfo(dtype).tiny
