"""Which implementation a test runs on, and inputs for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import emulated
from tdpo_ext import native

INSTRUCTION_SETS = [] if native.core is None else native.core.instruction_sets()
EMULATED = ["cuda-on-cpu"] if emulated.compiler() else []
COMPILED = INSTRUCTION_SETS + EMULATED
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pytest_report_header() -> str:
    return f"tdpo_ext backends: {native.backends()}"


def use_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> str:
    if name == "fallback":
        monkeypatch.setattr("tdpo_ext.ops.core", None)
    elif name == "cuda-on-cpu":
        monkeypatch.setattr("tdpo_ext.ops.core", emulated.EmulatedCore())
    else:
        monkeypatch.setenv("TDPO_EXT_INSTRUCTION_SET", name)
    return name


@pytest.fixture(params=[*COMPILED, "fallback"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set this processor has, the CUDA kernels on the CPU, and plain PyTorch."""
    return use_backend(monkeypatch, request.param)


@pytest.fixture(params=COMPILED or [pytest.param("", marks=pytest.mark.skip("not built"))])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set this processor has, and the CUDA kernels on the CPU."""
    return use_backend(monkeypatch, request.param)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(20240418)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pair_of_logits(
    *shape: int, scale: float = 2.0, gap: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Reference logits of a standard deviation, and a policy that differs from them by a gap."""
    reference = torch.randn(*shape, dtype=torch.float64) * scale
    policy = reference + torch.randn(*shape, dtype=torch.float64) * gap
    return policy.to(dtype), reference.to(dtype)


def labels_for(logits: Tensor, ignored: float = 0.0) -> Tensor:
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    return labels.masked_fill(torch.rand(labels.shape) < ignored, -100)


def numpy64(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().to(torch.float64).numpy()


def relative_error(ours: Tensor, truth: NDArray[np.float64]) -> float:
    """||ours - truth|| / ||truth||, and 0 where both are 0."""
    difference = np.linalg.norm(numpy64(ours) - truth)
    return 0.0 if difference == 0 else float(difference / np.linalg.norm(truth))
