"""Parameters whose values are elsewhere: sharded, partitioned, quantised or on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tdpo_ext.distributed import is_dtensor


def is_partitioned(parameter: Any) -> bool:
    """True if ZeRO-3 owns the parameter; its values may be gathered at the moment."""
    return hasattr(parameter, "ds_id")


def has_partitioned(model: nn.Module) -> bool:
    """True if ZeRO-3 owns a parameter of the model."""
    return any(is_partitioned(parameter) for parameter in model.parameters())


def full_shape(parameter: Any) -> Any:
    """The shape of all of a parameter, whether or not this process holds its values."""
    return getattr(parameter, "ds_shape", parameter.shape)


def where_values_are(parameter: Any) -> str:
    """Where a parameter's values are if it does not hold them all, for a message; else empty."""
    if is_partitioned(parameter) and parameter.numel() == 0:
        return "partitioned (ZeRO-3)"
    if is_dtensor(parameter) or is_dtensor(parameter.data):
        return "sharded (a DTensor)"
    return "on the meta device" if getattr(parameter, "is_meta", False) else ""


@contextmanager
def gathered(tensor: Any) -> Iterator[Tensor]:
    """All values of a parameter that FSDP2 or ZeRO-3 has sharded."""
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
