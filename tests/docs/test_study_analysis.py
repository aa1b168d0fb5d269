"""The study's analysis finds a planted order and none in noise; its page agrees with it."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import sentiment  # noqa: F401  # the path to the modules below

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

import study_analysis
import study_bootstrap
import study_claims
import study_lines
import study_page
import study_pictures
import study_results
from study_plan import DPO, FULL, TDPO2
from study_summary import summary_of

ABOUT = {
    "conditions": {},
    "made_on": [
        {"processor": "a CPU", "device": "cpu", "torch": "2", "tdpo_ext": "0", "commit": "abc"}
    ],
    "starts": {"0": {"parameters": 930_000}},
}


def verdicts(lines: Any) -> dict[str, str]:
    found = study_claims.judged(study_analysis.runs_of(lines))
    return {claim["name"]: claim["verdict"] for claim in found}


@pytest.mark.parametrize(("order", "word"), [(1.0, "holds"), (-1.0, "does not hold")])
def test_a_planted_order_is_found(order: float, word: str) -> None:
    assert set(verdicts(study_lines.made_up(order)).values()) == {word}


def test_noise_tells_nothing() -> None:
    """Intervals of 95 % may exclude a true 0 once in twenty times, not much more often, though
    every method's learning rate is chosen among equally good ones."""
    found = [verdicts(study_lines.made_up(0, draw=draw)) for draw in range(12)]
    words = [word for claims in found for word in claims.values()]
    assert set(words) <= {"holds", "does not hold", "cannot be told"}
    assert words.count("cannot be told") >= 0.95 * len(words)


def test_fewer_than_five_seeds_tell_nothing() -> None:
    assert set(verdicts(study_lines.made_up(1, seeds=4)).values()) == {"cannot be told"}


def test_a_seed_that_lacks_a_run_is_left_out() -> None:
    lines = study_lines.made_up(1, seeds=6)
    del lines[next(key for key in lines if key.seed == 3)]
    assert study_analysis.runs_of(lines).seeds == (0, 1, 2, 4, 5)


def test_a_diverged_run_is_not_chosen() -> None:
    lines = copy.deepcopy(study_lines.made_up(1))
    for key, line in lines.items():
        if key.setting == DPO and key.learning_rate == study_lines.RATES[-1]:
            for name, values in line["curve"].items():
                if name != "examples":
                    values[1:] = [None] * (len(values) - 1)
    assert set(verdicts(lines).values()) == {"holds"}


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(size=(300, 5))
    bounds = np.array(
        [study_bootstrap.interval(study_bootstrap.plain(sample)) for sample in samples]
    )
    held = ((bounds[:, 0] < 0) & (bounds[:, 1] > 0)).mean()
    assert 0.91 < held < 0.99


def test_interpolation_is_straight_over_the_root_of_the_kl() -> None:
    curve = {"root_kl": np.array([0.0, 1.0, 3.0, 2.0]), "reward": np.array([0.4, 0.5, 0.7, 0.9])}
    assert study_analysis.reward_at(1)(curve) == pytest.approx(0.5)
    assert study_analysis.reward_at(4)(curve) == pytest.approx(0.6)  # where it first gets there
    assert study_analysis.kl_at(0.6)(curve) == pytest.approx(4)
    assert study_analysis.kl_at(0.3)(curve) == 0
    assert np.isnan(study_analysis.reward_at(16)(curve))


def test_a_learning_rate_is_chosen_on_the_other_seeds() -> None:
    """In noise alone, a rate chosen on the seed itself would be above the mean."""
    runs = study_analysis.runs_of(study_lines.made_up(0, seeds=40))
    value = study_analysis.measured("tokens_per_completion")
    found = study_analysis.best(runs, (TDPO2[0],), value, largest=True)
    every = np.array([runs.values(TDPO2[0], rate, value) for rate in runs.learning_rates])
    assert found is not None
    assert (
        abs(found.estimate.by_seed.mean() - every.mean()) < every.max(axis=0).mean() - every.mean()
    )


def test_of_a_single_seed_the_best_learning_rate_is_its_own() -> None:
    runs = study_analysis.runs_of(study_lines.made_up(1, seeds=1))
    found = study_analysis.best(runs, (DPO,), study_analysis.kl_at(0.5), largest=False)
    every = [runs.values(DPO, rate, study_analysis.kl_at(0.5))[0] for rate in runs.learning_rates]
    assert found is not None
    assert found.estimate.by_seed == np.nanmin(every)


def test_levels_that_a_method_does_not_reach_are_not_named() -> None:
    lines = copy.deepcopy(study_lines.made_up(1))
    for key, line in lines.items():
        if key.setting == DPO:
            kl = np.array(line["curve"]["on_policy_kl"])
            line["curve"]["on_policy_kl"] = (3 * kl / kl[-1]).tolist()
    found = study_claims.judged(study_analysis.runs_of(lines))
    measures = {claim["name"]: claim["measure"] for claim in found}
    assert measures["tdpo2_reward"].endswith("KL = 1 and 2")
    assert measures["tdpo2_tdpo1"].endswith("KL = 1, 2 and 4")


def test_the_edge_of_a_grid_is_marked() -> None:
    [row] = [
        row
        for row in summary_of(study_lines.made_up(1), ABOUT)["reward_at_kl"]
        if row["method"] == "DPO, best beta"
    ]
    for at in row["at"].values():
        betas = [setting.beta for setting in study_claims.ANY_BETA_DPO]
        assert at["beta_at_the_edge"] == (at["beta"] in (min(betas), max(betas)))
        edges = study_lines.RATES[0], study_lines.RATES[-1]
        assert at["rate_at_the_edge"] == (at["learning_rate"] in edges)
        assert 0 < at["updates"] <= 160  # 5120 examples


@pytest.fixture(params=[1.0, 0.0, -1.0])
def summary(request: pytest.FixtureRequest) -> dict[str, Any]:
    return summary_of(study_lines.made_up(request.param), ABOUT)


def check_sentences(summary: dict[str, Any]) -> None:
    """Each sentence's verdict against the interval that stands in it."""
    lines = study_page.claim_lines(summary)
    assert len(lines) == len(study_claims.CLAIMS)
    for line in lines:
        word = re.search(r"\*\*(.+)\*\*", line)[1]
        bounds = re.search(r"\(([+-][\d.e-]+) to ([+-][\d.e-]+)\)", line)
        if bounds is None:
            assert word == "cannot be told", line
            continue
        low, high = map(float, bounds.groups())
        told = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
        assert word == told, line


def test_sentences_agree_with_their_numbers(summary: dict[str, Any]) -> None:
    check_sentences(summary)


def test_page_and_pictures_are_made(summary: dict[str, Any], tmp_path: Any) -> None:
    study_pictures.draw(summary, tmp_path)
    assert (tmp_path / "frontier.png").stat().st_size > 20_000
    assert (tmp_path / "seq_kl.png").stat().st_size > 20_000
    texts, tables = study_page.texts(summary), study_page.tables(summary)
    assert "abc" in texts["study_made"]
    assert set(tables) == set(study_page.TABLES)
    assert len(tables.pop("study_seq_kl_by_rate")) == len(study_lines.RATES)
    assert all(len(rows) >= 6 for rows in tables.values())
    json.dumps(summary, allow_nan=False)


def test_without_results_the_page_says_so() -> None:
    if study_page.committed() is None:
        assert "No results are committed yet" in study_page.texts()["study_claims"]


@pytest.mark.skipif(study_page.committed() is None, reason="no results are committed yet")
def test_the_committed_summary_is_that_of_the_committed_runs() -> None:
    lines = study_results.read(study_page.RESULTS / "runs.jsonl")
    summary = study_page.committed()
    assert json.loads(json.dumps(summary_of(lines, summary["about"]))) == summary
    assert summary["about"]["conditions"] == FULL.conditions()
    assert sum(path.stat().st_size for path in study_page.RESULTS.glob("*.json*")) < 2**20
    check_sentences(summary)
