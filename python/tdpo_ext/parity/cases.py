"""The inputs that parity is checked on.

They are a grid of dtypes, sizes, kinds of rows, strides, masks and upstream gradients, made on the
CPU from fixed seeds, so that every machine gets the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.checks import LOGIT_DTYPES

SEQUENCES, TOKENS = 4, 3
VOCABULARIES, QUICK_VOCABULARIES = (1, 2, 17, 1000, 32003, 128256), (2, 33, 1000)
WIDTHS = {17: 5, 33: 8, 1000: 64, 32003: 64}
"""The width of the hidden states, for each vocabulary that the fused head is checked on."""
IGNORED = (0.0, 0.4)
UPSTREAMS_OF_A_CASE = 2
"""The number of kinds of upstream gradients for each dtype, size and kind of rows. They take turns,
so five sizes of one dtype go through all kinds."""


class Inputs(NamedTuple):
    policy: Tensor
    """Logits ``[4, 3, V]``."""
    reference: Tensor
    labels: Tensor
    """``[4, 3]``"""
    grad_logps: Tensor
    grad_kl: Tensor


def upstream_of_divergences(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Upstream gradients of KL(pi || pi_ref), where it is finite, and of the policy's entropy."""
    excluded = (inputs.reference == -torch.inf) & (inputs.policy > -torch.inf)
    return inputs.grad_kl.masked_fill(excluded.any(-1), 0), inputs.grad_logps


class HeadInputs(NamedTuple):
    policy_hidden: Tensor
    """``[4, 3, H]``"""
    policy_weight: Tensor
    """``[V, H]``"""
    reference_hidden: Tensor
    reference_weight: Tensor
    labels: Tensor
    grad_logps: Tensor
    grad_kl: Tensor


# --- kinds of rows: how far policy and reference are apart, and in which way ----------------------

Kind = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Makes logits of policy and reference, from two tensors of normal numbers and the labels."""


def _apart(scale: float, gap: float) -> Kind:
    def kind(x: Tensor, y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return scale * x + gap * y, scale * x

    return kind


def _certain(x: Tensor, y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label has almost all of the mass, as under a well-trained model."""
    at_label = 25 * torch.zeros_like(x).scatter_(-1, labels.unsqueeze(-1), 1)
    return x + 0.1 * y + at_label, x + at_label


def _underflow(x: Tensor, y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Entries 120 below the maximum: softmax().log() in float32 is -inf there."""
    low = torch.zeros_like(x)
    low[..., ::3] = -120
    return x + y, x + low


def _masked(x: Tensor, y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Some logits of both sides are -inf, and some of the reference's alone; never the label's."""
    policy, reference = x + y, x.clone()
    policy[..., 1::5] = reference[..., 1::5] = -torch.inf
    reference[..., 2::5] = -torch.inf
    at = labels.unsqueeze(-1)
    return policy.scatter(-1, at, 1.0), reference.scatter(-1, at, 1.0)


def _shifted(x: Tensor, y: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A constant added to all of the policy's logits changes no probability."""
    return x + y + 100, x


KINDS: dict[str, Kind] = {
    "identical": _apart(2, 0),
    "close": _apart(2, 1e-2),
    "apart": _apart(1, 1),
    "far": _apart(20, 20),
    "certain": _certain,
    "underflow": _underflow,
    "masked": _masked,
    "shifted": _shifted,
}

# --- strides: the same numbers elsewhere in memory, with NaN between the rows ---------------------


def _with_nan_around(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _slice_of_tokens(x: Tensor) -> Tensor:
    sequences, tokens, width = x.shape
    return _with_nan_around(x, (sequences, tokens + 1, width))[:, :-1].copy_(x)


def _transposed(x: Tensor) -> Tensor:
    sequences, tokens, width = x.shape
    return _with_nan_around(x, (tokens, sequences, width)).transpose(0, 1).copy_(x)


def _misaligned(x: Tensor) -> Tensor:
    sequences, tokens, width = x.shape
    return _with_nan_around(x, (sequences, tokens, width + 4))[..., 1 : width + 1].copy_(x)


LAYOUTS = {
    "contiguous": _contiguous,
    "a slice of tokens": _slice_of_tokens,
    "transposed": _transposed,
    "misaligned": _misaligned,
}

# --- upstream gradients: which parts of the backward algebra they need ----------------------------

UPSTREAM = {
    "any": lambda x, y: (x, y),
    "log p alone": lambda x, y: (x, 0 * y),
    "KL alone": lambda x, y: (0 * x, y),
    "equal": lambda x, y: (x, x),  # TDPO1: the policy's probabilities cancel
    "none": lambda x, y: (0 * x, 0 * y),
}


class Case(NamedTuple):
    dtype: torch.dtype
    vocabulary: int
    kind: str
    upstream: str
    layout: str
    ignored: float
    seed: int

    def __str__(self) -> str:
        return (
            f"V = {self.vocabulary}, rows {self.kind}, {self.layout}, {self.ignored:.0%} ignored, "
            f"upstream {self.upstream}"
        )

    @property
    def accumulation(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _labels_and_upstream(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (SEQUENCES, TOKENS)
        labels = torch.randint(0, self.vocabulary, shape, generator=generator)
        ignored = torch.rand(shape, generator=generator) < self.ignored
        # Rounded to float32, so that every backend gets the same numbers.
        upstream = torch.randn((2, *shape), generator=generator).to(self.accumulation)
        return labels, ignored, *UPSTREAM[self.upstream](upstream[0], upstream[1])

    def logits(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        labels, ignored, *upstream = self._labels_and_upstream(generator)
        shape = (2, SEQUENCES, TOKENS, self.vocabulary)
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        policy, reference = KINDS[self.kind](normal[0], normal[1], labels)
        for logits in (policy, reference):  # ignored rows must not be read
            logits[ignored] = torch.nan
        labels = labels.masked_fill(ignored, -100)
        return Inputs(policy.to(self.dtype), reference.to(self.dtype), labels, *upstream)

    def heads(self) -> HeadInputs:
        """Hidden states and weights of a policy near its reference."""
        generator = torch.Generator().manual_seed(self.seed)
        labels, ignored, *upstream = self._labels_and_upstream(generator)
        width = WIDTHS[self.vocabulary]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        hidden, weight = normal(SEQUENCES, TOKENS, width), normal(self.vocabulary, width)
        moved = hidden + 0.1 * normal(*hidden.shape)
        scale = 2 / width**0.5
        tensors = (moved, scale * weight, hidden, scale * weight)
        hidden[ignored] = moved[ignored] = torch.nan
        labels = labels.masked_fill(ignored, -100)
        return HeadInputs._make([*(x.to(self.dtype) for x in tensors), labels, *upstream])


def logit_cases(quick: bool) -> Iterator[Case]:
    """Every dtype with every size and kind of row; layouts, masks and upstream take turns."""
    vocabularies = QUICK_VOCABULARIES if quick else VOCABULARIES
    upstream = itertools.cycle(UPSTREAM)
    layouts, ignored = itertools.cycle(LAYOUTS), itertools.cycle(IGNORED * 2 + IGNORED[:1])
    seeds = itertools.count()
    for dtype, vocabulary, kind in itertools.product(LOGIT_DTYPES, vocabularies, KINDS):
        for _ in range(UPSTREAMS_OF_A_CASE):
            turn = next(upstream), next(layouts), next(ignored)
            yield Case(dtype, vocabulary, kind, *turn, next(seeds))


def head_cases(quick: bool) -> Iterator[Case]:
    vocabularies = [v for v in (QUICK_VOCABULARIES if quick else VOCABULARIES) if v in WIDTHS]
    ignored = itertools.cycle(IGNORED)
    grid = itertools.product(LOGIT_DTYPES, vocabularies, UPSTREAM)
    for seed, (dtype, vocabulary, upstream) in enumerate(grid):
        yield Case(dtype, vocabulary, "apart", upstream, "contiguous", next(ignored), seed)
