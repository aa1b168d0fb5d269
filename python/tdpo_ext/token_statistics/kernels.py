"""Calls of the compiled core: here tensors become integers. Where it is absent, plain PyTorch.

Arguments have been checked. ``add_tile`` has no plain version: ask ``serves`` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.distributed import IGNORED, Shard, gather_logits, gather_records
from tdpo_ext.token_statistics import fallback
from tdpo_ext.token_statistics.native import (
    core,
    core_absent_because,
    cuda_absent_because,
    instruction_set,
)

RECORD = 9
"""Numbers in the record of a row (LabelledStats in csrc/vocab_stats.h)."""

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(checks.LOGIT_DTYPES)}

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


def _warn_of_fallback(device: torch.device) -> None:
    fallback.warn_once(device.type, _absent_because(device) or core_absent_because)


def _run(name: str, device: torch.device, *arguments: Any) -> Any:
    """A function of the core, where tensors of a device are: on the CPU its instruction set and
    threads, on CUDA the device and the caller's stream."""
    if device.type == "cpu":
        where: tuple[Any, Any] = instruction_set(core), torch.get_num_threads()
        return getattr(core, name)(*where, *arguments)
    stream = torch.cuda.current_stream(device)
    return getattr(core, f"cuda_{name}")(stream.device.index, stream.cuda_stream, *arguments)


def _row_layout(logits: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the leading dimensions, merged where one stride serves several."""
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
    if len(sizes) > 4:
        raise ValueError(
            "logits may have at most 4 leading dimensions that strides keep apart, got shape "
            f"{list(logits.shape)} with strides {list(logits.stride())}; call .contiguous()"
        )
    return sizes, strides


def _problem(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Any, ...]:
    """What all passes over logits take (``_core.pyi``)."""
    if policy_logits.device.type == "cuda":
        checks.check_cuda_vocabulary(policy_logits)
    return (
        _DTYPE_CODES[policy_logits.dtype],
        labels.numel(),
        policy_logits.shape[-1],
        ignore_index,
        policy_logits.data_ptr(),
        *_row_layout(policy_logits),
        reference_logits.data_ptr(),
        *_row_layout(reference_logits),
        labels.data_ptr(),
    )


def _workspace(device: torch.device, problem: tuple[Any, ...]) -> list[Tensor]:
    """On CUDA the memory that forward needs beside its outputs, from torch's allocator."""
    if device.type == "cpu":
        return []
    size = core.cuda_forward_workspace_bytes(*problem[:3])
    return [torch.empty(size, dtype=torch.uint8, device=device)]


def _with_dense_rows(logits: Tensor) -> Tensor:
    """What a kernel can read. The public functions have checked that, but of the tensor they were
    given: a subclass, or PyTorch's own lazy zeros, may hand the op another one."""
    dense = logits.stride(-1) == 1 or logits.shape[-1] == 1
    return logits if dense else logits.contiguous()


def contiguous_int64(labels: Tensor) -> Tensor:
    return labels.to(torch.int64).contiguous()


def empty_outputs(like: Tensor, shape: torch.Size) -> Outputs:
    """policy_logps, reference_logps, forward_kl ``[...]`` and normalizers ``[..., 8]``."""
    dtype = fallback.accumulation_dtype(like)
    logps, reference_logps, kl = (like.new_empty(shape, dtype=dtype) for _ in range(3))
    return logps, reference_logps, kl, like.new_empty((*shape, fallback.NORMALIZERS), dtype=dtype)


def _addresses(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def token_stats(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> Outputs:
    """Of whole rows. On the CPU a label outside the vocabulary raises IndexError."""
    device, vocabulary = policy_logits.device, policy_logits.shape[-1]
    if not serves(device):
        _warn_of_fallback(device)
        if device.type == "cpu":
            checks.check_label_range(labels, vocabulary, ignore_index)
        return fallback.forward(policy_logits, reference_logits, labels, ignore_index)
    outputs = empty_outputs(policy_logits, labels.shape)
    labels = contiguous_int64(labels)
    policy_logits, reference_logits = map(_with_dense_rows, (policy_logits, reference_logits))
    problem = _problem(policy_logits, reference_logits, labels, ignore_index)
    workspace = _workspace(device, problem)
    wrong_label = _run(
        "token_stats_forward", device, *_addresses(workspace), *problem, *_addresses(outputs)
    )
    if device.type == "cpu" and wrong_label >= 0:
        label = int(labels.view(-1)[wrong_label])
        raise checks.label_range_error(label, vocabulary, ignore_index)
    return outputs


def empty_records(rows: int, like: Tensor) -> Tensor:
    """The records of no entry."""
    records = like.new_zeros(rows, RECORD, dtype=fallback.accumulation_dtype(like))
    records[:, :2] = -torch.inf  # maxima
    records[:, 7:] = -torch.inf  # the label's logits
    return records


def add_tile(records: Tensor, policy_tile: Tensor, reference_tile: Tensor, labels: Tensor) -> None:
    """Merge the records of a tile ``[..., columns]`` into ``records``; labels count from it."""
    problem = _problem(policy_tile, reference_tile, labels, IGNORED)
    workspace = _workspace(records.device, problem)
    _run("token_stats_tile", records.device, *_addresses(workspace), *problem, records.data_ptr())


def finish(records: Tensor, labels: Tensor, vocabulary: int, ignore_index: int) -> Outputs:
    """Outputs ``[rows]`` from records ``[sets, rows, 9]``; NaN for labels outside."""
    outputs = empty_outputs(records, labels.shape)
    _run(
        "token_stats_finish",
        records.device,
        _DTYPE_CODES[records.dtype],
        labels.numel(),
        vocabulary,
        ignore_index,
        labels.data_ptr(),
        records.shape[0],
        records.data_ptr(),
        *_addresses(outputs),
    )
    return outputs


def token_stats_of_shard(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    *shard: Any,
) -> Outputs:
    """As ``token_stats``, of rows whose vocabulary is sharded over processes; labels are global."""
    device, of = policy_logits.device, Shard(*shard)
    if device.type == "cpu":
        checks.check_label_range(labels, of.total, ignore_index)
    labels = contiguous_int64(labels)
    if not serves(device):
        _warn_of_fallback(device)
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
    # The row of headers is finished as one that is ignored, which saves a copy of all the others.
    with_header = torch.cat([labels.reshape(-1), labels.new_full((1,), ignore_index)])
    outputs = finish(gathered, with_header, shard.total, ignore_index)
    logps, reference_logps, kl, normalizers = (
        torch.where(agreed, x[:-1], torch.nan).view(labels.shape + x.shape[1:]) for x in outputs
    )
    return logps, reference_logps, kl, normalizers


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
    """dz = g_m (onehot(y) - p) + g_k (p - q) of whole rows, or of tiles (labels count from them).

    ``gradient`` may be the policy's logits. It may be the reference's where g_m = g_k in all rows.
    Of float32 logits it may be bfloat16 or float16, in memory of its own: rounded once, to nearest.
    """
    if not serves(gradient.device):
        arguments = (labels, normalizers, grad_logps, grad_kl, ignore_index)
        fallback.backward(gradient, policy_logits, reference_logits, *arguments)
        return
    # Incoming gradients are often expanded scalars, whose rows have no addresses of their own.
    labels = contiguous_int64(labels)
    policy_logits, reference_logits = map(_with_dense_rows, (policy_logits, reference_logits))
    saved = [x.contiguous() for x in (normalizers, grad_logps, grad_kl)]
    _run(
        "token_stats_backward",
        gradient.device,
        *_problem(policy_logits, reference_logits, labels, ignore_index),
        *_addresses(saved),
        _DTYPE_CODES[gradient.dtype],
        gradient.data_ptr(),
        *_row_layout(gradient),
    )
