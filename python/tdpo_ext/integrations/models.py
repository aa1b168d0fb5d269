"""Facts about a Hugging Face model, and switches that hold for all its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def language_model(model: Any) -> Any:
    """The Hugging Face model inside PEFT's wrapper, or the model itself.

    Raises:
        TypeError: ``model`` is neither; the message says what to pass instead.
    """
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
    """A short name for an argument's value, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, str) else type(value).__name__


def dtype_name(dtype: Any) -> str:
    """The dtype as a word: bfloat16 for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face or PEFT model inside DDP, DeepSpeed and torch.compile."""
    inner: Any = model
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    return inner


def text_config(model: nn.Module) -> Any:
    """The config of the language model, without the vision or audio part of a larger one."""
    return language_model(unwrapped(model)).config.get_text_config()


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(language_model(unwrapped(model)).config.is_encoder_decoder)


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Labels shifted right by one token, as an encoder-decoder's decoder takes them.

    Args:
        model: the Hugging Face model.
        labels: ``[2B, T]`` int64, -100 on padding.

    Returns:
        ``[2B, T]`` int64.

    Raises:
        ValueError: the model's config lacks the decoder's start token or the padding token.
    """
    start, padding = (
        getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id")
    )
    missing = (
        f"the config of {type(model).__name__} needs decoder_start_token_id and pad_token_id, got "
        f"{start} and {padding}"
    )
    # Most classes have a method for it; M2M100, Blenderbot and others have none.
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, name):
            try:
                ids: Tensor = getattr(model, name)(labels)
            except (AttributeError, ValueError) as error:
                raise ValueError(missing) from error
            return ids
    if start is None or padding is None:
        raise ValueError(missing)
    shifted = labels.masked_fill(labels == -100, padding)
    return torch.cat([torch.full_like(shifted[:, :1], start), shifted[:, :-1]], dim=1)


def has_router(model: nn.Module) -> bool:
    """True for a mixture of experts, whose forward can return its router's loss."""
    return hasattr(text_config(model), "output_router_logits")


def router_coefficient(model: nn.Module) -> float:
    """The weight of the router's loss that a mixture of experts' config names; 0 without one."""
    config = text_config(model)
    for name in ("router_aux_loss_coef", "aux_loss_coef"):  # the latter in JetMoe
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 0.0


def without_router_loss(model: nn.Module) -> dict[str, Any]:
    """Arguments of a reference's forward: nobody uses the router's loss of a reference."""
    return {"output_router_logits": False} if has_router(model) else {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode inside, and afterwards in the mode it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


_ROUTER_NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch off dropout and the noise of routers in all modules, in training mode too.

    TDPO compares two models token by token; a random part of one of them would be read as KL. What
    a model reads from its config in forward, or draws with no number to set, stays on.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" not in name and name not in _ROUTER_NOISE:
                continue
            if isinstance(value, float):  # attention keeps its own as a number
                setattr(module, name, 0.0)
            elif isinstance(value, dict):  # PEFT's layers, a number for each adapter
                value.update({key: 0.0 for key, each in value.items() if isinstance(each, float)})
    return model
