"""The ops for divergences in both directions and entropies, and their autograd.Function.

As ``ops.py`` has them for the statistics that TDPO needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdpo_ext.autograd import (
    library,
    may_skip_the_dispatcher,
    refuse_graph_of_gradients,
    refuse_overwritten_logits,
    register,
    register_backward,
    save,
    saved,
)
from tdpo_ext.distributed import IGNORED, Shard
from tdpo_ext.outputs import TokenDivergences
from tdpo_ext.token_statistics import divergence_kernels as kernels

_OUTPUTS = (
    "(Tensor policy_logps, Tensor reference_logps, Tensor forward_kl, Tensor reverse_kl,"
    " Tensor policy_entropy, Tensor reference_entropy, Tensor normalizers)"
)
library.define(
    "token_divergences(Tensor policy_logits, Tensor reference_logits, Tensor labels,"
    f" int ignore_index, bool unlabelled) -> {_OUTPUTS}"
)
library.define(
    "token_divergences_of_shard(Tensor policy_logits, Tensor reference_logits, Tensor labels,"
    f" int ignore_index, bool unlabelled, str group, SymInt start, SymInt total) -> {_OUTPUTS}"
)
_backward_arguments = (
    "Tensor reference_logits, Tensor labels, Tensor normalizers, Tensor grad_policy_logps,"
    " Tensor grad_forward_kl, Tensor grad_reverse_kl, Tensor grad_policy_entropy, int ignore_index"
)
library.define(
    f"token_divergences_backward(Tensor policy_logits, {_backward_arguments}) -> Tensor policy_grad"
)
library.define(
    f"token_divergences_backward_(Tensor(a!) policy_logits, {_backward_arguments}) -> ()"
)


def _forward_fake(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, *options: Any
) -> kernels.Outputs:
    return kernels.empty_outputs(policy_logits, labels.shape)


register("token_divergences", kernels.forward, _forward_fake)
register("token_divergences_of_shard", kernels.forward_of_shard, _forward_fake)
_backward = register_backward("token_divergences_backward", kernels.write_gradient)


class _TokenDivergencesFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy_logits: Tensor,
        reference_logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        unlabelled: bool,
        inplace_backward: bool,
        shard: Shard | None,
    ) -> tuple[Tensor, ...]:
        arguments = policy_logits, reference_logits, labels, ignore_index, unlabelled
        if shard is None:
            direct = may_skip_the_dispatcher(policy_logits, reference_logits, labels)
            op = kernels.forward if direct else torch.ops.tdpo_ext.token_divergences
            outputs = op(*arguments)
        else:
            outputs = torch.ops.tdpo_ext.token_divergences_of_shard(*arguments, *shard)
            # Backward needs no other process: to it this part is a tile of the vocabulary.
            labels, ignore_index = shard.own_labels(labels, ignore_index), IGNORED
        *of_rows, normalizers = outputs
        save(ctx, (policy_logits, normalizers), (reference_logits, labels))
        _, reference_logps, _, _, _, reference_entropy = of_rows
        ctx.mark_non_differentiable(reference_logps, reference_entropy)
        ctx.ignore_index = ignore_index
        ctx.inplace_backward = inplace_backward
        return tuple(of_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (policy_logits, normalizers), (reference_logits, labels) = saved(ctx)
        logps, _, forward_kl, reverse_kl, entropy, _ = gradients
        tensors = reference_logits, labels, normalizers, logps, forward_kl, reverse_kl, entropy
        others = None, None, None, None, None, None
        if not ctx.inplace_backward:
            direct = may_skip_the_dispatcher(policy_logits, *tensors)
            op = _backward if direct else torch.ops.tdpo_ext.token_divergences_backward
            return op(policy_logits, *tensors, ctx.ignore_index), *others
        refuse_graph_of_gradients(also="inplace_backward=True, ")
        refuse_overwritten_logits(ctx, policy_logits)
        torch.ops.tdpo_ext.token_divergences_backward_(policy_logits, *tensors, ctx.ignore_index)
        return policy_logits.detach(), *others


def token_divergences(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    unlabelled: bool,
    inplace_backward: bool,
    shard: Shard | None = None,
) -> TokenDivergences:
    """The op with its gradient, for arguments that ``functional.token_divergences`` has checked.

    ``unlabelled``: labels outside the vocabulary stand for none.
    """
    outputs = _TokenDivergencesFunction.apply(  # type: ignore[no-untyped-call]
        policy_logits,
        reference_logits,
        labels,
        ignore_index,
        unlabelled,
        inplace_backward,
        shard,
    )
    return TokenDivergences(*outputs)
