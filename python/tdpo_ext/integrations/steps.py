"""What every trainer derived from ``transformers.Trainer`` does alike, over public hooks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.hidden import language_model
from tdpo_ext.outputs import TDPOOutput


class PairMetrics:
    """Means over pairs and batches; nothing waits for a device until asked."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        """One for each name, and the number of pairs."""

    def add(self, names: list[str], values: Tensor) -> None:
        """``[pairs, names]``"""
        sums = torch.cat([values.sum(0), values.new_tensor([len(values)])])
        self.names, self.sums = names, sums if self.sums is None else self.sums + sums

    def take(self, accelerator: Any = None) -> dict[str, float]:
        """Means since the last time; of all processes together, if each passes its accelerator."""
        sums, self.sums = self.sums, None
        if sums is None:
            return {}
        if accelerator is not None:
            sums = accelerator.gather(sums[None]).sum(0)
        *means, pairs = sums.tolist()
        return {name: value / pairs for name, value in zip(self.names, means, strict=True)}


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
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        for name in ("cp_enabled", "sp_enabled"):
            if getattr(parallelism, name, False):
                raise ValueError(
                    f"parallelism_config has {name}: the trainer would split sequences before the "
                    "loss sums over them; examples/sequence_parallel.py does it in a loop"
                )
        self.model_accepts_loss_kwargs = True  # to Trainers that do not know loss_is_scaled_for_ga

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
        output, router = self.tdpo_output(model, dict(inputs))
        pairs, metrics, loss = pairs_of(inputs), output.metrics_of_pairs(), output.loss
        if router is not None:
            metrics["aux_loss"] = router.value.detach().expand(pairs)
            loss = loss + router.coefficient * router.value
        values = torch.stack([*metrics.values()], dim=-1)
        if model.training:
            self.training_metrics.add([*metrics], values)
        else:  # accelerate drops what it has repeated to fill the last batch
            gathered = self.accelerator.gather_for_metrics(values)
            self.evaluation_metrics.add([*metrics], gathered)
        self.tdpo_ran = True
        if num_items_in_batch is not None:
            # Gradients are averaged over processes; so the whole is a mean over all pairs.
            loss = loss * (pairs * self.accelerator.num_processes / num_items_in_batch)
        return (loss, {"loss": loss, "tdpo": output}) if return_outputs else loss

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
        """With the metrics of all pairs beside the Trainer's own, under the same prefix."""
        self.evaluation_metrics.take()  # of a loop that an error has ended
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self.evaluation_metrics.take()
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in means.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_runtime" in logs:  # the Trainer's own, on every process
            logs.update(self.training_metrics.take(self.accelerator))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def pairs_of(batch: Mapping[str, Any]) -> int:
    return len(batch["input_ids"]) // 2


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model inside PEFT, DDP, DeepSpeed and torch.compile."""
    inner: Any = model
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    return inner


def text_config(model: nn.Module) -> Any:
    return language_model(unwrapped(model)).config.get_text_config()


def without_dropout(model: nn.Module) -> nn.Module:
    """Every dropout of the model off, in training too: TDPO compares two models token by token."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():  # attention keeps its own as a number
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


class ReferenceAdapter:
    """Within it, a PEFT model is its own reference: adapter "ref" if it has one, else none.

    PEFT lets every adapter it activates be trained; afterwards that is again as it was.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        named = self.model.named_parameters()
        self.trained = {name: parameter.requires_grad for name, parameter in named}
        self.before = self.model.active_adapter
        self.off = None if "ref" in self.model.peft_config else self.model.disable_adapter()
        if self.off is not None:
            self.off.__enter__()
        else:
            self.model.set_adapter("ref")
            self._restore()

    def __exit__(self, *error: Any) -> None:
        if self.off is not None:
            self.off.__exit__(*error)
        else:
            self.model.set_adapter(self.before)
        self._restore()

    def _restore(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trained[name])
