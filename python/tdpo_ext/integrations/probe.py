"""What a model does to its head's results, measured without the model's numbers.

No config says everything, and what one says is not always done after the head: MiniCPM3 divides
the hidden states by its ``logits_scaling``, Granite the logits. So the model's forward is run once
with a stub for its head, which returns known numbers, and with stubs for all that comes before it.
No weight is read: a model may be on the meta device, partitioned, offloaded or quantised. That the
head multiplies with its weight is looked at apart from that.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tdpo_ext.integrations.classes import plain_forward
from tdpo_ext.integrations.hidden import (
    LogitOptions,
    evaluating,
    head_of,
    language_model,
    missing_values,
    parameter_of,
    weight_and_bias,
)

INSTEAD = (
    "call tdpo_ext.linear_tdpo_loss with your own hidden states, scale and softcap, or use the "
    "logits (tdpo_ext.TDPOLoss)"
)


def logit_options_of(model: nn.Module, *, run_backbone: bool = True) -> LogitOptions:
    """Scale and softcap that the model applies to its head's results.

    Args:
        run_backbone: where the model does not run with stubs, run it as it is, on two sequences of
            two tokens.

    Raises:
        RuntimeError: the model does not call its head, or more than once.
        ValueError: it does something else to the results, or what it does cannot be measured
            although its config names a scale or a softcap.
    """
    inner = language_model(model)
    head = head_of(inner)
    candidates = options_named(inner.config)
    try:
        given, made = _run(inner, head, run_backbone)
    except _NotRunError as error:
        if len(candidates) == 1:
            warnings.warn(
                f"what {type(inner).__name__} does to the results of its head could not be "
                f"measured ({error}); its config names no scale and no softcap, so it is taken to "
                "do nothing",
                stacklevel=3,
            )
            return candidates[0]
        raise ValueError(
            f"the config of {type(inner).__name__} names {candidates[0]}, and whether that is "
            f"applied after the head could not be measured ({error}); {INSTEAD}"
        ) from error
    if given.shape != made.shape:
        raise ValueError(
            f"the logits of {type(inner).__name__} have shape {tuple(made.shape)}, the results of "
            f"its head {tuple(given.shape)}; {INSTEAD}"
        )
    for options in candidates:
        if _same(options.applied(given), made):
            return options
    raise ValueError(
        f"{type(inner).__name__} does something to the results of its head that no known field of "
        f"its config says; {INSTEAD}"
    )


def _same(expected: Tensor, made: Tensor) -> bool:
    relative = max(1e-5, 2 * torch.finfo(made.dtype).eps)
    return torch.allclose(made.float(), expected, rtol=relative, atol=1e-6)


# --- what a config names --------------------------------------------------------------------------

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Cohere; Falcon-H1; Muse. None in MPT: no scale."""
_DIVISORS = ("logits_scaling",)
"""Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies with it."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


def options_named(config: Any) -> list[LogitOptions]:
    """All that the fields of a config can mean, the fullest first; the last is: nothing at all."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def numbers(fields: tuple[str, ...]) -> list[float]:
        values = [getattr(text, field, None) for field in fields]
        return [float(value) for value in values if isinstance(value, int | float) and value]

    alternatives: list[tuple[float | None, ...]]
    alternatives = [(factor, None) for factor in numbers(_FACTORS) if factor != 1]
    alternatives += [(1 / x, x, None) for x in numbers(_DIVISORS) if x != 1]
    softcaps = (*numbers(_SOFTCAPS), None)
    choices = [*itertools.product(*alternatives, softcaps)]
    choices.sort(key=lambda choice: choice.count(None))  # stable
    options = []
    for *factors, softcap in choices:
        scale = 1.0
        for factor in factors:
            scale *= 1.0 if factor is None else factor
        options.append(LogitOptions(scale, softcap))
    return [*dict.fromkeys(options)]


# --- the model's forward with stubs ---------------------------------------------------------------


class _NotRunError(Exception):
    pass


class _Output:
    """What a stub returns for a whole model: an output that has everything, most of it None."""

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


class _Stub:
    """Stands for a module: called, it returns the same each time; asked, it is the module, with
    stubs for the modules inside."""

    def __init__(self, module: nn.Module, result: Callable[[nn.Module], Any]) -> None:
        self.stub = SimpleNamespace(module=module, result=result, calls=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.stub.calls += 1
        return self.stub.result(self.stub.module)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.stub.module, name)
        return _Stub(value, self.stub.result) if isinstance(value, nn.Module) else value


Stubs = list[tuple[nn.Module, _Stub]]


def _run(inner: Any, head: nn.Module, run_backbone: bool) -> tuple[Tensor, Tensor]:
    """What the head's stub has returned, and the logits that the model has made of it."""
    inputs = _inputs(inner)
    ramp = _ramp(parameter_of(head), inputs["input_ids"])
    reason: Exception | None = None
    called = []
    plans: list[Stubs] = [*_plans(inner, head, ramp)]
    whole = missing_values_of(inner)
    if run_backbone and not whole:
        plans.append([])
    for plan in plans:
        stub = _Stub(head, lambda _: ramp)
        try:
            with evaluating(inner), _replaced(inner, [(head, stub), *plan]), torch.no_grad():
                logits = _plain_call(inner, inputs).logits
        except Exception as error:  # whatever a model makes of stubs
            reason = reason or error
            continue
        called.append(stub.stub.calls)
        if called[-1] == 1 and isinstance(logits, Tensor):
            return ramp, logits.to(ramp.device)
    if called:
        times = f"{max(called)} times in one forward" if any(called) else "not"
        raise RuntimeError(
            f"{type(inner).__name__} did not call its head ({type(head).__name__}) once: {times}; "
            "use the logits (tdpo_ext.TDPOLoss)"
        )
    said = f"{type(reason).__name__}: {reason}" if reason else "nothing could be run"
    raise _NotRunError(f"{said}; its parameters are {whole}" if whole else said) from reason


def missing_values_of(inner: nn.Module) -> str:
    """Why the model itself must not be run; empty if it may."""
    for module in inner.modules():
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "quant_state"):
                # bitsandbytes packs weights anew at the first forward in evaluation mode.
                return "quantised to 4 bit"
            if parameter.is_meta:
                return "on the meta device"
            if hasattr(parameter, "ds_id") and parameter.numel() == 0:
                return "partitioned (ZeRO-3)"
            if type(parameter.data).__name__ == "DTensor":
                return "sharded (DTensors)"
    return ""


def _inputs(inner: Any) -> dict[str, Any]:
    """Two sequences of two tokens."""
    device = parameter_of(head_of(inner)).device
    if device.type == "meta":
        device = torch.device("cpu")
    ids = torch.ones(2, 2, dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def _ramp(weight: Any, ids: Tensor) -> Tensor:
    """``[batch, tokens, V]``: small and large numbers of both signs, other ones for each token."""
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]
    row = torch.linspace(-1, 1, vocabulary, device=ids.device)
    sizes = torch.arange(1, ids.numel() + 1, device=ids.device).view(*ids.shape, 1)
    return (40 * row**3 + 0.3 * row + 0.01) * sizes


def _plans(inner: nn.Module, head: nn.Module, ramp: Tensor) -> Iterator[Stubs]:
    """Stubs in place of all beside the way to the head that has values. None of them is needed."""
    weight = parameter_of(head)
    width = getattr(weight, "ds_shape", weight.shape)[-1]
    hidden = ramp.new_zeros(*ramp.shape[:2], width)
    beside = [module for module in _beside(inner, head) if _has_values(module)]

    def by_kind(module: nn.Module) -> Any:
        return _Output(hidden) if isinstance(module, PreTrainedModel) else hidden

    yield [(module, _Stub(module, by_kind)) for module in beside]
    yield [(module, _Stub(module, lambda _: _Output(hidden))) for module in beside]


def _has_values(module: nn.Module) -> bool:
    """Unlike a softcap that is a module, and comes after the head."""
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _beside(module: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if child is head:
            continue
        if any(each is head for each in child.modules()):
            yield from _beside(child, head)
        else:
            yield child


@contextmanager
def _replaced(inner: nn.Module, stubs: Stubs) -> Iterator[None]:
    """Each module's place taken by its stub: nothing that hooks the module is called."""
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


def _plain_call(inner: Any, inputs: dict[str, Any]) -> Any:
    """Without the hooks of the whole model, as these may gather or move all weights."""
    inputs = {**inputs, "return_dict": True}
    if "forward" in inner.__dict__ and "_hf_hook" not in inner.__dict__:
        return inner.forward(**inputs)  # somebody's wrapper
    return type(inner).forward(inner, **inputs)


# --- the head -------------------------------------------------------------------------------------


def check_head(head: nn.Module, name: str) -> None:
    """Raise ValueError unless the head multiplies with its weight and adds its bias."""
    if missing_values(head):
        if plain_forward(head) is not nn.Linear.forward:
            warnings.warn(
                f"the head of {name} is a {type(head).__name__} and its weight is "
                f"{missing_values(head)}, so it could not be compared with a plain linear layer",
                stacklevel=3,
            )
        return
    with evaluating(head), torch.no_grad():
        weight, bias = weight_and_bias(head)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(4, weight.shape[1], generator=generator)
        rows = rows.to(weight.device, weight.dtype)
        wanted = nn.functional.linear(rows, weight, bias)
        try:
            made = head.forward(rows)
        except Exception as error:
            why = f"it fails on {tuple(rows.shape)}: {error}"
            raise ValueError(_no_linear(head, name, why)) from error
    if not isinstance(made, Tensor) or made.shape != wanted.shape:
        what = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(_no_linear(head, name, f"it returns {what}, not {tuple(wanted.shape)}"))
    size = wanted.float().abs().amax().clamp(min=1e-6)
    worst = ((made - wanted).float().abs().amax() / size).item()
    # Adapters add their part after the product, rounded once more.
    roundings = 4 if hasattr(head, "base_layer") else 1
    if not worst <= max(roundings * torch.finfo(wanted.dtype).eps, 1e-5):
        why = f"the results differ by {worst:.2g} of the largest"
        raise ValueError(_no_linear(head, name, why))


def _no_linear(head: nn.Module, name: str, why: str) -> str:
    return (
        f"the head of {name} ({type(head).__name__}) does not multiply its input with its weight "
        f"alone: {why}; {INSTEAD}"
    )
