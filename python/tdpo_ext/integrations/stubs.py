"""Stubs in place of a model's modules, so that its forward runs without reading a weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tdpo_ext.integrations.heads import parameter_of
from tdpo_ext.integrations.parameters import full_shape


class _Output:
    """What a stub returns for a whole model: it has every field, and most are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden
        self.hidden_states = (hidden,)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        if isinstance(key, slice):
            return (self.last_hidden_state,)[key]
        return self.last_hidden_state if key == 0 else None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.last_hidden_state,))

    def __contains__(self, key: Any) -> bool:
        return False

    def __len__(self) -> int:
        return 1

    def get(self, key: str, default: Any = None) -> Any:
        value = getattr(self, key)
        return default if value is None else value


class Stub:
    """Stands for a module: a call gives ``result(module)``, other attributes are the module's.

    Modules inside it are stubs with the same result. ``stub.calls`` counts the calls.
    """

    def __init__(self, module: nn.Module, result: Callable[[nn.Module], Any]) -> None:
        self.stub = SimpleNamespace(module=module, result=result, calls=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.stub.calls += 1
        return self.stub.result(self.stub.module)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.stub.module, name)
        return Stub(value, self.stub.result) if isinstance(value, nn.Module) else value


Stubs = list[tuple[nn.Module, Stub]]
"""Modules, each with the stub that takes its place."""


def plans_of(inner: nn.Module, head: nn.Module, logits: Tensor) -> Iterator[Stubs]:
    """Stubs for all modules that hold values, but for those that the head is inside of.

    The plans differ in what the stubs return: a forward may take one and fail with another.

    Args:
        inner: the Hugging Face model.
        head: its head, which gets a stub of its own elsewhere.
        logits: ``[batch, tokens, V]``, what that stub returns.
    """
    hidden = logits.new_zeros(*logits.shape[:2], full_shape(parameter_of(head))[-1])
    beside = [module for module in _beside(inner, head) if _has_values(module)]

    def by_kind(module: nn.Module) -> Any:
        return _Output(hidden) if isinstance(module, PreTrainedModel) else hidden

    yield [(module, Stub(module, by_kind)) for module in beside]
    yield [(module, Stub(module, lambda _: _Output(hidden))) for module in beside]


def _has_values(module: nn.Module) -> bool:
    """True for modules with weights; a softcap that is a module has none, and has to run."""
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _beside(module: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """The largest modules inside that do not hold the head."""
    for child in module.children():
        if child is head:
            continue
        if any(each is head for each in child.modules()):
            yield from _beside(child, head)
        else:
            yield child


@contextmanager
def replaced(inner: nn.Module, stubs: Stubs) -> Iterator[None]:
    """Inside, each module's place is taken by its stub, so that no hook of the module is called."""
    stub_of = {id(module): stub for module, stub in stubs}
    places = [
        (parent._modules, name, module)
        for parent in inner.modules()
        for name, module in parent._modules.items()
        if id(module) in stub_of
    ]
    try:
        for children, name, module in places:
            children[name] = stub_of[id(module)]  # type: ignore[assignment]
        yield
    finally:
        for children, name, module in places:
            children[name] = module


def plain_call(inner: Any, inputs: dict[str, Any]) -> Any:
    """Call the model without the hooks on the whole of it, which may gather or move all weights."""
    inputs = {**inputs, "return_dict": True}
    if "forward" in inner.__dict__ and "_hf_hook" not in inner.__dict__:
        return inner.forward(**inputs)  # a wrapper of another library
    return type(inner).forward(inner, **inputs)
