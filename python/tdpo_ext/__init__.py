"""Token-level Direct Preference Optimization: the loss, its per-token statistics, their kernels."""

from tdpo_ext import reference
from tdpo_ext.functional import tdpo_loss, token_divergences, token_stats
from tdpo_ext.fused_head.functional import (
    linear_tdpo_loss,
    linear_token_divergences,
    linear_token_stats,
)
from tdpo_ext.loss import pair_loss
from tdpo_ext.modules import LinearTDPOLoss, TDPOLoss
from tdpo_ext.outputs import TDPOOutput, TokenDivergences, TokenStats
from tdpo_ext.token_statistics.native import backends

__version__ = "0.1.0"

__all__ = [
    "LinearTDPOLoss",
    "TDPOLoss",
    "TDPOOutput",
    "TokenDivergences",
    "TokenStats",
    "backends",
    "linear_tdpo_loss",
    "linear_token_divergences",
    "linear_token_stats",
    "pair_loss",
    "reference",
    "tdpo_loss",
    "token_divergences",
    "token_stats",
]
