"""What an attached model takes as ``tdpo=``, what it returns for it, and the checks of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from tdpo_ext.integrations.hidden import HeadInputs
from tdpo_ext.integrations.models import named
from tdpo_ext.outputs import TDPOOutput, TokenStats

HEAD_INPUTS = "head_inputs"
"""As ``tdpo=``, the request to a reference: return the ``HeadInputs``."""


class TDPOTargets(NamedTuple):
    """As ``tdpo=``, the request to the policy: return the loss. Give one of both label fields."""

    reference: HeadInputs
    """What the reference returned for ``tdpo=HEAD_INPUTS``, or the same from a cache."""
    labels: Tensor | None = None
    """``[2B, T]`` int64 or int32, the chosen sequences first, the loss's ``ignore_index`` (-100)
    where nothing is scored. The loss shifts them."""
    shift_labels: Tensor | None = None
    """``[2B, T]`` int64 or int32, labels that are shifted already: aligned with what the head
    takes. Without a loss, for statistics, -100 where nothing is scored."""
    cu_seqlens: Tensor | None = None
    """``[2B + 1]`` int64 or int32, the boundaries of sequences packed into one row. The model's
    inputs are ``[1, total]`` then, and labels ``[total]`` or ``[1, total]``."""


@dataclass
class TDPOModelOutput(ModelOutput):
    """What an attached model returns for ``TDPOTargets``."""

    loss: Tensor | None = None
    """``tdpo.loss``; None if the model was attached with ``loss=None``."""
    tdpo: TDPOOutput | TokenStats | None = None
    """The ``TDPOOutput``, or for a model attached with ``loss=None`` the ``TokenStats``."""
    aux_loss: Tensor | None = None
    """The router's loss of a mixture of experts, if the call had ``output_router_logits=True``."""

    def __getattr__(self, name: str) -> Any:
        hint = {
            "logits": "with tdpo= there are no logits; call the model without it to have them",
            "metrics": "call tdpo.metrics()",
        }.get(name, "")
        raise AttributeError(f"TDPOModelOutput has no {name}" + (f": {hint}" if hint else ""))


def check_fields(targets: TDPOTargets, *, encoder_decoder: bool, statistics: bool) -> None:
    """Check what can be checked before the model's forward.

    Args:
        targets: of the call.
        encoder_decoder: the model is one.
        statistics: the model was attached with ``loss=None``.

    Raises:
        TypeError: the reference or the labels are something else than they have to be.
        ValueError: both label fields, neither, or the one that this model cannot take.
    """
    if not isinstance(targets.reference, HeadInputs):
        raise TypeError(
            "TDPOTargets.reference must be the HeadInputs that an attached reference returns for "
            f"tdpo=HEAD_INPUTS, got {named(targets.reference)}"
        )
    given = [name for name in ("labels", "shift_labels") if getattr(targets, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"TDPOTargets needs labels or shift_labels, got {'both' if given else 'neither'}; give "
            "one of them"
        )
    labels = getattr(targets, given[0])
    if not isinstance(labels, Tensor):
        raise TypeError(f"TDPOTargets.{given[0]} must be a tensor, got {named(labels)}")
    if encoder_decoder and given == ["labels"]:
        raise ValueError(
            "TDPOTargets.labels are shifted inside, but a decoder's inputs are shifted already; "
            "give an encoder-decoder shift_labels"
        )
    if statistics and given == ["labels"]:
        raise ValueError(
            "TDPOTargets.labels are shifted by the loss, and this model has none (attach_tdpo with "
            "loss=None): statistics need shift_labels, aligned with the hidden states"
        )


def check_targets(own: HeadInputs, targets: TDPOTargets) -> None:
    """Compare labels and reference with what the policy's head takes.

    Args:
        own: the policy's head inputs.
        targets: of the call; ``check_fields`` has passed.

    Raises:
        ValueError: shapes, vocabularies or devices do not belong together.
    """
    labels = targets.labels if targets.labels is not None else targets.shift_labels
    assert labels is not None
    reference = targets.reference
    rows = own.hidden.shape[:-1]
    if targets.cu_seqlens is None:
        if labels.shape != rows:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the head takes {tuple(rows)} "
                f"positions{_likely_cause(labels.shape, rows)}"
            )
    elif rows[0] != 1 or labels.shape not in (rows[1:], rows):
        raise ValueError(
            "with cu_seqlens the model takes one row [1, total] and labels [total] or [1, total], "
            f"got {tuple(rows)} and {tuple(labels.shape)}"
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


def _likely_cause(labels: torch.Size, rows: torch.Size) -> str:
    """Why labels have another length than the head's input, for a message."""
    if len(labels) != 2 or labels[0] != rows[0]:
        return ""
    if labels[1] > rows[1]:
        return "; leave logits_to_keep out"
    return (
        "; labels and shift_labels are as long as input_ids, nothing is cut off. If PEFT puts "
        "virtual tokens before each sequence, call attach_tdpo on the PEFT model"
    )
