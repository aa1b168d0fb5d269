"""Override one module's forward, by giving the module a subclass of its class.

A ``forward`` that is set on the instance has three faults: the module cannot be pickled, its copies
call the original module's forward, and wrappers that look for ``forward.__func__`` miss it. With a
subclass of the same name, copy, pickle, torch.save and torch.compile see an ordinary method.
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
    """Call ``forward`` instead of the module's own; one that is overridden already is left alone.

    Args:
        module: changed in place.
        forward: a function of a module, so that it can be pickled; it gets the forward that was
            there as its first argument.
    """
    if hasattr(type(module), "_tdpo_plain_class"):
        return
    plain: Any = type(module)
    ours = module.__class__ = _subclass(plain, forward)
    if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
        # accelerate's hook brings the weights, then calls _old_forward: override that one.
        module.__dict__["_old_forward"] = types.MethodType(ours.forward, module)
    elif "forward" in module.__dict__:  # a wrapper, such as accelerate's: go around it
        module.__dict__["_tdpo_forward_before"] = module.__dict__["forward"]
        module.__dict__["forward"] = types.MethodType(ours._tdpo_around, module)


def restore_forward(module: nn.Module) -> None:
    """Undo ``override_forward``.

    If the forward or the class was wrapped since, the override stays inside that wrapper.
    """
    ours: Any = type(module)
    plain = vars(ours).get("_tdpo_plain_class")
    if plain is None:
        return
    attributes = module.__dict__
    if _is_ours(module, attributes.get("_old_forward")):
        attributes["_old_forward"] = types.MethodType(plain.forward, module)
    elif _is_ours(module, attributes.get("forward")):
        is_around = attributes.pop("forward").__func__ is ours._tdpo_around
        before = attributes.pop("_tdpo_forward_before", None)
        if is_around:  # else accelerate has taken off its wrapper and this one around it
            attributes["forward"] = before
    elif "forward" in attributes:
        return
    module.__class__ = plain


def plain_forward(module: nn.Module) -> Any:
    """The forward of the class that the module has, or had before ``override_forward``."""
    plain: Any = getattr(type(module), "_tdpo_plain_class", type(module))
    return plain.forward


def _is_ours(module: nn.Module, forward: Any) -> bool:
    ours: Any = type(module)
    return getattr(forward, "__func__", None) in (ours.forward, ours._tdpo_around)


@functools.cache
def _subclass(plain: Any, override: Forward) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return override(functools.partial(plain.forward, self), self, *args, **kwargs)

    # generate reads the signature, so it is the class's own. functools.wraps would set __wrapped__
    # too, and accelerate would take this forward off.
    forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]
    forward.__qualname__ = f"{plain.__qualname__}.forward"

    @functools.wraps(forward)  # accelerate, which takes its wrapper off, then ends at forward
    def around(self: Any, *args: Any, **kwargs: Any) -> Any:
        return override(self.__dict__["_tdpo_forward_before"], self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        if type(self) is not subclass:
            return super(subclass, self).__reduce_ex__(protocol)
        made = plain.__reduce_ex__(self, 2)
        if made[1][:1] != (subclass,):  # the class has a __reduce__ of its own
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
            "_tdpo_around": around,
            "_tdpo_plain_class": plain,
        },
    )
    return subclass


def _new(plain: Any, override: Forward) -> Any:
    """An empty module for pickle and copy, which then set its attributes."""
    subclass = _subclass(plain, override)
    return subclass.__new__(subclass)
