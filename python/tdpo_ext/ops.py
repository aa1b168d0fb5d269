"""torch.library ops: schemas, fakes, the implementations under them, and the autograd seam.

One op name, several implementations: compiled kernels on the CPU and on CUDA, plain PyTorch
elsewhere. The autograd.Function stands outside the op, so torch.compile sees the op and traces the
Function.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdpo_ext import checks, fallback
from tdpo_ext.native import core, core_absent_because, cuda_absent_because
from tdpo_ext.outputs import TokenStats

INSTRUCTION_SET_VARIABLE = "TDPO_EXT_INSTRUCTION_SET"

_library = torch.library.Library("tdpo_ext", "FRAGMENT")
_library.define(
    "token_stats(Tensor policy_logits, Tensor reference_logits, Tensor labels, int ignore_index)"
    " -> (Tensor policy_logps, Tensor reference_logps, Tensor forward_kl, Tensor normalizers)"
)
_backward_arguments = (
    "Tensor reference_logits, Tensor labels, Tensor normalizers, Tensor grad_policy_logps,"
    " Tensor grad_forward_kl, int ignore_index"
)
_library.define(
    f"token_stats_backward(Tensor policy_logits, {_backward_arguments}) -> Tensor policy_grad"
)
_library.define(f"token_stats_backward_(Tensor(a!) policy_logits, {_backward_arguments}) -> ()")

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(checks.LOGIT_DTYPES)}


def instruction_set() -> str:
    """The instruction set the CPU kernels use: the best one here, or what the variable asks for."""
    assert core is not None
    present: list[str] = core.instruction_sets()
    asked = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if asked is None:
        return present[-1]
    if asked not in present:
        raise ValueError(
            f"{INSTRUCTION_SET_VARIABLE} must be one of {present} on this processor, got {asked!r}"
        )
    return asked


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


def _contiguous_int64(labels: Tensor) -> Tensor:
    return labels.to(torch.int64).contiguous()


def _problem(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Any, ...]:
    """What both passes of the core take (``_core.pyi``)."""
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


def _processor() -> tuple[str, int]:
    """Where the CPU kernels run: instruction set and threads."""
    return instruction_set(), torch.get_num_threads()


def _stream(device: torch.device) -> tuple[int, int]:
    """Where the CUDA kernels run: device and the caller's stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device.index, stream.cuda_stream


def _outputs(policy_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = fallback.accumulation_dtype(policy_logits)
    shape = labels.shape
    return (
        policy_logits.new_empty(shape, dtype=dtype),
        policy_logits.new_empty(shape, dtype=dtype),
        policy_logits.new_empty(shape, dtype=dtype),
        policy_logits.new_empty((*shape, fallback.NORMALIZERS), dtype=dtype),
    )


# --- forward --------------------------------------------------------------------------------------


def _forward_anywhere(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fallback.warn_once(policy_logits.device.type, "no compiled kernel serves this device")
    return fallback.forward(policy_logits, reference_logits, labels, ignore_index)


def _forward_cpu(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vocabulary = policy_logits.shape[-1]
    if core is None:
        fallback.warn_once("cpu", core_absent_because)
        checks.check_label_range(labels, vocabulary, ignore_index)
        return fallback.forward(policy_logits, reference_logits, labels, ignore_index)
    outputs = _outputs(policy_logits, labels)
    labels = _contiguous_int64(labels)
    wrong_label = core.token_stats_forward(
        *_processor(),
        *_problem(policy_logits, reference_logits, labels, ignore_index),
        *(output.data_ptr() for output in outputs),
    )
    if wrong_label >= 0:
        label = int(labels.view(-1)[wrong_label])
        raise checks.label_range_error(label, vocabulary, ignore_index)
    return outputs


def _forward_cuda(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    absent_because = cuda_absent_because(policy_logits.device)
    if absent_because:
        fallback.warn_once("cuda", absent_because)
        return fallback.forward(policy_logits, reference_logits, labels, ignore_index)
    checks.check_cuda_vocabulary(policy_logits)
    outputs = _outputs(policy_logits, labels)
    labels = _contiguous_int64(labels)
    problem = _problem(policy_logits, reference_logits, labels, ignore_index)
    workspace = policy_logits.new_empty(
        core.cuda_forward_workspace_bytes(*problem[:3]), dtype=torch.uint8
    )
    core.cuda_token_stats_forward(
        *_stream(policy_logits.device),
        workspace.data_ptr(),
        *problem,
        *(output.data_ptr() for output in outputs),
    )
    return outputs


def _forward_fake(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(policy_logits, labels)


# --- backward -------------------------------------------------------------------------------------


def _write_gradient_anywhere(gradient: Tensor, *arguments: Any) -> None:
    fallback.warn_once(gradient.device.type, "no compiled kernel serves this device")
    fallback.backward(gradient, *arguments)


def _write_gradient_cpu(gradient: Tensor, *arguments: Any) -> None:
    if core is None:
        fallback.backward(gradient, *arguments)
    else:
        _run_backward(core.token_stats_backward, _processor(), gradient, *arguments)


def _write_gradient_cuda(gradient: Tensor, *arguments: Any) -> None:
    if cuda_absent_because(gradient.device):
        fallback.backward(gradient, *arguments)
    else:
        stream = _stream(gradient.device)
        _run_backward(core.cuda_token_stats_backward, stream, gradient, *arguments)


def _run_backward(
    kernel: Callable[..., None],
    where: tuple[Any, ...],
    gradient: Tensor,
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    grad_logps: Tensor,
    grad_kl: Tensor,
    ignore_index: int,
) -> None:
    # Incoming gradients are often expanded scalars, whose rows have no addresses of their own.
    labels = _contiguous_int64(labels)
    normalizers, grad_logps, grad_kl = (
        saved.contiguous() for saved in (normalizers, grad_logps, grad_kl)
    )
    kernel(
        *where,
        *_problem(policy_logits, reference_logits, labels, ignore_index),
        normalizers.data_ptr(),
        grad_logps.data_ptr(),
        grad_kl.data_ptr(),
        gradient.data_ptr(),
        *_row_layout(gradient),
    )


def _backward_with(write_gradient: Callable[..., None]) -> Callable[..., Tensor]:
    def backward(policy_logits: Tensor, *arguments: Any) -> Tensor:
        gradient = policy_logits.new_empty(policy_logits.shape)
        write_gradient(gradient, policy_logits, *arguments)
        return gradient

    return backward


def _backward_inplace_with(write_gradient: Callable[..., None]) -> Callable[..., None]:
    def backward_(policy_logits: Tensor, *arguments: Any) -> None:
        checks.check_inplace_backward(policy_logits)
        write_gradient(policy_logits, policy_logits, *arguments)
        # Autograd does not see what a kernel writes, and must: a second backward has to raise.
        torch.autograd.graph.increment_version(policy_logits)

    return backward_


def _backward_fake(policy_logits: Tensor, *arguments: Any) -> Tensor:
    return policy_logits.new_empty(policy_logits.shape)


def _backward_inplace_fake(policy_logits: Tensor, *arguments: Any) -> None:
    return None


for _key, _forward, _write_gradient in (
    ("CompositeExplicitAutograd", _forward_anywhere, _write_gradient_anywhere),
    ("CPU", _forward_cpu, _write_gradient_cpu),
    ("CUDA", _forward_cuda, _write_gradient_cuda),
):
    _library.impl("token_stats", _forward, _key)
    _library.impl("token_stats_backward", _backward_with(_write_gradient), _key)
    _library.impl("token_stats_backward_", _backward_inplace_with(_write_gradient), _key)
for _name, _fake in (
    ("token_stats", _forward_fake),
    ("token_stats_backward", _backward_fake),
    ("token_stats_backward_", _backward_inplace_fake),
):
    torch.library.register_fake(f"tdpo_ext::{_name}", _fake, lib=_library)


# --- autograd -------------------------------------------------------------------------------------

_SECOND_DERIVATIVE = (
    "tdpo_ext's compiled ops are differentiable once; for second derivatives use the functions of "
    "the same names in tdpo_ext.reference"
)


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(_SECOND_DERIVATIVE)


torch.library.register_autograd(
    "tdpo_ext::token_stats_backward", _refuse_second_derivative, lib=_library
)


class _TokenStatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy_logits: Tensor,
        reference_logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        policy_logps, reference_logps, forward_kl, normalizers = torch.ops.tdpo_ext.token_stats(
            policy_logits, reference_logits, labels, ignore_index
        )
        constants = (reference_logits, labels)
        # A reference computed in inference mode cannot be saved for backward. It need not be: it
        # has no gradient, and no version that autograd could check.
        inference = not torch.compiler.is_compiling() and any(x.is_inference() for x in constants)
        ctx.inference_constants = constants if inference else None
        ctx.save_for_backward(policy_logits, normalizers, *(() if inference else constants))
        ctx.mark_non_differentiable(reference_logps)
        ctx.ignore_index = ignore_index
        ctx.inplace_backward = inplace_backward
        return policy_logps, reference_logps, forward_kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        policy_logits, normalizers, *constants = ctx.saved_tensors
        reference_logits, labels = ctx.inference_constants or constants
        grad_policy_logps, _, grad_forward_kl = gradients
        arguments = (
            reference_logits,
            labels,
            normalizers,
            grad_policy_logps,
            grad_forward_kl,
            ctx.ignore_index,
        )
        if not ctx.inplace_backward:
            gradient = torch.ops.tdpo_ext.token_stats_backward(policy_logits, *arguments)
            return gradient, None, None, None, None
        if torch.is_grad_enabled():
            raise RuntimeError(f"{_SECOND_DERIVATIVE} (inplace_backward=True, create_graph=True)")
        torch.ops.tdpo_ext.token_stats_backward_(policy_logits, *arguments)
        return policy_logits.detach(), None, None, None, None


def token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    inplace_backward: bool,
) -> TokenStats:
    """The op with its gradient; arguments are checked by ``functional.token_stats``."""
    stats = _TokenStatsFunction.apply(  # type: ignore[no-untyped-call]
        policy_logits, reference_logits, labels, ignore_index, inplace_backward
    )
    return TokenStats(*stats)
