"""The ops that take logits: schemas, fakes, implementations, and their autograd.Function.

Each op serves all devices: ``kernels.py`` chooses the kernel, or plain PyTorch, for its tensors.
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
from tdpo_ext.outputs import TokenStats
from tdpo_ext.token_statistics import kernels

library.define(
    "token_stats(Tensor policy_logits, Tensor reference_logits, Tensor labels, int ignore_index)"
    " -> (Tensor policy_logps, Tensor reference_logps, Tensor forward_kl, Tensor normalizers)"
)
library.define(
    "token_stats_of_shard(Tensor policy_logits, Tensor reference_logits, Tensor labels,"
    " int ignore_index, str group, SymInt start, SymInt total)"
    " -> (Tensor policy_logps, Tensor reference_logps, Tensor forward_kl, Tensor normalizers)"
)
_backward_arguments = (
    "Tensor reference_logits, Tensor labels, Tensor normalizers, Tensor grad_policy_logps,"
    " Tensor grad_forward_kl, int ignore_index"
)
library.define(
    f"token_stats_backward(Tensor policy_logits, {_backward_arguments}) -> Tensor policy_grad"
)
library.define(f"token_stats_backward_(Tensor(a!) policy_logits, {_backward_arguments}) -> ()")


def _forward_fake(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, *options: Any
) -> kernels.Outputs:
    return kernels.empty_outputs(policy_logits, labels.shape)


register("token_stats", kernels.token_stats, _forward_fake)
register("token_stats_of_shard", kernels.token_stats_of_shard, _forward_fake)
_backward = register_backward("token_stats_backward", kernels.write_gradient)


# --- autograd -------------------------------------------------------------------------------------


class _TokenStatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy_logits: Tensor,
        reference_logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        inplace_backward: bool,
        shard: Shard | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = policy_logits, reference_logits, labels, ignore_index
        if shard is None:
            direct = may_skip_the_dispatcher(policy_logits, reference_logits, labels)
            op = kernels.token_stats if direct else torch.ops.tdpo_ext.token_stats
            outputs = op(*arguments)
        else:
            outputs = torch.ops.tdpo_ext.token_stats_of_shard(*arguments, *shard)
            # Backward needs no other process: to it this part is a tile of the vocabulary.
            labels, ignore_index = shard.own_labels(labels, ignore_index), IGNORED
        policy_logps, reference_logps, forward_kl, normalizers = outputs
        save(ctx, (policy_logits, normalizers), (reference_logits, labels))
        ctx.mark_non_differentiable(reference_logps)
        ctx.ignore_index = ignore_index
        ctx.inplace_backward = inplace_backward
        return policy_logps, reference_logps, forward_kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (policy_logits, normalizers), (reference_logits, labels) = saved(ctx)
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
            direct = may_skip_the_dispatcher(policy_logits, *arguments[:-1])
            op = _backward if direct else torch.ops.tdpo_ext.token_stats_backward
            return op(policy_logits, *arguments), None, None, None, None, None
        refuse_graph_of_gradients(also="inplace_backward=True, ")
        refuse_overwritten_logits(ctx, policy_logits)
        torch.ops.tdpo_ext.token_stats_backward_(policy_logits, *arguments)
        return policy_logits.detach(), None, None, None, None, None


def token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    inplace_backward: bool,
    shard: Shard | None = None,
) -> TokenStats:
    """The op with its gradient, for arguments that ``functional.token_stats`` has checked."""
    stats = _TokenStatsFunction.apply(  # type: ignore[no-untyped-call]
        policy_logits, reference_logits, labels, ignore_index, inplace_backward, shard
    )
    return TokenStats(*stats)
