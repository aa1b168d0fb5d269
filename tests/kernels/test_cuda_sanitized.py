"""The CUDA kernels on the CPU under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from sanitizers import needs_sanitizer, run_sanitized

FILES = ["token_stats", "shapes_strides_masks", "not_finite", "cuda_kernels", "gradient_dtypes"]
FILES = [*(f"kernels/test_{name}.py" for name in FILES), "fused_head/test_fused_head.py"]
# Long in this build, or of memory that the sanitizer will not reserve.
NOT = [
    "fma",  # the other rounding: the same reads and writes
    "128256",
    "many_blocks",
    "150001",
    "40001",
    "two_to_the_31",
    "every_half_width",
    "round_to_nearest",
]


@needs_sanitizer
def test_the_kernels_touch_nothing_that_is_not_theirs():
    chosen = "cuda-on-cpu and not (" + " or ".join(NOT) + ")"
    status, output = run_sanitized(FILES, chosen)
    assert status == 0, output[-5000:]
    assert "AddressSanitizer" not in output
