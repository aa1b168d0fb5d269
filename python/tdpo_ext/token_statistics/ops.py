"""torch.library ops: schemas, fakes, the kernels under them, and the autograd seam.

One op name for all devices: ``kernels.py`` chooses what serves a tensor. The autograd.Function
stands outside the op, so torch.compile sees the op and traces the Function.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.distributed import IGNORED, Shard
from tdpo_ext.outputs import TokenStats
from tdpo_ext.token_statistics import kernels

_library = torch.library.Library("tdpo_ext", "FRAGMENT")
_library.define(
    "token_stats(Tensor policy_logits, Tensor reference_logits, Tensor labels, int ignore_index)"
    " -> (Tensor policy_logps, Tensor reference_logps, Tensor forward_kl, Tensor normalizers)"
)
_library.define(
    "token_stats_of_shard(Tensor policy_logits, Tensor reference_logits, Tensor labels,"
    " int ignore_index, str group, SymInt start, SymInt total)"
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


def _forward_fake(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, *options: Any
) -> kernels.Outputs:
    return kernels.empty_outputs(policy_logits, labels.shape)


def _backward(policy_logits: Tensor, *arguments: Any) -> Tensor:
    gradient = policy_logits.new_empty(policy_logits.shape)
    kernels.write_gradient(gradient, policy_logits, *arguments)
    return gradient


def _backward_fake(policy_logits: Tensor, *arguments: Any) -> Tensor:
    return policy_logits.new_empty(policy_logits.shape)


def _backward_inplace(policy_logits: Tensor, *arguments: Any) -> None:
    checks.check_inplace_backward(policy_logits)
    kernels.write_gradient(policy_logits, policy_logits, *arguments)
    # Autograd does not see what a kernel writes, and must: a second backward has to raise.
    torch.autograd.graph.increment_version(policy_logits)


def _backward_inplace_fake(policy_logits: Tensor, *arguments: Any) -> None:
    return None


for _name, _function, _fake in (
    ("token_stats", kernels.token_stats, _forward_fake),
    ("token_stats_of_shard", kernels.token_stats_of_shard, _forward_fake),
    ("token_stats_backward", _backward, _backward_fake),
    ("token_stats_backward_", _backward_inplace, _backward_inplace_fake),
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
    "tdpo_ext::token_stats_backward", _refuse_second_derivative, lib=_library
)


@functools.cache
def _keys_of_plain_tensors(device: torch.device) -> Any:
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device=device))


def _may_skip_the_dispatcher(*tensors: Tensor) -> bool:
    """Whether nobody would see the op: no compiler, no dispatch mode, no second derivative, and
    tensors that are what they seem, no subclasses, batches or lazy zeros.

    Then the kernels are called as they are, which saves a small call an eighth of its time.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    plain = _keys_of_plain_tensors(tensors[0].device)
    return all(torch._C._dispatch_keys(tensor) == plain for tensor in tensors)


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
            direct = _may_skip_the_dispatcher(policy_logits, reference_logits, labels)
            op = kernels.token_stats if direct else torch.ops.tdpo_ext.token_stats
            outputs = op(*arguments)
        else:
            outputs = torch.ops.tdpo_ext.token_stats_of_shard(*arguments, *shard)
            # Backward is a tile's, and no other process takes part in it.
            labels, ignore_index = shard.own_labels(labels, ignore_index), IGNORED
        policy_logps, reference_logps, forward_kl, normalizers = outputs
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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
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
            direct = _may_skip_the_dispatcher(policy_logits, *arguments[:-1])
            op = _backward if direct else torch.ops.tdpo_ext.token_stats_backward
            return op(policy_logits, *arguments), None, None, None, None, None
        if torch.is_grad_enabled():
            raise RuntimeError(f"{_SECOND_DERIVATIVE} (inplace_backward=True, create_graph=True)")
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
    """The op with its gradient; arguments are checked by ``functional.token_stats``."""
    stats = _TokenStatsFunction.apply(  # type: ignore[no-untyped-call]
        policy_logits, reference_logits, labels, ignore_index, inplace_backward, shard
    )
    return TokenStats(*stats)
