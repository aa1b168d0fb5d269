"""What every trainer derived from ``transformers.Trainer`` does alike, over public hooks alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import IterableDatasetShard  # type: ignore[import-untyped]
from torch import Tensor, nn

from tdpo_ext.integrations.evaluation import CountedStream
from tdpo_ext.integrations.metrics import PairMetrics
from tdpo_ext.outputs import TDPOOutput


class RouterLoss(NamedTuple):
    """The auxiliary loss of a mixture of experts' router."""

    value: Tensor
    """As the model returns it, and as it is logged."""
    coefficient: float
    """The loss gets coefficient times value."""


class TDPOSteps:
    """To be inherited from before a Trainer; ``tdpo_output`` is what differs.

    The loss of an optimizer step is the mean over all its pairs, however they fall into
    micro-batches and processes.
    """

    accelerator: Any
    training_metrics: PairMetrics
    evaluation_metrics: PairMetrics
    loss_is_scaled_for_ga: bool | None = True
    tdpo_ran = False

    def tdpo_output(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[TDPOOutput, RouterLoss | None]:
        """Of one batch, and the loss of a mixture of experts' router, if it has one."""
        raise NotImplementedError

    def begin(self) -> None:
        """After the Trainer's own construction."""
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
        self.model_accepts_loss_kwargs = True  # to Trainers that do not know loss_is_scaled_for_ga

    def _keep_batches_whole(self) -> None:
        """Accelerate's default for a stream is that one process cuts batches for all."""
        trainer: Any = self
        for config in (trainer.args.accelerator_config, self.accelerator.dataloader_config):
            if config.dispatch_batches:
                raise ValueError(
                    "accelerator_config has dispatch_batches=True: it cuts the batches of one "
                    "process by rows, so that the two sequences of a pair land on different "
                    "processes; leave it unset or say False"
                )
            config.dispatch_batches = False

    @contextmanager
    def reference_precision(self) -> Iterator[None]:
        """Around every forward of a reference: no gradients, and the policy's autocast, so that a
        reference that equals the policy gives the same numbers, to the bit."""
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:  # else the policy may meet casts of its own weights made without gradients
            torch.clear_autocast_cache()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.training_metrics.take()  # of a run that an error has ended
        self.unlogged_tokens = 0
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """With the number of pairs of this step, in all processes, instead of that of tokens."""
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
        with self.accelerator.autocast():  # also for a model that has not been prepared as yet
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
            self.evaluation_metrics.add([*metrics], values[: self._unrepeated(pairs)])
        self.tdpo_ran = True
        if num_items_in_batch is not None:
            # Gradients are averaged over processes; so the whole is a mean over all pairs.
            loss = loss * (pairs * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"loss": loss, "tdpo": output}) if return_outputs else loss

    def _unrepeated(self, pairs: int) -> int:
        """How many of an evaluation batch's pairs, from its first on, are no repetitions.

        Accelerate fills the last batches of all processes with examples from the beginning.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader:
            return pairs
        dataloader = state.active_dataloader
        stream, sampler = dataloader.dataset, dataloader.batch_sampler
        if isinstance(stream, IterableDatasetShard):
            counted = isinstance(stream.dataset, CountedStream) and not stream.drop_last
            left = stream.dataset.count % (pairs * stream.num_processes) if counted else 0
            process = stream.process_index
        else:
            left = state.remainder if getattr(sampler, "even_batches", True) else 0
            process = getattr(sampler, "process_index", 0)
        return min(max(left - process * pairs, 0), pairs) if left > 0 else pairs

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self.tdpo_ran:
            raise RuntimeError(
                f"{type(self).__mro__[2].__module__} did not call compute_loss, so it trains "
                "something else than TDPO; use a version that tdpo_ext names in its extras"
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
        """With the loss and the metrics of all pairs, each counted once. The Trainer's own loss is
        a mean over batches and the repetitions that fill them."""
        self.evaluation_metrics.take()  # of a loop that an error has ended
        self._count_stream(dataloader)
        self._cast_reference()
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self.evaluation_metrics.take(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in means.items()})
        return output

    def prediction_loop(self, *args: Any, **kwargs: Any) -> Any:
        """What ``use_legacy_prediction_loop`` asks older Trainers for."""
        return self.evaluation_loop(*args, **kwargs)

    def _count_stream(self, dataloader: Any) -> None:
        shard = getattr(dataloader, "dataset", None)
        if not isinstance(shard, IterableDatasetShard):
            return
        if dataloader.num_workers > 0:
            raise ValueError(
                f"evaluation of an iterable data set on {shard.num_processes} processes with "
                f"dataloader_num_workers={dataloader.num_workers}: which examples are repetitions "
                "that fill the last batches is known only in the workers. Use "
                "dataloader_num_workers=0 or a data set with a length"
            )
        if not isinstance(shard.dataset, CountedStream):
            shard.dataset = CountedStream(shard.dataset)

    def _cast_reference(self) -> None:
        """As the Trainer casts the policy for ``bf16_full_eval`` and ``fp16_full_eval``."""
        trainer: Any = self
        if trainer.is_in_train or not (trainer.args.fp16_full_eval or trainer.args.bf16_full_eval):
            return
        dtype = torch.float16 if trainer.args.fp16_full_eval else torch.bfloat16
        for name in ("reference", "ref_model"):
            if isinstance(reference := getattr(self, name, None), nn.Module):
                reference.to(dtype)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_runtime" in logs:  # the Trainer's own, on every process
            means = self.training_metrics.take(self.accelerator)
            logs.update(means)
            if means and isinstance(self.unlogged_tokens, Tensor):
                logs["num_tokens"] = self._tokens_until_now()
                self.unlogged_tokens = 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _tokens_until_now(self) -> int:
        """All that were trained on, in all processes; from what was logged last, also before the
        checkpoint that a run was resumed from."""
        trainer: Any = self
        history: Any = (
            each["num_tokens"] for each in trainer.state.log_history if "num_tokens" in each
        )
        own = torch.as_tensor(self.unlogged_tokens, device=self.accelerator.device).reshape(1)
        tokens = self.accelerator.gather(own).sum().item()
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        size = getattr(parallelism, "tp_size", 1) or 1  # of processes that have the same tokens
        return int(max(history, default=0) + tokens // size)


def pairs_of(batch: Mapping[str, Any]) -> int:
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
