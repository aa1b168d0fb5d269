"""TDPO in float64 NumPy, written from the equations; it shares nothing with the package.

Zeng et al., ICML 2024, arXiv 2404.11999. Row by row and slowly; ``test_oracle.py`` checks it by
finite differences. z are the policy's logits, r the reference's, p and q their softmaxes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_softmax(x: Array) -> Array:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def forward_kl(z: Array, r: Array) -> float:
    """KL(q || p) = sum_v q log(q / p), as the sum of q (e^-u - 1 + u), u = log q - log p.

    Equal because p and q both sum to 1, and no term of it is negative. Where |u| is small,
    e^-u - 1 + u is a series; 24 terms of it leave less than 1e-20.
    """
    log_p, log_q = log_softmax(z), log_softmax(r)
    possible = log_q > -np.inf
    impossible_mass = np.exp(log_p[~possible]).sum()  # 0 log 0 = 0; of p - q + 0, p is left
    log_p, log_q = log_p[possible], log_q[possible]
    if np.any(log_p == -np.inf):
        return np.inf
    u = log_q - log_p
    close = np.abs(u) < 0.5
    term, series = np.ones(close.sum()), np.zeros(close.sum())
    for n in range(1, 24):
        term = term * -u[close] / n
        series = series + term * (n > 1)
    close_terms = np.exp(log_q[close]) * series
    p, q, u = np.exp(log_p[~close]), np.exp(log_q[~close]), u[~close]
    return float(impossible_mass + close_terms.sum() + (p - q + q * u).sum())


def token_stats(z: Array, r: Array, labels: NDArray[np.int64], ignore_index: int = -100) -> Array:
    """[N, V], [N, V], [N] -> [3, N]: log p(y), log q(y), KL(q || p); 0 where ignored."""
    stats = np.zeros((3, len(labels)))
    for row, label in enumerate(labels):
        if label != ignore_index:
            stats[0, row] = log_softmax(z[row])[label]
            stats[1, row] = log_softmax(r[row])[label]
            stats[2, row] = forward_kl(z[row], r[row])
    return stats


def token_stats_gradient(
    z: Array,
    r: Array,
    labels: NDArray[np.int64],
    grad_logps: Array,
    grad_kl: Array,
    ignore_index: int = -100,
) -> Array:
    """sum_n grad_logps log p(y) + grad_kl KL, differentiated by z.

    d log p(y) / dz_v = 1[v = y] - p_v and dKL / dz_v = p_v - q_v.
    """
    gradient = np.zeros_like(z)
    for row, label in enumerate(labels):
        if label != ignore_index:
            log_p, log_q = log_softmax(z[row]), log_softmax(r[row])
            p = np.exp(log_p)
            with np.errstate(invalid="ignore", over="ignore"):
                # p - q = q (e^(log p - log q) - 1) keeps its digits where they are close.
                close = np.exp(log_q) * np.expm1(log_p - log_q)
            difference = np.where(np.abs(p - np.exp(log_q)) < 0.1 * p, close, p - np.exp(log_q))
            gradient[row] = grad_kl[row] * difference - grad_logps[row] * p
            others = np.exp(np.delete(log_p, label)).sum()  # 1 - p(y) without cancelling
            gradient[row, label] = grad_logps[row] * others + grad_kl[row] * difference[label]
    return gradient


class Divergences(NamedTuple):
    forward_kl: Array
    """KL(q || p) = sum_v q log(q / p), [N]"""
    reverse_kl: Array
    """KL(p || q) = sum_v p log(p / q), [N]"""
    policy_entropy: Array
    reference_entropy: Array
    gradients: tuple[Array, Array, Array]
    """of forward_kl, reverse_kl and policy_entropy by z, [N, V] each"""


def divergences(z: Array, r: Array) -> Divergences:
    """[N, V], [N, V]. The definitions as they stand, in extended precision, whose 64 bits leave
    1e-13 of a divergence of 1e-6."""
    log_p, log_q = (_extended_log_softmax(x) for x in (z, r))
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        u = log_p - log_q
        forward = np.where(q == 0, 0, -q * u).sum(-1)
        reverse = np.where(p == 0, 0, p * u).sum(-1)
        # exp() may be 0 where the logit is not -inf.
        forward = np.where(((z == -np.inf) & (r > -np.inf)).any(-1), np.inf, forward)
        reverse = np.where(((r == -np.inf) & (z > -np.inf)).any(-1), np.inf, reverse)
        entropies = [-np.where(x == 0, 0, x * y).sum(-1) for x, y in ((p, log_p), (q, log_q))]
        # d/dz_v of sum_w p_w x_w is p_v (x_v - mean x) plus the mean of dx/dz_v, which is 0 here.
        by_reverse = np.where(p == 0, 0, p * (u - reverse[:, None]))
        by_entropy = np.where(p == 0, 0, -p * (log_p + entropies[0][:, None]))
    values = (forward, reverse, *entropies)
    gradients = tuple(x.astype(np.float64) for x in (p - q, by_reverse, by_entropy))
    return Divergences(*(x.astype(np.float64) for x in values), gradients)


def _extended_log_softmax(x: Array) -> NDArray[np.longdouble]:
    shifted = x.astype(np.longdouble) - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Loss(NamedTuple):
    losses: Array
    """[B]"""
    gradient: Array
    """of sum_b weights_b losses_b by z, [2B, T, V]"""
    logps: Array
    """[2B] sums (or means) of log p(y)"""
    margin: Array
    seq_kl: Array


def log_sigmoid(x: Array) -> Array:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


def tdpo_loss(
    z: Array,
    r: Array,
    labels: NDArray[np.int64],
    *,
    weights: Array,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: str = "tdpo2",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    ignore_index: int = -100,
) -> Loss:
    """z, r [2B, T, V], chosen first; labels [2B, T] already aligned; weights [B] of the pairs.

    u = beta (M_w - M_l). TDPO1: h = u - beta (K_l - K_w). TDPO2: h = u - alpha beta (K_l - sg K_w).
    losses = -(1 - e) log sigmoid(h) - e log sigmoid(-h).
    """
    sequences, tokens, vocabulary = z.shape
    pairs = sequences // 2
    flat = (z.reshape(-1, vocabulary), r.reshape(-1, vocabulary), labels.reshape(-1))
    stats = token_stats(*flat, ignore_index).reshape(3, sequences, tokens)
    count = np.ones(sequences)
    if average_log_prob:
        count = np.maximum((labels != ignore_index).sum(1), 1)
    logps, reference_logps, seq_kl = stats.sum(2) / count
    margin = logps - reference_logps
    slope = 1.0 if variant == "tdpo1" else alpha
    h = beta * (margin[:pairs] - margin[pairs:])
    if slope:
        h = h - beta * slope * (seq_kl[pairs:] - seq_kl[:pairs])
    e = label_smoothing
    losses = -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)
    by_h = weights * (-(1 - e) * sigmoid(-h) + e * sigmoid(h))
    by_margin = np.concatenate((by_h, -by_h)) * beta
    chosen_kl = by_h if variant == "tdpo1" else np.zeros(pairs)  # TDPO2 stops this gradient
    by_kl = np.concatenate((chosen_kl, -slope * by_h)) * beta
    per_token = [np.repeat(x / count, tokens) for x in (by_margin, by_kl)]
    gradient = token_stats_gradient(*flat, *per_token, ignore_index).reshape(z.shape)
    return Loss(losses, gradient, logps, margin, seq_kl)


class Head(NamedTuple):
    hidden: Array  # [N, H]
    weight: Array  # [V, H]
    bias: Array  # [V]
    scale: float = 1.0
    softcap: float = 0.0  # 0: none

    def logits(self) -> Array:
        x = self.scale * (self.hidden @ self.weight.T + self.bias)
        return self.softcap * np.tanh(x / self.softcap) if self.softcap else x

    def gradients(self, by_logits: Array) -> tuple[Array, Array, Array]:
        """By hidden states, weight and bias."""
        slope = self.scale * np.ones_like(by_logits)
        if self.softcap:
            x = self.scale * (self.hidden @ self.weight.T + self.bias)
            slope /= np.cosh(x / self.softcap) ** 2
        by_product = by_logits * slope
        return by_product @ self.weight, by_product.T @ self.hidden, by_product.sum(0)
