"""Questions to a Hugging Face model, and switches that hold for all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def language_model(model: Any) -> Any:
    """The Hugging Face model inside PEFT's wrapper, or the model itself."""
    if isinstance(model, nn.Module):
        peft: Any = model
        inner = peft.get_base_model() if hasattr(model, "get_base_model") else model
        if hasattr(inner, "get_output_embeddings"):
            return inner
    raise TypeError(
        f"model must be a Hugging Face language model or a PEFT model of one, got {named(model)}; "
        f"{_what_instead(model)}"
    )


def _what_instead(model: Any) -> str:
    if isinstance(model, type):
        return "make one of its class: from_pretrained, or its constructor"
    if isinstance(model, str):
        return "load it first: AutoModelForCausalLM.from_pretrained"
    if hasattr(getattr(model, "module", None), "get_output_embeddings"):
        return "attach the model inside, before it is wrapped (here .module)"
    return "with another model call tdpo_ext.linear_tdpo_loss on its hidden states"


def named(value: Any) -> str:
    """What somebody gave, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, str) else type(value).__name__


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model inside PEFT, DDP, DeepSpeed and torch.compile."""
    inner: Any = model
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    return inner


def text_config(model: nn.Module) -> Any:
    return language_model(unwrapped(model)).config.get_text_config()


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What an encoder-decoder's decoder takes for these labels: itself one token behind them."""
    start, padding = (
        getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id")
    )
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, name):  # of most classes, not of M2M100, Blenderbot and others
            try:
                ids: Tensor = getattr(model, name)(labels)
            except (AttributeError, ValueError) as error:
                raise ValueError(_no_start(model, start, padding)) from error
            return ids
    if start is None or padding is None:
        raise ValueError(_no_start(model, start, padding))
    shifted = labels.masked_fill(labels == -100, padding)
    return torch.cat([torch.full_like(shifted[:, :1], start), shifted[:, :-1]], dim=1)


def _no_start(model: Any, start: Any, padding: Any) -> str:
    return (
        f"the config of {type(model).__name__} needs decoder_start_token_id and pad_token_id, got "
        f"{start} and {padding}"
    )


def router_coefficient(model: Any) -> float:
    """With which a mixture of experts adds its router's loss; 0 where its config has none."""
    config = language_model(model).config.get_text_config()
    for name in ("router_aux_loss_coef", "aux_loss_coef"):  # the latter in JetMoe
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


_ROUTER_NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def without_dropout(model: nn.Module) -> nn.Module:
    """Every dropout of the model off, in training too, and every noise of a router: TDPO compares
    two models token by token."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():  # attention keeps its own as a number
            random = "drop" in name or name in _ROUTER_NOISE
            if random and isinstance(value, float):
                setattr(module, name, 0.0)
    return model
