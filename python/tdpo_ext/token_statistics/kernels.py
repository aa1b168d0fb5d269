"""Calls of the compiled core: tensors become the core's structs, which hold addresses.

Where no compiled kernels serve a device, plain PyTorch (``fallback``) does the same. Only
``add_tile`` and ``finish`` have no plain version: ask ``serves`` first. The public functions have
checked all arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.distributed import IGNORED, Shard, gather_logits, gather_records
from tdpo_ext.token_statistics import fallback
from tdpo_ext.token_statistics.native import (
    core as core,
)
from tdpo_ext.token_statistics.native import (
    core_absent_because,
    cuda_absent_because,
    instruction_set,
)

_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in checks.LOGIT_DTYPES}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _absent_because(device: torch.device) -> str:
    if device.type == "cpu":
        return core_absent_because if core is None else ""
    if device.type == "cuda":
        return cuda_absent_because(device)
    return "no compiled kernel serves this device"


def serves(device: torch.device) -> bool:
    """Whether compiled kernels serve a device."""
    return core is not None and not _absent_because(device)


def warn_of_fallback(device: torch.device) -> None:
    fallback.warn_once(device.type, _absent_because(device) or core_absent_because)


def run(name: str, device: torch.device, work: Any, *workspace: int) -> Any:
    """Call a function of the core for tensors on a device: on the CPU with an instruction set and a
    number of threads, on CUDA on the caller's stream and with the address of a workspace."""
    if device.type == "cpu":
        return getattr(core, name)(instruction_set(core), torch.get_num_threads(), work)
    # torch.cuda.current_stream makes an object, which takes as long as the launch of a kernel.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    return getattr(core, f"cuda_{name}")(device.index, stream, work, *workspace)


# --- the core's structs: each field is described in csrc/token_stats.h ----------------------------


def dtype_code(tensor: Tensor) -> int:
    code: int = core.DTYPES[_DTYPE_NAMES[tensor.dtype]]
    return code


def row_layout(logits: Tensor) -> Any:
    """The leading dimensions, merged where one stride serves several."""
    if logits.is_contiguous():
        vocabulary = logits.shape[-1]
        rows = logits.numel() // vocabulary
        return core.RowLayout(dims=1, sizes=(rows,), strides=(vocabulary,))
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > core.MOST_LEADING_DIMENSIONS:
        raise ValueError(
            f"logits may have at most {core.MOST_LEADING_DIMENSIONS} leading dimensions that "
            f"strides keep apart, got shape {list(logits.shape)} with strides "
            f"{list(logits.stride())}; call .contiguous()"
        )
    return core.RowLayout(dims=len(sizes), sizes=sizes, strides=strides)


def _logits(logits: Tensor) -> Any:
    return core.Logits(data=logits.data_ptr(), rows=row_layout(logits))


class Sequences(NamedTuple):
    """Which rows form a sequence, and whether their labels have to be shifted along it."""

    number: int = 0
    length: int = 0
    cu_seqlens: Tensor | None = None
    shift: bool = False


_NO_SEQUENCES = Sequences()


def problem_of(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    sequences: Sequences = _NO_SEQUENCES,
) -> Any:
    if policy_logits.device.type == "cuda":
        checks.check_cuda_vocabulary(policy_logits, core.LARGEST_CUDA_VOCABULARY)
    return core.Problem(
        dtype=dtype_code(policy_logits),
        rows=labels.numel(),
        vocabulary=policy_logits.shape[-1],
        ignore_index=ignore_index,
        policy=_logits(policy_logits),
        reference=_logits(reference_logits),
        labels=labels.data_ptr(),
        shift=sequences.shift,
        sequences=sequences_of_core(sequences),
    )


def sequences_of_core(sequences: Sequences) -> Any:
    """The core's ``Sequences``."""
    bounds = sequences.cu_seqlens
    return core.Sequences(
        count=sequences.number,
        length=sequences.length,
        bounds=0 if bounds is None else bounds.data_ptr(),
    )


def _outputs(outputs: Outputs) -> Any:
    policy_logps, reference_logps, forward_kl, normalizers = outputs
    return core.Outputs(
        policy_logps=policy_logps.data_ptr(),
        reference_logps=reference_logps.data_ptr(),
        forward_kl=forward_kl.data_ptr(),
        normalizers=normalizers.data_ptr(),
        **NO_DIVERGENCES,
    )


NO_DIVERGENCES = {"reverse_kl": 0, "policy_entropy": 0, "reference_entropy": 0}
"""The fields of the core's ``Outputs`` that ``divergence_kernels`` alone fills."""


def run_over_logits(
    name: str, device: torch.device, work: Any, bytes_of: str = "cuda_forward_workspace_bytes"
) -> Any:
    """``run`` with the workspace that forward needs on CUDA, from torch's allocator. ``bytes_of``
    is the core's function that says its size."""
    if device.type == "cpu":
        return run(name, device, work)
    size = getattr(core, bytes_of)(work.problem)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    return run(name, device, work, workspace.data_ptr())


# --- the calls ------------------------------------------------------------------------------------


def with_dense_rows(logits: Tensor) -> Tensor:
    """Logits that a kernel can read. The public functions have checked the tensor that they were
    given, but a subclass, or PyTorch's own lazy zeros, may hand the op another one."""
    dense = logits.stride(-1) == 1 or logits.shape[-1] == 1
    return logits if dense else logits.contiguous()


def contiguous_int64(labels: Tensor) -> Tensor:
    return labels.to(torch.int64).contiguous()


def empty_outputs(like: Tensor, shape: torch.Size) -> Outputs:
    """policy_logps, reference_logps, forward_kl ``[...]`` and normalizers ``[..., 8]``."""
    dtype = fallback.accumulation_dtype(like)
    logps, reference_logps, kl = (like.new_empty(shape, dtype=dtype) for _ in range(3))
    return logps, reference_logps, kl, like.new_empty((*shape, fallback.NORMALIZERS), dtype=dtype)


def token_stats(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> Outputs:
    """The statistics of whole rows. On the CPU a label outside the vocabulary raises IndexError."""
    device, vocabulary = policy_logits.device, policy_logits.shape[-1]
    if not serves(device):
        warn_of_fallback(device)
        if device.type == "cpu":
            checks.check_label_range(labels, vocabulary, ignore_index)
        return fallback.forward(policy_logits, reference_logits, labels, ignore_index)
    outputs = empty_outputs(policy_logits, labels.shape)
    labels = contiguous_int64(labels)
    policy_logits, reference_logits = map(with_dense_rows, (policy_logits, reference_logits))
    work = core.Forward(
        problem=problem_of(policy_logits, reference_logits, labels, ignore_index),
        outputs=_outputs(outputs),
        unlabelled=False,
    )
    wrong_label = run_over_logits("token_stats_forward", device, work)
    if device.type == "cpu" and wrong_label >= 0:
        label = int(labels.view(-1)[wrong_label])
        raise checks.label_range_error(label, vocabulary, ignore_index)
    return outputs


def empty_records(rows: int, like: Tensor, divergences: bool = False) -> Tensor:
    """Records ``[rows, 9]`` (``[rows, 13]`` with divergences) to which no vocabulary entry has been
    added (LabelledStats in csrc/vocab_stats.h)."""
    width = core.DIVERGENCE_RECORD if divergences else core.RECORD
    records = like.new_zeros(rows, width, dtype=fallback.accumulation_dtype(like))
    records[:, :2] = -torch.inf  # maxima
    records[:, -2:] = -torch.inf  # the label's logits
    return records


def add_tile(records: Tensor, policy_tile: Tensor, reference_tile: Tensor, labels: Tensor) -> None:
    """Add the entries of a tile ``[..., columns]`` to ``records``, of either width; labels count
    from the tile's first column."""
    problem = problem_of(policy_tile, reference_tile, labels, IGNORED)
    divergences = records.shape[-1] == core.DIVERGENCE_RECORD
    work = core.Tile(problem=problem, records=records.data_ptr(), divergences=divergences)
    bytes_of = "cuda_divergences_workspace_bytes" if divergences else "cuda_forward_workspace_bytes"
    run_over_logits("token_stats_tile", records.device, work, bytes_of)


def finish(records: Tensor, labels: Tensor, vocabulary: int, ignore_index: int) -> Outputs:
    """Outputs ``[rows]`` from records ``[sets, rows, 9]``; NaN where a label lies outside the
    vocabulary."""
    outputs = empty_outputs(records, labels.shape)
    run_finish(records, labels, vocabulary, ignore_index, _outputs(outputs))
    return outputs


def run_finish(
    records: Tensor,
    labels: Tensor,
    vocabulary: int,
    ignore_index: int,
    outputs: Any,
    unlabelled: bool = False,
) -> None:
    """Write the core's ``Outputs`` from records."""
    work = core.Finish(
        dtype=dtype_code(records),
        rows=labels.numel(),
        vocabulary=vocabulary,
        ignore_index=ignore_index,
        labels=labels.data_ptr(),
        sets=records.shape[0],
        records=records.data_ptr(),
        outputs=outputs,
        unlabelled=unlabelled,
    )
    run("token_stats_finish", records.device, work)


def token_stats_of_shard(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    *shard: Any,
) -> Outputs:
    """As ``token_stats``, of rows whose vocabulary is sharded over processes. Labels count from the
    first entry of the whole vocabulary."""
    device, of = policy_logits.device, Shard(*shard)
    if device.type == "cpu":
        checks.check_label_range(labels, of.total, ignore_index)
    labels = contiguous_int64(labels)
    if not serves(device):
        warn_of_fallback(device)
        whole = gather_logits(policy_logits, of), gather_logits(reference_logits, of)
        return fallback.forward(*whole, labels, ignore_index)
    records = empty_records(labels.numel(), policy_logits)
    add_tile(records, policy_logits, reference_logits, of.own_labels(labels, ignore_index))
    return finish_of_shards(records, labels, ignore_index, policy_logits.shape[-1], of)


def finish_of_shards(
    records: Tensor, labels: Tensor, ignore_index: int, width: int, shard: Shard
) -> Outputs:
    """Outputs ``[...]`` from this process's records ``[N, 9]`` and those of the others."""
    gathered, agreed = gather_records(records, labels, width, shard)
    with_header = labels_with_header(labels, ignore_index)
    outputs = finish(gathered, with_header, shard.total, ignore_index)
    logps, reference_logps, kl, normalizers = without_header(outputs, agreed, labels.shape)
    return logps, reference_logps, kl, normalizers


def labels_with_header(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels ``[N + 1]`` for records of shards, behind which a header lies. As a row that is
    ignored it need not be cut off, which would copy all records."""
    labels = labels.to(torch.int64)  # int32 may not hold ignore_index
    return torch.cat([labels.reshape(-1), labels.new_full((1,), ignore_index)])


def without_header(
    outputs: tuple[Tensor, ...], agreed: Tensor, shape: torch.Size
) -> Iterator[Tensor]:
    """Outputs ``[N + 1]`` without the header's row; NaN where the processes do not agree."""
    return (torch.where(agreed, x[:-1], torch.nan).view(shape + x.shape[1:]) for x in outputs)


def write_gradient(
    gradient: Tensor,
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    grad_logps: Tensor,
    grad_kl: Tensor,
    ignore_index: int = IGNORED,
) -> None:
    """dz = g_m (onehot(y) - p) + g_k (p - q) of whole rows, or of a tile, from whose first column
    labels then count.

    ``gradient`` has the logits' dtype and may be the policy's logits or the reference's: each entry
    of both is read before its gradient is stored. Where logits are float32 it may instead be
    bfloat16 or float16, in memory of its own; it is then rounded once, to nearest.
    """
    if not serves(gradient.device):
        arguments = (labels, normalizers, grad_logps, grad_kl, ignore_index)
        fallback.backward(gradient, policy_logits, reference_logits, *arguments)
        return
    # Upstream gradients are often expanded scalars, whose rows have no addresses of their own.
    grad_logps, grad_kl = grad_logps.contiguous(), grad_kl.contiguous()
    upstream = core.Upstream(
        policy_logps=grad_logps.data_ptr(),
        forward_kl=grad_kl.data_ptr(),
        **NO_PAIRS,
        **NO_DIVERGENCE_GRADIENTS,
    )
    tensors = policy_logits, reference_logits, labels, normalizers
    run_backward(gradient, *tensors, upstream, ignore_index)


NO_DIVERGENCE_GRADIENTS = {"reverse_kl": 0, "policy_entropy": 0}
NO_PAIRS = {
    "slopes": 0,
    "loss": 0,
    "loss_stride": 0,
    "chosen_kl_ratio": 0.0,
    "rejected_kl_ratio": 0.0,
}


def run_backward(
    gradient: Tensor,
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    upstream: Any,
    ignore_index: int,
    sequences: Sequences = _NO_SEQUENCES,
) -> None:
    """Write the gradient that the core's ``Upstream`` gives."""
    labels, normalizers = contiguous_int64(labels), normalizers.contiguous()
    policy_logits, reference_logits = map(with_dense_rows, (policy_logits, reference_logits))
    work = core.Backward(
        problem=problem_of(policy_logits, reference_logits, labels, ignore_index, sequences),
        normalizers=normalizers.data_ptr(),
        upstream=upstream,
        gradient_dtype=dtype_code(gradient),
        gradient=gradient.data_ptr(),
        gradient_rows=row_layout(gradient),
    )
    run("token_stats_backward", gradient.device, work)
