"""Give one module another forward, by a class of its own.

A module whose ``forward`` is replaced on the instance cannot be pickled, its copies call the
original, and wrappers that look for ``forward.__func__`` miss it. So the module gets a subclass of
its class, with the same name, instead: copy, pickle, torch.save and torch.compile see a method like
any other.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]
"""``(call, module, *args, **kwargs)``; ``call(*args, **kwargs)`` is the forward that was there."""


def override_forward(module: nn.Module, forward: Forward) -> None:
    """Nothing happens where that was done before."""
    if hasattr(type(module), "_tdpo_plain_class"):
        return
    plain: Any = type(module)
    module.__class__ = _subclass(plain, forward)
    if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
        # accelerate's hook brings the weights, then calls _old_forward: that has to be ours.
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    elif "forward" in module.__dict__:  # somebody's, which ours goes around
        module.__dict__["_tdpo_forward_before"] = module.__dict__.pop("forward")


def restore_forward(module: nn.Module) -> None:
    """Undo that, unless somebody has wrapped the forward or the class since: then it stays below
    theirs."""
    plain = vars(type(module)).get("_tdpo_plain_class")
    if plain is None:
        return
    attributes = module.__dict__
    if _is_ours(module, attributes.get("_old_forward")):
        attributes["_old_forward"] = types.MethodType(plain.forward, module)
    else:
        if _is_ours(module, attributes.get("forward")):
            del attributes["forward"]
        if "forward" in attributes:
            return
        if "_tdpo_forward_before" in attributes:
            attributes["forward"] = attributes.pop("_tdpo_forward_before")
    module.__class__ = plain


def plain_forward(module: nn.Module) -> Any:
    """The forward of the class that a module had before."""
    plain: Any = getattr(type(module), "_tdpo_plain_class", type(module))
    return plain.forward


def _is_ours(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(module).forward


@functools.cache
def _subclass(plain: Any, override: Forward) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.__dict__.get("_tdpo_forward_before")
        call = functools.partial(plain.forward, self) if before is None else before
        return override(call, self, *args, **kwargs)

    # As the class's own to whoever looks at its signature, as generate does. No __wrapped__:
    # accelerate takes its own wrappers off as far as that leads.
    forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]
    forward.__qualname__ = f"{plain.__qualname__}.forward"

    def reduce(self: Any, protocol: Any) -> Any:
        if type(self) is not subclass:
            return super(subclass, self).__reduce_ex__(protocol)
        made = plain.__reduce_ex__(self, 2)
        if made[1][:1] != (subclass,):  # a class with ways of its own
            return made
        return (_new, (plain, override), *made[2:])

    subclass = type(plain)(
        plain.__name__,
        (plain,),
        {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "__reduce_ex__": reduce,
            "forward": forward,
            "_tdpo_plain_class": plain,
        },
    )
    return subclass


def _new(plain: Any, override: Forward) -> Any:
    """What pickle and copy make first, before they give it its attributes."""
    subclass = _subclass(plain, override)
    return subclass.__new__(subclass)
