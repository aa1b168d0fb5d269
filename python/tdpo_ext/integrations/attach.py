"""The fused head inside a Hugging Face model's own forward.

``attach_tdpo`` gives the model one more argument, ``tdpo``. While it is given, the head's module,
called where it always was, does not multiply: it returns the loss, made from its input and its
weight. So whatever gathers, shards or casts that module's weight (DDP, FSDP2, ZeRO-3, PEFT,
autocast) does it at the usual moments, forward and backward, and the logits never exist. What the
model then does to the head's result it does to a few numbers, and nobody reads that.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from tdpo_ext.functional import linear_tdpo_loss, linear_token_stats
from tdpo_ext.integrations.hidden import (
    HeadInputs,
    LogitOptions,
    check_rebuilt_logits,
    evaluating,
    head_of,
    language_model,
    parameter_of,
    probe_inputs,
    weight_and_bias,
)
from tdpo_ext.modules import LinearTDPOLoss
from tdpo_ext.outputs import TDPOOutput, TokenStats

HEAD_INPUTS = "head_inputs"
"""As ``tdpo=``: return the ``HeadInputs``, which is what a reference is asked for."""


class TDPOTargets(NamedTuple):
    """As ``tdpo=``: return the loss against these. Exactly one of the two kinds of labels."""

    reference: HeadInputs
    """What the reference gave for ``tdpo=HEAD_INPUTS``, or the same from a cache."""
    labels: Tensor | None = None
    """``[2B, T]``, shifted inside; chosen sequences first."""
    shift_labels: Tensor | None = None
    """``[2B, T]``, aligned with what the head takes."""
    cu_seqlens: Tensor | None = None
    """``[2B + 1]``: boundaries of sequences packed into one row, ``[1, total]``."""


@dataclass
class TDPOModelOutput(ModelOutput):
    loss: Tensor | None = None
    """``tdpo.loss``; None if statistics were asked for."""
    tdpo: TDPOOutput | TokenStats | None = None
    aux_loss: Tensor | None = None
    """Of a mixture of experts' router, if it was asked for (``output_router_logits=True``)."""


class Attachment:
    """What an attached model remembers, and the way from its forward to its head's and back."""

    def __init__(self, model: nn.Module, head: nn.Module, loss: LinearTDPOLoss | None) -> None:
        self.loss = loss
        self.model_name = type(model).__name__
        self.logit_options = LogitOptions.of(model.config)
        self.parameter = weakref.ref(parameter_of(head))
        self.takes_use_cache = "use_cache" in inspect.signature(type(model).forward).parameters
        self.request: TDPOTargets | str | None = None
        self.result: Any = None
        self.numbers: Tensor | None = None
        """What the head has returned, as other people's hooks have left it."""

    def answer(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """What the head returns instead of logits: all that its gradients come back through."""
        request = self.request
        weight, bias = weight_and_bias(head)
        if type(weight).__name__ == "DTensor":
            raise ValueError(
                "the head's weight is a DTensor inside forward (tensor parallel): attach_tdpo "
                "needs all of it; leave the head out of the tensor-parallel plan"
            )
        own = HeadInputs(
            hidden,
            weight,
            bias,
            self.logit_options,
            autocast=_autocast_dtype(hidden.device.type),
            model=self.model_name,
        )
        if not isinstance(request, TDPOTargets):
            self.result = self.kept(own, head)
            return hidden[..., :1]
        if request.cu_seqlens is not None:
            own = own.replace(hidden=hidden.squeeze(0))
        if self.loss is None:
            stats = self.result = self.stats(own, request)
            self.numbers = torch.stack(stats, dim=-1)
        else:
            output = self.result = self.output(self.loss, own, request)
            # [batch, tokens, vocabulary], as logits have; a vocabulary of 1 survives any broadcast.
            # A clone, since FSDP2 cannot put its hooks on views.
            self.numbers = output.loss.reshape(-1, 1, 1).clone()
        return self.numbers

    def keep_numbers(self, head: nn.Module, arguments: Any, numbers: Tensor) -> None:
        """A forward hook of the head."""
        self.numbers = numbers

    def take_result(self) -> Any:
        """The answer, whose gradient passes through the head's module on its way back: there ZeRO-3
        and FSDP2 gather the weight for it. None if the head was not called."""
        result, numbers = self.result, self.numbers
        self.result = self.numbers = None
        if isinstance(result, TDPOOutput):
            assert numbers is not None
            return result._replace(loss=numbers.reshape(result.loss.shape).clone())
        if isinstance(result, TokenStats):
            assert numbers is not None
            return TokenStats(*(x.clone() for x in numbers.unbind(-1)))
        return result

    def kept(self, own: HeadInputs, head: nn.Module) -> HeadInputs:
        """To be used after forward, when the gathered weight of a sharded head is gone."""
        if torch.compiler.is_compiling():
            sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
        else:  # FSDP2 replaces the parameter that was there, ZeRO-3 marks it
            parameter = parameter_of(head)
            sharded = parameter is not self.parameter() or hasattr(parameter, "ds_id")
        if not sharded:
            return own
        bias = None if own.bias is None else own.bias.clone()
        return own.replace(weight=own.weight.clone(), bias=bias)

    def stats(self, own: HeadInputs, request: TDPOTargets) -> TokenStats:
        if request.shift_labels is None:
            raise ValueError("statistics need shift_labels, aligned with the hidden states")
        reference = _as_constant(request.reference, own)
        return linear_token_stats(
            own.hidden,
            own.weight,
            reference.hidden,
            reference.weight,
            request.shift_labels,
            **_logit_arguments(own, reference),
        )

    def output(self, loss: LinearTDPOLoss, own: HeadInputs, request: TDPOTargets) -> TDPOOutput:
        reference = _as_constant(request.reference, own)
        if request.cu_seqlens is not None:
            reference = reference.replace(hidden=reference.hidden.squeeze(0))
        options = {**loss.options(), **_logit_arguments(own, reference)}
        return linear_tdpo_loss(
            own.hidden,
            own.weight,
            reference.hidden,
            reference.weight,
            request.labels,
            shift_labels=request.shift_labels,
            cu_seqlens=request.cu_seqlens,
            **options,
        )


def _as_constant(reference: HeadInputs, own: HeadInputs) -> HeadInputs:
    """Detached. The head stays as it is; what is small gets the type of the head's weight."""
    reference = reference.detached()
    if own.hidden.dtype == torch.float64:
        return reference.to(torch.float64)  # loses nothing, and float64 goes with float64 alone
    dtype = reference.weight.dtype
    bias = None if reference.bias is None else reference.bias.to(dtype)
    return reference.replace(hidden=reference.hidden.to(dtype), bias=bias)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """Of the autocast in force; None without one."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _logit_arguments(own: HeadInputs, reference: HeadInputs) -> dict[str, Any]:
    if own.logit_options.softcap and not reference.logit_options.softcap:
        raise ValueError(
            f"the policy caps its logits at {own.logit_options.softcap}, the reference does "
            "not; use the logits (tdpo_ext.TDPOLoss)"
        )
    return {
        "policy_bias": own.bias,
        "reference_bias": reference.bias,
        "logit_scale": own.logit_options.scale,
        "logit_softcap": own.logit_options.softcap,
        "reference_logit_scale": reference.logit_options.scale,
        "reference_logit_softcap": reference.logit_options.softcap,
    }


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward that was there before."""
    before = module.__dict__["_tdpo_forward_before"]
    if before is not None:
        return before(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _head_forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    attachment: Attachment | None = self.__dict__.get("_tdpo")
    if attachment is None or attachment.request is None:
        return _call(self, (hidden, *args), kwargs)
    return attachment.answer(self, hidden)


def _model_forward(self: Any, *args: Any, tdpo: Any = None, **kwargs: Any) -> Any:
    attachment: Attachment | None = self.__dict__.get("_tdpo")
    if tdpo is None:
        return _call(self, args, kwargs)
    _check_request(self, attachment, tdpo, kwargs)
    assert attachment is not None
    if attachment.takes_use_cache:
        kwargs.setdefault("use_cache", False)
    attachment.request = tdpo
    try:
        with _last_hook(head_of(self), attachment.keep_numbers):
            outputs = _call(self, args, {**kwargs, "return_dict": True})
    finally:  # also after an error: what is kept would keep the graph alive
        attachment.request = None
        result = attachment.take_result()
    if result is None:
        raise RuntimeError(
            f"{type(self).__name__} did not call its head ({type(head_of(self)).__name__}); use "
            "the logits (tdpo_ext.TDPOLoss)"
        )
    if isinstance(result, HeadInputs):
        return result
    loss = result.loss if isinstance(result, TDPOOutput) else None
    return TDPOModelOutput(loss=loss, tdpo=result, aux_loss=getattr(outputs, "aux_loss", None))


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
    if not isinstance(tdpo, TDPOTargets) and tdpo != HEAD_INPUTS:
        raise TypeError(f'tdpo must be a TDPOTargets or "{HEAD_INPUTS}", got {type(tdpo).__name__}')
    if kwargs.get("labels") is not None:
        raise ValueError("labels and tdpo were both given; labels go into TDPOTargets")
    if head_of(model).__dict__.get("_tdpo") is not attachment:
        raise RuntimeError(
            "the model's head has changed since attach_tdpo (adapters added, embeddings resized, "
            "model copied with another head); call attach_tdpo last"
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
        probe: compare four tokens' logits, rebuilt from what the head takes, with the model's own;
            a model on the meta device, or one that ZeRO-3 has partitioned already, is not compared,
            and a warning says so.

    Returns:
        ``model``.

    Raises:
        TypeError: not a Hugging Face language model.
        ValueError: its logits cannot be rebuilt, or its head cannot be fused; the message says what
            to do instead.
    """
    inner = language_model(model)
    detach_tdpo(model)
    head = head_of(inner)
    without_values = _without_values(head)
    if not without_values:
        weight_and_bias(head)  # refuses a head that cannot be fused
    attachment = Attachment(inner, head, loss)
    for module, forward in ((inner, _model_forward), (head, _head_forward)):
        module.__dict__["_tdpo"] = attachment
        if "_tdpo_forward_before" in module.__dict__:  # ours is still there, below somebody's
            continue
        before = module.__dict__.get("forward")
        # As the class's own to whoever looks at its signature, as generate does.
        wrapped = functools.wraps(type(module).forward)(_copied(forward))
        module.__dict__["_tdpo_forward_before"] = before
        module.__dict__["forward"] = types.MethodType(wrapped, module)
    if probe and without_values:
        warnings.warn(
            f"the parameters of {type(inner).__name__} are {without_values}, so its logits are not "
            "compared with those rebuilt from its hidden states; attach_tdpo a small model of the "
            "same architecture once, to be sure of it",
            stacklevel=2,
        )
    elif probe:
        try:
            _probe(inner)
        except Exception:
            detach_tdpo(model)
            raise
    return model


def _without_values(head: nn.Module) -> str:
    """Why the head's weight cannot be read as yet; empty if it can."""
    parameter = parameter_of(head)
    if hasattr(parameter, "ds_id") and parameter.numel() == 0:
        return "partitioned (ZeRO-3)"
    return "on the meta device" if parameter.is_meta else ""


def _copied(function: Any) -> types.FunctionType:
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def detach_tdpo(model: nn.Module) -> nn.Module:
    """Undo ``attach_tdpo``; a model that is not attached is left alone."""
    inner = language_model(model)
    for module in (inner, head_of(inner)):
        if module.__dict__.pop("_tdpo", None) is None:
            continue
        current = module.__dict__["forward"]
        function = getattr(current, "__func__", None)
        if getattr(function, "__code__", None) in _OURS:
            before = module.__dict__.pop("_tdpo_forward_before")
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
        # Else somebody has wrapped ours since: it stays below theirs and passes everything on.
    return model


_OURS = (_model_forward.__code__, _head_forward.__code__)


@torch.no_grad()
def _probe(model: Any) -> None:
    inputs = probe_inputs(model)
    with evaluating(model):
        logits = model(**inputs).logits
        rebuilt = model(**inputs, tdpo=HEAD_INPUTS).logits()
    check_rebuilt_logits(model, logits, rebuilt)
