"""The compiled kernels; ``tdpo_ext.ops`` checks and calls.

Addresses are integers. Sizes and strides (in elements) describe the rows of ``[..., V]`` tensors,
merged to at most 4 leading dimensions.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    openmp: bool

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
    gradient: int,
    gradient_sizes: list[int],
    gradient_strides: list[int],
) -> None: ...
def instruction_sets() -> list[str]:
    """Those with kernels that this processor can run, the best last."""

def build_info() -> BuildInfo: ...
