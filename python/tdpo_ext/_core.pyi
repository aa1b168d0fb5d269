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
DIVERGENCE_NORMALIZERS: int
"""Numbers of a row that forward saves for backward, with divergences."""
DIVERGENCE_RECORD: int
"""Numbers of a row in the records of tiles, with divergences."""
CUDA_BLOCK_WARPS: int
"""Warps in a block of the CUDA kernels."""
LARGEST_CUDA_VOCABULARY: int
"""The most vocabulary entries that the CUDA kernels take."""
MOST_LEADING_DIMENSIONS: int
"""The most dimensions of a RowLayout."""
PAIR_QUANTITIES: int
"""Numbers of a pair in LossForward.pairs."""
ALL_LABELS_VALID: int
"""What forward on the CPU returns if nothing is wrong."""
BOUNDS_NOT_USABLE: int
"""What it returns if the bounds of sequences do not ascend from 0 to the number of rows."""
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

class Sequences:
    """Which rows form a sequence."""

    def __init__(self, *, count: int, length: int, bounds: int) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def bounds(self) -> int: ...

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
        shift: int,
        sequences: Sequences,
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
    @property
    def shift(self) -> int: ...
    @property
    def sequences(self) -> Sequences: ...

class Outputs:
    def __init__(
        self,
        *,
        policy_logps: int,
        reference_logps: int,
        forward_kl: int,
        normalizers: int,
        reverse_kl: int,
        policy_entropy: int,
        reference_entropy: int,
    ) -> None: ...
    @property
    def policy_logps(self) -> int: ...
    @property
    def reference_logps(self) -> int: ...
    @property
    def forward_kl(self) -> int: ...
    @property
    def normalizers(self) -> int: ...
    @property
    def reverse_kl(self) -> int: ...
    @property
    def policy_entropy(self) -> int: ...
    @property
    def reference_entropy(self) -> int: ...

class Forward:
    """Forward over whole rows."""

    def __init__(self, *, problem: Problem, outputs: Outputs, unlabelled: int) -> None: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def outputs(self) -> Outputs: ...
    @property
    def unlabelled(self) -> int: ...

class Tile:
    """Forward over a tile of the vocabulary."""

    def __init__(self, *, problem: Problem, records: int, divergences: int) -> None: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def records(self) -> int: ...
    @property
    def divergences(self) -> int: ...

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
        unlabelled: int,
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
    @property
    def unlabelled(self) -> int: ...

class LossOptions:
    def __init__(
        self,
        *,
        beta: float,
        alpha: float,
        label_smoothing: float,
        tdpo1: int,
        average: int,
        reduction: int,
    ) -> None: ...
    @property
    def beta(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def tdpo1(self) -> int: ...
    @property
    def average(self) -> int: ...
    @property
    def reduction(self) -> int: ...

class LossForward:
    """From logits, or the statistics of rows, to the losses of pairs."""

    def __init__(
        self,
        *,
        problem: Problem,
        options: LossOptions,
        statistics: Outputs,
        slopes: int,
        pairs: int,
        loss: int,
    ) -> None: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def options(self) -> LossOptions: ...
    @property
    def statistics(self) -> Outputs: ...
    @property
    def slopes(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def loss(self) -> int: ...

class Upstream:
    """Upstream gradients, of each row or of the loss."""

    def __init__(
        self,
        *,
        policy_logps: int,
        forward_kl: int,
        slopes: int,
        loss: int,
        loss_stride: int,
        chosen_kl_ratio: float,
        rejected_kl_ratio: float,
        reverse_kl: int,
        policy_entropy: int,
    ) -> None: ...
    @property
    def policy_logps(self) -> int: ...
    @property
    def forward_kl(self) -> int: ...
    @property
    def slopes(self) -> int: ...
    @property
    def loss(self) -> int: ...
    @property
    def loss_stride(self) -> int: ...
    @property
    def chosen_kl_ratio(self) -> float: ...
    @property
    def rejected_kl_ratio(self) -> float: ...
    @property
    def reverse_kl(self) -> int: ...
    @property
    def policy_entropy(self) -> int: ...

class Backward:
    """The gradient of whole rows, or of a tile."""

    def __init__(
        self,
        *,
        problem: Problem,
        normalizers: int,
        upstream: Upstream,
        gradient_dtype: int,
        gradient: int,
        gradient_rows: RowLayout,
    ) -> None: ...
    @property
    def problem(self) -> Problem: ...
    @property
    def normalizers(self) -> int: ...
    @property
    def upstream(self) -> Upstream: ...
    @property
    def gradient_dtype(self) -> int: ...
    @property
    def gradient(self) -> int: ...
    @property
    def gradient_rows(self) -> RowLayout: ...

def token_stats_forward(instruction_set: str, threads: int, work: Forward) -> int:
    """ALL_LABELS_VALID, or the first row whose label is neither valid nor ignored.

    In that case nothing is written.
    """

def token_stats_tile(instruction_set: str, threads: int, work: Tile) -> None: ...
def token_stats_finish(instruction_set: str, threads: int, work: Finish) -> None: ...
def token_stats_backward(instruction_set: str, threads: int, work: Backward) -> None: ...
def tdpo_loss_forward(instruction_set: str, threads: int, work: LossForward) -> int:
    """ALL_LABELS_VALID, BOUNDS_NOT_USABLE, or as token_stats_forward."""

def tdpo_loss_finish(instruction_set: str, threads: int, work: LossForward) -> int:
    """The same from statistics; it does not look at labels."""

def instruction_sets() -> list[str]:
    """Those with kernels that this processor can run, the best last."""

class BuildInfo(TypedDict):
    compiler: str
    openmp: str  # the file of the OpenMP runtime that torch has loaded; "" if there is none
    cuda: bool
    no_cuda_because: str

def build_info() -> BuildInfo: ...

# Only where build_info()["cuda"]. Addresses are the device's; calls launch and return. `stream` is
# a cudaStream_t, `workspace` the address of as many bytes as cuda_forward_workspace_bytes says.

def cuda_forward_workspace_bytes(problem: Problem) -> int: ...
def cuda_divergences_workspace_bytes(problem: Problem) -> int: ...
def cuda_token_stats_forward(device: int, stream: int, work: Forward, workspace: int) -> None: ...
def cuda_token_stats_tile(device: int, stream: int, work: Tile, workspace: int) -> None: ...
def cuda_token_stats_finish(device: int, stream: int, work: Finish) -> None: ...
def cuda_token_stats_backward(device: int, stream: int, work: Backward) -> None: ...
def cuda_loss_workspace_bytes(problem: Problem) -> int: ...
def cuda_tdpo_loss_forward(device: int, stream: int, work: LossForward, workspace: int) -> None: ...
def cuda_loss_finish_workspace_bytes(problem: Problem) -> int: ...
def cuda_tdpo_loss_finish(device: int, stream: int, work: LossForward, workspace: int) -> None: ...

class CudaRuntime(TypedDict):
    runtime_version: int
    driver_version: int
    devices: int
    architectures: str
    error: str

def cuda_runtime() -> CudaRuntime: ...
def cuda_cannot_run_because(device: int) -> str: ...
