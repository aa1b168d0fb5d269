"""The implementations that tests run on, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import sanitized_core
import torch

from tdpo_ext.token_statistics import kernels, native

if sanitized_core.chosen():
    native.core = kernels.core = sanitized_core.SanitizedCore()

INSTRUCTION_SETS = [] if native.core is None else native.core.instruction_sets()
ROUNDINGS = [] if sanitized_core.chosen() else emulated.roundings()
EMULATED = {emulated.backend_name(rounding): rounding for rounding in ROUNDINGS}
CUDA = list(EMULATED)
if native.backends()["cuda"]["compiled"]:
    CUDA.append("cuda")
COMPILED = INSTRUCTION_SETS + CUDA


@contextlib.contextmanager
def use_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[str]:
    if name == "fallback":
        monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", None)
    elif name in EMULATED:
        core = emulated.EmulatedCore(EMULATED[name])
        monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", core)
    elif name != "cuda":
        monkeypatch.setenv("TDPO_EXT_INSTRUCTION_SET", name)
    # On a card the tests make their tensors there.
    with torch.device("cuda") if name == "cuda" else contextlib.nullcontext():
        yield name


def parameters(names: list[str]) -> list[Any]:
    """The names, with the marker `cuda` on what needs a card."""
    marked = [pytest.param(x, marks=pytest.mark.cuda) if x == "cuda" else x for x in names]
    return marked or [pytest.param("", marks=pytest.mark.skip("not built"))]
