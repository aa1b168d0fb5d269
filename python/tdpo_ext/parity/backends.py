"""The backends that are present, and a context in which one of them serves."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from tdpo_ext.token_statistics import kernels, native


class Backend(NamedTuple):
    device: torch.device
    name: str
    """An instruction set of the CPU, "kernels" (CUDA) or "fallback" (plain PyTorch)."""

    def __str__(self) -> str:
        return f"{self.device} {self.name}"

    @property
    def is_fallback(self) -> bool:
        return self.name == "fallback"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """A context in which this backend serves every call."""
        with contextlib.ExitStack() as stack:
            if self.is_fallback:
                stack.enter_context(mock.patch.object(kernels, "core", None))
            elif self.device.type == "cpu":
                asked = {native.INSTRUCTION_SET_VARIABLE: self.name}
                stack.enter_context(mock.patch.dict(os.environ, asked))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "tdpo_ext runs its plain-PyTorch fallback")
            yield


def devices_present() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def backends_of(device: torch.device) -> list[Backend]:
    """The backends that can serve a device: compiled ones first, plain PyTorch last."""
    names = []
    if device.type == "cpu" and native.core is not None:
        names = native.core.instruction_sets()
    elif device.type != "cpu" and kernels.serves(device):
        names = ["kernels"]
    return [Backend(device, name) for name in (*names, "fallback")]


def checked_device(name: str) -> torch.device:
    """The device of this name; ValueError if torch does not know it or it is not present."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"devices must be present here ({', '.join(devices_present())}), got {name!r}: {said}"
        ) from error
    return device
