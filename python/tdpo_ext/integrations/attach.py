"""The fused head inside a Hugging Face model's own forward.

``attach_tdpo`` gives the model one more argument, ``tdpo``. While it is given, the head's module,
called where it always was, does not multiply: it returns the loss, made from its input and its
weight. So whatever gathers, shards or casts that module's weight (DDP, FSDP2, ZeRO-3, PEFT,
autocast) does it at the usual moments, forward and backward, and the logits never exist. What the
model then does to the head's result it does to a few numbers, and nobody reads that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.adapters import virtual_tokens
from tdpo_ext.integrations.attachment import Attachment
from tdpo_ext.integrations.classes import override_forward, restore_forward
from tdpo_ext.integrations.heads import check_head, head_of, missing_values, weight_and_bias
from tdpo_ext.integrations.hidden import HeadInputs
from tdpo_ext.integrations.models import language_model, named
from tdpo_ext.integrations.probe import logit_options_of
from tdpo_ext.integrations.targets import HEAD_INPUTS, TDPOModelOutput, TDPOTargets, check_labels
from tdpo_ext.modules import LinearTDPOLoss
from tdpo_ext.outputs import TDPOOutput

__all__ = ["HEAD_INPUTS", "TDPOModelOutput", "TDPOTargets", "attach_tdpo", "detach_tdpo"]


def _head_forward(call: Any, head: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    attachment: Attachment | None = head.__dict__.get("_tdpo")
    if attachment is None or attachment.request is None:
        return call(hidden, *args, **kwargs)
    return attachment.answer(head, hidden)


def _model_forward(call: Any, model: Any, *args: Any, tdpo: Any = None, **kwargs: Any) -> Any:
    if tdpo is None:
        return call(*args, **kwargs)
    attachment: Attachment | None = model.__dict__.get("_tdpo")
    _check_request(model, attachment, tdpo, kwargs)
    assert attachment is not None
    if attachment.takes_use_cache:
        kwargs.setdefault("use_cache", False)
    attachment.request = tdpo
    try:
        with _last_hook(head_of(model), attachment.keep_numbers):
            outputs = call(*args, **{**kwargs, "return_dict": True})
    finally:  # also after an error: what is kept would keep the graph alive
        attachment.request = None
        result = attachment.take_result()
    if result is None:
        raise RuntimeError(
            f"{type(model).__name__} did not call its head ({type(head_of(model)).__name__}); use "
            "the logits (tdpo_ext.TDPOLoss)"
        )
    if isinstance(result, HeadInputs):
        return result
    loss = result.loss if isinstance(result, TDPOOutput) else None
    return TDPOModelOutput(loss=loss, tdpo=result, aux_loss=getattr(outputs, "aux_loss", None))


def _prompting_forward(call: Any, model: Any, *args: Any, tdpo: Any = None, **kwargs: Any) -> Any:
    """Of a PEFT model that puts virtual tokens before every sequence. With its adapters disabled
    PEFT does not call it."""
    if tdpo is None:
        return call(*args, **kwargs)
    attachment: Attachment | None = language_model(model).__dict__.get("_tdpo")
    if attachment is None:
        raise RuntimeError("the model was detached; call attach_tdpo(model) again")
    attachment.virtual_tokens = virtual_tokens(model)
    try:
        return call(*args, tdpo=tdpo, **kwargs)
    finally:
        attachment.virtual_tokens = 0


@contextmanager
def _last_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    """A forward hook that sees what all others have made of the module's result: DeepSpeed replaces
    it. Compiled code takes no hooks, and has none of DeepSpeed's."""
    if torch.compiler.is_compiling():
        yield
        return
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_request(model: Any, attachment: Any, tdpo: Any, kwargs: dict[str, Any]) -> None:
    if attachment is None:
        raise RuntimeError("the model was detached; call attach_tdpo(model) again")
    if model.__dict__.get("_is_replica"):
        raise RuntimeError(
            "tdpo= does not work under nn.DataParallel, which would split pairs over devices; use "
            "DistributedDataParallel (torchrun or accelerate launch)"
        )
    if not isinstance(tdpo, TDPOTargets) and not (isinstance(tdpo, str) and tdpo == HEAD_INPUTS):
        raise TypeError(
            f'tdpo must be a TDPOTargets or "{HEAD_INPUTS}" (HEAD_INPUTS), got {named(tdpo)}'
        )
    if kwargs.get("labels") is not None:
        raise ValueError("labels and tdpo were both given; labels go into TDPOTargets")
    if kwargs.get("return_dict") is False:
        raise ValueError("return_dict=False and tdpo were both given; with tdpo there is no tuple")
    if isinstance(tdpo, TDPOTargets):
        check_labels(attachment, tdpo)
    if head_of(model).__dict__.get("_tdpo") is not attachment:
        raise RuntimeError(
            "the model's head has changed since attach_tdpo (adapters added, embeddings resized, "
            "another head set, or the same head attached with another model); call attach_tdpo "
            "last, once for each model, and give each a head module of its own"
        )


_DEFAULT = LinearTDPOLoss()


def attach_tdpo(
    model: nn.Module, loss: LinearTDPOLoss | None = _DEFAULT, *, probe: bool = True
) -> nn.Module:
    """Let ``model`` compute TDPO inside its own forward, without logits.

        attach_tdpo(policy, LinearTDPOLoss(beta=0.1))
        attach_tdpo(reference)
        with torch.no_grad():
            of_reference = reference(**batch, tdpo=HEAD_INPUTS)
        output = policy(**batch, tdpo=TDPOTargets(of_reference, labels))
        output.loss.backward()                     # and output.tdpo.metrics()

    Without ``tdpo=`` the model is what it was: generate, saving and evaluation are untouched.
    Attach after adding adapters, before DDP, FSDP or DeepSpeed.

    Args:
        model: a Hugging Face language model, decoder only or encoder-decoder, or a PEFT model of
            one. Changed in place. An encoder-decoder is called with ``decoder_input_ids`` and
            takes ``shift_labels``.
        loss: the options of the loss (those of the logits are the model's own). None: statistics
            per token instead, as ``linear_token_stats``, for losses of your own.
        probe: look at the head's weight, and where the model does not run with stubs for its parts
            run it as it is. False: do neither. In both cases what the model does to its head's
            results is measured (``probe.logit_options_of``), for which no weights are needed.

    Returns:
        ``model``.

    Raises:
        TypeError: not a Hugging Face language model.
        ValueError: its logits cannot be rebuilt, or its head cannot be fused; the message says what
            to do instead.
    """
    if loss is not None and not isinstance(loss, LinearTDPOLoss):
        raise TypeError(
            f"loss must be a LinearTDPOLoss or None (statistics per token), got {named(loss)}; its "
            "options are LinearTDPOLoss(beta=..., alpha=..., variant=...)"
        )
    inner = language_model(model)
    detach_tdpo(model)
    head = head_of(inner)
    if not missing_values(head):
        weight_and_bias(head)  # refuses a head that cannot be fused
    if probe:
        check_head(head, type(inner).__name__)
    attachment = Attachment(inner, head, loss, logit_options_of(inner, run_backbone=probe))
    for module, forward in ((inner, _model_forward), (head, _head_forward)):
        module.__dict__["_tdpo"] = attachment
        override_forward(module, forward)
    if model is not inner and virtual_tokens(model):
        override_forward(model, _prompting_forward)
    return model


def detach_tdpo(model: nn.Module) -> nn.Module:
    """Undo ``attach_tdpo``; a model that is not attached is left alone."""
    inner = language_model(model)
    for module in (inner, head_of(inner)):
        module.__dict__.pop("_tdpo", None)
        restore_forward(module)
    if model is not inner:
        restore_forward(model)
    return model
