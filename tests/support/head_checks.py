"""The fused head: arguments, its gradients, and the products that it spends."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from inputs import labels_for, numpy64
from torch import Tensor

import tdpo_ext
from tdpo_ext.fused_head import products

METHODS = [("tdpo1", 0.5), ("tdpo2", 0.5), ("tdpo2", 0.0)]
OPTIONS = {
    "plain": {},
    "bias": {"policy_bias": True},
    "biases, scale": {"policy_bias": True, "reference_bias": True, "logit_scale": 0.7},
    "softcap": {"logit_softcap": 2.0},
    "all, each its own": {
        "policy_bias": True,
        "reference_bias": True,
        "logit_scale": 0.6,
        "logit_softcap": 3.0,
        "reference_logit_scale": 1.3,
        "reference_logit_softcap": 5.0,
    },
}
NAMES = ("policy_hidden", "policy_weight", "policy_bias")


def arguments_of(
    *leading: int,
    vocabulary: int = 131,
    width: int = 19,
    reference_width: int = 13,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Two heads that have nothing to do with each other, and what `options` asks for."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "policy_hidden": normal(*leading, width),
        "policy_weight": normal(vocabulary, width) / width**0.5,
        "reference_hidden": normal(*leading, reference_width),
        "reference_weight": normal(vocabulary, reference_width) / reference_width**0.5,
        **options,
        **{name: normal(vocabulary) for name in options if name.endswith("bias")},
    }


def oracle_heads(given: dict[str, Any]) -> tuple[oracle.Head, oracle.Head]:
    zero = torch.zeros(given["policy_weight"].shape[0])
    heads = []
    for which, prefix in (("policy", ""), ("reference", "reference_")):
        scale = given.get(f"{prefix}logit_scale", given.get("logit_scale", 1.0))
        softcap = given.get(f"{prefix}logit_softcap", given.get("logit_softcap", 0.0))
        hidden = numpy64(given[f"{which}_hidden"])
        bias = numpy64(given.get(f"{which}_bias", zero))
        weight = numpy64(given[f"{which}_weight"])
        flat = hidden.reshape(-1, hidden.shape[-1])
        heads.append(oracle.Head(flat, weight, bias, scale, softcap))
    return heads[0], heads[1]


def requiring_grad(
    given: dict[str, Any], frozen: bool = False
) -> tuple[dict[str, Any], list[Tensor]]:
    names = [name for name in NAMES if name in given and (name == "policy_hidden" or not frozen)]
    given = {**given, **{name: given[name].detach().requires_grad_() for name in names}}
    return given, [given[name] for name in names]


def bound_of(dtype: torch.dtype) -> float:
    """The bound of a gradient's error: half-width gradients are rounded when they are stored."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 1e-12}
    return rounding.get(dtype, 2e-6)


def loss_and_gradients(given, leaves, weights=None, loss=tdpo_ext.linear_tdpo_loss, **options):
    output = loss(**given, **options)
    scalar = output.loss if weights is None else (output.loss * weights).sum()
    return output, torch.autograd.grad(scalar, leaves)


class CountedProducts:
    """How many GEMM units were spent: one is 2 N V H operations for N kept tokens."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kept: int, vocabulary: int, width: int
    ) -> None:
        self.operations = 0
        self.unit = 2 * kept * vocabulary * width
        for name in ("multiply", "multiply_add"):
            monkeypatch.setattr(products, name, self.counting(getattr(products, name)))

    def counting(self, product: Any) -> Any:
        def counted(a, b, out):
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            product(a, b, out=out)

        return counted

    def units(self) -> float:
        taken, self.operations = self.operations / self.unit, 0
        return taken


def check_ignored_tokens(given: dict[str, Any], frozen: bool) -> None:
    """NaN or infinities in the hidden states of ignored tokens change no bit, of anything."""
    labels = labels_for(torch.empty(4, 5, 131), 0.5)
    results = []
    for poison in (0.0, math.nan, math.inf):
        for name in ("policy_hidden", "reference_hidden"):
            given[name][labels == -100] = poison
        with_grad, leaves = requiring_grad(given, frozen)
        output, gradients = loss_and_gradients(with_grad, leaves, shift_labels=labels)
        results.append([*output, *gradients])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)
