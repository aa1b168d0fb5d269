"""The statistics of tokens as usually written in PyTorch: the kernels are timed against them."""

from __future__ import annotations

from torch import Tensor


def formula(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y) and KL as in the paper's code: log-softmaxes, gather, sum of q (log q - log p).

    They are computed in float32. Both are 0 where the label is ignored.
    """
    log_p = policy.float().log_softmax(-1)
    log_q = reference.float().log_softmax(-1)
    kept = labels != -100
    logps = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * kept, (log_q.exp() * (log_q - log_p)).sum(-1) * kept
