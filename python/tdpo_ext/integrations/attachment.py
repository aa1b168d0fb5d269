"""What an attached model remembers, and what its head returns instead of logits."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.fused_head.functional import linear_tdpo_loss, linear_token_stats
from tdpo_ext.integrations.classes import plain_forward
from tdpo_ext.integrations.heads import parameter_of, weight_and_bias
from tdpo_ext.integrations.hidden import HeadInputs, LogitOptions
from tdpo_ext.integrations.targets import TDPOTargets, check_targets
from tdpo_ext.modules import LinearTDPOLoss
from tdpo_ext.outputs import TDPOOutput, TokenStats


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
