"""The fused head inside a Hugging Face model's own forward.

``attach_tdpo`` gives the model one more argument, ``tdpo``. While it is given, the head's module,
called where it always was, does not multiply: it returns the loss, made from its input and its
weight. So whatever gathers, shards or casts that module's weight (DDP, FSDP2, ZeRO-3, PEFT,
autocast) does it at the usual moments, forward and backward, and the logits never exist. What the
model then does to the head's result it does to a few numbers, and nobody reads that.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from tdpo_ext.fused_head.functional import linear_tdpo_loss, linear_token_stats
from tdpo_ext.integrations.classes import override_forward, plain_forward, restore_forward
from tdpo_ext.integrations.hidden import (
    HeadInputs,
    LogitOptions,
    head_of,
    language_model,
    missing_values,
    named,
    parameter_of,
    weight_and_bias,
)
from tdpo_ext.integrations.probe import check_head, logit_options_of
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

    def __getattr__(self, name: str) -> Any:
        hint = {
            "logits": "with tdpo= there are no logits; call the model without it to have them",
            "metrics": "call tdpo.metrics()",
        }.get(name, "")
        raise AttributeError(f"TDPOModelOutput has no {name}" + (f": {hint}" if hint else ""))


class Attachment:
    """What an attached model remembers, and the way from its forward to its head's and back."""

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        loss: LinearTDPOLoss | None,
        logit_options: LogitOptions,
    ) -> None:
        self.loss = loss
        self.model_name = type(model).__name__
        self.logit_options = logit_options
        self.parameter: Callable[[], Any] = weakref.ref(parameter_of(head))
        arguments = inspect.signature(plain_forward(model)).parameters
        self.takes_use_cache = "use_cache" in arguments
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.request: TDPOTargets | str | None = None
        self.virtual_tokens = 0
        """That PEFT has put before each sequence in this call, as prompt tuning does."""
        self.result: Any = None
        self.numbers: Tensor | None = None
        """What the head has returned, as other people's hooks have left it."""
        self.has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: attached to the copied head, and in no call."""
        nothing = {"request": None, "result": None, "numbers": None, "virtual_tokens": 0}
        return {**vars(self), **nothing, "parameter": self.parameter()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameter = state["parameter"]
        vars(self).update(state)
        self.parameter = _nothing if parameter is None else weakref.ref(parameter)

    def answer(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """What the head returns instead of logits: all that its gradients come back through."""
        request = self.request
        if self.result is not None:
            raise RuntimeError(
                f"{self.model_name} called its head more than once in one forward; use the logits "
                "(tdpo_ext.TDPOLoss)"
            )
        if self.virtual_tokens:
            hidden = hidden[:, self.virtual_tokens :]
        own = self.inputs_of(head, hidden)
        if not isinstance(request, TDPOTargets):
            self.result = self.kept(own, head)
            return hidden[..., :1]
        self.compare_autocast(own, request.reference)
        check_targets(own, request)
        if request.cu_seqlens is not None:
            own = own.replace(hidden=hidden.squeeze(0))
            of_reference = request.reference.replace(hidden=request.reference.hidden.squeeze(0))
            request = request._replace(reference=of_reference)
        if self.loss is None:
            stats = self.result = self.stats(own, request)
            self.numbers = torch.stack(stats, dim=-1)
        else:
            output = self.result = self.output(self.loss, own, request)
            # [batch, tokens, vocabulary], as logits have; a vocabulary of 1 survives any broadcast.
            # A clone, since FSDP2 cannot put its hooks on views.
            self.numbers = output.loss.reshape(-1, 1, 1).clone()
        return self.numbers

    def inputs_of(self, head: nn.Module, hidden: Tensor) -> HeadInputs:
        weight, bias = weight_and_bias(head)
        if type(weight).__name__ == "DTensor":
            raise ValueError(
                "the head's weight is a DTensor inside forward (tensor parallel): attach_tdpo "
                "needs all of it; leave the head out of the tensor-parallel plan"
            )
        autocast = _autocast_dtype(hidden.device.type)
        options = self.logit_options
        return HeadInputs(hidden, weight, bias, options, autocast=autocast, model=self.model_name)

    def compare_autocast(self, own: HeadInputs, reference: HeadInputs) -> None:
        """Warn once: under another autocast the same model gives other hidden states."""
        if torch.compiler.is_compiling() or self.has_warned or not reference.model:
            return
        if own.autocast != reference.autocast:
            self.has_warned = True
            warnings.warn(
                f"the policy runs under {_named(own.autocast)}, the reference "
                f"({reference.model}) ran under {_named(reference.autocast)}: even if both are the "
                "same model, the loss does not start at log 2. Call the reference under the same "
                "autocast (with accelerator.autocast(), or after "
                "accelerator.prepare_model(reference, evaluation_mode=True))",
                stacklevel=2,
            )

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
            # What accelerate brings for one call is new in each, and ours to keep.
            sharded = sharded and not hasattr(head, "_hf_hook")
        if not sharded:
            return own
        bias = None if own.bias is None else own.bias.clone()
        return own.replace(weight=own.weight.clone(), bias=bias)

    def stats(self, own: HeadInputs, request: TDPOTargets) -> TokenStats:
        assert request.shift_labels is not None
        reference = _as_constant(request.reference, own)
        return linear_token_stats(
            own.hidden,
            own.weight,
            reference.hidden,
            reference.weight,
            request.shift_labels.view(own.hidden.shape[:-1]),
            **_logit_arguments(own, reference),
        )

    def output(self, loss: LinearTDPOLoss, own: HeadInputs, request: TDPOTargets) -> TDPOOutput:
        reference = _as_constant(request.reference, own)
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
    """Detached. The head stays as it is; what is small gets the type of the head's weight, unless
    autocast gives all of it one: a second rounding would tell it from the policy's."""
    reference = reference.detached()
    if own.hidden.dtype == torch.float64:
        return reference.to(torch.float64)  # loses nothing, and float64 goes with float64 alone
    if own.autocast is not None:
        return reference
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


def _named(autocast: torch.dtype | None) -> str:
    return "no autocast" if autocast is None else f"autocast to {autocast}"


def _nothing() -> None:
    """As a weak reference to what is gone."""


# --- the forwards ---------------------------------------------------------------------------------


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


def virtual_tokens(model: Any) -> int:
    """That a PEFT model puts before each sequence that its base model's head sees."""
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    # Prefix tuning gives keys and values instead; a decoder sees nothing of an encoder's prompt.
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind in ("PREFIX_TUNING", "CARTRIDGE") or language_model(model).config.is_encoder_decoder:
        return 0
    return int(config.num_virtual_tokens)


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
        _check_labels(attachment, tdpo)
    if head_of(model).__dict__.get("_tdpo") is not attachment:
        raise RuntimeError(
            "the model's head has changed since attach_tdpo (adapters added, embeddings resized, "
            "another head set, or the same head attached with another model); call attach_tdpo "
            "last, once for each model, and give each a head module of its own"
        )


def _check_labels(attachment: Attachment, targets: TDPOTargets) -> None:
    if not isinstance(targets.reference, HeadInputs):
        raise TypeError(
            "TDPOTargets.reference must be the HeadInputs that an attached reference returns for "
            f"tdpo=HEAD_INPUTS, got {named(targets.reference)}"
        )
    given = [name for name in ("labels", "shift_labels") if getattr(targets, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"TDPOTargets needs labels or shift_labels, got {'both' if given else 'neither'}"
        )
    labels = getattr(targets, given[0])
    if not isinstance(labels, Tensor):
        raise TypeError(f"TDPOTargets.{given[0]} must be a tensor, got {named(labels)}")
    if attachment.is_encoder_decoder and given == ["labels"]:
        raise ValueError(
            "TDPOTargets.labels are shifted inside, but what a decoder takes is shifted already; "
            "give an encoder-decoder shift_labels"
        )
    if attachment.loss is None and given == ["labels"]:
        raise ValueError("statistics need shift_labels, aligned with the hidden states")


def check_targets(own: HeadInputs, targets: TDPOTargets) -> None:
    """Raise ValueError unless labels and reference belong to what the policy's head takes."""
    labels = targets.labels if targets.labels is not None else targets.shift_labels
    assert labels is not None
    reference = targets.reference
    rows = own.hidden.shape[:-1]
    if targets.cu_seqlens is None:
        if labels.shape != rows:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the head takes {tuple(rows)} "
                f"positions{_why(labels.shape, rows)}"
            )
    elif rows[0] != 1 or labels.shape not in (rows[1:], rows):
        raise ValueError(
            f"with cu_seqlens the model takes one row [1, total] and labels [total], got "
            f"{tuple(rows)} and {tuple(labels.shape)}"
        )
    if reference.hidden.shape[:-1] != rows:
        raise ValueError(
            f"the reference's hidden states are of {tuple(reference.hidden.shape[:-1])} positions, "
            f"the policy's of {tuple(rows)}; give both models the same batch"
        )
    if reference.weight.shape[0] != own.weight.shape[0]:
        raise ValueError(
            f"the reference's vocabulary has {reference.weight.shape[0]} tokens, the policy's "
            f"{own.weight.shape[0]}; both need the same (resize_token_embeddings)"
        )
    if {reference.hidden.device, reference.weight.device, labels.device} != {own.hidden.device}:
        raise ValueError(
            f"the policy's hidden states are on {own.hidden.device}, the reference's on "
            f"{reference.hidden.device}, its head on {reference.weight.device}, labels on "
            f"{labels.device}; move them to one device (HeadInputs.to(device) moves a reference)"
        )


def _why(labels: torch.Size, rows: torch.Size) -> str:
    if len(labels) != 2 or labels[0] != rows[0]:
        return ""
    if labels[1] > rows[1]:
        return "; leave logits_to_keep out"
    return (
        "; labels and shift_labels are as long as input_ids, nothing is cut off. If PEFT puts "
        "virtual tokens before each sequence, call attach_tdpo on the PEFT model"
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
