"""Hypothesis: how rows, layouts and magnitudes are drawn, and how many examples.

The profile is chosen by TDPO_EXT_TEST_PROFILE: "ci" (the default) draws the same few examples
every time, and "short" fewer; "long" draws TDPO_EXT_TEST_EXAMPLES (20000) new ones for each
property and backend, and keeps what failed in .hypothesis.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

_COMMON = {
    "deadline": None,
    # The fixture `backend` is the same for all examples of a test.
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
_SAME = {**_COMMON, "derandomize": True, "database": None}
settings.register_profile("ci", max_examples=50, **_SAME)
settings.register_profile("short", max_examples=8, **_SAME)
settings.register_profile(
    "long", max_examples=int(os.environ.get("TDPO_EXT_TEST_EXAMPLES", "20000")), **_COMMON
)
settings.load_profile(os.environ.get("TDPO_EXT_TEST_PROFILE", "ci"))

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
WIDE_DTYPES = st.sampled_from([torch.float32, torch.float64])
# One below, at and above a vector of each width, and anything else.
VOCABULARIES = st.one_of(
    st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 257, 511, 513, 1025, 2049])
)
SEEDS = st.integers(0, 2**31)


class Rows(NamedTuple):
    policy: Tensor
    """[N, V]"""
    reference: Tensor
    labels: Tensor
    """[N], some -100"""
    upstream: Tensor
    """[2, N]: of log p(y) and of the KL"""


@st.composite
def rows(
    draw: st.DrawFn,
    dtypes: st.SearchStrategy[torch.dtype] = DTYPES,
    *,
    extremes: bool = False,
    least_rows: int = 0,
    least_vocabulary: int = 1,
) -> Rows:
    """Rows of ordinary logits; with ``extremes`` some entries are nearly what a dtype can hold at
    most, infinitely small, or tiny. On the CPU, also where another device is the default."""
    dtype = draw(dtypes)
    count, vocabulary = draw(st.integers(least_rows, 6)), draw(VOCABULARIES)
    vocabulary = max(vocabulary, least_vocabulary)
    scale = draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0]))
    gap = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0, 60.0]))
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    reference = scale * normal(count, vocabulary)
    policy = reference + gap * normal(count, vocabulary)
    policy, reference = policy.to(dtype), reference.to(dtype)
    labels = torch.randint(0, vocabulary, (count,), generator=generator, device="cpu")
    if extremes and count:
        special = draw(st.lists(st.tuples(SEEDS, SEEDS, st.sampled_from(_SPECIAL)), max_size=8))
        for row, entry, value in special:
            side = policy if row % 3 else reference
            number = value if isinstance(value, float) else getattr(torch.finfo(dtype), value)
            if value in ("max", "min") and dtype != torch.float16:
                number /= 2**14  # so that no sum of gaps overflows
            side[row % count, entry % vocabulary] = number
    ignored = torch.rand(count, generator=generator, device="cpu")
    labels[ignored < draw(st.sampled_from([0.0, 0.5]))] = -100
    upstream = normal(2, count).to(torch.float64 if dtype == torch.float64 else torch.float32)
    kind = draw(st.sampled_from(["any", "margin", "kl", "equal", "none"]))
    upstream[0] *= kind not in ("kl", "none")
    upstream[1] *= kind not in ("margin", "none")
    if kind == "equal":
        upstream[1] = upstream[0]
    return Rows(policy, reference, labels, upstream)


_SPECIAL: list[float | str] = ["max", "min", "tiny", "smallest_normal", float("-inf"), 0.0, 80.0]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Elements before the first row, between rows, before each row, and every how manieth row."""
    return draw(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 3))
    )


def laid_out(x: Tensor, layout: tuple[int, int, int, int]) -> Tensor:
    """The same numbers elsewhere in memory, with NaN around them."""
    offset, behind, before, step = layout
    count, width = x.shape
    pitch = before + width + behind
    memory = torch.full((offset + count * step * pitch,), torch.nan, dtype=x.dtype, device=x.device)
    there = memory[offset:].view(count * step, pitch)[::step, before : before + width]
    return there.copy_(x)
