"""The scale and softcap that a model applies to its head's results, measured.

A config alone does not tell: MiniCPM3 divides the hidden states by its ``logits_scaling``, Granite
the logits. So the model's forward runs once with a stub for its head, which returns known numbers,
and with stubs for all modules before it. No weight is read: a model may be on the meta device,
partitioned, offloaded or quantised. ``heads.check_head`` tests that the head multiplies with its
weight.
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
from tdpo_ext.integrations.parameters import full_shape, where_values_are
from tdpo_ext.integrations.stubs import Stub, Stubs, plain_call, plans_of, replaced


def logit_options_of(model: nn.Module, *, run_backbone: bool = True) -> LogitOptions:
    """The scale and softcap that the model applies to its head's results.

    Args:
        model: a Hugging Face language model, or a PEFT model of one.
        run_backbone: if the model does not run with stubs, run it as it is, on two sequences of two
            tokens.

    Raises:
        RuntimeError: the model does not call its head, or calls it more than once.
        ValueError: the model does something else to the results; or its config names a scale or a
            softcap, and it cannot be measured whether that is applied after the head.
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
            f"the config of {type(inner).__name__} names {candidates[0]}, but it could not be "
            f"measured whether that is applied after the head ({error}); {INSTEAD}"
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
    """True if they are equal but for the rounding of the model's dtype."""
    relative = max(1e-5, 2 * torch.finfo(made.dtype).eps)
    return torch.allclose(made.float(), expected, rtol=relative, atol=1e-6)


_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Fields of configs that name a factor: of Cohere, Falcon-H1 and Muse. In MPT it may be None."""
_DIVISORS = ("logits_scaling",)
"""Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies with it."""
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


def options_named(config: Any) -> list[LogitOptions]:
    """Every scale and softcap that a config can mean, for the probe to choose from.

    Returns:
        Those that use the most fields come first; the last is no scale and no softcap.
    """
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
    """The model's forward failed with every plan of stubs."""


def _run(inner: Any, head: nn.Module, run_backbone: bool) -> tuple[Tensor, Tensor]:
    """What the head's stub returned, and the logits that the model made of it."""
    inputs = _inputs(inner)
    ramp = _ramp(parameter_of(head), inputs["input_ids"])
    reason: Exception | None = None
    called = []
    plans: list[Stubs] = [*plans_of(inner, head, ramp)]
    refusal = _why_not_to_run(inner)
    if run_backbone and not refusal:
        plans.append([])  # no stub but the head's
    for plan in plans:
        stub = Stub(head, lambda _: ramp)
        try:
            with evaluating(inner), replaced(inner, [(head, stub), *plan]), torch.no_grad():
                logits = plain_call(inner, inputs).logits
        except Exception as error:  # of any kind: the stubs are no modules
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
    raise NotRunError(f"{said}; its parameters are {refusal}" if refusal else said) from reason


def _why_not_to_run(inner: nn.Module) -> str:
    """What keeps the model's own modules from being run; empty if nothing does."""
    for parameter in inner.parameters():
        if hasattr(parameter, "quant_state"):
            # bitsandbytes packs weights anew at the first forward in evaluation mode.
            return "quantised to 4 bit"
        if where := where_values_are(parameter):
            return where
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
    """``[batch, tokens, V]``: small and large numbers of both signs, different for each token."""
    row = torch.linspace(-1, 1, full_shape(weight)[0], device=ids.device)
    sizes = torch.arange(1, ids.numel() + 1, device=ids.device).view(*ids.shape, 1)
    return (40 * row**3 + 0.3 * row + 0.01) * sizes
