"""What an attached model and its head share: the request of a call, and the result for it."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.distributed import is_dtensor
from tdpo_ext.fused_head.functional import linear_tdpo_loss, linear_token_stats
from tdpo_ext.integrations.classes import plain_forward
from tdpo_ext.integrations.heads import parameter_of, weight_and_bias
from tdpo_ext.integrations.hidden import HeadInputs, LogitOptions
from tdpo_ext.integrations.parameters import is_partitioned
from tdpo_ext.integrations.targets import TDPOTargets, check_targets
from tdpo_ext.modules import LinearTDPOLoss
from tdpo_ext.outputs import TDPOOutput, TokenStats


class Attachment:
    """Carries the request from the model's forward to its head's, and the result back.

    Args:
        model: the Hugging Face model.
        head: its head, of ``head_of``.
        loss: None: the result is ``TokenStats``.
        logit_options: the scale and softcap that the model applies to its head's results.
    """

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
        self.parameters: list[Callable[[], Any]] = _references(head.parameters())
        """All of the head's, since each adapter may have a head of its own (modules_to_save)."""
        arguments = inspect.signature(plain_forward(model)).parameters
        self.takes_use_cache = "use_cache" in arguments
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.request: TDPOTargets | str | None = None
        self.virtual_tokens = 0
        """The number that PEFT puts before each sequence in this call (prompt tuning)."""
        self.result: Any = None
        self.numbers: Tensor | None = None
        """What the head returned, after other hooks have replaced it."""
        self.has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle, which is in no call and has the copied head's weight."""
        nothing = {"request": None, "result": None, "numbers": None, "virtual_tokens": 0}
        parameters = [each() for each in self.parameters]
        return {**vars(self), **nothing, "parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.parameters = _references(x for x in state["parameters"] if x is not None)

    def answer(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """What the head returns instead of logits; the loss's gradient comes back through it."""
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
            request = _of_one_row(request)
        result = self.result = self.result_for(request, own)
        if isinstance(result, TokenStats):
            self.numbers = torch.stack(result, dim=-1)
        else:
            # Three dimensions as logits have; a size of 1 survives any broadcast. A clone, since
            # FSDP2 cannot put its hooks on views.
            self.numbers = result.loss.reshape(-1, 1, 1).clone()
        return self.numbers

    def result_for(self, request: TDPOTargets, own: HeadInputs) -> TDPOOutput | TokenStats:
        """The loss, or the statistics, of the policy's head inputs against the reference's."""
        reference = _as_constant(request.reference, own)
        tensors = own.hidden, own.weight, reference.hidden, reference.weight
        options = _logit_arguments(own, reference)
        if self.loss is None:
            assert request.shift_labels is not None
            labels = request.shift_labels.view(own.hidden.shape[:-1])
            return linear_token_stats(*tensors, labels, **options)
        return linear_tdpo_loss(
            *tensors,
            request.labels,
            shift_labels=request.shift_labels,
            cu_seqlens=request.cu_seqlens,
            **{**self.loss.options(), **options},
        )

    def inputs_of(self, head: nn.Module, hidden: Tensor) -> HeadInputs:
        """The head inputs of this call."""
        weight, bias = weight_and_bias(head)
        if is_dtensor(weight):
            raise ValueError(
                "the head's weight is a DTensor inside forward (tensor parallel): attach_tdpo "
                "needs all of it; leave the head out of the tensor-parallel plan"
            )
        autocast = _autocast_dtype(hidden.device.type)
        options = self.logit_options
        return HeadInputs(hidden, weight, bias, options, autocast=autocast, model=self.model_name)

    def compare_autocast(self, own: HeadInputs, reference: HeadInputs) -> None:
        """Warn once if they differ: the same model then has other hidden states."""
        if torch.compiler.is_compiling() or self.has_warned or not reference.model:
            return
        if own.autocast != reference.autocast:
            self.has_warned = True
            warnings.warn(
                f"the policy runs under {_autocast_name(own.autocast)}, the reference "
                f"({reference.model}) ran under {_autocast_name(reference.autocast)}: even if both "
                "are the same model, the loss does not start at log 2. Call the reference under "
                "the same autocast (with accelerator.autocast(), or after "
                "accelerator.prepare_model(reference, evaluation_mode=True))",
                stacklevel=2,
            )

    def keep_numbers(self, head: nn.Module, arguments: Any, numbers: Tensor) -> None:
        """A forward hook of the head, called after all others."""
        self.numbers = numbers

    def take_result(self) -> Any:
        """The result, and forget it; None if the head was not called.

        Its gradient passes through the head's module in backward, where ZeRO-3 and FSDP2 gather the
        weight for it.
        """
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
        """The head inputs that forward returns; a weight that is gathered only in it is copied."""
        if torch.compiler.is_compiling():
            sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
        else:  # FSDP2 replaces the parameter that was there, ZeRO-3 marks it
            parameter = parameter_of(head)
            known = any(parameter is each() for each in self.parameters)
            sharded = not known or is_partitioned(parameter)
            # The weight that accelerate's offloading brings is new in each call, and may be kept.
            sharded = sharded and not hasattr(head, "_hf_hook")
        if not sharded:
            return own
        bias = None if own.bias is None else own.bias.clone()
        return own.replace(weight=own.weight.clone(), bias=bias)


def _of_one_row(targets: TDPOTargets) -> TDPOTargets:
    """Targets of packed sequences without the dimension of the one row, as the loss takes them."""
    labels, shift_labels = (
        None if x is None else x.flatten() for x in (targets.labels, targets.shift_labels)
    )
    reference = targets.reference.replace(hidden=targets.reference.hidden.squeeze(0))
    return targets._replace(reference=reference, labels=labels, shift_labels=shift_labels)


def _as_constant(reference: HeadInputs, own: HeadInputs) -> HeadInputs:
    """The reference detached, in dtypes that the fused head takes.

    Hidden states and bias get the dtype of the head's weight, which stays as it is. Autocast gives
    all of them its own dtype later: a rounding before that would make a reference that equals the
    policy differ from it.
    """
    reference = reference.detached()
    if own.hidden.dtype == torch.float64:
        return reference.to(torch.float64)  # float64 goes with float64 alone
    if own.autocast is not None:
        return reference
    dtype = reference.weight.dtype
    bias = None if reference.bias is None else reference.bias.to(dtype)
    return reference.replace(hidden=reference.hidden.to(dtype), bias=bias)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast in force; None if there is none."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _logit_arguments(own: HeadInputs, reference: HeadInputs) -> dict[str, Any]:
    """Biases, scales and softcaps of both models, as arguments of the fused head.

    Raises:
        ValueError: the policy has a softcap and the reference none.
    """
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


def _autocast_name(autocast: torch.dtype | None) -> str:
    return "no autocast" if autocast is None else f"autocast to {autocast}"


def _references(parameters: Iterable[Any]) -> list[Callable[[], Any]]:
    """Weak ones."""
    return [weakref.ref(parameter) for parameter in parameters]
