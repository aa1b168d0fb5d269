"""A golden run: fifty steps of TDPO training, followed by every way through the library.

The model, its gradients and the descent are NumPy in float64, written here from the formulas; the
loss of a batch and its gradient by the logits are the oracle's. Its losses are committed, to six
digits. A language model of an embedding and a head:

    h_t = tanh(E[x_t])        z_t = W h_t + b        the reference: the same, before training
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tdpo_ext

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, PAIRS, TOKENS, VOCABULARY, WIDTH = 50, 4, 9, 53, 12
RATE = 2.0
OPTIONS = {"beta": 0.3, "alpha": 0.5}
METHODS = ["tdpo1", "tdpo2"]
# The loss before each step.
# fmt: off
GOLDEN = {
    "tdpo1": [
        0.693147, 0.689835, 0.650204, 0.658280, 0.702366, 0.579931, 0.661930, 0.704667, 0.986154,
        0.837810, 0.096680, 0.097361, 0.067214, 0.097887, 0.107389, 0.089084, 0.078735, 0.072345,
        0.078618, 0.087090, 0.057476, 0.062306, 0.040673, 0.061819, 0.066214, 0.053578, 0.045917,
        0.050094, 0.056431, 0.060234, 0.042051, 0.046590, 0.030316, 0.045941, 0.048899, 0.039514,
        0.034337, 0.038585, 0.044832, 0.046333, 0.033399, 0.037353, 0.024421, 0.036703, 0.038976,
        0.031485, 0.027702, 0.031436, 0.037309, 0.037719,
    ],
    "tdpo2": [
        0.693147, 0.689555, 0.654883, 0.658125, 0.711725, 0.584626, 0.665667, 0.697932, 0.957027,
        0.832610, 0.120692, 0.121549, 0.078773, 0.110698, 0.126283, 0.105963, 0.086171, 0.079764,
        0.080288, 0.087834, 0.069217, 0.072909, 0.046641, 0.068368, 0.074170, 0.061766, 0.051322,
        0.055288, 0.058675, 0.062668, 0.050260, 0.053661, 0.034971, 0.050577, 0.054457, 0.045341,
        0.038678, 0.042645, 0.046836, 0.049046, 0.039832, 0.042755, 0.028373, 0.040375, 0.043423,
        0.036115, 0.031378, 0.034796, 0.039047, 0.040398,
    ],
}
# fmt: on


class Parameters(NamedTuple):
    embedding: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]


def parameters() -> Parameters:
    numbers = np.random.default_rng(20240418)
    return Parameters(
        numbers.standard_normal((VOCABULARY, WIDTH)),
        numbers.standard_normal((VOCABULARY, WIDTH)) * 0.7,
        numbers.standard_normal(VOCABULARY) * 0.1,
    )


def batches() -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Tokens [2B, T] and labels as the model saw them: prompt and some padding are ignored."""
    numbers = np.random.default_rng(7)
    made = []
    for _ in range(10):
        tokens = numbers.integers(0, VOCABULARY, (2 * PAIRS, TOKENS))
        tokens[PAIRS:, :2] = tokens[:PAIRS, :2]  # one prompt for both responses
        labels = tokens.copy()
        labels[:, :2] = -100
        labels[numbers.integers(0, 2 * PAIRS), -2:] = -100
        made.append((tokens, labels))
    return made


# --- NumPy ----------------------------------------------------------------------------------------


def logits_of(of: Parameters, tokens: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    hidden = np.tanh(of.embedding[tokens])
    return hidden, hidden @ of.weight.T + of.bias


def golden_run(variant: str, frozen_head: bool = False) -> list[float]:
    reference, policy = parameters(), parameters()
    losses = []
    data = batches()
    for step in range(STEPS):
        tokens, labels = data[step % len(data)]
        hidden, z = logits_of(policy, tokens)
        _, r = logits_of(reference, tokens)
        aligned = np.full_like(labels, -100)
        aligned[:, :-1] = labels[:, 1:]
        weights = np.full(PAIRS, 1 / PAIRS)
        loss = oracle.tdpo_loss(z, r, aligned, weights=weights, variant=variant, **OPTIONS)
        losses.append(float(loss.losses.mean()))
        by_logits = loss.gradient.reshape(-1, VOCABULARY)
        by_hidden = by_logits @ policy.weight * (1 - hidden.reshape(-1, WIDTH) ** 2)
        by_embedding = np.zeros_like(policy.embedding)
        np.add.at(by_embedding, tokens.reshape(-1), by_hidden)
        by_weight = by_logits.T @ hidden.reshape(-1, WIDTH)
        of_head = (by_weight, by_logits.sum(0))
        if frozen_head:
            of_head = tuple(np.zeros_like(x) for x in of_head)
        gradients = Parameters(by_embedding, *of_head)
        policy = Parameters(*(x - RATE * g for x, g in zip(policy, gradients, strict=True)))
    return losses


@pytest.mark.parametrize("variant", METHODS)
def test_the_committed_losses_are_those_of_numpy(variant):
    np.testing.assert_allclose(golden_run(variant), GOLDEN[variant], rtol=0, atol=5.1e-7)


# --- ours -----------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        start = parameters()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            for ours, given in zip(
                (self.embedding.weight, self.head.weight, self.head.bias), start, strict=True
            ):
                ours.copy_(torch.from_numpy(given))

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.embedding(tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


Loss = Callable[[Model, Model, Tensor, Tensor, str], Tensor]
"""Policy, reference, tokens, labels, variant -> the mean over the pairs."""


def from_logits(policy: Model, reference: Model, tokens: Tensor, labels: Tensor, variant: str):
    with torch.no_grad():
        reference_logits = reference(tokens)
    return tdpo_ext.tdpo_loss(
        policy(tokens), reference_logits, labels, variant=variant, **OPTIONS
    ).loss


def in_place(policy: Model, reference: Model, tokens: Tensor, labels: Tensor, variant: str):
    with torch.no_grad():
        reference_logits = reference(tokens)
    return tdpo_ext.tdpo_loss(
        policy(tokens), reference_logits, labels, variant=variant, inplace_backward=True, **OPTIONS
    ).loss


def under_autocast(*arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return from_logits(*arguments)


def from_hidden_states(chunk_bytes: int | None) -> Loss:
    def loss(policy: Model, reference: Model, tokens: Tensor, labels: Tensor, variant: str):
        with torch.no_grad():
            reference_hidden = reference.hidden(tokens)
        return tdpo_ext.linear_tdpo_loss(
            policy.hidden(tokens),
            policy.head.weight,
            reference_hidden,
            reference.head.weight.detach(),
            labels,
            policy_bias=policy.head.bias,
            reference_bias=reference.head.bias.detach(),
            variant=variant,
            chunk_bytes=chunk_bytes,
            **OPTIONS,
        ).loss

    return loss


def compiled(*arguments):
    return torch.compile(from_logits, backend="aot_eager")(*arguments)


def run(
    loss: Loss, variant: str, pairs_at_a_time: int = PAIRS, frozen_head: bool = False
) -> list[float]:
    """Train, and return the losses before each step."""
    policy, reference = Model(), Model()
    policy.head.requires_grad_(not frozen_head)
    optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
    data, losses = [[torch.from_numpy(x) for x in batch] for batch in batches()], []
    for step in range(STEPS):
        tokens, labels = data[step % len(data)]
        total = 0.0
        for start in range(0, PAIRS, pairs_at_a_time):
            rows = [*range(start, start + pairs_at_a_time)]
            rows += [PAIRS + row for row in rows]
            part = loss(policy, reference, tokens[rows], labels[rows], variant)
            part = part * pairs_at_a_time / PAIRS
            part.backward()
            total += part.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_follows(losses: list[float], variant: str, atol: float) -> None:
    np.testing.assert_allclose(losses, GOLDEN[variant], rtol=0, atol=atol)


WAYS: dict[str, Loss] = {
    "logits": from_logits,
    "in place": in_place,
    "hidden states, whole pairs": from_hidden_states(None),
    "hidden states, recomputed": from_hidden_states(4000),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", METHODS)
def test_float32_follows_to_six_digits(variant, way):
    assert_follows(run(WAYS[way], variant), variant, 1e-6)


@pytest.mark.parametrize("variant", METHODS)
def test_every_backend_follows(on_host, variant):
    assert_follows(run(from_logits, variant), variant, 1e-6)


@pytest.mark.parametrize("variant", METHODS)
def test_a_frozen_head_follows_too(variant):
    """The way of the fused head that makes its gradient in forward."""
    losses = run(from_hidden_states(None), variant, frozen_head=True)
    np.testing.assert_allclose(losses, golden_run(variant, frozen_head=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", METHODS)
def test_gradient_accumulation_follows(variant):
    assert_follows(run(from_logits, variant, pairs_at_a_time=1), variant, 1e-6)


@pytest.mark.parametrize("variant", METHODS)
def test_torch_compile_follows(variant):
    torch.compiler.reset()
    assert_follows(run(compiled, variant), variant, 1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("variant", METHODS)
def test_bfloat16_autocast_follows_within_its_rounding(variant):
    """Logits of size 3 are rounded to 1/64; over a sequence that averages to some thousandths."""
    losses = run(under_autocast, variant)
    assert_follows(losses, variant, 0.01)
    assert max(abs(a - b) for a, b in zip(losses, GOLDEN[variant], strict=True)) > 1e-5
