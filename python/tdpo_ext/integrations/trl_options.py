"""``TDPOConfig``, and what TDPO can honour of the options of DPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trl
from packaging.version import Version


@dataclass
class TDPOConfig(trl.DPOConfig):
    """``DPOConfig`` and the options of TDPO; ``beta`` and ``label_smoothing`` are those of TDPO."""

    tdpo_variant: str = field(default="tdpo2", metadata={"help": '"tdpo2" or "tdpo1"'})
    tdpo_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the sequential KL in TDPO2; 0 is DPO."}
    )
    tdpo_average_log_prob: bool = field(
        default=False,
        metadata={"help": "Means over the tokens of a response instead of sums, of margin and KL."},
    )
    tdpo_fused_head: bool = field(
        default=True,
        metadata={"help": "Compute the loss from hidden states; False: from the logits."},
    )
    tdpo_chunk_bytes: int | None = field(
        default=None,
        metadata={"help": "Memory of the fused head beyond its inputs and gradients."},
    )
    tdpo_inplace_backward: bool = field(
        default=False,
        metadata={"help": "From logits: write their gradient over them, which saves their size."},
    )
    tdpo_reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "With precompute_ref_log_probs=True: the folder of the reference's hidden "
            "states; None: _reference_cache in output_dir."
        },
    )


class Only(NamedTuple):
    """An option of DPO, what TDPO can honour of it, and why not more."""

    name: str
    allowed: tuple[Any, ...]
    why: str

    def shown(self) -> str:
        """What is allowed, as the documentation has it."""
        return ", ".join(f"`{value!r}`" for value in self.allowed)


_OTHER_LOSS = "it belongs to another loss than TDPO"
ONLY = (
    Only("loss_type", ("sigmoid", ["sigmoid"]), _OTHER_LOSS),
    Only("loss_weights", (None, [1.0]), "there is one loss to weigh"),
    Only("ld_alpha", (None,), _OTHER_LOSS),
    Only("use_weighting", (False,), _OTHER_LOSS),
    Only(
        "f_divergence_type",
        ("reverse_kl",),
        "from it follows the margin log pi(y) - log pi_ref(y) that TDPO is made of; TDPO's own "
        "forward KL is added to that margin and is always there",
    ),
    Only(
        "use_liger_kernel",
        (False,),
        "before version 1.15 TRL replaces the loss with it, later only layers",
    ),
    Only(
        "label_smoothing_factor",
        (0,),
        "it smooths the labels of tokens; label_smoothing is that of preferences",
    ),
)
"""All other options of ``DPOConfig`` are TRL's own business."""
_OF_ONE_ROUTE = (
    Only("tdpo_chunk_bytes", (None,), "the logits are whole; it is for tdpo_fused_head=True"),
    Only("tdpo_inplace_backward", (False,), "there are no logits; it is for tdpo_fused_head=False"),
)


def check_options(args: Any, functions: dict[str, Any]) -> None:
    if not isinstance(args, TDPOConfig):
        raise TypeError(f"args must be a TDPOConfig, got {type(args).__name__}")
    layers_only = Version(trl.__version__) >= Version("1.15")
    for option in (*ONLY, _OF_ONE_ROUTE[args.tdpo_fused_head]):
        value = getattr(args, option.name, option.allowed[0])
        value = getattr(value, "value", value)  # an enum in some versions
        if option.name == "use_liger_kernel" and layers_only:
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
