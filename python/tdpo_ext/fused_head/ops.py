"""The ops of the fused head, and an autograd.Function for each of its paths to gradients.

torch.compile sees an op as one node, not its loop over tiles. The first arguments of every op are
the fields of ``Heads``; those of ``Options`` follow. The paths are ``recompute``,
``with_direction`` and ``with_gradients`` (whole pairs); ``tdpo_ext.fused_head`` says what each
costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.autograd import (
    differentiable_once,
    grouped,
    library,
    refuse_graph_of_gradients,
    register,
    save,
    saved,
)
from tdpo_ext.distributed import Shard
from tdpo_ext.fused_head import backward, forward, forward_gradients
from tdpo_ext.fused_head.head import Head, Wanted
from tdpo_ext.fused_head.pairs import Batch, TokenSlopes, kl_ratio_of_tokens
from tdpo_ext.fused_head.problem import Problem, Upstream
from tdpo_ext.fused_head.products import accumulation_dtype
from tdpo_ext.fused_head.quantities import (
    STATISTICS,
    AnyUpstream,
    Divergences,
    DivergenceUpstream,
    Outputs,
)
from tdpo_ext.loss import LossOptions
from tdpo_ext.outputs import TokenDivergences, TokenStats
from tdpo_ext.token_statistics import kernels, loss_kernels

_HEADS = (
    "Tensor policy_hidden, Tensor policy_weight, Tensor? policy_bias, Tensor reference_hidden,"
    " Tensor reference_weight, Tensor? reference_bias, Tensor labels"
)
_OPTIONS = (
    "float policy_scale, float policy_softcap, float reference_scale, float reference_softcap,"
    " int ignore_index, int chunk_bytes, str group, SymInt shard_start, SymInt shard_total"
)
_STATS = "Tensor policy_logps, Tensor reference_logps, Tensor forward_kl"
_DIVERGENCES = f"{_STATS}, Tensor reverse_kl, Tensor policy_entropy, Tensor reference_entropy"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
library.define(f"linear_token_stats({_HEADS}, {_OPTIONS}) -> ({_STATS}, Tensor normalizers)")
library.define(
    f"linear_token_divergences({_HEADS}, {_OPTIONS}, bool unlabelled)"
    f" -> ({_DIVERGENCES}, Tensor normalizers)"
)
_UPSTREAM = "Tensor normalizers, Tensor grad_policy_logps, Tensor grad_forward_kl"
library.define(
    f"linear_token_stats_backward({_HEADS}, {_UPSTREAM}, {_OPTIONS}, bool[] wanted)"
    f" -> ({_GRADIENTS})"
)
library.define(
    f"linear_token_divergences_backward({_HEADS}, {_UPSTREAM}, Tensor grad_reverse_kl,"
    f" Tensor grad_policy_entropy, {_OPTIONS}, bool[] wanted) -> ({_GRADIENTS})"
)
library.define(
    f"linear_token_stats_direction({_HEADS}, Tensor ratio, {_OPTIONS})"
    f" -> ({_STATS}, Tensor direction)"
)
library.define(
    f"linear_tdpo_gradients({_HEADS}, Tensor? cu_seqlens, SymInt sequences, {_OPTIONS},"
    " float beta, float alpha, str variant, float label_smoothing, bool average_log_prob,"
    " str reduction, SymInt pairs_at_once, bool[] wanted)"
    f" -> ({_STATS}, {_GRADIENTS}, Tensor unit)"
)


class Options(NamedTuple):
    """The options of the logits, the ignored label, the memory limit, and the shard."""

    policy_scale: float
    policy_softcap: float
    """0: no softcap."""
    reference_scale: float
    reference_softcap: float
    ignore_index: int
    chunk_bytes: int
    group: str
    """The processes that share the vocabulary; "": it is not sharded."""
    shard_start: int
    shard_total: int

    @property
    def shard(self) -> Shard | None:
        """This process's part of the vocabulary; None: it is not sharded."""
        return Shard(self.group, self.shard_start, self.shard_total) if self.group else None


class Heads(NamedTuple):
    """Hidden states ``[N, H]``, weight ``[V, H]``, bias ``[V]`` of both heads; labels ``[N]``."""

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
    def policy(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.policy_hidden, self.policy_weight, self.policy_bias

    @property
    def reference(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.reference_hidden, self.reference_weight, self.reference_bias

    @property
    def wanted(self) -> Wanted:
        """The policy's tensors that require a gradient."""
        on = torch.is_grad_enabled()
        bias = self.policy_bias is not None and self.policy_bias.requires_grad
        return Wanted(
            on and self.policy_hidden.requires_grad,
            on and self.policy_weight.requires_grad,
            on and bias,
        )


def problem_of(heads: Heads, options: Options) -> Problem:
    return Problem(
        Head(*heads.policy, options.policy_scale, options.policy_softcap),
        Head(*heads.reference, options.reference_scale, options.reference_softcap),
        kernels.contiguous_int64(heads.labels),
        options.ignore_index,
        options.chunk_bytes,
        options.shard,
    )


def _checked_problem(heads: Heads, options: Options, unlabelled: bool = False) -> Problem:
    problem = problem_of(heads, options)
    if problem.labels.device.type == "cpu" and not unlabelled:
        shard, vocabulary = problem.shard, problem.policy.vocabulary
        vocabulary = vocabulary if shard is None else shard.total
        checks.check_label_range(problem.labels, vocabulary, problem.ignore_index)
    return problem


def _empty_gradients(heads: Heads, wanted: list[bool]) -> list[Tensor]:
    gradients = []
    for tensor, is_wanted in zip(heads.policy, wanted, strict=True):
        if is_wanted and tensor is not None:
            gradients.append(torch.empty_like(tensor, dtype=accumulation_dtype(tensor.dtype)))
        else:
            dtype = accumulation_dtype(heads.policy_hidden.dtype)
            gradients.append(heads.policy_hidden.new_empty(0, dtype=dtype))
    return gradients


# --- the ops --------------------------------------------------------------------------------------


def _forward(heads: Heads, options: Options) -> Outputs:
    return forward.forward(_checked_problem(heads, options), STATISTICS)


def _forward_fake(heads: Heads, options: Options) -> Outputs:
    return STATISTICS.empty_outputs(heads.policy_hidden, heads.labels.shape)


def _divergences(heads: Heads, options: Options, unlabelled: bool) -> Outputs:
    return forward.forward(_checked_problem(heads, options, unlabelled), Divergences(unlabelled))


def _divergences_fake(heads: Heads, options: Options, unlabelled: bool) -> Outputs:
    return Divergences(unlabelled).empty_outputs(heads.policy_hidden, heads.labels.shape)


def _backward(
    heads: Heads, upstream: AnyUpstream, options: Options, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return backward.backward(problem_of(heads, options), upstream, Wanted(*wanted))


def _backward_fake(
    heads: Heads, upstream: AnyUpstream, options: Options, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(_empty_gradients(heads, wanted))


def _direction(heads: Heads, ratio: Tensor, options: Options) -> tuple[Tensor, ...]:
    outputs, direction = forward_gradients.forward_with_direction(
        _checked_problem(heads, options), ratio
    )
    return *outputs[:3], direction


def _direction_fake(heads: Heads, ratio: Tensor, options: Options) -> tuple[Tensor, ...]:
    direction = _empty_gradients(heads, [True, False, False])[0]
    return *kernels.empty_outputs(heads.policy_hidden, heads.labels.shape)[:3], direction


def _gradients(
    heads: Heads,
    batch: Batch,
    options: Options,
    loss: LossOptions,
    pairs_at_once: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    problem = _checked_problem(heads, options)
    dtype = accumulation_dtype(heads.policy_hidden.dtype)  # alpha is rounded to it
    slopes = TokenSlopes(batch, loss, problem.labels)
    of_labels = loss_kernels.Batch(
        batch.shaped(problem.labels), False, batch.cu_seqlens, problem.ignore_index
    )

    def slopes_of(outputs: kernels.Outputs) -> Tensor:
        """Those of pairs whose statistics are incomplete must not be used."""
        stats = TokenStats(*map(batch.shaped, outputs[:3]))
        return slopes.of_tokens(loss_kernels.forward_of_stats(stats, of_labels, loss)[2])

    ratio = kl_ratio_of_tokens(slopes.sequence, batch.pairs, loss.alpha, loss.variant, dtype)
    outputs, gradients = forward_gradients.forward_by_pairs(
        problem,
        chunk_of_token=(slopes.sequence % batch.pairs) // pairs_at_once,
        chunks=-(-batch.pairs // pairs_at_once),
        ratio=ratio,
        slopes_of=slopes_of,
        wanted=Wanted(*wanted),
    )
    return *outputs[:3], *gradients, ratio.new_tensor(slopes.unit)


def _gradients_fake(
    heads: Heads,
    batch: Batch,
    options: Options,
    loss: LossOptions,
    pairs_at_once: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    outputs = kernels.empty_outputs(heads.policy_hidden, heads.labels.shape)
    unit = outputs[0].new_empty(())
    return *outputs[:3], *_empty_gradients(heads, wanted), unit


_of_upstream, _of_divergences = ((Heads, x, Options, list) for x in (Upstream, DivergenceUpstream))
_of_pairs = (Heads, Batch, Options, LossOptions, int, list)
for _name, _function, _fake, _groups in (
    ("linear_token_stats", _forward, _forward_fake, (Heads, Options)),
    ("linear_token_stats_backward", _backward, _backward_fake, _of_upstream),
    ("linear_token_divergences", _divergences, _divergences_fake, (Heads, Options, bool)),
    ("linear_token_divergences_backward", _backward, _backward_fake, _of_divergences),
    ("linear_token_stats_direction", _direction, _direction_fake, (Heads, Tensor, Options)),
    ("linear_tdpo_gradients", _gradients, _gradients_fake, _of_pairs),
):
    register(_name, grouped(_function, *_groups), grouped(_fake, *_groups))
differentiable_once("linear_token_stats_backward")
differentiable_once("linear_token_divergences_backward")


# --- autograd -------------------------------------------------------------------------------------


class _Recompute(torch.autograd.Function):
    """The path "recompute": backward makes the logits once more, for any upstream gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
        labels: Tensor,
        options: Options,
        wanted: Wanted,
        unlabelled: bool | None,
    ) -> tuple[Tensor, ...]:
        policy = hidden, weight, bias
        constants = reference_hidden, reference_weight, reference_bias, labels
        *of_tokens, normalizers = _outputs_of((*policy, *constants), options, unlabelled)
        save(ctx, (*policy, normalizers), constants)
        ctx.mark_non_differentiable(*(of_tokens[at] for at in (1, 5) if at < len(of_tokens)))
        ctx.options, ctx.wanted = options, wanted
        return tuple(of_tokens)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (*policy, normalizers), constants = saved(ctx)
        logps, _, *others = upstream
        if len(upstream) == len(TokenStats._fields):
            op = torch.ops.tdpo_ext.linear_token_stats_backward
        else:
            op = torch.ops.tdpo_ext.linear_token_divergences_backward
            others.pop()  # of the reference's entropy
        of_tokens = normalizers, logps, *others
        gradients = op(*policy, *constants, *of_tokens, *ctx.options, list(ctx.wanted))
        hidden, weight, bias = (
            gradient.to(tensor.dtype) if is_wanted else None
            for tensor, gradient, is_wanted in zip(policy, gradients, ctx.wanted, strict=True)
        )
        return hidden, weight, bias, None, None, None, None, None, None, None


def _outputs_of(heads: tuple[Any, ...], options: Options, unlabelled: bool | None) -> Any:
    """The outputs of the op; ``unlabelled`` is None where no divergences are asked for."""
    if unlabelled is None:
        return torch.ops.tdpo_ext.linear_token_stats(*heads, *options)
    return torch.ops.tdpo_ext.linear_token_divergences(*heads, *options, unlabelled)


def _recomputed(heads: Heads, options: Options, unlabelled: bool | None) -> Any:
    """The same without normalizers, differentiable for any upstream gradients."""
    wanted = heads.wanted
    if not any(wanted):
        return _outputs_of(heads, options, unlabelled)[:-1]
    return _Recompute.apply(*heads, options, wanted, unlabelled)  # type: ignore[no-untyped-call]


def recompute(heads: Heads, options: Options) -> TokenStats:
    """The statistics, differentiable for any upstream gradients."""
    return TokenStats(*_recomputed(heads, options, None))


def recompute_divergences(heads: Heads, options: Options, unlabelled: bool) -> TokenDivergences:
    """The divergences, differentiable for any upstream gradients. ``unlabelled``: labels outside
    the vocabulary stand for none."""
    return TokenDivergences(*_recomputed(heads, options, unlabelled))


class _WithDirection(torch.autograd.Function):
    """The path "direction": backward scales the gradient that forward has made."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, direction: Tensor, logps: Tensor, kl: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(direction)
        ctx.dtype = hidden.dtype
        return logps.clone(), kl.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_gradients()
        (direction,) = ctx.saved_tensors
        return (direction * upstream[0].unsqueeze(-1)).to(ctx.dtype), None, None, None


def with_direction(heads: Heads, options: Options, ratio: Tensor) -> TokenStats:
    """The statistics, differentiable with respect to the hidden states alone.

    Each token's upstream gradient of the KL must be ``ratio`` times that of log p(y).
    """
    logps, reference_logps, kl, direction = torch.ops.tdpo_ext.linear_token_stats_direction(
        *heads.detached(), ratio, *options
    )
    logps, kl = _WithDirection.apply(heads.policy_hidden, direction, logps, kl)  # type: ignore[no-untyped-call]
    return TokenStats(logps, reference_logps, kl)


class _WithGradients(torch.autograd.Function):
    """The path "whole pairs": forward has made the loss's gradients, in multiples of a unit."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        wanted: Wanted,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *gradients_and_unit: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*gradients_and_unit)
        ctx.wanted = wanted
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph_of_gradients()
        *gradients, unit = ctx.saved_tensors
        factor = upstream[0] * unit
        hidden, weight, bias = (
            _scaled(gradient, factor, dtype) if is_wanted else None
            for gradient, dtype, is_wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
        )
        return None, None, hidden, weight, bias, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != gradient.dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    # In place, since there may be no memory for a second gradient of the head. A second backward
    # raises, because the saved tensor has changed.
    return gradient.mul_(factor).detach()


def with_gradients(
    loss: Tensor, heads: Heads, gradients: tuple[Tensor, ...], wanted: Wanted
) -> Tensor:
    """``loss``, differentiable by the results of ``linear_tdpo_gradients``: gradients and unit."""
    result: Tensor = _WithGradients.apply(loss, wanted, *heads.policy, *gradients)  # type: ignore[no-untyped-call]
    return result
