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
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.heads import INSTEAD, head_of, parameter_of
from tdpo_ext.integrations.hidden import LogitOptions
from tdpo_ext.integrations.models import evaluating, language_model
from tdpo_ext.integrations.stubs import Stub, Stubs, plain_call, plans_of, replaced


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
    except NotRunError as error:
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


class NotRunError(Exception):
    pass


def _run(inner: Any, head: nn.Module, run_backbone: bool) -> tuple[Tensor, Tensor]:
    """What the head's stub has returned, and the logits that the model has made of it."""
    inputs = _inputs(inner)
    ramp = _ramp(parameter_of(head), inputs["input_ids"])
    reason: Exception | None = None
    called = []
    plans: list[Stubs] = [*plans_of(inner, head, ramp)]
    whole = missing_values_of(inner)
    if run_backbone and not whole:
        plans.append([])
    for plan in plans:
        stub = Stub(head, lambda _: ramp)
        try:
            with evaluating(inner), replaced(inner, [(head, stub), *plan]), torch.no_grad():
                logits = plain_call(inner, inputs).logits
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
    raise NotRunError(f"{said}; its parameters are {whole}" if whole else said) from reason


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
