"""The losses as modules that hold their options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tdpo_ext import checks
from tdpo_ext.checks import Reduction, Variant
from tdpo_ext.functional import tdpo_loss
from tdpo_ext.fused_head.functional import linear_tdpo_loss
from tdpo_ext.loss import LossOptions
from tdpo_ext.outputs import TDPOOutput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _LossModule(nn.Module):
    """The options that both losses have."""

    def __init__(
        self,
        beta: float,
        alpha: float,
        variant: Variant,
        *,
        label_smoothing: float,
        average_log_prob: bool,
        reduction: Reduction,
        ignore_index: int,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        LossOptions(beta, alpha, variant, label_smoothing, average_log_prob, reduction).checked()
        checks.check_ignore_index(ignore_index)
        self.beta = beta
        self.alpha = alpha
        self.variant = variant
        self.label_smoothing = label_smoothing
        self.average_log_prob = average_log_prob
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.process_group = process_group

    def options(self) -> dict[str, Any]:
        """The options, as keyword arguments of the function."""
        return {
            "beta": self.beta,
            "alpha": self.alpha,
            "variant": self.variant,
            "label_smoothing": self.label_smoothing,
            "average_log_prob": self.average_log_prob,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "process_group": self.process_group,
        }

    def extra_repr(self) -> str:
        options = self.options()
        if self.process_group is None:
            del options["process_group"]
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class TDPOLoss(_LossModule):
    """``tdpo_ext.tdpo_loss`` as a module that holds the options; it has no parameters.

    Args:
        beta: Strength of the KL constraint, see ``tdpo_loss``.
        alpha: Weight of the sequential KL in TDPO2, see ``tdpo_loss``.
        variant: "tdpo2" or "tdpo1", see ``tdpo_loss``.
        label_smoothing: Probability of a reversed preference, see ``tdpo_loss``.
        average_log_prob: Means over tokens instead of sums, see ``tdpo_loss``.
        reduction: "mean", "sum" or "none" over the pairs, see ``tdpo_loss``.
        ignore_index: The label of tokens that do not count, see ``tdpo_loss``.
        inplace_backward: Let the gradient overwrite the policy's logits, see ``tdpo_loss``.
        process_group: The processes that share the vocabulary, see ``token_stats``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is outside its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.5,
        variant: Variant = "tdpo2",
        *,
        label_smoothing: float = 0.0,
        average_log_prob: bool = False,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            beta,
            alpha,
            variant,
            label_smoothing=label_smoothing,
            average_log_prob=average_log_prob,
            reduction=reduction,
            ignore_index=ignore_index,
            process_group=process_group,
        )
        self.inplace_backward = inplace_backward

    def options(self) -> dict[str, Any]:
        """The options, as keyword arguments of ``tdpo_loss``."""
        return {**super().options(), "inplace_backward": self.inplace_backward}

    def forward(
        self,
        policy_logits: Tensor,
        reference_logits: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> TDPOOutput:
        """Call ``tdpo_ext.tdpo_loss`` with the options of this module.

        Args:
            policy_logits: ``[2B, T, V]``, or ``[total, V]`` with cu_seqlens, float32, bfloat16,
                float16 or float64, see ``tdpo_loss``.
            reference_logits: Those of the reference, of the same shape and dtype.
            labels: ``[2B, T]`` or ``[total]``, int64 or int32, as the model saw them.
            shift_labels: ``[2B, T]`` or ``[total]``, int64 or int32, already aligned with the
                logits. Give exactly one of labels and shift_labels.
            cu_seqlens: ``[2B + 1]``, int32 or int64, the boundaries of packed sequences.

        Returns:
            ``TDPOOutput``; only its ``loss`` carries a gradient.

        Raises:
            TypeError: As ``tdpo_loss``.
            ValueError: As ``tdpo_loss``.
            IndexError: As ``tdpo_loss``.
            RuntimeError: As ``tdpo_loss``.
        """
        return tdpo_loss(
            policy_logits,
            reference_logits,
            labels,
            shift_labels=shift_labels,
            cu_seqlens=cu_seqlens,
            **self.options(),
        )


class LinearTDPOLoss(_LossModule):
    """``tdpo_ext.linear_tdpo_loss`` as a module that holds the options; it has no parameters.

    Args:
        beta: Strength of the KL constraint, see ``tdpo_loss``.
        alpha: Weight of the sequential KL in TDPO2, see ``tdpo_loss``.
        variant: "tdpo2" or "tdpo1", see ``tdpo_loss``.
        label_smoothing: Probability of a reversed preference, see ``tdpo_loss``.
        average_log_prob: Means over tokens instead of sums, see ``tdpo_loss``.
        reduction: "mean", "sum" or "none" over the pairs, see ``tdpo_loss``.
        ignore_index: The label of tokens that do not count, see ``tdpo_loss``.
        logit_scale: Factor of the policy's logits, see ``linear_token_stats``.
        logit_softcap: Softcap of the policy's logits, see ``linear_token_stats``.
        reference_logit_scale: Factor of the reference's logits; None: the policy's.
        reference_logit_softcap: Softcap of the reference's logits; None: the policy's.
        chunk_bytes: Scratch memory in bytes, see ``linear_tdpo_loss``.
        process_group: The processes that share the vocabulary, see ``linear_token_stats``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is outside its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.5,
        variant: Variant = "tdpo2",
        *,
        label_smoothing: float = 0.0,
        average_log_prob: bool = False,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        reference_logit_scale: float | None = None,
        reference_logit_softcap: float | None = None,
        chunk_bytes: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            beta,
            alpha,
            variant,
            label_smoothing=label_smoothing,
            average_log_prob=average_log_prob,
            reduction=reduction,
            ignore_index=ignore_index,
            process_group=process_group,
        )
        checks.logit_options(
            logit_scale, logit_softcap, reference_logit_scale, reference_logit_softcap
        )
        checks.check_chunk_bytes(chunk_bytes)
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.reference_logit_scale = reference_logit_scale
        self.reference_logit_softcap = reference_logit_softcap
        self.chunk_bytes = chunk_bytes

    def options(self) -> dict[str, Any]:
        """The options, as keyword arguments of ``linear_tdpo_loss``."""
        return {
            **super().options(),
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "reference_logit_scale": self.reference_logit_scale,
            "reference_logit_softcap": self.reference_logit_softcap,
            "chunk_bytes": self.chunk_bytes,
        }

    def forward(
        self,
        policy_hidden: Tensor,
        policy_weight: Tensor,
        reference_hidden: Tensor,
        reference_weight: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        policy_bias: Tensor | None = None,
        reference_bias: Tensor | None = None,
    ) -> TDPOOutput:
        """Call ``tdpo_ext.linear_tdpo_loss`` with the options of this module.

        Args:
            policy_hidden: ``[2B, T, H]``, or ``[total, H]`` with cu_seqlens, float32, bfloat16,
                float16 or float64, see ``linear_tdpo_loss``.
            policy_weight: ``[V, H]``, of the dtype of policy_hidden.
            reference_hidden: ``[2B, T, H_ref]`` or ``[total, H_ref]``, of any of these dtypes
                (float64 if and only if policy_hidden is).
            reference_weight: ``[V, H_ref]``, of the dtype of reference_hidden.
            labels: ``[2B, T]`` or ``[total]``, int64 or int32, as the model saw them.
            shift_labels: ``[2B, T]`` or ``[total]``, int64 or int32, already aligned with the
                hidden states. Give exactly one of labels and shift_labels.
            cu_seqlens: ``[2B + 1]``, int32 or int64, the boundaries of packed sequences.
            policy_bias: ``[V]``, of the dtype of policy_hidden, or None.
            reference_bias: ``[V]``, of the dtype of reference_hidden, or None.

        Returns:
            ``TDPOOutput``; only its ``loss`` carries a gradient.

        Raises:
            TypeError: As ``linear_tdpo_loss``.
            ValueError: As ``linear_tdpo_loss``.
            IndexError: As ``linear_tdpo_loss``.
            RuntimeError: As ``linear_tdpo_loss``.
        """
        return linear_tdpo_loss(
            policy_hidden,
            policy_weight,
            reference_hidden,
            reference_weight,
            labels,
            shift_labels=shift_labels,
            cu_seqlens=cu_seqlens,
            policy_bias=policy_bias,
            reference_bias=reference_bias,
            **self.options(),
        )
