"""The named tuples that the public functions return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


class TokenStats(NamedTuple):
    """Three numbers per token, in nats, each of the labels' shape; 0 where the label is ignored.

    They are float32, or float64 for float64 logits.
    """

    policy_logps: Tensor
    """log pi(y_t | s_t), never above 0."""

    reference_logps: Tensor
    """log pi_ref(y_t | s_t), never above 0. No gradient."""

    forward_kl: Tensor
    """KL(pi_ref(.|s_t) || pi(.|s_t)) over the whole vocabulary, never below 0."""


class TokenDivergences(NamedTuple):
    """Numbers per token, in nats, each of the shape that labels have.

    None where not asked for; 0 in rows that are left out. They are float32, or float64 for float64
    logits.
    """

    policy_logps: Tensor | None = None
    """log pi(y_t | s_t), never above 0."""

    reference_logps: Tensor | None = None
    """log pi_ref(y_t | s_t), never above 0. No gradient."""

    forward_kl: Tensor | None = None
    """KL(pi_ref(.|s_t) || pi(.|s_t)) over the whole vocabulary, never below 0."""

    reverse_kl: Tensor | None = None
    """KL(pi(.|s_t) || pi_ref(.|s_t)) over the whole vocabulary, never below 0."""

    policy_entropy: Tensor | None = None
    """-sum_v pi(v|s_t) log pi(v|s_t), never below 0."""

    reference_entropy: Tensor | None = None
    """-sum_v pi_ref(v|s_t) log pi_ref(v|s_t), never below 0. No gradient."""


class TDPOOutput(NamedTuple):
    """The loss and quantities to log; only ``loss`` carries a gradient.

    All are float32, or float64 for float64 inputs. Quantities of sequences are in nats and have
    shape ``[B]``, one entry for each pair (chosen, rejected). They are sums over the response's
    tokens; with ``average_log_prob=True`` logps, KLs and rewards are means per token.
    """

    loss: Tensor
    """A scalar for reduction "mean" or "sum"; ``[B]`` for "none"."""

    losses: Tensor
    """The loss of each pair, ``[B]``."""

    chosen_rewards: Tensor
    """beta * (margin + sequential KL) of the chosen response, as the paper's code logs it."""

    rejected_rewards: Tensor
    """beta * (margin + sequential KL) of the rejected response."""

    chosen_logps: Tensor
    """The policy's log-probability of the chosen response: log pi(y_w | x), or its mean per
    token."""

    rejected_logps: Tensor
    """The policy's log-probability of the rejected response: log pi(y_l | x), or its mean per
    token."""

    chosen_kl: Tensor
    """SeqKL(x, y_w; pi_ref || pi) along the chosen response."""

    rejected_kl: Tensor
    """SeqKL(x, y_l; pi_ref || pi) along the rejected response."""

    chosen_dpo_rewards: Tensor
    """beta * margin of the chosen response: DPO's reward, which has no KL."""

    rejected_dpo_rewards: Tensor
    """beta * margin of the rejected response."""

    def metrics(self) -> dict[str, Tensor]:
        """Means over the batch, by name, as 0-d tensors on the loss's device.

        ``rewards/*`` and ``logps/*`` are what TRL logs under these names, so curves of DPO and of
        TDPO can be compared. ``tdpo_rewards/*`` are the rewards of the paper's code, which contain
        the KL. Nothing is copied to the host: call ``.item()`` when you log, not before.

        Returns:
            A dictionary with these keys. ``rewards/`` and ``tdpo_rewards/``: ``chosen``,
            ``rejected``, ``accuracies`` (chosen above rejected), ``margins`` (chosen - rejected).
            ``logps/``: ``chosen``, ``rejected``. ``kl/``: ``chosen``, ``rejected``, ``margin``
            (chosen - rejected).
        """
        of_pairs = self.metrics_of_pairs()
        means = torch.stack([*of_pairs.values()]).mean(dim=1)
        return dict(zip(of_pairs, means.unbind(), strict=True))

    def metrics_of_pairs(self) -> dict[str, Tensor]:
        """The same quantities for each pair, ``[B]``, under the same keys."""
        return {
            **self._rewards("rewards", self.chosen_dpo_rewards, self.rejected_dpo_rewards),
            **self._rewards("tdpo_rewards", self.chosen_rewards, self.rejected_rewards),
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
            "kl/chosen": self.chosen_kl,
            "kl/rejected": self.rejected_kl,
            "kl/margin": self.chosen_kl - self.rejected_kl,
        }

    def _rewards(self, prefix: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        return {
            f"{prefix}/chosen": chosen,
            f"{prefix}/rejected": rejected,
            f"{prefix}/accuracies": (chosen > rejected).to(self.losses.dtype),
            f"{prefix}/margins": chosen - rejected,
        }


# torch.export saves a module that returns a named tuple only if the tuple is registered by a name.
# The function that does it is not public; where it is missing, only such saving fails.
_register = getattr(_pytree, "_register_namedtuple", None)
if _register is not None:
    for _class in (TokenStats, TokenDivergences, TDPOOutput):
        _register(_class, serialized_type_name=f"tdpo_ext.{_class.__name__}")
