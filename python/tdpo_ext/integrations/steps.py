"""What TDPO changes in every trainer derived from ``transformers.Trainer``, by public hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.evaluation import count_stream, unrepeated_pairs
from tdpo_ext.integrations.metrics import PairMetrics
from tdpo_ext.outputs import TDPOOutput


class RouterLoss(NamedTuple):
    """The auxiliary loss of a mixture of experts' router."""

    value: Tensor
    """A scalar, as the model returns it and as it is logged."""
    coefficient: float
    """The loss gets coefficient times value."""


class TDPOSteps:
    """A base class to name before a Trainer; a subclass defines ``tdpo_output``.

    The loss of an optimizer step is the mean over all its pairs, independent of how they are split
    into micro-batches and over processes.
    """

    accelerator: Any
    training_metrics: PairMetrics
    evaluation_metrics: PairMetrics
    loss_is_scaled_for_ga: bool | None = True
    tdpo_ran = False

    def tdpo_output(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[TDPOOutput, RouterLoss | None]:
        """The loss of one batch, and the router's loss of a mixture of experts or None.

        Args:
            model: the policy, wrapped as the trainer has wrapped it.
            inputs: the batch, a dictionary that may be changed.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """To be called after the Trainer's own construction.

        Raises:
            ValueError: an option of accelerate that would split sequences or pairs.
        """
        self.training_metrics, self.evaluation_metrics = PairMetrics(), PairMetrics()
        self.unlogged_tokens: Any = 0
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        for name in ("cp_enabled", "sp_enabled"):
            if getattr(parallelism, name, False):
                raise ValueError(
                    f"parallelism_config has {name}: the trainer would split sequences before the "
                    "loss sums over them; examples/sequence_parallel.py does it in a loop"
                )
        self._keep_batches_whole()
        # Trainers that do not know loss_is_scaled_for_ga read this instead.
        self.model_accepts_loss_kwargs = True

    def _keep_batches_whole(self) -> None:
        """Let every process read its own batches of an iterable data set.

        By default accelerate lets one process read them and cut them for the others.
        """
        trainer: Any = self
        for config in (trainer.args.accelerator_config, self.accelerator.dataloader_config):
            if config.dispatch_batches:
                raise ValueError(
                    "accelerator_config has dispatch_batches=True: it cuts the batches of one "
                    "process by rows, so that the two sequences of a pair land on different "
                    "processes; leave it unset or set it to False"
                )
            config.dispatch_batches = False

    @contextmanager
    def reference_precision(self) -> Iterator[None]:
        """Around every forward of a reference: no gradients, and the policy's autocast.

        A reference that equals the policy then gives the same numbers, to the bit.
        """
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:  # the policy must not use casts of its weights that were made without gradients
            torch.clear_autocast_cache()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.training_metrics.take()  # drop what a run that an error has ended left
        self.unlogged_tokens = 0
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and its number of pairs in all processes (not of tokens)."""
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        count = sum(pairs_of(batch) for batch in batches)
        pairs = torch.tensor([count], device=self.accelerator.device)
        return batches, self.accelerator.gather(pairs).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        pairs = pairs_of(inputs)
        with self.accelerator.autocast():  # the model may not be prepared yet
            output, router = self.tdpo_output(model, dict(inputs))
        metrics, loss, losses = output.metrics_of_pairs(), output.loss, output.losses
        if router is not None:
            metrics["aux_loss"] = router.value.detach().expand(pairs)
            loss = loss + router.coefficient * router.value
            losses = losses + router.coefficient * metrics["aux_loss"]
        if model.training:
            self.training_metrics.add([*metrics], torch.stack([*metrics.values()], dim=-1))
            if "attention_mask" in inputs:
                self.unlogged_tokens = self.unlogged_tokens + inputs["attention_mask"].sum()
        else:
            metrics["loss"] = losses
            values = torch.stack([*metrics.values()], dim=-1)
            kept = unrepeated_pairs(self.accelerator, pairs)
            self.evaluation_metrics.add([*metrics], values[:kept])
        self.tdpo_ran = True
        if num_items_in_batch is not None:
            # Gradients are averaged over processes: together that makes a mean over all pairs.
            loss = loss * (pairs * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"loss": loss, "tdpo": output}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self.tdpo_ran:
            raise RuntimeError(
                f"{type(self).__mro__[2].__module__} did not call compute_loss, so it would "
                "train another loss than TDPO; use a version that tdpo_ext names in its extras"
            )
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss alone: there are no logits to return."""
        trainer: Any = self
        inputs = trainer._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's loop, with the loss and the metrics as means over all pairs.

        Each pair counts once. The Trainer's own loss is a mean over batches, and counts the
        examples that are repeated to fill the last ones.
        """
        self.evaluation_metrics.take()  # drop what a loop that an error has ended left
        count_stream(dataloader)
        self._cast_reference()
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self.evaluation_metrics.take(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in means.items()})
        self.after_evaluation(output.metrics, metric_key_prefix)
        return output

    def after_evaluation(self, metrics: dict[str, float], prefix: str) -> None:
        """A hook for subclasses: ``metrics`` are those of a whole evaluation, named prefix_*."""

    def prediction_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loop of older Trainers with ``use_legacy_prediction_loop``."""
        return self.evaluation_loop(*args, **kwargs)

    def _cast_reference(self) -> None:
        """Cast the reference as ``bf16_full_eval`` and ``fp16_full_eval`` cast the policy."""
        trainer: Any = self
        if trainer.is_in_train or not (trainer.args.fp16_full_eval or trainer.args.bf16_full_eval):
            return
        dtype = torch.float16 if trainer.args.fp16_full_eval else torch.bfloat16
        for name in ("reference", "ref_model"):
            if isinstance(reference := getattr(self, name, None), nn.Module):
                reference.to(dtype)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_runtime" in logs:  # a log of training, on every process
            means = self.training_metrics.take(self.accelerator)
            logs.update(means)
            if means and isinstance(self.unlogged_tokens, Tensor):
                logs["num_tokens"] = self._tokens_until_now()
                self.unlogged_tokens = 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _tokens_until_now(self) -> int:
        """The number of tokens trained on, in all processes.

        It goes on from the last log, which may stand in the checkpoint that the run resumed from.
        """
        trainer: Any = self
        history: Any = (
            each["num_tokens"] for each in trainer.state.log_history if "num_tokens" in each
        )
        own = torch.as_tensor(self.unlogged_tokens, device=self.accelerator.device).reshape(1)
        tokens = self.accelerator.gather(own).sum().item()
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        copies = getattr(parallelism, "tp_size", 1) or 1  # processes that have the same tokens
        return int(max(history, default=0) + tokens // copies)


def pairs_of(batch: Mapping[str, Any]) -> int:
    """The number of pairs in a batch.

    Raises:
        ValueError: ``batch`` has no ``input_ids``, or an odd number of rows.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None or len(ids) % 2:
        given = f"fields {[*batch]}" if isinstance(batch, Mapping) else type(batch).__name__
        got = given if ids is None else f"{len(ids)} rows"
        raise ValueError(
            "a batch must have input_ids [2B, T], the chosen sequences stacked on the rejected "
            f"ones; got {got}. data_collator must be a "
            "tdpo_ext.integrations.transformers.PreferenceCollator or give what that gives, and "
            "nothing may cut its batches (accelerate does with dispatch_batches=True)"
        )
    return len(ids) // 2
