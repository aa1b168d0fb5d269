"""Argument checks. Each error names the argument, what came, what is allowed, and what to do.

The checks of tensors come first, then those of the loss's options, of batches and of heads.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)

Variant = Literal["tdpo1", "tdpo2"]
"""TDPO1, or TDPO2, which is DPO with alpha = 0."""
Reduction = Literal["none", "mean", "sum"]
"""The loss of each pair, their mean, or their sum."""
VARIANTS: tuple[Variant, ...] = get_args(Variant)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def _names(values: tuple[object, ...]) -> str:
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError for anything but a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        came = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {came}")


def check_not_transformed(*tensors: Tensor | None) -> None:
    """Refuse tensors of torch.func transforms (vmap, grad, ...) and of forward-mode derivatives.

    The compiled ops would take such a tensor for a plain one, and the derivative would be lost.
    """
    if torch.compiler.is_compiling():
        return
    forward_mode = forward_ad._current_level >= 0
    for tensor in tensors:
        if tensor is not None and (
            torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or (forward_mode and forward_ad.unpack_dual(tensor).tangent is not None)
        ):
            raise RuntimeError(
                "tdpo_ext's compiled ops take no torch.func transform (grad, vmap, jvp, ...) and "
                "no forward-mode derivative; use torch.autograd, or the functions of the same "
                "names in tdpo_ext.reference"
            )


def check_logits(policy_logits: Tensor, reference_logits: Tensor) -> None:
    """Both must be ``[..., V]``, V >= 1, last dimension contiguous; one shape, dtype and device."""
    for name, logits in (("policy_logits", policy_logits), ("reference_logits", reference_logits)):
        check_tensor(name, logits)
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{name} must have dtype {_names(LOGIT_DTYPES)}, got {_names((logits.dtype,))}"
            )
        if logits.dim() < 1 or logits.shape[-1] < 1:
            raise ValueError(
                f"{name} must have shape [..., V] with V >= 1, got {list(logits.shape)}"
            )
        if logits.shape[-1] > 1 and logits.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension (stride 1), got stride "
                f"{logits.stride(-1)}; call .contiguous() on it"
            )
    if policy_logits.shape != reference_logits.shape:
        raise ValueError(
            "reference_logits must have the shape of policy_logits "
            f"{list(policy_logits.shape)}, got {list(reference_logits.shape)}"
        )
    if policy_logits.dtype != reference_logits.dtype:
        raise TypeError(
            f"reference_logits must have the dtype of policy_logits "
            f"({_names((policy_logits.dtype,))}), got {_names((reference_logits.dtype,))}"
        )
    if policy_logits.device != reference_logits.device:
        raise ValueError(
            f"reference_logits must be on the device of policy_logits ({policy_logits.device}), "
            f"got {reference_logits.device}"
        )
    if reference_logits.requires_grad:
        raise ValueError(
            "reference_logits must not require grad: the reference is a constant of the loss; "
            "compute it under torch.no_grad() or pass reference_logits.detach()"
        )


def check_cuda_vocabulary(policy_logits: Tensor, largest: int) -> None:
    """The kernels count the entries of a row in 32 bits; the core says how many it takes."""
    if policy_logits.shape[-1] > largest:
        raise ValueError(
            f"policy_logits may have at most {largest} vocabulary entries on CUDA, got "
            f"{policy_logits.shape[-1]}; use tdpo_ext.reference"
        )


def check_labels(name: str, labels: Tensor, logits: Tensor) -> None:
    """Labels must be integers, of the logits' shape without its last dimension."""
    check_tensor(name, labels)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"{name} must have dtype {_names(LABEL_DTYPES)}, got {_names((labels.dtype,))}"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of logits or hidden states without their last dimension, "
            f"{list(logits.shape[:-1])}, got {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(
            f"{name} must be on the device of logits or hidden states ({logits.device}), "
            f"got {labels.device}"
        )


def check_ignore_index(ignore_index: int) -> None:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")


def is_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Where labels equal ``ignore_index``.

    int32 labels are widened first: PyTorch compares them with the lower half of the number.
    """
    return labels.to(torch.int64) == ignore_index


def check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise IndexError for the first label outside [0, V) that is not ``ignore_index``.

    For tensors on the CPU only: on an accelerator reading the values would mean waiting for them.
    """
    wrong = ~is_ignored(labels, ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bool(wrong.any()):
        raise label_range_error(int(labels[wrong][0]), vocabulary, ignore_index)


def label_range_error(label: int, vocabulary: int, ignore_index: int) -> IndexError:
    return IndexError(
        f"labels must lie in [0, {vocabulary}) or equal ignore_index ({ignore_index}), got {label}"
    )


Divergence = Literal[
    "policy_logps",
    "reference_logps",
    "forward_kl",
    "reverse_kl",
    "policy_entropy",
    "reference_entropy",
]
"""What ``token_divergences`` can give."""
DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
NEED_LABELS: tuple[Divergence, ...] = ("policy_logps", "reference_logps")


def check_divergences(
    outputs: Collection[str], labels: Tensor | None, mask: Tensor | None, batch: Tensor
) -> None:
    """``outputs`` must name some of ``DIVERGENCES``; those of labels need labels, not a mask.

    Labels or the mask must fit ``batch``: logits or hidden states.
    """
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        raise TypeError(
            f"outputs must be a tuple of names, got {outputs!r}; write (name,) for a single one"
        )
    unknown = [name for name in outputs if name not in DIVERGENCES]
    if unknown or not outputs:
        came = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"outputs must be some of {DIVERGENCES}, got {came}")
    missing = [name for name in outputs if name in NEED_LABELS]
    if labels is None and missing:
        raise ValueError(f"outputs has {missing[0]!r}, which needs labels, got None; pass labels")
    if labels is not None and mask is not None:
        raise ValueError(
            "labels and mask were both given; mark the rows to leave out with ignore_index in "
            "labels, or pass labels=None"
        )
    if labels is not None:
        check_labels("labels", labels, batch)
    if mask is not None:
        check_mask(mask, batch)


def check_mask(mask: Tensor, logits: Tensor) -> None:
    """A mask must be bool, of the logits' shape without its last dimension."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype bool, got {_names((mask.dtype,))}")
    if mask.shape != logits.shape[:-1]:
        raise ValueError(
            "mask must have the shape of logits or hidden states without their last dimension, "
            f"{list(logits.shape[:-1])}, got {list(mask.shape)}"
        )
    if mask.device != logits.device:
        raise ValueError(
            f"mask must be on the device of logits or hidden states ({logits.device}), "
            f"got {mask.device}"
        )


def check_inplace_backward(policy_logits: Tensor, reference_logits: Tensor) -> None:
    """The policy's logits must not overlap in memory, and their rows must be contiguous.

    The gradient overwrites them, so each element needs an address of its own. That may be the
    address of the same element of the reference, which is read before, but not of another one.
    ``check_logits`` has checked the rows already, but a tensor subclass may hide another tensor
    from it.
    """
    if policy_logits.numel() == 0:
        return
    if policy_logits.shape[-1] > 1 and policy_logits.stride(-1) != 1:
        raise ValueError(
            "inplace_backward needs policy_logits that are contiguous in their last dimension, got "
            f"strides {list(policy_logits.stride())}; pass inplace_backward=False"
        )
    span = 1
    sizes_and_strides = zip(policy_logits.shape, policy_logits.stride(), strict=True)
    for stride, size in sorted((stride, size) for size, stride in sizes_and_strides if size > 1):
        if stride < span:
            raise ValueError(
                "inplace_backward needs policy_logits whose elements do not overlap in memory, got "
                f"shape {list(policy_logits.shape)} with strides {list(policy_logits.stride())}; "
                "pass inplace_backward=False or a .contiguous() copy"
            )
        span = stride * size
    if _meets_another_element(policy_logits, reference_logits):
        raise ValueError(
            "inplace_backward needs policy_logits that lie elsewhere in memory than "
            "reference_logits, or are the same view, got two views of one tensor that overlap; "
            "pass inplace_backward=False or reference_logits.clone()"
        )


def _meets_another_element(a: Tensor, b: Tensor) -> bool:
    """Whether an element of ``a`` may have the address of another element of ``b``.

    The elements of ``a`` do not overlap among themselves. Where the strides of ``b`` are others,
    the answer is whether the first to the last addresses of the two overlap.
    """
    if a.untyped_storage() is not b.untyped_storage():
        return False
    apart = int(b.storage_offset() - a.storage_offset())
    of_a, of_b = (
        [(t, n) for n, t in zip(x.shape, x.stride(), strict=True) if n > 1] for x in (a, b)
    )
    if of_a == of_b:
        return apart != 0 and _is_distance(apart, sorted(of_a, reverse=True))
    return -_width(of_b) <= apart <= _width(of_a)


def _width(strides_and_sizes: list[tuple[int, int]]) -> int:
    """The distance from the first to the last element."""
    return sum(stride * (size - 1) for stride, size in strides_and_sizes)


def _is_distance(apart: int, strides_and_sizes: list[tuple[int, int]]) -> bool:
    """Whether two elements of a view without overlaps lie ``apart``; largest strides come first."""
    if not strides_and_sizes:
        return apart == 0
    (stride, size), *others = strides_and_sizes
    # All smaller strides together reach less far than this one.
    steps = (apart // stride, apart // stride + 1)
    return any(abs(n) < size and _is_distance(apart - n * stride, others) for n in steps)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_pair_options(beta: float, alpha: float, variant: str, label_smoothing: float) -> None:
    for name, value in (("beta", beta), ("alpha", alpha), ("label_smoothing", label_smoothing)):
        _check_number(name, value)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def check_pair_sums(logps_margin: Tensor, seq_kl: Tensor) -> None:
    """Both must be floating tensors ``[2B]``: the chosen responses, then the rejected ones."""
    for name, value in (("logps_margin", logps_margin), ("seq_kl", seq_kl)):
        check_tensor(name, value)
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating tensor, got {_names((value.dtype,))}")
        if value.dim() != 1 or value.shape[0] % 2:
            raise ValueError(
                f"{name} must have shape [2B], chosen then rejected, got {list(value.shape)}"
            )
    if logps_margin.shape != seq_kl.shape:
        raise ValueError(
            f"seq_kl must have the shape of logps_margin {list(logps_margin.shape)}, "
            f"got {list(seq_kl.shape)}"
        )


def check_batch(name: str, batch: Tensor) -> None:
    """A batch must be ``[2B, T, ...]``: chosen sequences stacked on rejected ones."""
    width = "H" if "hidden" in name else "V"
    if batch.dim() != 3:
        raise ValueError(
            f"{name} must have shape [2B, T, {width}] (or [total, {width}] together with "
            f"cu_seqlens), got {list(batch.shape)}"
        )
    if batch.shape[0] % 2:
        raise ValueError(
            f"{name} must stack chosen on rejected along dimension 0, an even number of "
            f"sequences, got {batch.shape[0]}"
        )


def check_packed_batch(name: str, batch: Tensor, cu_seqlens: Tensor) -> None:
    """A packed batch must be ``[total, ...]``, its boundaries ``[2B + 1]``.

    ``sequences.sequence_bounds`` checks the values of the boundaries.
    """
    check_tensor("cu_seqlens", cu_seqlens)
    width = "H" if "hidden" in name else "V"
    if batch.dim() != 2:
        raise ValueError(
            f"{name} must have shape [total, {width}] when cu_seqlens is given, "
            f"got {list(batch.shape)}"
        )
    if cu_seqlens.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"cu_seqlens must have dtype {_names(LABEL_DTYPES)}, got {_names((cu_seqlens.dtype,))}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] % 2 != 1:
        raise ValueError(
            "cu_seqlens must have shape [2B + 1], chosen sequences before rejected ones, "
            f"got {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != batch.device:
        raise ValueError(
            f"cu_seqlens must be on the device of {name} ({batch.device}), got {cu_seqlens.device}"
        )


def bounds_error(cu_seqlens: Tensor, total: int) -> ValueError:
    return ValueError(
        f"cu_seqlens must ascend from 0 to the total number of tokens ({total}), got "
        f"{cu_seqlens.tolist()}"
    )


def labels_error(came: str) -> ValueError:
    return ValueError(
        "give exactly one of labels (as the model saw them, shifted inside) and shift_labels "
        f"(already aligned with the logits), got {came}"
    )


# --- the fused head -------------------------------------------------------------------------------


def _check_head(which: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states ``[..., H]``, weight ``[V, H]`` and bias ``[V]`` of one dtype and device."""
    given = {f"{which}_hidden": hidden, f"{which}_weight": weight}
    if bias is not None:
        given[f"{which}_bias"] = bias
    for name, value in given.items():
        check_tensor(name, value)
        if value.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{name} must have dtype {_names(LOGIT_DTYPES)}, got {_names((value.dtype,))}"
            )
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of {which}_hidden ({_names((hidden.dtype,))}), got "
                f"{_names((value.dtype,))}; cast one of them, or run under torch.autocast"
            )
        if value.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of {which}_hidden ({hidden.device}), "
                f"got {value.device}"
            )
    if hidden.dim() < 1 or weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"{which}_hidden must have shape [..., H] and {which}_weight [V, H] with V, H >= 1, "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{which}_weight must have shape [V, H] with the H of {which}_hidden "
            f"({hidden.shape[-1]}), got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{which}_bias must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}"
        )


Side = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight and bias of the policy or of the reference."""


def check_heads(policy: Side, reference: Side) -> None:
    """The two heads must fit together; only their hidden sizes may differ."""
    _check_head("policy", *policy)
    _check_head("reference", *reference)
    (hidden, weight, _), (reference_hidden, reference_weight, _) = policy, reference
    if reference_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            "reference_hidden must have the shape of policy_hidden but for its last dimension, "
            f"{list(hidden.shape[:-1])}, got {list(reference_hidden.shape)}"
        )
    if reference_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            "reference_weight must have as many rows as policy_weight, the vocabulary "
            f"({weight.shape[0]}), got {reference_weight.shape[0]}"
        )
    if reference_hidden.device != hidden.device:
        raise ValueError(
            f"reference_hidden must be on the device of policy_hidden ({hidden.device}), "
            f"got {reference_hidden.device}"
        )
    if (reference_hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(
            "reference_hidden and policy_hidden must both be float64 or neither, got "
            f"{_names((reference_hidden.dtype, hidden.dtype))}"
        )
    for name, value in zip(("hidden", "weight", "bias"), reference, strict=True):
        if value is not None and value.requires_grad:
            raise ValueError(
                f"reference_{name} must not require grad: the reference is a constant of the "
                f"loss; compute it under torch.no_grad() or pass reference_{name}.detach()"
            )


def check_logit_options(scale: float, softcap: float | None, prefix: str = "") -> None:
    _check_number(f"{prefix}logit_scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{prefix}logit_scale must be finite, got {scale}")
    if softcap is not None:
        _check_number(f"{prefix}logit_softcap", softcap)
        if not 0 < softcap < math.inf:
            raise ValueError(
                f"{prefix}logit_softcap must be positive and finite, or None, got {softcap}"
            )


class LogitOptions(NamedTuple):
    """How logits are made from x = h W^T + b: softcap tanh(scale x / softcap).

    A softcap of 0 means none: scale x.
    """

    scale: float
    softcap: float
    reference_scale: float
    reference_softcap: float


def logit_options(
    scale: float,
    softcap: float | None,
    reference_scale: float | None,
    reference_softcap: float | None,
) -> LogitOptions:
    """The options, checked; where one of the reference is None, it is the policy's."""
    reference_scale = scale if reference_scale is None else reference_scale
    reference_softcap = softcap if reference_softcap is None else reference_softcap
    check_logit_options(scale, softcap)
    check_logit_options(reference_scale, reference_softcap, "reference_")
    caps = float(softcap or 0), float(reference_softcap or 0)
    return LogitOptions(float(scale), caps[0], float(reference_scale), caps[1])


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    if chunk_bytes is None:
        return
    if not isinstance(chunk_bytes, int) or isinstance(chunk_bytes, bool):
        raise TypeError(f"chunk_bytes must be an int or None, got {type(chunk_bytes).__name__}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, or None, got {chunk_bytes}")
