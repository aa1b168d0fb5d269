"""The oracle against hand-computed values and finite differences."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

RNG = np.random.default_rng(3)


def central_difference(function, z, step=1e-6):
    gradient = np.empty_like(z)
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def test_two_words_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(q || p) = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3)
    z, r = np.log([[3.0, 1.0]]), np.zeros((1, 2))
    got = oracle.token_stats(z, r, np.array([1]))[:, 0]
    np.testing.assert_allclose(got, [np.log(1 / 4), np.log(1 / 2), np.log(4 / 3) / 2], rtol=1e-15)


def test_the_close_form_of_the_kl_is_the_plain_one():
    r = RNG.normal(0, 2, 50)
    for gap in (1e-3, 0.1, 1.0):
        z = r + RNG.normal(0, gap, 50)
        log_p, log_q = (oracle.log_softmax(x.astype(np.longdouble)) for x in (z, r))
        plain = float((np.exp(log_q) * (log_q - log_p)).sum())
        assert oracle.forward_kl(z, r) == pytest.approx(plain, rel=1e-10)


def test_gradient_of_the_statistics():
    z, r = RNG.normal(0, 1, (2, 4, 7))
    labels = np.array([3, -100, 0, 6])
    grad_logps, grad_kl = RNG.normal(0, 1, (2, 4))

    def value(z):
        logps, _, kl = oracle.token_stats(z, r, labels)
        return (grad_logps * logps + grad_kl * kl).sum()

    got = oracle.token_stats_gradient(z, r, labels, grad_logps, grad_kl)
    np.testing.assert_allclose(got, central_difference(value, z), atol=1e-8)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("variant", "alpha"), [("tdpo1", 0.5), ("tdpo2", 0.0), ("tdpo2", 0.7)])
def test_gradient_of_the_loss(variant, alpha, smoothing, average):
    z, r = RNG.normal(0, 1, (2, 4, 3, 5))
    labels = RNG.integers(0, 5, (4, 3))
    labels[0, 0] = labels[3, 1:] = -100
    weights = RNG.normal(0, 1, 2)
    options = {"beta": 0.3, "label_smoothing": smoothing, "average_log_prob": average}
    loss = oracle.tdpo_loss(z, r, labels, weights=weights, variant=variant, alpha=alpha, **options)

    def value(moved):
        if variant == "tdpo2" and alpha:
            # The stopped gradient: the chosen KL stays what it is while z moves. Its part of h is
            # added as a shift of the chosen margin's, written out here.
            stats = oracle.tdpo_loss(
                moved, r, labels, weights=weights, variant="tdpo2", alpha=0.0, **options
            )
            h = stats.margin[:2] - stats.margin[2:]
            h = 0.3 * (h - alpha * (stats.seq_kl[2:] - loss.seq_kl[:2]))
            e = smoothing
            losses = -(1 - e) * oracle.log_sigmoid(h) - e * oracle.log_sigmoid(-h)
            return (weights * losses).sum()
        moved_loss = oracle.tdpo_loss(
            moved, r, labels, weights=weights, variant=variant, alpha=alpha, **options
        )
        return (weights * moved_loss.losses).sum()

    assert value(z) == pytest.approx((weights * loss.losses).sum(), rel=1e-14)
    np.testing.assert_allclose(loss.gradient, central_difference(value, z), atol=1e-8)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_of_a_head_by_finite_differences(softcap):
    rng = np.random.default_rng(5)
    head = oracle.Head(*(rng.normal(size=shape) for shape in ((3, 4), (6, 4), 6)), 0.7, softcap)
    weights = rng.normal(size=(3, 6))
    for number, gradient in enumerate(head.gradients(weights)):
        for at in np.ndindex(gradient.shape):
            values = []
            for step in (1e-6, -1e-6):
                moved = head[number].copy()
                moved[at] += step
                values.append(
                    (head._replace(**{head._fields[number]: moved}).logits() * weights).sum()
                )
            assert gradient[at] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-8)


def test_divergences_of_two_words_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2)
    got = oracle.divergences(np.log([[3.0, 1.0]]), np.zeros((1, 2)))
    forward, reverse = np.log(4 / 3) / 2, 0.75 * np.log(3 / 2) + 0.25 * np.log(1 / 2)
    entropy = 0.75 * np.log(4 / 3) + 0.25 * np.log(4)
    np.testing.assert_allclose(np.ravel(got[:4]), [forward, reverse, entropy, np.log(2)], 1e-15)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_divergences(which):
    z, r = RNG.normal(0, 1, (2, 4, 7))
    z[1, 2] = r[1, 2] = z[2, 3] = -30
    weights = RNG.normal(0, 1, 4)
    wanted = central_difference(lambda z: (weights * oracle.divergences(z, r)[which]).sum(), z)
    got = weights[:, None] * oracle.divergences(z, r).gradients[which]
    np.testing.assert_allclose(got, wanted, atol=1e-8)


def test_divergences_of_excluded_words():
    z, r = np.array([[0.0, 1.0, -np.inf]] * 2), np.array([[0.0, -np.inf, -np.inf], [0.0, 1.0, 2.0]])
    got = oracle.divergences(z, r)
    assert got.forward_kl.tolist() == [pytest.approx(np.log1p(np.e)), np.inf]
    assert got.reverse_kl.tolist() == [np.inf, pytest.approx(np.log(1 + np.e**2 / (1 + np.e)))]
    assert np.isfinite(got.policy_entropy).all()
    assert got.reference_entropy[0] == 0
