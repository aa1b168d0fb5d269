"""Fixtures: which implementation a test runs on, seeds, numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest
import recording
import torch
from backends import COMPILED, CUDA, EMULATED, INSTRUCTION_SETS, parameters, use_backend

from tdpo_ext.token_statistics import native

# So that a failing comparison in these shows its values.
pytest.register_assert_rewrite("attached_models", "head_checks", "logit_checks", "trainer_checks")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="write the errors that tests measure to this JSON file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--record"):
        recording.write(Path(path))


# The files of tests that look at the last digits of numbers, and at where sums overflow.
OF_NUMBERS = {
    "test_shapes_strides_masks",
    "test_not_finite",
    "test_loss_op",
    "test_precision",
    "test_rows_that_change_path",
    "test_token_divergences",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what would only take time: the second rounding of the emulated CUDA kernels, in
    files that do not look at numbers."""

    def worth_its_time(item: pytest.Item) -> bool:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return "cuda-on-cpu-fma" not in parameters or item.path.stem in OF_NUMBERS

    items[:] = [item for item in items if worth_its_time(item)]


def pytest_report_header() -> str:
    return f"tdpo_ext backends: {native.backends()}"


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
