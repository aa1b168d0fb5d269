"""A fixed share of tests/support/fuzz.py, and that it would notice."""

from __future__ import annotations

import fuzz
import pytest
import torch

import tdpo_ext

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("share", range(4))
def test_a_share_of_the_fuzzing(share):
    outcomes = fuzz.fuzz(range(share * 10_000, share * 10_000 + 400), fuzz.backends())
    assert outcomes["answered"] > 200
    assert outcomes["refused"] > 40


def test_an_answer_that_is_wrong_is_noticed(monkeypatch):
    right = tdpo_ext.token_stats

    def wrong(*arguments, **options):
        stats = right(*arguments, **options)
        return stats._replace(forward_kl=stats.forward_kl * 1.001)

    monkeypatch.setattr(tdpo_ext, "token_stats", wrong)
    with pytest.raises(fuzz.WrongAnswerError, match="output 2 differs"):
        fuzz.fuzz(range(200), ["fallback"])


def test_a_missing_check_is_noticed(monkeypatch):
    monkeypatch.setattr("tdpo_ext.checks.check_pair_options", lambda *arguments: None)
    with pytest.raises(fuzz.WrongAnswerError, match=r"answered in spite of|refused"):
        fuzz.fuzz(range(400), ["fallback"])


def test_the_same_seed_makes_the_same_call():
    for seed in range(20):
        a, b = fuzz.Call(seed).arguments, fuzz.Call(seed).arguments
        assert a.keys() == b.keys()
        for name, value in a.items():
            same = (
                torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
            )
            assert same, name
