"""``TDPOConfig``, and the options of ``DPOConfig`` that TDPO takes with some values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trl
from packaging.version import Version

from tdpo_ext.checks import Variant


@dataclass
class TDPOConfig(trl.DPOConfig):
    """``DPOConfig`` with TDPO's options; ``beta`` and ``label_smoothing`` are those of TDPO."""

    tdpo_variant: Variant = field(default="tdpo2", metadata={"help": '"tdpo2" or "tdpo1"'})
    tdpo_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the sequential KL in TDPO2; 0 is DPO."}
    )
    tdpo_average_log_prob: bool = field(
        default=False,
        metadata={"help": "Means over the tokens of a response instead of sums, in margin and KL."},
    )
    tdpo_fused_head: bool = field(
        default=True,
        metadata={"help": "Compute the loss from hidden states; False: from the logits."},
    )
    tdpo_chunk_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Only with tdpo_fused_head=True: scratch memory of the fused head in bytes. If "
            "a whole pair fits, no product is made twice (docs/fused-head.md). None: the default "
            "of linear_tdpo_loss."
        },
    )
    tdpo_inplace_backward: bool = field(
        default=False,
        metadata={
            "help": "Only with tdpo_fused_head=False: write the gradient of the logits over them, "
            "which saves a tensor of their size."
        },
    )
    tdpo_reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "Only with precompute_ref_log_probs=True: the folder of the reference's hidden "
            "states; None: _reference_cache in output_dir."
        },
    )


class RestrictedOption(NamedTuple):
    """An option that TDPO takes with some values only."""

    name: str
    """Its field in ``TDPOConfig``."""
    allowed: tuple[Any, ...]
    """The values that are accepted, the default first."""
    why: str
    """The reason why others are refused."""
    free_from: str = ""
    """The version of TRL from which on any value is accepted; "": none."""

    def shown(self) -> str:
        """The allowed values as the documentation shows them."""
        values = ", ".join(f"`{value!r}`" for value in self.allowed)
        return f"{values}; any from TRL {self.free_from} on" if self.free_from else values


_OTHER_LOSS = "other values choose or change another loss than TDPO"

RESTRICTED_OPTIONS = (
    RestrictedOption("loss_type", ("sigmoid", ["sigmoid"]), _OTHER_LOSS),
    RestrictedOption("loss_weights", (None, [1.0]), "there is one loss, so nothing to weigh"),
    RestrictedOption("ld_alpha", (None,), _OTHER_LOSS),
    RestrictedOption("use_weighting", (False,), _OTHER_LOSS),
    RestrictedOption(
        "f_divergence_type",
        ("reverse_kl",),
        "TDPO's margin belongs to the reverse KL; its forward KL is a separate term",
    ),
    RestrictedOption(
        "use_liger_kernel",
        (False,),
        "before version 1.15 TRL replaces the loss with Liger's; since then it replaces layers "
        "only",
        "1.15",
    ),
    RestrictedOption(
        "label_smoothing_factor",
        (0,),
        "it smooths the labels of tokens; label_smoothing smooths preferences",
    ),
)
"""The options of ``DPOConfig`` that TDPO cannot honour in full; TRL handles all others."""

_WITH_FUSED_HEAD = RestrictedOption(
    "tdpo_inplace_backward",
    (False,),
    "the fused head makes no logits to write over; it is for tdpo_fused_head=False",
)
_FROM_LOGITS = RestrictedOption(
    "tdpo_chunk_bytes",
    (None,),
    "the logits are whole and not made in chunks; it is for tdpo_fused_head=True",
)
_WITHOUT_CACHE = RestrictedOption(
    "tdpo_reference_cache",
    (None,),
    "the reference is not precomputed, so nothing would be kept there; set "
    "precompute_ref_log_probs=True as well",
)


def check_options(args: Any, functions: dict[str, Any]) -> None:
    """Refuse what TDPO cannot honour.

    Args:
        args: of the trainer.
        functions: the trainer's arguments that are called with logits, by name; None if not given.

    Raises:
        TypeError: ``args`` is no ``TDPOConfig``.
        ValueError: an option has a value that is not allowed, or a function needs logits that the
            fused head does not make.
    """
    if not isinstance(args, TDPOConfig):
        raise TypeError(
            f"args must be a TDPOConfig, got {type(args).__name__}; TDPOConfig takes all options "
            "of DPOConfig (from tdpo_ext.integrations.trl import TDPOConfig)"
        )
    version = Version(trl.__version__)
    restricted = [*RESTRICTED_OPTIONS, _WITH_FUSED_HEAD if args.tdpo_fused_head else _FROM_LOGITS]
    if not args.precompute_ref_log_probs:
        restricted.append(_WITHOUT_CACHE)
    for option in restricted:
        value = getattr(args, option.name, option.allowed[0])
        value = getattr(value, "value", value)  # an enum in some versions
        if option.free_from and version >= Version(option.free_from):
            continue
        if value not in option.allowed:
            raise ValueError(
                f"{option.name} must be {option.allowed[0]!r}, got {value!r}: {option.why}"
            )
    for name, function in functions.items():
        if function is not None and args.tdpo_fused_head:
            raise ValueError(
                f"{name} needs logits, which the fused head never makes; set "
                "tdpo_fused_head=False, or read the logged rewards/*, tdpo_rewards/*, logps/*, kl/*"
            )
