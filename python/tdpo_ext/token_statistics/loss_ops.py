"""The ops from logits, or from the statistics of tokens, to the loss: schemas, fakes, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdpo_ext.autograd import (
    differentiable_once,
    grouped,
    library,
    may_skip_the_dispatcher,
    refuse_graph_of_gradients,
    refuse_overwritten_logits,
    register,
    register_backward,
    save,
    saved,
)
from tdpo_ext.loss import LossOptions
from tdpo_ext.outputs import TDPOOutput, TokenStats
from tdpo_ext.token_statistics import loss_kernels
from tdpo_ext.token_statistics.loss_kernels import Batch

_batch = "Tensor labels, bool shift, Tensor? cu_seqlens, int ignore_index"
_options = (
    "float beta, float alpha, str variant, float label_smoothing, bool average_log_prob,"
    " str reduction"
)
library.define(
    f"tdpo_loss(Tensor policy_logits, Tensor reference_logits, {_batch}, {_options})"
    " -> (Tensor loss, Tensor pairs, Tensor slopes, Tensor normalizers)"
)
_backward_arguments = (
    f"Tensor reference_logits, {_batch}, Tensor normalizers, Tensor slopes, Tensor grad_loss,"
    " float alpha, str variant"
)
library.define(
    f"tdpo_loss_backward(Tensor policy_logits, {_backward_arguments}) -> Tensor policy_grad"
)
library.define(
    "tdpo_loss_of_stats(Tensor policy_logps, Tensor reference_logps, Tensor forward_kl,"
    f" {_batch}, {_options}) -> (Tensor loss, Tensor pairs, Tensor slopes)"
)
library.define(
    "tdpo_loss_of_stats_backward(Tensor policy_logps, Tensor? cu_seqlens, Tensor slopes,"
    " Tensor grad_loss, float alpha, str variant)"
    " -> (Tensor grad_policy_logps, Tensor grad_forward_kl)"
)
library.define(f"tdpo_loss_backward_(Tensor(a!) policy_logits, {_backward_arguments}) -> ()")


def _empty_outputs(
    policy_logits: Tensor, reference_logits: Tensor, batch: Batch, options: LossOptions
) -> loss_kernels.LossOutputs:
    return loss_kernels.empty_outputs(policy_logits, batch, options.reduction)


def _empty_outputs_of_stats(
    stats: TokenStats, batch: Batch, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    return loss_kernels.empty_outputs_of_stats(stats.policy_logps, batch, options.reduction)


def _backward_of_stats_fake(
    policy_logps: Tensor, cu_seqlens: Tensor | None, slopes: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    shape = policy_logps.shape
    return slopes.new_empty(shape), slopes.new_empty(shape)


_arguments = Tensor, Tensor, Batch, LossOptions
_forward = grouped(loss_kernels.forward, *_arguments)
register("tdpo_loss", _forward, grouped(_empty_outputs, *_arguments))
_of_backward = (*(Tensor,) * 3, Batch, *(Tensor,) * 3, float, str)
_backward = register_backward(
    "tdpo_loss_backward", grouped(loss_kernels.write_gradient, *_of_backward)
)
_of_stats = TokenStats, Batch, LossOptions
_forward_of_stats = grouped(loss_kernels.forward_of_stats, *_of_stats)
register("tdpo_loss_of_stats", _forward_of_stats, grouped(_empty_outputs_of_stats, *_of_stats))
register("tdpo_loss_of_stats_backward", loss_kernels.gradients_of_stats, _backward_of_stats_fake)
differentiable_once("tdpo_loss_of_stats_backward")


# --- autograd -------------------------------------------------------------------------------------


class _TDPOLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy_logits: Tensor,
        reference_logits: Tensor,
        inplace_backward: bool,
        *batch_and_options: Any,
    ) -> tuple[Tensor, Tensor]:
        labels, shift, cu_seqlens, ignore_index = batch_and_options[:4]
        constants = reference_logits, labels, cu_seqlens
        direct = may_skip_the_dispatcher(policy_logits, *constants)
        op = _forward if direct else torch.ops.tdpo_ext.tdpo_loss
        loss, pairs, slopes, normalizers = op(policy_logits, reference_logits, *batch_and_options)
        save(ctx, (policy_logits, normalizers, slopes), constants)
        ctx.mark_non_differentiable(pairs)
        ctx.shift, ctx.ignore_index = shift, ignore_index
        ctx.alpha, ctx.variant = batch_and_options[5:7]
        ctx.inplace_backward = inplace_backward
        return loss, pairs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (policy_logits, normalizers, slopes), constants = saved(ctx)
        reference_logits, labels, cu_seqlens = constants
        arguments = (
            *(reference_logits, labels, ctx.shift, cu_seqlens, ctx.ignore_index),
            *(normalizers, slopes, gradients[0], ctx.alpha, ctx.variant),
        )
        others = (None,) * 12
        if not ctx.inplace_backward:
            tensors = policy_logits, *constants, normalizers, slopes, gradients[0]
            direct = may_skip_the_dispatcher(*tensors)
            op = _backward if direct else torch.ops.tdpo_ext.tdpo_loss_backward
            return op(policy_logits, *arguments), *others
        refuse_graph_of_gradients(also="inplace_backward=True, ")
        refuse_overwritten_logits(ctx, policy_logits)
        torch.ops.tdpo_ext.tdpo_loss_backward_(policy_logits, *arguments)
        return policy_logits.detach(), *others


def tdpo_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    batch: Batch,
    options: LossOptions,
    inplace_backward: bool,
) -> TDPOOutput:
    """The op with its gradient, for arguments that ``functional.tdpo_loss`` has checked."""
    loss, pairs = _TDPOLossFunction.apply(  # type: ignore[no-untyped-call]
        policy_logits, reference_logits, inplace_backward, *batch, *options
    )
    return TDPOOutput(loss, *pairs.unbind())


class _TDPOLossOfStatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy_logps: Tensor,
        reference_logps: Tensor,
        forward_kl: Tensor,
        *batch_and_options: Any,
    ) -> tuple[Tensor, Tensor]:
        stats = policy_logps, reference_logps, forward_kl
        labels, _, cu_seqlens, _ = batch_and_options[:4]
        direct = may_skip_the_dispatcher(*stats, labels, cu_seqlens)
        op = _forward_of_stats if direct else torch.ops.tdpo_ext.tdpo_loss_of_stats
        loss, pairs, slopes = op(*stats, *batch_and_options)
        # The statistics give the shape, and autograd sees that the gradient depends on them.
        save(ctx, (policy_logps, slopes), (cu_seqlens,))
        ctx.mark_non_differentiable(pairs)
        ctx.alpha, ctx.variant = batch_and_options[5:7]
        return loss, pairs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (policy_logps, slopes), (cu_seqlens,) = saved(ctx)
        arguments = policy_logps, cu_seqlens, slopes, gradients[0], ctx.alpha, ctx.variant
        of_logps, of_kl = torch.ops.tdpo_ext.tdpo_loss_of_stats_backward(*arguments)
        return of_logps, None, of_kl, *(None,) * 10


def tdpo_loss_of_stats(stats: TokenStats, batch: Batch, options: LossOptions) -> TDPOOutput:
    """The same from statistics of the labels' shape."""
    loss, pairs = _TDPOLossOfStatsFunction.apply(  # type: ignore[no-untyped-call]
        *stats, *batch, *options
    )
    return TDPOOutput(loss, *pairs.unbind())
