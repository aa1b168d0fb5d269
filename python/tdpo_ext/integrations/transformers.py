"""TDPO for ``transformers.Trainer``: a collator of preference pairs and a trainer.

``attach_tdpo`` alone serves any other trainer: see ``attach.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tdpo_ext.integrations.attach import (
    HEAD_INPUTS,
    TDPOTargets,
    attach_tdpo,
    detach_tdpo,
)
from tdpo_ext.integrations.hidden import (
    HeadInputs,
    LogitOptions,
    decoder_inputs,
    head_of,
    language_model,
    weight_and_bias,
)
from tdpo_ext.integrations.probe import logit_options_of
from tdpo_ext.integrations.steps import (
    ReferenceAdapter,
    TDPOSteps,
    text_config,
    unwrapped,
    without_dropout,
)
from tdpo_ext.modules import LinearTDPOLoss
from tdpo_ext.outputs import TDPOOutput

__all__ = ["PreferenceCollator", "TDPOTrainer", "attach_tdpo", "detach_tdpo"]


class PreferenceCollator:
    """Examples of one preference each to batches ``[2B, T]``, the chosen responses first.

    An example has ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, lists of token ids as TRL
    names them; the responses end with their end-of-sequence token. If it also has ``chosen_hidden``
    and ``rejected_hidden`` (``[T, H]`` tensors from a reference cache, one row for every token of
    prompt and response) the batch has ``reference_hidden``.

    Args:
        pad_token_id: what fills the rows on the right; masked in attention and labels.
        max_length: longer sequences lose their end.
        pad_to_multiple_of: round T up, so that fewer shapes are compiled.
        encoder_decoder: the prompt alone is the input, the response alone the labels.

    Returns, when called:
        ``input_ids``, ``attention_mask``, ``labels`` (-100 on prompt and padding), each ``[2B, T]``
        int64; and ``reference_hidden`` ``[2B, T, H]``.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        max_length: int | None = None,
        pad_to_multiple_of: int = 1,
        encoder_decoder: bool = False,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.encoder_decoder = encoder_decoder

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, labels, hidden = [], [], []
        for response in ("chosen", "rejected"):
            for example in examples:
                prompt = torch.as_tensor(example["prompt_ids"], dtype=torch.int64)
                answer = torch.as_tensor(example[f"{response}_ids"], dtype=torch.int64)
                if self.encoder_decoder:
                    ids.append(prompt[: self.max_length])
                    labels.append(answer[: self.max_length])
                    continue
                ids.append(torch.cat([prompt, answer])[: self.max_length])
                masked = torch.full_like(prompt, -100)
                labels.append(torch.cat([masked, answer])[: self.max_length])
                if f"{response}_hidden" in example:
                    hidden.append(example[f"{response}_hidden"][: self.max_length])
        batch = {
            "input_ids": self._padded(ids, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(row) for row in ids], 0),
            "labels": self._padded(labels, -100),
        }
        if hidden:
            batch["reference_hidden"] = self._padded(hidden, 0)
        return batch

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.shape[1] % self.pad_to_multiple_of
        shape = (padded.shape[0], missing, *padded.shape[2:])
        return torch.cat([padded, padded.new_full(shape, value)], dim=1)


class CachedReference(NamedTuple):
    """A reference whose hidden states come with the batches; its head, which stays in memory."""

    weight: Tensor
    bias: Tensor | None
    logit_options: LogitOptions

    @classmethod
    def of(cls, model: nn.Module) -> CachedReference:
        """With a copy of the model's head as it is now."""
        weight, bias = weight_and_bias(head_of(model))
        copied = None if bias is None else bias.detach().clone()
        return cls(weight.detach().clone(), copied, logit_options_of(model))

    def to(self, device: torch.device) -> CachedReference:
        bias = None if self.bias is None else self.bias.to(device)
        return CachedReference(self.weight.to(device), bias, self.logit_options)

    def with_hidden(self, hidden: Tensor) -> HeadInputs:
        return HeadInputs(hidden, *self.to(hidden.device))


class TDPOTrainer(TDPOSteps, transformers.Trainer):
    """``transformers.Trainer`` whose loss is TDPO, from the fused head inside the model's forward.

    The mean of the loss is over all pairs of an optimizer step, however they fall into
    micro-batches and processes. Metrics are those of ``TDPOOutput.metrics()``, means over the pairs
    since the last log.

    Args:
        model: a Hugging Face language model, or a PEFT model of one; ``attach_tdpo`` is called on
            it. Its dropout is switched off.
        args: ``TrainingArguments``.
        loss: the loss and its options; reduction "mean".
        reference: a model; or ``CachedReference.of(model)``, whose hidden states come as
            ``reference_hidden`` in the batches (``PreferenceCollator``). None: for a PEFT model its
            adapter "ref" or, without one, the model without adapters; else a frozen copy of it. A
            model is held whole on every device, but partitioned with ZeRO-3.
        others: as ``transformers.Trainer``; ``data_collator`` is a ``PreferenceCollator`` or gives
            such batches.

    Raises:
        ValueError: an option that TDPO cannot honour: ``compute_metrics``, ``compute_loss_func``,
            ``model_init``, ``label_smoothing_factor`` (the loss has ``label_smoothing``),
            ``use_liger_kernel``, several cards in one process.
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments | None = None,
        *,
        loss: LinearTDPOLoss | None = None,
        reference: nn.Module | CachedReference | None = None,
        **others: Any,
    ) -> None:
        loss = LinearTDPOLoss() if loss is None else loss
        args = transformers.TrainingArguments() if args is None else args
        _check_options(args, loss, others)
        args.remove_unused_columns = False  # the collator uses what forward does not take
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

    def _placed(self, reference: nn.Module) -> nn.Module:
        """On this process's device, whole, or partitioned as the policy is by ZeRO-3."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            return reference.to(self.accelerator.device)
        import deepspeed

        zero = {**plugin.deepspeed_config["zero_optimization"]}
        for name in ("offload_optimizer", "reduce_bucket_size"):  # of training alone
            zero.pop(name, None)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        engine: nn.Module = deepspeed.initialize(model=reference, config=config)[0]
        return engine

    def tdpo_output(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[TDPOOutput, Tensor | None]:
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
        return output.tdpo, text_config(model).router_aux_loss_coef * output.aux_loss

    @torch.no_grad()
    def _reference_inputs(
        self, model: nn.Module, inputs: dict[str, Any], cached: Tensor | None
    ) -> HeadInputs:
        if isinstance(self.reference, CachedReference):
            if cached is None:
                raise ValueError(
                    "reference is a CachedReference, but the batch has no reference_hidden; give "
                    "the examples chosen_hidden and rejected_hidden"
                )
            return self.reference.with_hidden(cached)
        if hasattr(text_config(model), "output_router_logits"):
            inputs = {**inputs, "output_router_logits": False}
        if self.reference is not None:
            result = self.reference(**inputs, tdpo=HEAD_INPUTS)
        else:
            with ReferenceAdapter(unwrapped(model)):
                result = model(**inputs, tdpo=HEAD_INPUTS)
        assert isinstance(result, HeadInputs)
        return result


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
    for name in ("compute_metrics", "compute_loss_func", "model_init"):
        if others.get(name) is not None:
            raise ValueError(f"{name} cannot be honoured: {_REASONS[name]}")
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


_REASONS = {
    "compute_metrics": "there are no logits; the metrics of TDPO are logged anyway",
    "compute_loss_func": "the loss is TDPO; pass its options as loss=LinearTDPOLoss(...)",
    "model_init": "pass the model itself, its reference is made from it",
}
