"""The fused head inside a Hugging Face model's own forward.

``attach_tdpo`` gives the model's forward one more argument, ``tdpo``. If a call has it, the head's
module does not multiply: called where it always was, it computes the loss from its input and its
weight, and returns a few numbers in place of the logits. So whatever gathers, shards or casts that
module's weight (DDP, FSDP2, ZeRO-3, PEFT, autocast) does it at the usual moments, forward and
backward, and the logits never exist. What the model then does to the head's result it does to those
few numbers; they are not used.
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
from tdpo_ext.integrations.targets import HEAD_INPUTS, TDPOModelOutput, TDPOTargets, check_fields
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
    finally:  # also after an error: a result that stays would keep the graph alive
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
    """The forward of a PEFT model that puts virtual tokens before every sequence.

    PEFT does not call it while the adapters are disabled, and then there are no virtual tokens.
    """
    if tdpo is None:
        return call(*args, **kwargs)
    attachment: Attachment | None = language_model(model).__dict__.get("_tdpo")
    if attachment is None:
        raise RuntimeError(_DETACHED)
    attachment.virtual_tokens = virtual_tokens(model)
    try:
        return call(*args, tdpo=tdpo, **kwargs)
    finally:
        attachment.virtual_tokens = 0


@contextmanager
def _last_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    """Inside, a forward hook that is called after all others, some of which replace the result.

    DeepSpeed's do. Compiled code takes no hooks; DeepSpeed's are not there either.
    """
    if torch.compiler.is_compiling():
        yield
        return
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


_DETACHED = "the model was detached; call attach_tdpo(model) again"


def _check_request(model: Any, attachment: Any, tdpo: Any, kwargs: dict[str, Any]) -> None:
    if attachment is None:
        raise RuntimeError(_DETACHED)
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
        raise ValueError(
            "return_dict=False and tdpo were both given; leave return_dict out, with tdpo there is "
            "no tuple"
        )
    if isinstance(tdpo, TDPOTargets):
        check_fields(
            tdpo,
            encoder_decoder=attachment.is_encoder_decoder,
            statistics=attachment.loss is None,
        )
    if head_of(model).__dict__.get("_tdpo") is not attachment:
        raise RuntimeError(
            "the model's head has changed since attach_tdpo (adapters added, embeddings resized, "
            "another head set, or the same head attached with another model); call attach_tdpo "
            "last, once for each model, and give each a head module of its own"
        )


_DEFAULT = LinearTDPOLoss()
_MEASURED = "scale and softcap of the logits are measured, each model's own"
_WITHOUT_EFFECT = {
    "logit_scale": _MEASURED,
    "logit_softcap": _MEASURED,
    "reference_logit_scale": _MEASURED,
    "reference_logit_softcap": _MEASURED,
    "process_group": "the head has the whole vocabulary, which no other process shares",
}
"""Options of the loss that an attached model does not take, and why."""


def _check_options(loss: LinearTDPOLoss) -> None:
    for name, why in _WITHOUT_EFFECT.items():
        value, default = getattr(loss, name), getattr(_DEFAULT, name)
        if value != default:
            came = value if isinstance(value, float | int) else named(value)
            raise ValueError(f"loss must have {name}={default}, got {came}: {why}; leave it out")


def attach_tdpo(
    model: nn.Module, loss: LinearTDPOLoss | None = _DEFAULT, *, probe: bool = True
) -> nn.Module:
    """Let ``model`` compute TDPO inside its own forward, without logits.

        attach_tdpo(policy, LinearTDPOLoss(beta=0.1))
        attach_tdpo(reference)
        with torch.no_grad():
            reference_inputs = reference(**batch, tdpo=HEAD_INPUTS)
        output = policy(**batch, tdpo=TDPOTargets(reference_inputs, labels))
        output.loss.backward()                     # and output.tdpo.metrics()

    Calls without ``tdpo=`` are what they were: generate, saving and evaluation are untouched.
    Attach after adding adapters, before DDP, FSDP or DeepSpeed.

    Args:
        model: a Hugging Face language model, decoder only or encoder-decoder, or a PEFT model of
            one. Changed in place. An encoder-decoder is called with ``decoder_input_ids`` and
            takes ``shift_labels``.
        loss: the options of the loss. Scale and softcap of the logits are the model's own and the
            head is whole, so ``logit_scale``, ``logit_softcap``, those of the reference and
            ``process_group`` keep their defaults. None: return statistics per token instead, those
            of ``linear_token_stats``, for losses of your own.
        probe: read the head's weight to test that the head is a linear layer; and if the model does
            not run with stubs for its modules, run it as it is. False: do neither. The scale and
            softcap of its logits are measured in both cases, without reading weights.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no Hugging Face language model, or ``loss`` no ``LinearTDPOLoss``.
        ValueError: the logits cannot be rebuilt, the head cannot be fused, or ``loss`` has one of
            these options; the message says what to do instead.
        RuntimeError: the model's forward does not call its head exactly once.
    """
    if loss is not None and not isinstance(loss, LinearTDPOLoss):
        raise TypeError(
            f"loss must be a LinearTDPOLoss or None (statistics per token), got {named(loss)}; its "
            "options are LinearTDPOLoss(beta=..., alpha=..., variant=...)"
        )
    if loss is not None:
        _check_options(loss)
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
    """Undo ``attach_tdpo``; a model that is not attached is left alone.

    Args:
        model: what ``attach_tdpo`` was called on. Changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no Hugging Face language model.
    """
    inner = language_model(model)
    for module in (inner, head_of(inner)):
        module.__dict__.pop("_tdpo", None)
        restore_forward(module)
    if model is not inner:
        restore_forward(model)
    return model
