"""The compiled kernels; ``tdpo_ext.token_statistics.kernels`` calls them.

The classes are the structs of ``csrc/token_stats.h``, which describes their fields. All fields are
given by name. A field for a tensor is its address, an integer; strides count elements.
"""

from collections.abc import Sequence
from typing import TypedDict

NORMALIZERS: int
"""Numbers of a row that forward saves for backward."""
RECORD: int
"""Numbers of a row in the records of tiles."""
CUDA_BLOCK_WARPS: int
"""Warps in a block of the CUDA kernels."""
LARGEST_CUDA_VOCABULARY: int
"""The most vocabulary entries that the CUDA kernels take."""
MOST_LEADING_DIMENSIONS: int
"""The most dimensions of a RowLayout."""
DTYPES: dict[str, int]
"""The values of ``dtype`` and ``gradient_dtype`` by PyTorch's names."""

class RowLayout:
    """Where the rows of a ``[..., V]`` tensor start."""

    def __init__(self, *, dims: int, sizes: Sequence[int], strides: Sequence[int]) -> None: ...
    @property
    def dims(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int, int, int]: ...
    @property
    def strides(self) -> tuple[int, int, int, int]: ...

class Logits:
    def __init__(self, *, data: int, rows: RowLayout) -> None: ...
    @property
    def data(self) -> int: ...
    @property
    def rows(self) -> RowLayout: ...

class Problem:
    """What every pass over logits takes."""

    def __init__(
        self,
        *,
        dtype: int,
        rows: int,
        vocabulary: int,
        ignore_index: int,
        policy: Logits,
        reference: Logits,
        labels: int,
    ) -> None: ...
    @property
    def dtype(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def ignore_index(self) -> int: ...
    @property
    def policy(self) -> Logits: ...
    @property
    def reference(self) -> Logits: ...
    @property
    def labels(self) -> int: ...

class Outputs:
    def __init__(
        self, *, policy_logps: int, reference_logps: int, forward_kl: int, normalizers: int
    ) -> None: ...
    @property
    def policy_logps(self) -> int: ...
    @property
    def reference_logps(self) -> int: ...
    @property
    def forward_kl(self) -> int: ...
    @property
    def normalizers(self) -> int: ...

class Forward:
    """Forward over whole rows."""

    def __init__(self, *, problem: Problem, outputs: Outputs) -> None: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def outputs(self) -> Outputs: ...

class Tile:
    """Forward over a tile of the vocabulary."""

    def __init__(self, *, problem: Problem, records: int) -> None: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def records(self) -> int: ...

class Finish:
    """Outputs from the records of all tiles."""

    def __init__(
        self,
        *,
        dtype: int,
        rows: int,
        vocabulary: int,
        ignore_index: int,
        labels: int,
        sets: int,
        records: int,
        outputs: Outputs,
    ) -> None: ...
    @property
    def dtype(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def ignore_index(self) -> int: ...
    @property
    def labels(self) -> int: ...
    @property
    def sets(self) -> int: ...
    @property
    def records(self) -> int: ...
    @property
    def outputs(self) -> Outputs: ...

class Backward:
    """The gradient of whole rows, or of a tile."""

    def __init__(
        self,
        *,
        problem: Problem,
        normalizers: int,
        grad_policy_logps: int,
        grad_forward_kl: int,
        gradient_dtype: int,
        gradient: int,
        gradient_rows: RowLayout,
    ) -> None: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def normalizers(self) -> int: ...
    @property
    def grad_policy_logps(self) -> int: ...
    @property
    def grad_forward_kl(self) -> int: ...
    @property
    def gradient_dtype(self) -> int: ...
    @property
    def gradient(self) -> int: ...
    @property
    def gradient_rows(self) -> RowLayout: ...

def token_stats_forward(instruction_set: str, threads: int, work: Forward) -> int:
    """-1, or the first row whose label is neither valid nor ignored; then nothing is written."""

def token_stats_tile(instruction_set: str, threads: int, work: Tile) -> None: ...
def token_stats_finish(instruction_set: str, threads: int, work: Finish) -> None: ...
def token_stats_backward(instruction_set: str, threads: int, work: Backward) -> None: ...
def instruction_sets() -> list[str]:
    """Those with kernels that this processor can run, the best last."""

class BuildInfo(TypedDict):
    compiler: str
    openmp: bool
    cuda: bool
    no_cuda_because: str

def build_info() -> BuildInfo: ...

# Only where build_info()["cuda"]. Addresses are the device's; calls launch and return. `stream` is
# a cudaStream_t, `workspace` the address of as many bytes as cuda_forward_workspace_bytes says.

def cuda_forward_workspace_bytes(problem: Problem) -> int: ...
def cuda_token_stats_forward(device: int, stream: int, work: Forward, workspace: int) -> None: ...
def cuda_token_stats_tile(device: int, stream: int, work: Tile, workspace: int) -> None: ...
def cuda_token_stats_finish(device: int, stream: int, work: Finish) -> None: ...
def cuda_token_stats_backward(device: int, stream: int, work: Backward) -> None: ...

class CudaRuntime(TypedDict):
    runtime_version: int
    driver_version: int
    devices: int
    architectures: str
    error: str

def cuda_runtime() -> CudaRuntime: ...
def cuda_cannot_run_because(device: int) -> str: ...
