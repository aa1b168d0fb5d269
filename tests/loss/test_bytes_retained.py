"""What each public function keeps for its backward, beside its inputs: a table of bytes.

N = tokens, B = pairs, V = vocabulary entries, H = width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import tdpo_ext

B, T, V, H = 3, 7, 200, 24
N = 2 * B * T
STATISTICS = 8 * 4 * N  # eight numbers a token, float32
DIVERGENCES = 12 * 4 * N  # with divergences twelve
SLOPES = 4 * 2 * B  # one a sequence


class Inputs:
    def __init__(self, dtype: torch.dtype, frozen: bool) -> None:
        def made(*shape: int, leaf: bool = False) -> Tensor:
            return torch.randn(*shape, dtype=dtype, requires_grad=leaf)

        self.logits = made(2 * B, T, V, leaf=True)
        self.of_a_model = self.logits * 1  # not a leaf: backward may write over it
        self.reference_logits = made(2 * B, T, V)
        self.labels = torch.randint(0, V, (2 * B, T))
        self.cu_seqlens = torch.arange(0, N + 1, T)
        self.head = (made(2 * B, T, H, leaf=True), made(V, H, leaf=not frozen))
        self.head += (made(2 * B, T, H), made(V, H))
        self.sums = made(2 * B, leaf=True), made(2 * B, leaf=True)

    def packed(self, name: str) -> Tensor:
        return getattr(self, name).flatten(0, 1)

    def tensors(self) -> list[Tensor]:
        own = [x for x in vars(self).values() if isinstance(x, Tensor)]
        return [*own, *self.head, *self.sums]


TABLE: dict[str, tuple[Callable[[Inputs], Any], int]] = {
    "token_stats": (
        lambda x: tdpo_ext.token_stats(x.logits, x.reference_logits, x.labels),
        STATISTICS,
    ),
    "token_stats, in place": (
        lambda x: tdpo_ext.token_stats(
            x.of_a_model, x.reference_logits, x.labels, inplace_backward=True
        ),
        STATISTICS,
    ),
    "tdpo_loss": (
        lambda x: tdpo_ext.tdpo_loss(x.logits, x.reference_logits, x.labels),
        STATISTICS + SLOPES,
    ),
    "tdpo_loss, packed": (
        lambda x: tdpo_ext.tdpo_loss(
            x.packed("logits"),
            x.packed("reference_logits"),
            x.packed("labels"),
            cu_seqlens=x.cu_seqlens,
        ),
        STATISTICS + SLOPES,
    ),
    "TDPOLoss": (
        lambda x: tdpo_ext.TDPOLoss()(x.logits, x.reference_logits, x.labels),
        STATISTICS + SLOPES,
    ),
    "TDPOLoss, TDPO1": (
        lambda x: tdpo_ext.TDPOLoss(variant="tdpo1")(x.logits, x.reference_logits, x.labels),
        STATISTICS + SLOPES,
    ),
    "token_divergences": (
        lambda x: tdpo_ext.token_divergences(x.logits, x.reference_logits, x.labels),
        DIVERGENCES,
    ),
    "linear_token_stats": (
        lambda x: tdpo_ext.linear_token_stats(*x.head, x.labels),
        STATISTICS,
    ),
    "linear_token_divergences": (
        lambda x: tdpo_ext.linear_token_divergences(*x.head, x.labels),
        DIVERGENCES,
    ),
    # The gradients themselves, made in forward, in float32; and the loss's upstream gradient.
    "linear_tdpo_loss": (
        lambda x: tdpo_ext.linear_tdpo_loss(*x.head, x.labels),
        4 * (N * H + V * H + 1),
    ),
    "linear_tdpo_loss, head frozen": (
        lambda x: tdpo_ext.linear_tdpo_loss(*x.head, x.labels),
        4 * (N * H + N) + SLOPES,  # the gradient of the hidden states but a factor a token
    ),
    "LinearTDPOLoss": (
        lambda x: tdpo_ext.LinearTDPOLoss()(*x.head, x.labels),
        4 * (N * H + V * H + 1),
    ),
}
NOT_IN_THE_TABLE = {
    "reference",
    "backends",
    "TDPOOutput",
    "TokenDivergences",
    "TokenStats",
    "pair_loss",
}


def retained(call: Callable[[Inputs], Any], inputs: Inputs) -> int:
    """Bytes of the storages that autograd keeps and that are no input's."""
    own = {x.untyped_storage().data_ptr() for x in inputs.tensors()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call(inputs)
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_nothing_of_the_logits_size_is_retained(compiled, name, dtype):
    call, wanted = TABLE[name]
    assert retained(call, Inputs(dtype, frozen="frozen" in name)) == wanted


@pytest.mark.parametrize("name", TABLE)
def test_nothing_is_retained_without_gradients(name):
    with torch.no_grad():
        assert retained(TABLE[name][0], Inputs(torch.float32, frozen=False)) == 0


def test_the_loss_of_pairs_retains_numbers_of_pairs():
    kept = retained(lambda x: tdpo_ext.pair_loss(*x.sums), Inputs(torch.float32, frozen=False))
    assert kept <= 16 * 4 * B


def test_every_public_function_is_in_the_table():
    named = {name.split(",")[0] for name in TABLE}
    assert set(tdpo_ext.__all__) - NOT_IN_THE_TABLE == named
