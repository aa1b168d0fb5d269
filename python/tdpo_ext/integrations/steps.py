"""What every trainer derived from ``transformers.Trainer`` does alike, over public hooks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.hidden import language_model
from tdpo_ext.outputs import TDPOOutput


class PairMetrics:
    """Means over pairs, batches and processes; nothing waits for a device until asked.

    Of training and evaluation apart.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.sums: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        self.pairs = {True: 0, False: 0}

    def add(self, metrics: dict[str, Tensor], pairs: int, *, training: bool) -> None:
        sums = self.sums[training]
        for name, mean in metrics.items():
            sums[name] = sums.get(name, 0) + mean.detach() * pairs
        self.pairs[training] += pairs

    def take(self, *, training: bool) -> dict[str, float]:
        """Means since the last time, over all processes; every process must ask."""
        sums, pairs = self.sums[training], self.pairs[training]
        self.sums[training], self.pairs[training] = {}, 0
        if not sums:
            return {}
        values = torch.stack([*sums.values()])
        row = torch.cat([values, values.new_tensor([pairs])])
        total = self.accelerator.gather(row[None]).sum(0).tolist()
        return {name: value / total[-1] for name, value in zip(sums, total, strict=False)}


class TDPOSteps:
    """To be inherited from before a Trainer; ``tdpo_output`` is what differs.

    The loss of an optimizer step is the mean over all its pairs, however they fall into
    micro-batches and processes.
    """

    accelerator: Any
    pair_metrics: PairMetrics
    loss_is_scaled_for_ga: bool | None = True
    tdpo_ran = False

    def tdpo_output(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[TDPOOutput, Tensor | None]:
        """Of one batch, and the loss of a mixture of experts' router, if it has one."""
        raise NotImplementedError

    def begin(self) -> None:
        """After the Trainer's own construction."""
        self.pair_metrics = PairMetrics(self.accelerator)
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
        output, aux_loss = self.tdpo_output(model, dict(inputs))
        pairs, metrics, loss = pairs_of(inputs), output.metrics(), output.loss
        if aux_loss is not None:
            metrics["aux_loss"] = aux_loss
            loss = loss + aux_loss
        self.pair_metrics.add(metrics, pairs, training=model.training)
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        evaluation = any(key.startswith("eval_") for key in logs)
        prefix = "eval_" if evaluation else ""
        means = self.pair_metrics.take(training=not evaluation)
        logs.update({prefix + name: value for name, value in means.items()})
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
    """Within it, a PEFT model is its own reference: adapter "ref" if it has one, else none."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        if "ref" in self.model.peft_config:
            self.before = self.model.active_adapter
            self._activate("ref")
        else:
            self.off = self.model.disable_adapter()
            self.off.__enter__()

    def __exit__(self, *error: Any) -> None:
        if "ref" in self.model.peft_config:
            self._activate(self.before)
        else:
            self.off.__exit__(*error)

    def _activate(self, name: str) -> None:
        """As ``set_adapter``, but what was trained is still trained."""
        trained = {n: p.requires_grad for n, p in self.model.named_parameters()}
        self.model.set_adapter(name)
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained[parameter_name])
