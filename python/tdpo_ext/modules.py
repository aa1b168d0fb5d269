"""The loss as a module, for those who keep their options in one."""

from __future__ import annotations

from torch import Tensor, nn

from tdpo_ext import checks
from tdpo_ext.functional import tdpo_loss
from tdpo_ext.outputs import TDPOOutput


class TDPOLoss(nn.Module):
    """``tdpo_ext.tdpo_loss`` with its options fixed at construction; it has no parameters.

    Args:
        beta, alpha, variant, label_smoothing, average_log_prob, reduction, ignore_index,
        inplace_backward: as ``tdpo_ext.tdpo_loss``.

    Raises:
        TypeError, ValueError: an option is of the wrong type or outside its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.5,
        variant: str = "tdpo2",
        *,
        label_smoothing: float = 0.0,
        average_log_prob: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        checks.check_loss_options(beta, alpha, variant, label_smoothing, reduction)
        checks.check_ignore_index(ignore_index)
        self.beta = beta
        self.alpha = alpha
        self.variant = variant
        self.label_smoothing = label_smoothing
        self.average_log_prob = average_log_prob
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.inplace_backward = inplace_backward

    def forward(
        self,
        policy_logits: Tensor,
        reference_logits: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> TDPOOutput:
        """Shapes and errors as ``tdpo_ext.tdpo_loss``."""
        return tdpo_loss(
            policy_logits,
            reference_logits,
            labels,
            shift_labels=shift_labels,
            cu_seqlens=cu_seqlens,
            beta=self.beta,
            alpha=self.alpha,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
            average_log_prob=self.average_log_prob,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, alpha={self.alpha}, variant={self.variant!r}, "
            f"label_smoothing={self.label_smoothing}, average_log_prob={self.average_log_prob}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"inplace_backward={self.inplace_backward}"
        )
