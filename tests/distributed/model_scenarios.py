"""Models over several processes, against one in float64 (``distributed_worker``)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from distributed_worker import scenario, unwrapped_name, whole
from tiny_models import tiny_batch, tiny_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tdpo_ext import LinearTDPOLoss, reference
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo
from tdpo_ext.integrations.models import without_dropout

LEARNING_RATE = 0.5


def batches(model: Any, step: int) -> list[dict[str, Any]]:
    """The batches of all processes in one step: equally many pairs, other tokens."""
    size = dist.get_world_size()
    return [tiny_batch(model, seed=step * size + rank) for rank in range(size)]


class Truth:
    """The same steps by one process in float64: the mean over all pairs of all processes."""

    def __init__(self, model: Any, reference_model: Any) -> None:
        self.model = copy.deepcopy(model).double()
        self.reference_model = copy.deepcopy(reference_model).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, number: int) -> tuple[float, dict[str, Tensor]]:
        losses = []
        for batch in batches(self.model, number):
            with torch.no_grad():
                of_reference = self.reference_model(**batch["inputs"]).logits
            of_policy = self.model(**batch["inputs"]).logits
            losses.append(reference.tdpo_loss(of_policy, of_reference, batch["labels"]).loss)
        mean = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        mean.backward()
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        self.optimizer.step()
        return mean.item(), gradients


class Engine:
    """What runs a model's steps; here as a plain loop does, on what ``wrap`` makes of it."""

    def __init__(self, model: Any) -> None:
        self.model = self.wrap(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    @staticmethod
    def before_attach(model: Any) -> None:
        pass

    def wrap(self, model: Any) -> Any:
        return model

    def backward(self, loss: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        loss.backward()
        return {unwrapped_name(n): whole(p.grad) for n, p in self.model.named_parameters()}

    def step(self) -> None:
        self.optimizer.step()


def steps_of(
    model: Any, engine: Any, *, shard_reference: bool = False, checkpointing: bool = False
) -> dict[str, float]:
    """Two steps, each with an evaluation before it."""
    without_dropout(model)
    reference_model = tiny_model(model.config.name_or_path, seed=1)
    truth = Truth(model, reference_model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    engine.before_attach(model)
    attach_tdpo(model, LinearTDPOLoss())
    attach_tdpo(reference_model).requires_grad_(False)
    policy = engine(model.train())
    ask = engine(reference_model).model if shard_reference else reference_model
    errors = {"loss": 0.0, "gradient": 0.0}
    for number in range(2):
        batch = batches(model, number)[dist.get_rank()]
        with torch.no_grad():
            of_reference = ask(**batch["inputs"], tdpo=HEAD_INPUTS)
            targets = TDPOTargets(of_reference, batch["labels"])
            evaluated = policy.model(**batch["inputs"], tdpo=targets).loss
        output = policy.model(**batch["inputs"], tdpo=targets)
        assert torch.equal(evaluated, output.loss.detach())
        gradients = policy.backward(output.loss)
        loss = output.loss.detach().clone()
        dist.all_reduce(loss)
        expected_loss, expected = truth.step(number)
        error = abs(loss.item() / dist.get_world_size() - expected_loss)
        errors["loss"] = max(errors["loss"], error)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp(min=1e-5)
            error = ((gradients[name] - gradient).abs().max() / scale).item()
            errors["gradient"] = max(errors["gradient"], error)
        policy.step()
    return errors


def named(name: str) -> Any:
    model = tiny_model(name)
    model.config.name_or_path = name
    return model


def layers_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


class DDP(Engine):
    def wrap(self, model: Any) -> Any:
        return DistributedDataParallel(model)


class CompiledDDP(Engine):
    def wrap(self, model: Any) -> Any:
        return torch.compile(DistributedDataParallel(model), backend="aot_eager")


class FSDP2(Engine):
    """Every layer is a group, and the root, with the head."""

    root: dict[str, Any] = {}  # noqa: RUF012

    def wrap(self, model: Any) -> Any:
        for layer in layers_of(model):
            fully_shard(layer)
        return fully_shard(model, **self.root)


class FSDP2RootResharded(FSDP2):
    root = {"reshard_after_forward": True}  # noqa: RUF012


class FSDP2HeadApart(FSDP2):
    def wrap(self, model: Any) -> Any:
        fully_shard(model.get_output_embeddings())
        return super().wrap(model)


@scenario
def ddp_untied() -> dict[str, float]:
    return steps_of(named("llama"), DDP)


@scenario
def ddp_tied() -> dict[str, float]:
    return steps_of(named("gpt2-tied"), DDP)


@scenario
def ddp_compiled() -> dict[str, float]:
    return steps_of(named("llama"), CompiledDDP)


@scenario
def fsdp2_head_in_the_root() -> dict[str, float]:
    return steps_of(named("llama"), FSDP2, shard_reference=True)


@scenario
def fsdp2_root_resharded() -> dict[str, float]:
    return steps_of(named("llama"), FSDP2RootResharded, shard_reference=True)


@scenario
def fsdp2_head_in_its_own_group() -> dict[str, float]:
    return steps_of(named("llama"), FSDP2HeadApart, shard_reference=True)


@scenario
def fsdp2_tied() -> dict[str, float]:
    return steps_of(named("gpt2-tied"), FSDP2, shard_reference=True)


@scenario
def fsdp2_with_activation_checkpointing() -> dict[str, float]:
    return steps_of(named("llama"), FSDP2HeadApart, checkpointing=True)
