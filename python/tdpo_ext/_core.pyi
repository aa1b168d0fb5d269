"""The compiled kernels; ``tdpo_ext.token_statistics.kernels`` calls.

Addresses are integers. Sizes and strides (in elements) describe the rows of ``[..., V]`` tensors,
merged to at most 4 leading dimensions.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    openmp: bool
    cuda: bool
    no_cuda_because: str

class CudaRuntime(TypedDict):
    runtime_version: int
    driver_version: int
    devices: int
    architectures: str
    error: str

def token_stats_forward(
    instruction_set: str,
    threads: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    policy: int,
    policy_sizes: list[int],
    policy_strides: list[int],
    reference: int,
    reference_sizes: list[int],
    reference_strides: list[int],
    labels: int,
    policy_logps: int,
    reference_logps: int,
    forward_kl: int,
    normalizers: int,
) -> int:
    """-1, or the first row whose label is neither valid nor ignored; nothing is written then."""

def token_stats_tile(
    instruction_set: str,
    threads: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    policy: int,
    policy_sizes: list[int],
    policy_strides: list[int],
    reference: int,
    reference_sizes: list[int],
    reference_strides: list[int],
    labels: int,
    records: int,
) -> None:
    """Merge a tile's records into ``records``, nine numbers a row; labels count from the tile."""

def token_stats_finish(
    instruction_set: str,
    threads: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    labels: int,
    sets: int,
    records: int,
    policy_logps: int,
    reference_logps: int,
    forward_kl: int,
    normalizers: int,
) -> None:
    """Outputs from ``sets`` sets of records; NaN for labels outside the vocabulary."""

def token_stats_backward(
    instruction_set: str,
    threads: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    policy: int,
    policy_sizes: list[int],
    policy_strides: list[int],
    reference: int,
    reference_sizes: list[int],
    reference_strides: list[int],
    labels: int,
    normalizers: int,
    grad_policy_logps: int,
    grad_forward_kl: int,
    gradient_dtype: int,
    gradient: int,
    gradient_sizes: list[int],
    gradient_strides: list[int],
) -> None:
    """The gradient has the logits' dtype; half-width ones there are of float32 logits too."""

def instruction_sets() -> list[str]:
    """Those with kernels that this processor can run, the best last."""

def build_info() -> BuildInfo: ...

# Only where build_info()["cuda"]. Addresses are the device's; calls launch and return.

def cuda_forward_workspace_bytes(dtype: int, rows: int, vocabulary: int) -> int:
    """Device memory that forward needs beside its outputs."""

def cuda_token_stats_forward(
    device: int,
    stream: int,
    workspace: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    policy: int,
    policy_sizes: list[int],
    policy_strides: list[int],
    reference: int,
    reference_sizes: list[int],
    reference_strides: list[int],
    labels: int,
    policy_logps: int,
    reference_logps: int,
    forward_kl: int,
    normalizers: int,
) -> None: ...
def cuda_token_stats_tile(
    device: int,
    stream: int,
    workspace: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    policy: int,
    policy_sizes: list[int],
    policy_strides: list[int],
    reference: int,
    reference_sizes: list[int],
    reference_strides: list[int],
    labels: int,
    records: int,
) -> None: ...
def cuda_token_stats_finish(
    device: int,
    stream: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    labels: int,
    sets: int,
    records: int,
    policy_logps: int,
    reference_logps: int,
    forward_kl: int,
    normalizers: int,
) -> None: ...
def cuda_token_stats_backward(
    device: int,
    stream: int,
    dtype: int,
    rows: int,
    vocabulary: int,
    ignore_index: int,
    policy: int,
    policy_sizes: list[int],
    policy_strides: list[int],
    reference: int,
    reference_sizes: list[int],
    reference_strides: list[int],
    labels: int,
    normalizers: int,
    grad_policy_logps: int,
    grad_forward_kl: int,
    gradient_dtype: int,
    gradient: int,
    gradient_sizes: list[int],
    gradient_strides: list[int],
) -> None: ...
def cuda_runtime() -> CudaRuntime: ...
def cuda_cannot_run_because(device: int) -> str: ...
