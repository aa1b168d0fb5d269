"""torch.library ops of the fused head, and their autograd seams: one for each way to gradients.

An op hides the loop over tiles from torch.compile. All take two heads flat: hidden states
``[N, H]``, weight ``[V, H]`` and bias of the policy, the same of the reference, labels ``[N]``, and
options.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.distributed import Shard
from tdpo_ext.fused_head import passes
from tdpo_ext.fused_head.head import Head, Wanted
from tdpo_ext.fused_head.passes import Problem
from tdpo_ext.fused_head.products import accumulation_dtype
from tdpo_ext.outputs import TokenStats
from tdpo_ext.reference import (
    kl_ratios,
    pair_difference,
    pair_slopes,
    sequence_terms,
)
from tdpo_ext.sequences import sequence_of_tokens
from tdpo_ext.token_statistics import kernels

_library = torch.library.Library("tdpo_ext", "FRAGMENT")

_HEADS = (
    "Tensor policy_hidden, Tensor policy_weight, Tensor? policy_bias, Tensor reference_hidden,"
    " Tensor reference_weight, Tensor? reference_bias, Tensor labels"
)
_OPTIONS = (
    "float policy_scale, float policy_softcap, float reference_scale, float reference_softcap,"
    " int ignore_index, int chunk_bytes, str group, SymInt shard_start, SymInt shard_total"
)
_STATS = "Tensor policy_logps, Tensor reference_logps, Tensor forward_kl"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
_library.define(f"linear_token_stats({_HEADS}, {_OPTIONS}) -> ({_STATS}, Tensor normalizers)")
_library.define(
    f"linear_token_stats_backward({_HEADS}, Tensor normalizers, Tensor grad_policy_logps,"
    f" Tensor grad_forward_kl, {_OPTIONS}, bool[] wanted) -> ({_GRADIENTS})"
)
_library.define(
    f"linear_token_stats_direction({_HEADS}, Tensor ratio, {_OPTIONS})"
    f" -> ({_STATS}, Tensor direction)"
)
_library.define(
    f"linear_tdpo_gradients({_HEADS}, Tensor? cu_seqlens, SymInt sequences, {_OPTIONS},"
    " float beta, float alpha, str variant, float label_smoothing, bool average_log_prob,"
    f" float weight, SymInt pairs_at_once, bool[] wanted) -> ({_STATS}, {_GRADIENTS}, Tensor unit)"
)


class Options(NamedTuple):
    """What all ops take last."""

    policy_scale: float
    policy_softcap: float  # 0: none
    reference_scale: float
    reference_softcap: float
    ignore_index: int
    chunk_bytes: int
    group: str  # "": the vocabulary is not sharded
    shard_start: int
    shard_total: int

    @property
    def shard(self) -> Shard | None:
        return Shard(*self[6:]) if self.group else None


class Heads(NamedTuple):
    """What all ops take first: flat tensors."""

    policy_hidden: Tensor
    policy_weight: Tensor
    policy_bias: Tensor | None
    reference_hidden: Tensor
    reference_weight: Tensor
    reference_bias: Tensor | None
    labels: Tensor

    def detached(self) -> Heads:
        tensors: list[Any] = [None if x is None else x.detach() for x in self]
        return Heads(*tensors)

    @property
    def wanted(self) -> Wanted:
        """Which of the policy's tensors ask for a gradient."""
        on = torch.is_grad_enabled()
        bias = self.policy_bias is not None and self.policy_bias.requires_grad
        return Wanted(
            on and self.policy_hidden.requires_grad,
            on and self.policy_weight.requires_grad,
            on and bias,
        )


def problem_of(heads: Heads, options: Options) -> Problem:
    return Problem(
        Head(*heads[:3], options.policy_scale, options.policy_softcap),
        Head(*heads[3:6], options.reference_scale, options.reference_softcap),
        kernels.contiguous_int64(heads.labels),
        options.ignore_index,
        options.chunk_bytes,
        options.shard,
    )


def _checked_problem(heads: Heads, options: Options) -> Problem:
    problem = problem_of(heads, options)
    if problem.labels.device.type == "cpu":
        shard, vocabulary = problem.shard, problem.policy.vocabulary
        vocabulary = vocabulary if shard is None else shard.total
        checks.check_label_range(problem.labels, vocabulary, problem.ignore_index)
    return problem


def _empty_gradients(heads: Heads, wanted: list[bool]) -> list[Tensor]:
    gradients = []
    for tensor, is_wanted in zip(heads[:3], wanted, strict=True):
        if is_wanted and tensor is not None:
            gradients.append(torch.empty_like(tensor, dtype=accumulation_dtype(tensor.dtype)))
        else:
            dtype = accumulation_dtype(heads.policy_hidden.dtype)
            gradients.append(heads.policy_hidden.new_empty(0, dtype=dtype))
    return gradients


# --- the ops --------------------------------------------------------------------------------------


def _forward(*arguments: Any) -> kernels.Outputs:
    return passes.forward(_checked_problem(Heads(*arguments[:7]), Options(*arguments[7:])))


def _forward_fake(*arguments: Any) -> kernels.Outputs:
    heads = Heads(*arguments[:7])
    return kernels.empty_outputs(heads.policy_hidden, heads.labels.shape)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    heads, upstream = Heads(*arguments[:7]), passes.Upstream(*arguments[7:10])
    *options, wanted = arguments[10:]
    problem = problem_of(heads, Options(*options))
    return passes.backward(problem, upstream, Wanted(*wanted))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(Heads(*arguments[:7]), arguments[-1]))


def _direction(*arguments: Any) -> tuple[Tensor, ...]:
    problem = _checked_problem(Heads(*arguments[:7]), Options(*arguments[8:]))
    outputs, direction = passes.forward_with_direction(problem, arguments[7])
    return *outputs[:3], direction


def _direction_fake(*arguments: Any) -> tuple[Tensor, ...]:
    heads = Heads(*arguments[:7])
    direction = _empty_gradients(heads, [True, False, False])[0]
    return *kernels.empty_outputs(heads.policy_hidden, heads.labels.shape)[:3], direction


def gradient_unit(slope: float) -> float:
    """The power of 2 next to a slope, of which gradients that are made in forward are multiples:
    numbers near 1 do not leave float16's range, and the factor costs no rounding."""
    return float(2.0 ** round(math.log2(slope)))


def _gradients(*arguments: Any) -> tuple[Tensor, ...]:
    (cu_seqlens, sequences), rest = arguments[7:9], arguments[9:]
    options, rest = Options(*rest[: len(Options._fields)]), rest[len(Options._fields) :]
    problem = _checked_problem(Heads(*arguments[:7]), options)
    beta, alpha, variant, label_smoothing, average, weight, pairs_at_once, wanted = rest
    sequence = sequence_of_tokens(problem.labels, cu_seqlens, sequences)
    pairs = sequences // 2
    dtype = accumulation_dtype(problem.policy.hidden.dtype)  # alpha may be no float32
    rejected = sequence // pairs
    ratio = torch.tensor(kl_ratios(alpha, variant), dtype=dtype, device=sequence.device)[rejected]
    sign = torch.tensor([1.0, -1.0], dtype=dtype, device=sequence.device)
    unit = gradient_unit(beta * weight)

    def slopes_of(outputs: kernels.Outputs) -> Tensor:
        """What autograd would give, written out: the loss is made of few terms."""
        shape = (-1,) if cu_seqlens is not None else (sequences, -1)
        stats = TokenStats(*(x.view(shape) for x in outputs[:3]))
        labels = problem.labels.view(shape)
        terms = sequence_terms(stats, labels, cu_seqlens, average, problem.ignore_index)
        difference = pair_difference(terms.margin, terms.kl, alpha, variant)
        slopes = weight / unit * pair_slopes(difference, beta, label_smoothing)
        per_sequence = (sign[:, None] * slopes).flatten()
        if terms.kept is not None:
            per_sequence = per_sequence / terms.kept
        slopes_of_tokens: Tensor = per_sequence[sequence]
        return slopes_of_tokens

    chunk = (sequence % pairs) // pairs_at_once
    chunks = -(-pairs // pairs_at_once)
    outputs, gradients = passes.forward_by_pairs(
        problem, chunk, chunks, ratio, slopes_of, Wanted(*wanted)
    )
    return *outputs[:3], *gradients, ratio.new_tensor(unit)


def _gradients_fake(*arguments: Any) -> tuple[Tensor, ...]:
    heads = Heads(*arguments[:7])
    outputs = kernels.empty_outputs(heads.policy_hidden, heads.labels.shape)
    unit = outputs[0].new_empty(())
    return *outputs[:3], *_empty_gradients(heads, arguments[-1]), unit


for _name, _function, _fake in (
    ("linear_token_stats", _forward, _forward_fake),
    ("linear_token_stats_backward", _backward, _backward_fake),
    ("linear_token_stats_direction", _direction, _direction_fake),
    ("linear_tdpo_gradients", _gradients, _gradients_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tdpo_ext::{_name}", _fake, lib=_library)


# --- autograd -------------------------------------------------------------------------------------

_SECOND_DERIVATIVE = (
    "tdpo_ext's compiled ops are differentiable once; for second derivatives use the functions of "
    "the same names in tdpo_ext.reference"
)


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(_SECOND_DERIVATIVE)


torch.library.register_autograd(
    "tdpo_ext::linear_token_stats_backward", _refuse_second_derivative, lib=_library
)


def _refuse_graph_of_gradients() -> None:
    """Where autograd would take gradients made in forward for constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{_SECOND_DERIVATIVE} (create_graph=True)")


class _Recompute(torch.autograd.Function):
    """Way (a): any upstream gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, wanted = arguments
        heads, options = Heads(*given[:7]), given[7:]
        *stats, normalizers = torch.ops.tdpo_ext.linear_token_stats(*heads, *options)
        # A reference computed in inference mode cannot be saved for backward. It need not be: it
        # has no gradient, and no version that autograd could check.
        constants = heads[3:]
        inference = not torch.compiler.is_compiling() and any(
            x is not None and x.is_inference() for x in constants
        )
        ctx.inference_constants = constants if inference else None
        ctx.save_for_backward(*heads[:3], normalizers, *(() if inference else constants))
        ctx.mark_non_differentiable(stats[1])
        ctx.options, ctx.wanted = options, wanted
        return stats[0], stats[1], stats[2]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, normalizers, *constants = ctx.saved_tensors
        constants = ctx.inference_constants or constants
        gradients = torch.ops.tdpo_ext.linear_token_stats_backward(
            hidden,
            weight,
            bias,
            *constants,
            normalizers,
            upstream[0].contiguous(),
            upstream[2].contiguous(),
            *ctx.options,
            list(ctx.wanted),
        )
        return *_as_asked((hidden, weight, bias), gradients, ctx.wanted), *([None] * 14)


def _as_asked(
    tensors: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...], wanted: Wanted
) -> list[Tensor | None]:
    """Gradients in their tensors' types, None where none is wanted."""
    return [
        gradient.to(tensor.dtype) if is_wanted and tensor is not None else None
        for tensor, gradient, is_wanted in zip(tensors, gradients, wanted, strict=True)
    ]


def recompute(heads: Heads, options: Options) -> TokenStats:
    """Statistics with gradients for any upstream ones; without, if none is wanted."""
    wanted = heads.wanted
    if not any(wanted):
        return TokenStats(*torch.ops.tdpo_ext.linear_token_stats(*heads, *options)[:3])
    return TokenStats(*_Recompute.apply(*heads, *options, wanted))  # type: ignore[no-untyped-call]


class _Scaled(torch.autograd.Function):
    """Way (b): the gradient is known but for the upstream gradient of log p(y)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, direction: Tensor, logps: Tensor, kl: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(direction)
        ctx.dtype = hidden.dtype
        return logps.clone(), kl.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_graph_of_gradients()
        (direction,) = ctx.saved_tensors
        return (direction * upstream[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def with_direction(heads: Heads, options: Options, ratio: Tensor) -> TokenStats:
    """Statistics whose upstream gradients must be in ``ratio``: that of the KL to that of log p."""
    logps, reference_logps, kl, direction = torch.ops.tdpo_ext.linear_token_stats_direction(
        *heads.detached(), ratio, *options
    )
    logps, kl = _Scaled.apply(heads.policy_hidden, direction, logps, kl)  # type: ignore[no-untyped-call]
    return TokenStats(logps, reference_logps, kl)


class _WithGradients(torch.autograd.Function):
    """Way (c): a loss whose gradients are there already, in a unit."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, wanted: Wanted, *tensors: Any) -> Tensor:
        parameters, gradients_and_unit = tensors[:3], tensors[3:]
        ctx.save_for_backward(*gradients_and_unit)
        ctx.wanted = wanted
        ctx.dtypes = [None if x is None else x.dtype for x in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_graph_of_gradients()
        scaled: list[Tensor | None] = []
        *gradients, unit = ctx.saved_tensors
        factor = upstream[0] * unit
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True):
            if not wanted:
                scaled.append(None)
            elif dtype != gradient.dtype:
                scaled.append(
                    torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
                )
            else:
                # In place: a second gradient of the head's size might not fit. A second backward
                # raises, since the saved tensor has changed.
                scaled.append(gradient.mul_(factor).detach())
        return None, None, *scaled, None, None, None, None


def attach_gradients(
    loss: Tensor, heads: Heads, gradients: tuple[Tensor, ...], wanted: Wanted
) -> Tensor:
    result: Tensor = _WithGradients.apply(loss, wanted, *heads[:3], *gradients)  # type: ignore[no-untyped-call]
    return result
