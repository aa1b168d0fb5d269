"""Calls of the compiled core: tensors become the core's structs, which hold addresses.

Where no compiled kernels serve a device, plain PyTorch (``fallback``) does the same. Only
``add_tile`` and ``finish`` have no plain version: ask ``serves`` first. The public functions have
checked all arguments.
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


def _warn_of_fallback(device: torch.device) -> None:
    fallback.warn_once(device.type, _absent_because(device) or core_absent_because)


def _run(name: str, device: torch.device, work: Any, *workspace: int) -> Any:
    """Call a function of the core for tensors on a device: on the CPU with an instruction set and a
    number of threads, on CUDA on the caller's stream and with the address of a workspace."""
    if device.type == "cpu":
        return getattr(core, name)(instruction_set(core), torch.get_num_threads(), work)
    stream = torch.cuda.current_stream(device)
    function = getattr(core, f"cuda_{name}")
    return function(stream.device.index, stream.cuda_stream, work, *workspace)


# --- the core's structs: each field is described in csrc/token_stats.h ----------------------------


def _dtype(tensor: Tensor) -> int:
    code: int = core.DTYPES[_DTYPE_NAMES[tensor.dtype]]
    return code


def _row_layout(logits: Tensor) -> Any:
    """The leading dimensions, merged where one stride serves several."""
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
    return core.Logits(data=logits.data_ptr(), rows=_row_layout(logits))


def _problem(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> Any:
    if policy_logits.device.type == "cuda":
        checks.check_cuda_vocabulary(policy_logits, core.LARGEST_CUDA_VOCABULARY)
    return core.Problem(
        dtype=_dtype(policy_logits),
        rows=labels.numel(),
        vocabulary=policy_logits.shape[-1],
        ignore_index=ignore_index,
        policy=_logits(policy_logits),
        reference=_logits(reference_logits),
        labels=labels.data_ptr(),
    )


def _outputs(outputs: Outputs) -> Any:
    policy_logps, reference_logps, forward_kl, normalizers = outputs
    return core.Outputs(
        policy_logps=policy_logps.data_ptr(),
        reference_logps=reference_logps.data_ptr(),
        forward_kl=forward_kl.data_ptr(),
        normalizers=normalizers.data_ptr(),
    )


def _run_over_logits(name: str, device: torch.device, work: Any) -> Any:
    """``_run`` with the workspace that forward needs on CUDA, from torch's allocator."""
    if device.type == "cpu":
        return _run(name, device, work)
    size = core.cuda_forward_workspace_bytes(work.problem)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    return _run(name, device, work, workspace.data_ptr())


# --- the calls ------------------------------------------------------------------------------------


def _with_dense_rows(logits: Tensor) -> Tensor:
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
        _warn_of_fallback(device)
        if device.type == "cpu":
            checks.check_label_range(labels, vocabulary, ignore_index)
        return fallback.forward(policy_logits, reference_logits, labels, ignore_index)
    outputs = empty_outputs(policy_logits, labels.shape)
    labels = contiguous_int64(labels)
    policy_logits, reference_logits = map(_with_dense_rows, (policy_logits, reference_logits))
    work = core.Forward(
        problem=_problem(policy_logits, reference_logits, labels, ignore_index),
        outputs=_outputs(outputs),
    )
    wrong_label = _run_over_logits("token_stats_forward", device, work)
    if device.type == "cpu" and wrong_label >= 0:
        label = int(labels.view(-1)[wrong_label])
        raise checks.label_range_error(label, vocabulary, ignore_index)
    return outputs


def empty_records(rows: int, like: Tensor) -> Tensor:
    """Records ``[rows, 9]`` to which no vocabulary entry has been added (LabelledStats in
    csrc/vocab_stats.h)."""
    records = like.new_zeros(rows, core.RECORD, dtype=fallback.accumulation_dtype(like))
    records[:, :2] = -torch.inf  # maxima
    records[:, 7:] = -torch.inf  # the label's logits
    return records


def add_tile(records: Tensor, policy_tile: Tensor, reference_tile: Tensor, labels: Tensor) -> None:
    """Add the entries of a tile ``[..., columns]`` to ``records``; labels count from the tile's
    first column."""
    problem = _problem(policy_tile, reference_tile, labels, IGNORED)
    work = core.Tile(problem=problem, records=records.data_ptr())
    _run_over_logits("token_stats_tile", records.device, work)


def finish(records: Tensor, labels: Tensor, vocabulary: int, ignore_index: int) -> Outputs:
    """Outputs ``[rows]`` from records ``[sets, rows, 9]``; NaN where a label lies outside the
    vocabulary."""
    outputs = empty_outputs(records, labels.shape)
    work = core.Finish(
        dtype=_dtype(records),
        rows=labels.numel(),
        vocabulary=vocabulary,
        ignore_index=ignore_index,
        labels=labels.data_ptr(),
        sets=records.shape[0],
        records=records.data_ptr(),
        outputs=_outputs(outputs),
    )
    _run("token_stats_finish", records.device, work)
    return outputs


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
    # A header lies behind the records. As a row that is ignored it need not be cut off, which would
    # copy all records.
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
    labels = contiguous_int64(labels)
    policy_logits, reference_logits = map(_with_dense_rows, (policy_logits, reference_logits))
    normalizers, grad_logps, grad_kl = (x.contiguous() for x in (normalizers, grad_logps, grad_kl))
    work = core.Backward(
        problem=_problem(policy_logits, reference_logits, labels, ignore_index),
        normalizers=normalizers.data_ptr(),
        grad_policy_logps=grad_logps.data_ptr(),
        grad_forward_kl=grad_kl.data_ptr(),
        gradient_dtype=_dtype(gradient),
        gradient=gradient.data_ptr(),
        gradient_rows=_row_layout(gradient),
    )
    _run("token_stats_backward", gradient.device, work)
