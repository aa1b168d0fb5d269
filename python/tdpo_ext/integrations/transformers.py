"""TDPO for ``transformers.Trainer``: a collator of preference pairs and a trainer.

For any other trainer, ``attach_tdpo`` alone is enough: see ``attach.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tdpo_ext.integrations.adapters import has_adapters, reference_model
from tdpo_ext.integrations.attach import attach_tdpo, detach_tdpo
from tdpo_ext.integrations.cached_reference.reference import CachedReference
from tdpo_ext.integrations.cached_reference.trainers import cache_reference_of_trainer
from tdpo_ext.integrations.empty_pairs import without_empty_pairs
from tdpo_ext.integrations.hidden import HeadInputs
from tdpo_ext.integrations.models import (
    decoder_inputs,
    is_encoder_decoder,
    language_model,
    router_coefficient,
    text_config,
    unwrapped,
    without_dropout,
    without_router_loss,
)
from tdpo_ext.integrations.parameters import has_partitioned
from tdpo_ext.integrations.preferences import PreferenceBatch, PreferenceCollator
from tdpo_ext.integrations.steps import RouterLoss, TDPOSteps
from tdpo_ext.integrations.targets import HEAD_INPUTS, TDPOTargets
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

    The loss of an optimizer step is the mean over all its pairs, independent of how they are split
    into micro-batches and over processes. The metrics of ``TDPOOutput.metrics()`` are logged as
    means over the pairs since the last log, and ``num_tokens`` as all tokens trained on. The loss
    and the metrics of an evaluation are means over all its pairs, each counted once.

    Args:
        model: a Hugging Face language model, or a PEFT model of one; ``attach_tdpo`` is called on
            it. Its dropout is switched off.
        args: ``TrainingArguments``; None: their defaults.
        loss: the loss and its options, with reduction "mean"; None: ``LinearTDPOLoss()``.
        reference: a model; or ``CachedReference.of(model)``, whose hidden states come with the
            batches as ``reference_hidden`` (``PreferenceCollator``). None: for a PEFT model its
            adapter "ref" or, without one, the model without adapters; for others a frozen copy of
            ``model``. Every device holds all of the reference; ZeRO-3 partitions it.
        precompute_reference: a folder. The reference runs once over all data sets, its hidden
            states are written there (``precompute_reference``), and the model is released.
        **others: the other arguments of ``transformers.Trainer``. ``data_collator`` is a
            ``PreferenceCollator`` or returns such batches; None: one without ``max_length``. Where
            it would cut off all of a response, the example is left out of lists,
            ``datasets.Dataset`` and iterable data sets, with a warning that says how many.

    Raises:
        ValueError: an option that TDPO cannot honour: ``compute_metrics``,
            ``preprocess_logits_for_metrics``, ``compute_loss_func``, ``model_init``,
            ``label_smoothing_factor`` (the loss has ``label_smoothing``), ``use_liger_kernel``, a
            loss whose reduction is not "mean", whose ``ignore_index`` is not -100 or that has an
            option which ``attach_tdpo`` does not take, ``dispatch_batches=True`` in
            ``accelerator_config``, accelerate's context or sequence parallelism, or several GPUs in
            one process. Also if ``precompute_reference`` and a ``CachedReference`` are both given,
            or if the model is partitioned by ZeRO-3 and no ``reference`` is given to copy.
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
        check_options(args, loss, others)
        args.remove_unused_columns = False  # the collator uses columns that forward does not take
        collator = others.get("data_collator")
        if collator is None:
            collator = _default_collator(model, others.get("processing_class"))
        others["data_collator"] = collator
        for name in ("train_dataset", "eval_dataset"):
            if others.get(name) is not None:
                others[name] = without_empty_pairs(others[name], collator, name)
        if reference is None and not has_adapters(model):
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
        """The reference on this process's device, or partitioned if ZeRO-3 partitions the policy.

        DeepSpeed casts the policy's weights; the reference's get the same dtype.
        """
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
        for name in ("offload_optimizer", "reduce_bucket_size"):  # these are for training alone
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
        targets: dict[str, Any] = {"labels": labels}
        if is_encoder_decoder(model):
            inputs["decoder_input_ids"] = decoder_inputs(language_model(unwrapped(model)), labels)
            targets = {"shift_labels": labels}
        reference = self._reference_inputs(model, inputs, cached)
        output = model(**inputs, tdpo=TDPOTargets(reference, **targets))
        if output.aux_loss is None:
            return output.tdpo, None
        return output.tdpo, RouterLoss(output.aux_loss, router_coefficient(model))

    def _reference_inputs(
        self, model: nn.Module, inputs: dict[str, Any], cached: Tensor | None
    ) -> HeadInputs:
        if isinstance(self.reference, CachedReference):
            return self.reference.with_hidden(cached)
        inputs = {**inputs, **without_router_loss(model)}
        with self.reference_precision(), reference_model(model, self.reference) as reference:
            result = reference(**inputs, tdpo=HEAD_INPUTS)
        assert isinstance(result, HeadInputs)
        return result


def _enabled(settings: dict[str, Any], name: str) -> bool:
    """True if DeepSpeed's config switches this dtype on; the Trainer has replaced "auto"."""
    return settings.get(name, {}).get("enabled") is True


def _default_collator(model: nn.Module, processing_class: Any) -> PreferenceCollator:
    """A collator without ``max_length``. Padding is masked, so 0 serves if no token is named."""
    config = text_config(model)
    known = (getattr(each, "pad_token_id", None) for each in (processing_class, config))
    pad = next((token for token in known if token is not None), 0)
    return PreferenceCollator(pad, encoder_decoder=is_encoder_decoder(model))


def _check_copyable(model: nn.Module) -> None:
    if has_partitioned(model):
        raise ValueError(
            "the model's parameters are partitioned (ZeRO-3), so no reference can be copied from "
            "it; load the reference with from_pretrained as well and pass it as reference="
        )


def check_options(
    args: transformers.TrainingArguments, loss: LinearTDPOLoss, others: dict[str, Any]
) -> None:
    if loss.reduction != "mean":
        raise ValueError(
            f'loss must have reduction "mean", got "{loss.reduction}"; pass '
            'loss=LinearTDPOLoss(..., reduction="mean")'
        )
    if loss.ignore_index != -100:
        raise ValueError(
            f"loss must have ignore_index=-100, got {loss.ignore_index}: the labels of the "
            "trainer's batches are -100 where nothing is scored; leave it out"
        )
    for name, reason in REFUSED_ARGUMENTS.items():
        if others.get(name) is not None:
            raise ValueError(f"{name} cannot be honoured: {reason}")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: it smooths the "
            "labels of tokens; for preferences pass loss=LinearTDPOLoss(label_smoothing=...)"
        )
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel must be False, got True: it replaces the model's forward, in which "
            "the loss is computed; leave it off"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"the trainer takes one card per process: {args.n_gpu} cards in one process would use "
            "nn.DataParallel, which splits pairs; start the script with torchrun or accelerate "
            "launch, or show it one card with CUDA_VISIBLE_DEVICES"
        )


_NO_LOGITS = (
    "the loss comes from hidden states and there are no logits. The metrics of TDPO are logged "
    "without it; for others, call the model without tdpo= in a callback (on_evaluate): that "
    "returns its logits"
)
REFUSED_ARGUMENTS = {
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "compute_loss_func": "the loss is TDPO; pass its options as loss=LinearTDPOLoss(...)",
    "model_init": "pass the model itself, since its reference is made from it",
}
"""Arguments of ``transformers.Trainer`` that must be None, and why."""
