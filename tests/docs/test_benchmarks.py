"""The pages tell the figures of benchmarks/results/, and what is timed computes the loss."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tdpo_ext

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fill
import render
import render_gpu

ROOT = Path(__file__).parents[2]
PAGES = {page.name: wanted for page, wanted in fill.pages()}


@pytest.mark.parametrize("page", [page for page, _ in fill.pages()], ids=lambda page: page.name)
def test_a_page_holds_what_is_made_elsewhere(page: Path) -> None:
    assert page.read_text() == PAGES[page.name], "make docs"


def test_the_page_of_benchmarks_is_that_of_the_results() -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text() == render.page(), (
        "python benchmarks/render.py"
    )


def test_other_results_make_other_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = render.page()
    shutil.copytree(render_gpu.RUN, tmp_path, dirs_exist_ok=True)
    path = tmp_path / render_gpu.FUSED
    report = json.loads(path.read_text())
    for row in report["measurements"]:
        row["milliseconds"] = {name: 2 * taken for name, taken in row["milliseconds"].items()}
    path.write_text(json.dumps(report))
    monkeypatch.setattr(render_gpu, "RUN", tmp_path)
    changed = {page.name for page, wanted in fill.pages() if wanted != PAGES[page.name]}
    assert changed == {"README.md", "scaling.md"}
    assert render.page() != before


def test_every_table_of_the_card_names_card_commit_torch_and_cuda() -> None:
    """A table's first line follows an empty one, and that follows what says where it was made."""
    runs = [render_gpu.made_on(known) for known in ({}, render_gpu.by_hand()["run"])]
    lines = render_gpu.gpu_section()
    starts = [
        number
        for number, line in enumerate(lines)
        if line.startswith("| ") and not lines[number - 1].startswith("|")
    ]
    assert len(starts) >= 8
    for number in starts:
        assert lines[number - 2].startswith(tuple(runs)), lines[number]


@pytest.fixture(scope="module")
def training_step() -> Any:
    pytest.importorskip("transformers")
    import training_step

    return training_step


def test_paths_of_a_training_step_give_the_loss_and_gradient_of_float64(training_step: Any) -> None:
    step = training_step.make_step(training_step.SIZES["quick"], "cpu", torch.float32)
    policy, reference = (copy.deepcopy(x).double() for x in (step.policy, step.reference))
    with torch.no_grad():
        reference_logits = reference(step.tokens).logits
    truth = tdpo_ext.reference.tdpo_loss(policy(step.tokens).logits, reference_logits, step.labels)
    truth.loss.backward()
    norm = torch.stack([x.grad.norm() for x in policy.parameters()]).norm()
    for path in training_step.PATHS:
        if path != "backbone alone":
            found = training_step.loss_and_norm(path, step)
            assert found == pytest.approx((truth.loss.item(), norm.item()), rel=1e-5), path


def test_a_path_that_computes_something_else_gives_no_figures(training_step: Any) -> None:
    right, wrong = (0.7, 4.0), (0.7, 2.0)
    training_step.check_agreement({"eager formula": right, "backbone alone": wrong})
    with pytest.raises(SystemExit, match="attach_tdpo: gradient norm 2, eager formula 4"):
        training_step.check_agreement({"eager formula": right, "attach_tdpo": wrong})
