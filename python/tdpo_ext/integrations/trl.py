"""TDPO for TRL: ``DPOTrainer`` with another loss; data, reference and all else are TRL's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import trl
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo
from tdpo_ext.integrations.cached_reference import (
    CachedReference,
    cache_reference_of_trainer,
    separate_reference_of_trl,
    without_precomputing,
)
from tdpo_ext.integrations.hidden import parameter_of
from tdpo_ext.integrations.steps import (
    ReferenceAdapter,
    RouterLoss,
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
    """``DPOConfig`` and the options of TDPO; ``beta`` and ``label_smoothing`` are those of TDPO."""

    tdpo_variant: str = field(default="tdpo2", metadata={"help": '"tdpo2" or "tdpo1"'})
    tdpo_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the sequential KL in TDPO2; 0 is DPO."}
    )
    tdpo_average_log_prob: bool = field(
        default=False,
        metadata={"help": "Means over the tokens of a response instead of sums, of margin and KL."},
    )
    tdpo_fused_head: bool = field(
        default=True,
        metadata={"help": "Compute the loss from hidden states; False: from the logits."},
    )
    tdpo_chunk_bytes: int | None = field(
        default=None,
        metadata={"help": "Memory of the fused head beyond its inputs and gradients."},
    )
    tdpo_inplace_backward: bool = field(
        default=False,
        metadata={"help": "From logits: write their gradient over them, which saves their size."},
    )
    tdpo_reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "With precompute_ref_log_probs=True: the folder of the reference's hidden "
            "states; None: _reference_cache in output_dir."
        },
    )


class TDPOTrainer(TDPOSteps, trl.DPOTrainer):
    """``trl.DPOTrainer`` with the TDPO loss.

        TDPOTrainer("path/to/model", args=TDPOConfig("folder"), train_dataset=pairs).train()

    Construction and data are TRL's, PEFT included: there the reference is the adapter "ref" or the
    model without adapters. The loss of an optimizer step is the mean over all its pairs. It
    logs ``rewards/*``, ``logps/*``, ``aux_loss`` and ``num_tokens`` as TRL does, ``tdpo_rewards/*``
    and ``kl/*``, each a mean over the pairs since the last log. It does not log ``entropy``,
    ``logits/*`` and ``mean_token_accuracy``: they need more of the logits than the loss does.

    Args:
        model: a model, or the path of one, as ``trl.DPOTrainer`` takes it.
        ref_model: the reference, as ``trl.DPOTrainer`` takes it; None: a copy, or the model without
            its adapters.
        args: ``TDPOConfig``. None: one that writes to ``<name of the model>-TDPO``.
        *others: as ``trl.DPOTrainer``, in its order.
        preprocess_logits_for_metrics: as ``transformers.Trainer``.
        **named: as ``trl.DPOTrainer``: ``train_dataset``, ``processing_class``, ``peft_config`` and
            so on. ``compute_metrics`` is called with the logits, which ``tdpo_fused_head=False``
            makes. As in TRL the rows of each batch are its chosen and then its rejected sequences,
            and ``label_ids`` their ``input_ids``.

    Raises:
        TypeError: ``args`` is no ``TDPOConfig``.
        ValueError: an option of DPO that TDPO cannot honour; the message names it. Or a reference
            whose vocabulary is not the model's.
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
        signature = inspect.signature(super().__init__)  # of the TRL that is installed
        given = signature.bind(model, ref_model, args, *others, **named)
        functions = {
            "compute_metrics": given.arguments.get("compute_metrics"),
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        _check_options(args, functions)
        _check_vocabularies(model, ref_model)  # before TRL tokenises the data
        options = {
            "beta": args.beta,
            "alpha": args.tdpo_alpha,
            "variant": args.tdpo_variant,
            "label_smoothing": args.label_smoothing,
            "average_log_prob": args.tdpo_average_log_prob,
        }
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
        # TRL leaves attention's dropout on, which is a number and no module.
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        for each in models:
            if args.disable_dropout:
                without_dropout(each)
            if args.tdpo_fused_head or args.precompute_ref_log_probs:
                # What an engine has wrapped already cannot be called without it.
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
            reference = self._of_reference(model, inputs, cached)
        if self.args.tdpo_fused_head:
            outputs = model(**inputs, **router, tdpo=TDPOTargets(reference, labels))
            output = outputs.tdpo
        else:
            outputs = model(**inputs, **router)
            output = self._from_logits(outputs.logits, reference, labels)
        return output, RouterLoss(outputs.aux_loss, coefficient) if coefficient else None

    def _from_logits(self, policy: Tensor, reference: Tensor, labels: Tensor) -> TDPOOutput:
        # PEFT's prompt learning has put virtual tokens before the sequences.
        policy, reference = (x[:, -labels.shape[1] :] for x in (policy, reference))
        if not policy.requires_grad:
            self.evaluation_logits = policy
        dtype = torch.promote_types(policy.dtype, reference.dtype)  # neither is rounded
        output: TDPOOutput = self.logits_loss(policy.to(dtype), reference.to(dtype), labels)
        return output

    def _of_reference(self, model: nn.Module, inputs: dict[str, Any], cached: Any) -> Any:
        """What its head takes, or its logits."""
        if self.cached_reference is not None:
            given = self.cached_reference.with_hidden(cached)
            return given if self.args.tdpo_fused_head else given.logits()
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

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().compute_loss(*args, **kwargs)
        except ValueError as error:
            if "image tokens do not match" in str(error) and self.args.max_length is not None:
                raise ValueError(
                    f"max_length={self.args.max_length} has cut image tokens off some sequences, "
                    "whose images are all still there; raise it, or set max_length=None"
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
        """The loss; and the logits, if there are any, with the tokens."""
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        logits, self.evaluation_logits = self.evaluation_logits, None
        if prediction_loss_only or logits is None:
            self.gather_function = self.accelerator.gather_for_metrics
            return loss, None, None
        self.gather_function = _GatheredPairs(self.accelerator, len(logits))
        return loss, logits, inputs["input_ids"].to(logits.device)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """TRL logs as eval_* whatever the set is called: what it logs, under those names too."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = output.metrics
        metrics[f"{metric_key_prefix}_num_tokens"] = self._tokens_until_now()
        self.last_evaluation = {
            f"eval_{name}": metrics[f"{metric_key_prefix}_{name}"]
            for name in (*self.evaluation_metrics.names, "num_tokens")
            if name != "loss"
        }
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" not in logs and "train_runtime" not in logs:
            logs.update(self.last_evaluation)
            self.last_evaluation = {}
        super().log(logs, *args, **kwargs)


class _GatheredPairs:
    """``gather_for_metrics`` for rows of which the first half are chosen, the second rejected.

    At the end of a data set accelerate drops the examples that it has repeated, and takes a row for
    an example: it would drop half of the last batch. Here a pair is one.
    """

    def __init__(self, accelerator: Any, rows: int) -> None:
        self.accelerator = accelerator
        self.rows = rows
        self.loss_comes = True

    def __call__(self, data: Any) -> Any:
        if self.loss_comes:  # the Trainer gathers it first, as one number for each example
            self.loss_comes = False
            return self.accelerator.gather_for_metrics(data)
        return tree_map_only(Tensor, self._gathered, data)

    def _gathered(self, values: Tensor) -> Any:
        if len(values) != self.rows:  # what preprocess_logits_for_metrics has made of them
            return self.accelerator.gather_for_metrics(values)
        pairs = torch.stack(values.chunk(2), dim=1)
        return self.accelerator.gather_for_metrics(pairs).transpose(0, 1).flatten(0, 1)


class Only(NamedTuple):
    """An option of DPO, what TDPO can honour of it, and why not more."""

    name: str
    allowed: tuple[Any, ...]
    why: str

    def shown(self) -> str:
        """What is allowed, as the documentation has it."""
        return ", ".join(f"`{value!r}`" for value in self.allowed)


_OTHER_LOSS = "it belongs to another loss than TDPO"

ONLY = (
    Only("loss_type", ("sigmoid", ["sigmoid"]), _OTHER_LOSS),
    Only("loss_weights", (None, [1.0]), "there is one loss to weigh"),
    Only("ld_alpha", (None,), _OTHER_LOSS),
    Only("use_weighting", (False,), _OTHER_LOSS),
    Only(
        "f_divergence_type",
        ("reverse_kl",),
        "from it follows the margin log pi(y) - log pi_ref(y) that TDPO is made of; TDPO's own "
        "forward KL is added to that margin and is always there",
    ),
    Only(
        "use_liger_kernel",
        (False,),
        "before version 1.15 TRL replaces the loss with it, later only layers",
    ),
    Only(
        "label_smoothing_factor",
        (0,),
        "it smooths the labels of tokens; label_smoothing is that of preferences",
    ),
)
"""All other options of ``DPOConfig`` are TRL's own business."""

_OF_ONE_ROUTE = (
    Only("tdpo_chunk_bytes", (None,), "the logits are whole; it is for tdpo_fused_head=True"),
    Only("tdpo_inplace_backward", (False,), "there are no logits; it is for tdpo_fused_head=False"),
)


def _check_options(args: Any, functions: dict[str, Any]) -> None:
    if not isinstance(args, TDPOConfig):
        raise TypeError(f"args must be a TDPOConfig, got {type(args).__name__}")
    layers_only = Version(trl.__version__) >= Version("1.15")
    for option in (*ONLY, _OF_ONE_ROUTE[args.tdpo_fused_head]):
        value = getattr(args, option.name, option.allowed[0])
        value = getattr(value, "value", value)  # an enum in some versions
        if option.name == "use_liger_kernel" and layers_only:
            continue
        if value not in option.allowed:
            raise ValueError(
                f"{option.name} must be {option.allowed[0]!r}, got {value!r}: {option.why}"
            )
    for name, function in functions.items():
        if function is not None and args.tdpo_fused_head:
            raise ValueError(
                f"{name} needs logits, which the fused head never makes; set "
                "tdpo_fused_head=False, or read the logged rewards/*, tdpo_rewards/*, logps/*, kl/*"
            )


def _output_folder(model: Any) -> str:
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
    """None where it is not to be seen: no model as yet, or one without output embeddings."""
    if not isinstance(model, nn.Module):
        return None
    inner = unwrapped(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        return None
    # Not the weight's shape: engines partition it, and quantisation packs it.
    rows = getattr(head, "out_features", None)
    return int(parameter_of(head).shape[0] if rows is None else rows)
