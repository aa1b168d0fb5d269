"""TDPO for TRL: ``DPOTrainer`` with another loss; data, reference and all else are TRL's."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor, nn

from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo
from tdpo_ext.integrations.steps import (
    ReferenceAdapter,
    TDPOSteps,
    text_config,
    unwrapped,
    without_dropout,
)
from tdpo_ext.modules import LinearTDPOLoss, TDPOLoss
from tdpo_ext.outputs import TDPOOutput

__all__ = ["TDPOConfig", "TDPOTrainer"]


@dataclass
class TDPOConfig(trl.DPOConfig):
    """``DPOConfig`` and three options; ``beta`` and ``label_smoothing`` are those of TDPO."""

    tdpo_variant: str = field(default="tdpo2", metadata={"help": '"tdpo2" or "tdpo1"'})
    tdpo_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the sequential KL in TDPO2; 0 is DPO."}
    )
    tdpo_fused_head: bool = field(
        default=True,
        metadata={"help": "Compute the loss from hidden states; False: from the logits."},
    )


class TDPOTrainer(TDPOSteps, trl.DPOTrainer):
    """``trl.DPOTrainer`` with the TDPO loss.

    Construction and data are TRL's, PEFT included: there the reference is the adapter "ref" or the
    model without adapters. The loss of an optimizer step is the mean over all its pairs. Logged are
    rewards/*, logps/* and kl/*, means over the pairs since the last log; of TRL's metrics those of
    single logits (entropy, logits/*, mean_token_accuracy) are not.

    Args:
        model, ref_model, train_dataset, processing_class, peft_config, others: as
            ``trl.DPOTrainer``.
        args: ``TDPOConfig``.

    Raises:
        TypeError: ``args`` is no ``TDPOConfig``.
        ValueError: an option of DPO that TDPO cannot honour; the message names it.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **others: Any) -> None:
        args = TDPOConfig() if args is None else args
        _check_options(args, others)
        options = {
            "beta": args.beta,
            "alpha": args.tdpo_alpha,
            "variant": args.tdpo_variant,
            "label_smoothing": args.label_smoothing,
        }
        linear_loss, self.logits_loss = LinearTDPOLoss(**options), TDPOLoss(**options)
        super().__init__(model=model, ref_model=ref_model, args=args, **others)
        self.begin()
        # TRL leaves attention's dropout on, which is a number and no module.
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        for each in models:
            if args.disable_dropout:
                without_dropout(each)
            if args.tdpo_fused_head:
                # What an engine has wrapped already cannot be called without it.
                attach_tdpo(unwrapped(each), linear_loss, probe=unwrapped(each) is each)

    def tdpo_output(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[TDPOOutput, Tensor | None]:
        completion = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        inputs["use_cache"] = False
        coefficient = self._router_coefficient(model)
        router = {"output_router_logits": True} if coefficient else {}
        with torch.no_grad():
            reference = self._of_reference(model, inputs)
        if self.args.tdpo_fused_head:
            outputs = model(**inputs, **router, tdpo=TDPOTargets(reference, labels))
            output = outputs.tdpo
        else:
            outputs = model(**inputs, **router)
            output = self.logits_loss(outputs.logits, reference.to(outputs.logits.dtype), labels)
        return output, coefficient * outputs.aux_loss if coefficient else None

    def _of_reference(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What its head takes, or its logits."""
        separate = self.ref_model is not None
        context = nullcontext() if separate else ReferenceAdapter(unwrapped(model))
        reference = self.ref_model if separate else model
        with context:
            if self.args.tdpo_fused_head:
                return reference(**inputs, tdpo=HEAD_INPUTS)
            return reference(**inputs).logits

    def _router_coefficient(self, model: nn.Module) -> float:
        """Of the auxiliary loss of a mixture of experts; 0 for other models."""
        config = text_config(model)
        if not hasattr(config, "output_router_logits"):
            return 0.0
        asked = getattr(self.args, "router_aux_loss_coef", None)
        own = getattr(config, "router_aux_loss_coef", 0.0)
        return float(own if asked is None else asked)


_ONLY: dict[str, tuple[Any, ...]] = {
    "loss_type": ("sigmoid", ["sigmoid"]),
    "loss_weights": (None, [1.0]),
    "ld_alpha": (None,),
    "rpo_alpha": (None,),
    "f_divergence_type": ("reverse_kl",),
    "use_weighting": (False,),
    "reference_free": (False, None),
    "precompute_ref_log_probs": (False,),
    "padding_free": (False,),
    "use_liger_kernel": (False,),
    "use_logits_to_keep": (False,),
}
_WHY = {
    "precompute_ref_log_probs": "it keeps one number per sequence; the KL needs the whole "
    "distribution of the reference at every token",
    "use_liger_kernel": "it replaces the model's forward or its loss",
}


def _check_options(args: Any, others: dict[str, Any]) -> None:
    if not isinstance(args, TDPOConfig):
        raise TypeError(f"args must be a TDPOConfig, got {type(args).__name__}")
    for name, allowed in _ONLY.items():
        value = getattr(args, name, allowed[0])  # of options that only some versions of TRL have
        value = getattr(value, "value", value)
        if value not in allowed:
            why = _WHY.get(name, "it belongs to another loss than TDPO")
            raise ValueError(f"{name} must be {allowed[0]!r}, got {value!r}: {why}")
    if others.get("compute_metrics") is not None:
        raise ValueError("compute_metrics cannot be honoured: evaluation has no logits")
