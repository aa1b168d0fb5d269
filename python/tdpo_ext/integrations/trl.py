"""TDPO for TRL: ``DPOTrainer`` with another loss; data, reference and everything else are TRL's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor, nn

from tdpo_ext.integrations.adapters import reference_model
from tdpo_ext.integrations.attach import attach_tdpo
from tdpo_ext.integrations.cached_reference.reference import CachedReference
from tdpo_ext.integrations.cached_reference.trainers import (
    cache_reference_of_trainer,
    separate_reference_of_trl,
    without_precomputing,
)
from tdpo_ext.integrations.evaluation import GatheredPairs
from tdpo_ext.integrations.heads import parameter_of
from tdpo_ext.integrations.models import has_router, text_config, unwrapped, without_dropout
from tdpo_ext.integrations.steps import RouterLoss, TDPOSteps
from tdpo_ext.integrations.targets import HEAD_INPUTS, TDPOTargets
from tdpo_ext.integrations.trl_options import TDPOConfig, check_options
from tdpo_ext.modules import LinearTDPOLoss, TDPOLoss
from tdpo_ext.outputs import TDPOOutput

__all__ = ["TDPOConfig", "TDPOTrainer"]


class TDPOTrainer(TDPOSteps, trl.DPOTrainer):
    """``trl.DPOTrainer`` with the TDPO loss.

        TDPOTrainer("path/to/model", args=TDPOConfig("folder"), train_dataset=pairs).train()

    Construction and data are TRL's. With PEFT the reference is the adapter "ref" or the model
    without adapters, as in TRL. The loss of an optimizer step is the mean over all its pairs.

    It logs ``rewards/*``, ``logps/*``, ``aux_loss`` and ``num_tokens`` as TRL does, and beside them
    ``tdpo_rewards/*`` and ``kl/*``, each a mean over the pairs since the last log. It does not log
    ``entropy``, ``logits/*`` and ``mean_token_accuracy``: they need more of the logits than the
    loss does.

    Args:
        model: a model, or the path of one, as ``trl.DPOTrainer`` takes it.
        ref_model: the reference, as ``trl.DPOTrainer`` takes it. None: with PEFT the adapter "ref"
            or the model without adapters; else TRL loads it from where the model came from.
        args: ``TDPOConfig``. None: one that writes to ``<name of the model>-TDPO``.
        *others: the other arguments of ``trl.DPOTrainer``, in its order.
        preprocess_logits_for_metrics: as ``transformers.Trainer`` takes it; needs
            ``tdpo_fused_head=False``.
        **named: the other arguments of ``trl.DPOTrainer`` by name: ``train_dataset``,
            ``processing_class``, ``peft_config`` and so on. ``compute_metrics`` is called with the
            logits, which ``tdpo_fused_head=False`` makes; as in TRL the rows of each batch are its
            chosen and then its rejected sequences, and ``label_ids`` their ``input_ids``.

    Raises:
        TypeError: ``args`` is no ``TDPOConfig``.
        ValueError: an option of DPO that TDPO cannot honour (``trl_options.RESTRICTED_OPTIONS``), a
            function that needs logits with the fused head, ``tdpo_inplace_backward=True`` with it
            or ``tdpo_chunk_bytes`` without it, ``tdpo_reference_cache`` without
            ``precompute_ref_log_probs=True``, a reference whose vocabulary is not the model's,
            ``dispatch_batches=True`` in ``accelerator_config``, or accelerate's context or sequence
            parallelism.
    """

    _name = "TDPO"
    _tag_names: ClassVar[list[str]] = ["trl", "tdpo"]
    _paper: ClassVar[dict[str, str]] = {
        "title": "Token-level Direct Preference Optimization",
        "id": "2404.11999",
        "citation": """\
@inproceedings{zeng2024tokenlevel,
    title     = {Token-level Direct Preference Optimization},
    author    = {Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and \
Jun Wang},
    booktitle = {Proceedings of the 41st International Conference on Machine Learning},
    series    = {Proceedings of Machine Learning Research},
    volume    = {235},
    publisher = {PMLR},
    year      = {2024},
    url       = {https://arxiv.org/abs/2404.11999},
}""",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *others: Any,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        **named: Any,
    ) -> None:
        args = TDPOConfig(_output_folder(model)) if args is None else args
        # Versions of TRL differ in their arguments.
        signature = inspect.signature(super().__init__)
        given = signature.bind(model, ref_model, args, *others, **named)
        functions = {
            "compute_metrics": given.arguments.get("compute_metrics"),
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        check_options(args, functions)
        _check_vocabularies(model, ref_model)  # before TRL tokenises the data
        options = _loss_options(args)
        linear_loss = LinearTDPOLoss(**options, chunk_bytes=args.tdpo_chunk_bytes)
        self.logits_loss = TDPOLoss(**options, inplace_backward=args.tdpo_inplace_backward)
        given.arguments["ref_model"] = separate_reference_of_trl(
            model, ref_model, args, given.arguments.get("peft_config")
        )
        with without_precomputing(args):
            super().__init__(*given.args, **given.kwargs)
        self.begin()
        _check_vocabularies(self.model, self.ref_model)
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.evaluation_logits: Tensor | None = None
        self.last_evaluation: dict[str, float] = {}
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        for each in models:
            if args.disable_dropout:
                without_dropout(each)  # TRL leaves on attention's dropout, which is no module
            if args.tdpo_fused_head or args.precompute_ref_log_probs:
                # A model inside an engine (DeepSpeed) cannot be called by itself, so not probed.
                attach_tdpo(unwrapped(each), linear_loss, probe=unwrapped(each) is each)
        self.cached_reference: CachedReference | None = None
        if args.precompute_ref_log_probs:
            folder = args.tdpo_reference_cache
            self.cached_reference = cache_reference_of_trainer(self, self.ref_model, folder)
            self.ref_model: Any = None

    def tdpo_output(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[TDPOOutput, RouterLoss | None]:
        completion = inputs.pop("completion_mask")
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        inputs["use_cache"] = False
        cached = inputs.pop("reference_hidden", None)
        coefficient = self._router_coefficient(model)
        router = {"output_router_logits": True} if coefficient else {}
        with self.reference_precision():
            reference = self._reference_result(model, inputs, cached)
        if self.args.tdpo_fused_head:
            outputs = model(**inputs, **router, tdpo=TDPOTargets(reference, labels))
            output = outputs.tdpo
        else:
            outputs = model(**inputs, **router)
            output = self._from_logits(outputs.logits, reference, labels)
        return output, RouterLoss(outputs.aux_loss, coefficient) if coefficient else None

    def _from_logits(self, policy: Tensor, reference: Tensor, labels: Tensor) -> TDPOOutput:
        # PEFT's prompt learning may have put virtual tokens before the sequences: drop these.
        policy, reference = (x[:, -labels.shape[1] :] for x in (policy, reference))
        if not policy.requires_grad:
            self.evaluation_logits = policy
        dtype = torch.promote_types(policy.dtype, reference.dtype)  # so that neither is rounded
        output: TDPOOutput = self.logits_loss(policy.to(dtype), reference.to(dtype), labels)
        return output

    def _reference_result(self, model: nn.Module, inputs: dict[str, Any], cached: Any) -> Any:
        """The reference's ``HeadInputs`` or, without the fused head, its logits."""
        if self.cached_reference is not None:
            inputs_of_head = self.cached_reference.with_hidden(cached)
            return inputs_of_head if self.args.tdpo_fused_head else inputs_of_head.logits()
        with reference_model(model, self.ref_model) as reference:
            if self.args.tdpo_fused_head:
                return reference(**inputs, tdpo=HEAD_INPUTS)
            return reference(**inputs).logits

    def _router_coefficient(self, model: nn.Module) -> float:
        """The weight of the router's loss as TRL takes it; 0 if the model has no router.

        TRL's option comes before the model's config; of the config it reads this field alone.
        """
        if not has_router(model):
            return 0.0
        option = getattr(self.args, "router_aux_loss_coef", None)
        own = getattr(text_config(model), "router_aux_loss_coef", 0.0)
        return float(own if option is None else option)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().compute_loss(*args, **kwargs)
        except ValueError as error:
            if "image tokens do not match" in str(error) and self.args.max_length is not None:
                raise ValueError(
                    f"max_length={self.args.max_length} has cut image tokens off some sequences, "
                    "but not their images; raise it, or set max_length=None"
                ) from error
            raise

    # --- evaluation and what is logged ------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The loss; if there are logits, these too, and the tokens as labels."""
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        logits, self.evaluation_logits = self.evaluation_logits, None
        if prediction_loss_only or logits is None:
            self.gather_function = self.accelerator.gather_for_metrics
            return loss, None, None
        self.gather_function = GatheredPairs(self.accelerator, len(logits))
        return loss, logits, inputs["input_ids"].to(logits.device)

    def after_evaluation(self, metrics: dict[str, float], prefix: str) -> None:
        """Keep the metrics for ``log`` under TRL's names, eval_* for every evaluation set."""
        metrics[f"{prefix}_num_tokens"] = self._tokens_until_now()
        self.last_evaluation = {
            f"eval_{name}": metrics[f"{prefix}_{name}"]
            for name in (*self.evaluation_metrics.names, "num_tokens")
            if name != "loss"
        }

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" not in logs and "train_runtime" not in logs:
            logs.update(self.last_evaluation)
            self.last_evaluation = {}
        super().log(logs, *args, **kwargs)


def _loss_options(args: TDPOConfig) -> dict[str, Any]:
    """The options that both losses take."""
    return {
        "beta": args.beta,
        "alpha": args.tdpo_alpha,
        "variant": args.tdpo_variant,
        "label_smoothing": args.label_smoothing,
        "average_log_prob": args.tdpo_average_log_prob,
    }


def _output_folder(model: Any) -> str:
    """The folder of a run without ``args``, named as TRL names its own: model and method."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    last = name.rstrip("/").split("/")[-1]
    return f"{last}-TDPO" if last else "TDPO"


def _check_vocabularies(model: Any, reference: Any) -> None:
    own, other = (_vocabulary(x) for x in (model, reference))
    if own is not None and other is not None and own != other:
        raise ValueError(
            f"the model has a vocabulary of {own}, the reference one of {other}: the KL compares "
            "them token by token. Take a reference with the same tokenizer, and bring both to one "
            "size with resize_token_embeddings"
        )


def _vocabulary(model: Any) -> int | None:
    """The number of tokens; None for a model that is not loaded or has no output embeddings."""
    if not isinstance(model, nn.Module):
        return None
    inner = unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        return None
    # The weight's shape comes second: engines partition it, and quantisation packs it.
    rows = getattr(head, "out_features", None)
    return int(parameter_of(head).shape[0] if rows is None else rows)
