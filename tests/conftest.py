"""Which implementation a test runs on, and inputs for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
import recording
import sanitized_core
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdpo_ext.token_statistics import kernels, native

if sanitized_core.chosen():
    native.core = kernels.core = sanitized_core.SanitizedCore()

INSTRUCTION_SETS = [] if native.core is None else native.core.instruction_sets()
EMULATED = [] if sanitized_core.chosen() else emulated.roundings()
EMULATED = {emulated.backend_name(rounding): rounding for rounding in EMULATED}
CUDA = list(EMULATED)
if native.backends()["cuda"]["compiled"]:
    CUDA.append("cuda")
COMPILED = INSTRUCTION_SETS + CUDA
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="write the errors that tests measure to this JSON file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--record"):
        recording.write(Path(path))


# The files of tests that look at the last digits of numbers, and at where sums overflow.
OF_NUMBERS = {"test_edges", "test_not_finite", "test_precision", "test_ways"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what would only take time: the second rounding of the emulated CUDA kernels, in
    files that do not look at numbers."""

    def worth_its_time(item: pytest.Item) -> bool:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return "cuda-on-cpu-fma" not in parameters or item.path.stem in OF_NUMBERS

    items[:] = [item for item in items if worth_its_time(item)]


def pytest_report_header() -> str:
    return f"tdpo_ext backends: {native.backends()}"


@contextlib.contextmanager
def use_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[str]:
    if name == "fallback":
        monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", None)
    elif name in EMULATED:
        monkeypatch.setattr(
            "tdpo_ext.token_statistics.kernels.core", emulated.EmulatedCore(EMULATED[name])
        )
    elif name != "cuda":
        monkeypatch.setenv("TDPO_EXT_INSTRUCTION_SET", name)
    # On a card the tests make their tensors there.
    with torch.device("cuda") if name == "cuda" else contextlib.nullcontext():
        yield name


def parameters(names: list[str]) -> list[Any]:
    """The names, with the marker `cuda` on what needs a card."""
    marked = [pytest.param(x, marks=pytest.mark.cuda) if x == "cuda" else x for x in names]
    return marked or [pytest.param("", marks=pytest.mark.skip("not built"))]


@pytest.fixture(params=parameters([*COMPILED, "fallback"]))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set, the CUDA kernels on the CPU and on a card, and plain PyTorch."""
    with use_backend(monkeypatch, request.param) as name:
        yield name


@pytest.fixture(params=parameters(COMPILED))
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set, and the CUDA kernels on the CPU and on a card."""
    with use_backend(monkeypatch, request.param) as name:
        yield name


@pytest.fixture(params=[x for x in (*COMPILED, "fallback") if x != "cuda"])
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All of `backend` but the card: with tensors in host memory, whose values Python may see."""
    with use_backend(monkeypatch, request.param) as name:
        yield name


@pytest.fixture(params=parameters(INSTRUCTION_SETS))
def on_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set this processor has."""
    with use_backend(monkeypatch, request.param) as name:
        yield name


@pytest.fixture(params=parameters(CUDA))
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CUDA kernels, on the CPU and on a card."""
    with use_backend(monkeypatch, request.param) as name:
        yield name


@pytest.fixture
def emulated_core(monkeypatch: pytest.MonkeyPatch) -> emulated.EmulatedCore:
    """The CUDA kernels on the CPU, where the order of warps can be chosen."""
    if not emulated.compiler():
        pytest.skip("no C++ compiler on the path")
    core = emulated.EmulatedCore()
    monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", core)
    return core


@pytest.fixture
def cuda_unchecked(cuda: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, where nobody looks at the labels first."""
    if cuda in EMULATED:
        core = emulated.EmulatedCore(EMULATED[cuda], check_labels=False)
        monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", core)
    return cuda


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(20240418)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small operations: on a busy machine a second thread is waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return tensor.detach().to(torch.float64).cpu().numpy()


def relative_error(ours: Tensor, truth: NDArray[np.float64]) -> float:
    """||ours - truth|| / ||truth||, and 0 where both are 0."""
    difference = np.linalg.norm(numpy64(ours) - truth)
    return 0.0 if difference == 0 else float(difference / np.linalg.norm(truth))
