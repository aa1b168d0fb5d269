"""TDPO for ``transformers.Trainer``: a collator of preference pairs and a trainer.

``attach_tdpo`` alone serves any other trainer: see ``attach.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tdpo_ext.integrations.attach import (
    HEAD_INPUTS,
    TDPOTargets,
    attach_tdpo,
    detach_tdpo,
)
from tdpo_ext.integrations.cached_reference import CachedReference, cache_reference_of_trainer
from tdpo_ext.integrations.hidden import (
    HeadInputs,
    decoder_inputs,
    language_model,
    router_coefficient,
)
from tdpo_ext.integrations.preferences import (
    PreferenceBatch,
    PreferenceCollator,
    without_empty_pairs,
)
from tdpo_ext.integrations.steps import (
    ReferenceAdapter,
    RouterLoss,
    TDPOSteps,
    text_config,
    unwrapped,
    without_dropout,
)
from tdpo_ext.modules import LinearTDPOLoss
from tdpo_ext.outputs import TDPOOutput

__all__ = [
    "CachedReference",
    "PreferenceBatch",
    "PreferenceCollator",
    "TDPOTrainer",
    "attach_tdpo",
    "detach_tdpo",
]


class TDPOTrainer(TDPOSteps, transformers.Trainer):
    """``transformers.Trainer`` whose loss is TDPO, from the fused head inside the model's forward.

    The mean of the loss is over all pairs of an optimizer step, however they fall into
    micro-batches and processes. Metrics are those of ``TDPOOutput.metrics()``, means over the pairs
    since the last log, and ``num_tokens``, all tokens trained on. Those of an evaluation, its loss
    too, are means over all its pairs, each counted once.

    Args:
        model: a Hugging Face language model, or a PEFT model of one; ``attach_tdpo`` is called on
            it. Its dropout is switched off.
        args: ``TrainingArguments``.
        loss: the loss and its options; reduction "mean".
        reference: a model; or ``CachedReference.of(model)``, whose hidden states come as
            ``reference_hidden`` in the batches (``PreferenceCollator``). None: for a PEFT model its
            adapter "ref" or, without one, the model without adapters; else a frozen copy of it. A
            model is held whole on every device, but partitioned with ZeRO-3.
        precompute_reference: a folder: the reference runs once over all data sets, its hidden
            states go to disk there (``precompute_reference``), and the model is let go.
        **others: as ``transformers.Trainer``. ``data_collator`` is a ``PreferenceCollator``, or
            gives such batches; None: one without ``max_length``. Examples of which it leaves no
            response are left out of lists, ``datasets.Dataset`` and iterable data sets, with a
            warning that says how many.

    Raises:
        ValueError: an option that TDPO cannot honour: ``compute_metrics``,
            ``preprocess_logits_for_metrics``, ``compute_loss_func``, ``model_init``,
            ``label_smoothing_factor`` (the loss has ``label_smoothing``), ``use_liger_kernel``,
            ``dispatch_batches=True`` in ``accelerator_config``, several cards in one process.
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments | None = None,
        *,
        loss: LinearTDPOLoss | None = None,
        reference: nn.Module | CachedReference | None = None,
        precompute_reference: str | Path | None = None,
        **others: Any,
    ) -> None:
        loss = LinearTDPOLoss() if loss is None else loss
        args = transformers.TrainingArguments() if args is None else args
        _check_options(args, loss, others)
        args.remove_unused_columns = False  # the collator uses what forward does not take
        collator = others.get("data_collator")
        if collator is None:
            collator = _default_collator(model, others.get("processing_class"))
        others["data_collator"] = collator
        for name in ("train_dataset", "eval_dataset"):
            if others.get(name) is not None:
                others[name] = without_empty_pairs(others[name], collator, name)
        if reference is None and not hasattr(model, "peft_config"):
            _check_copyable(model)
            reference = copy.deepcopy(detach_tdpo(model))
        without_dropout(model)
        super().__init__(attach_tdpo(model, loss), args, **others)
        self.begin()
        self.reference = reference
        if isinstance(reference, nn.Module):
            attach_tdpo(without_dropout(reference)).requires_grad_(False).eval()
            self.reference = self._placed(reference)
        elif reference is not None:
            self.reference = reference.to(self.accelerator.device)
        if precompute_reference is not None:
            if isinstance(self.reference, CachedReference):
                raise ValueError(
                    "precompute_reference and a CachedReference were both given; pass one of them"
                )
            self.reference = cache_reference_of_trainer(self, self.reference, precompute_reference)

    def _placed(self, reference: nn.Module) -> nn.Module:
        """On this process's device, whole, or partitioned as the policy is by ZeRO-3; in the type
        that DeepSpeed casts the policy's weights to."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None:
            return reference.to(self.accelerator.device)
        settings = plugin.deepspeed_config
        casts = {name: settings[name] for name in ("bf16", "fp16") if _enabled(settings, name)}
        if plugin.zero_stage != 3:
            for name in casts:
                dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
                for parameter in reference.parameters():  # buffers stay as they are
                    parameter.data = parameter.data.to(dtype)
            return reference.to(self.accelerator.device)
        import deepspeed

        zero = {**settings["zero_optimization"]}
        for name in ("offload_optimizer", "reduce_bucket_size"):  # of training alone
            zero.pop(name, None)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **casts}
        engine: nn.Module = deepspeed.initialize(model=reference, config=config)[0]
        return engine

    def tdpo_output(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[TDPOOutput, RouterLoss | None]:
        if "labels" not in inputs:
            raise ValueError(
                f"the batch has {', '.join(inputs)} but no labels ([2B, T], -100 on prompt and "
                "padding); use a PreferenceCollator as data_collator"
            )
        labels = inputs.pop("labels")
        cached = inputs.pop("reference_hidden", None)
        inner = language_model(unwrapped(model))
        targets: dict[str, Any] = {"labels": labels}
        if inner.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = decoder_inputs(inner, labels)
            targets = {"shift_labels": labels}
        reference = self._reference_inputs(model, inputs, cached)
        output = model(**inputs, tdpo=TDPOTargets(reference, **targets))
        if output.aux_loss is None:
            return output.tdpo, None
        return output.tdpo, RouterLoss(output.aux_loss, router_coefficient(unwrapped(model)))

    def _reference_inputs(
        self, model: nn.Module, inputs: dict[str, Any], cached: Tensor | None
    ) -> HeadInputs:
        if isinstance(self.reference, CachedReference):
            return self.reference.with_hidden(cached)
        if hasattr(text_config(model), "output_router_logits"):
            inputs = {**inputs, "output_router_logits": False}
        with self.reference_precision():
            if self.reference is not None:
                result = self.reference(**inputs, tdpo=HEAD_INPUTS)
            else:
                with ReferenceAdapter(unwrapped(model)):
                    result = model(**inputs, tdpo=HEAD_INPUTS)
        assert isinstance(result, HeadInputs)
        return result


def _enabled(settings: dict[str, Any], name: str) -> bool:
    return settings.get(name, {}).get("enabled") is True  # the Trainer has filled in what is "auto"


def _default_collator(model: nn.Module, processing_class: Any) -> PreferenceCollator:
    """What fills the rows is masked, so that any token will do."""
    config = text_config(model)
    known = (getattr(each, "pad_token_id", None) for each in (processing_class, config))
    pad = next((token for token in known if token is not None), 0)
    return PreferenceCollator(pad, encoder_decoder=language_model(model).config.is_encoder_decoder)


def _check_copyable(model: nn.Module) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "the model's parameters are partitioned (ZeRO-3), so no reference can be copied from "
            "it; load the reference with from_pretrained as well and pass it as reference="
        )


def _check_options(
    args: transformers.TrainingArguments, loss: LinearTDPOLoss, others: dict[str, Any]
) -> None:
    if loss.reduction != "mean":
        raise ValueError(f'loss must have reduction "mean", got "{loss.reduction}"')
    for name, reason in _REASONS.items():
        if others.get(name) is not None:
            raise ValueError(f"{name} cannot be honoured: {reason}")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} smooths labels of tokens; pass "
            "loss=LinearTDPOLoss(label_smoothing=...) for preferences"
        )
    if getattr(args, "use_liger_kernel", False):
        raise ValueError("use_liger_kernel=True replaces the model's forward; leave it off")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} cards in one process would use nn.DataParallel; start the script with "
            "torchrun or accelerate launch, or show it one card with CUDA_VISIBLE_DEVICES"
        )


_NO_LOGITS = (
    "the loss comes from hidden states and there are no logits. The metrics of TDPO are logged "
    "without it; for others, call the model without tdpo= in a callback (on_evaluate), where it "
    "returns its logits as ever"
)
_REASONS = {
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "compute_loss_func": "the loss is TDPO; pass its options as loss=LinearTDPOLoss(...)",
    "model_init": "pass the model itself, its reference is made from it",
}
