"""What the functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Three numbers per token, in nats, each shaped like the labels; 0 where the label is ignored.

    float32, or float64 for float64 logits.
    """

    policy_logps: Tensor
    """log pi(y_t | s_t), never above 0."""

    reference_logps: Tensor
    """log pi_ref(y_t | s_t), never above 0."""

    forward_kl: Tensor
    """KL(pi_ref(.|s_t) || pi(.|s_t)) over the whole vocabulary, never below 0."""


class TDPOOutput(NamedTuple):
    """The loss and what is worth logging about it; only ``loss`` carries a gradient.

    Sequence quantities are in nats and shaped ``[B]``, one entry for each (chosen, rejected) pair.
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
    """log pi(y_w | x): the policy's log-probability of the chosen response."""

    rejected_logps: Tensor
    """log pi(y_l | x): the policy's log-probability of the rejected response."""

    chosen_kl: Tensor
    """SeqKL(x, y_w; pi_ref || pi) along the chosen response."""

    rejected_kl: Tensor
    """SeqKL(x, y_l; pi_ref || pi) along the rejected response."""

    def metrics(self) -> dict[str, Tensor]:
        """Means over the batch as 0-d tensors on the loss's device, under the names TRL logs.

        Nothing is copied to the host: call ``.item()`` when you log, not before.
        """
        return {name: values.mean() for name, values in self.metrics_of_pairs().items()}

    def metrics_of_pairs(self) -> dict[str, Tensor]:
        """The same of each pair, ``[B]``. ``kl/margin`` is chosen minus rejected, as in the paper's
        code."""
        accuracies = self.chosen_rewards > self.rejected_rewards
        return {
            "rewards/chosen": self.chosen_rewards,
            "rewards/rejected": self.rejected_rewards,
            "rewards/accuracies": accuracies.to(self.losses.dtype),
            "rewards/margins": self.chosen_rewards - self.rejected_rewards,
            "logps/chosen": self.chosen_logps,
            "logps/rejected": self.rejected_logps,
            "kl/chosen": self.chosen_kl,
            "kl/rejected": self.rejected_kl,
            "kl/margin": self.chosen_kl - self.rejected_kl,
        }
