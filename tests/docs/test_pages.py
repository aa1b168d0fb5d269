"""What the pages show works: their Python runs, their commands lead somewhere, so do their links.

A block of Python runs with what ``<!-- run with: ... -->`` before it names in ``STAND_INS``, or
with nothing. ``<!-- not run: why -->`` leaves it out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"(?:<!-- (run with|not run): (.*?) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
NEEDS = ("transformers", "datasets", "trl", "peft", "accelerate")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]


def tiny() -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module("tiny")
    finally:
        sys.path.pop(0)


def files() -> dict[str, Any]:
    """A model, its tokenizer and pairs in the current folder; the same pairs as token ids."""
    tiny().language_model().save_pretrained("path/to/model")
    tiny().tokenizer().save_pretrained("path/to/model")
    rows = [json.dumps(row) for row in tiny().preferences()]
    Path("pairs.jsonl").write_text("\n".join(rows))
    return {"examples": tiny().tokenized_preferences()}


def loop() -> dict[str, Any]:
    policy, reference = tiny().language_model(), tiny().language_model().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    from tdpo_ext.integrations.transformers import PreferenceCollator

    loader = torch.utils.data.DataLoader(
        tiny().tokenized_preferences(), batch_size=3, collate_fn=PreferenceCollator(pad_token_id=0)
    )
    return {"policy": policy, "reference": reference, "optimizer": optimizer, "loader": loader}


def hidden_states() -> dict[str, Any]:
    head, reference_head = torch.nn.Linear(8, 11), torch.nn.Linear(8, 11).requires_grad_(False)
    hidden, reference_hidden = torch.randn(2, 4, 6, 8).unbind()
    labels = torch.randint(0, 11, (4, 6))
    return {
        "hidden": hidden.requires_grad_(),
        "head": head,
        "reference_hidden": reference_hidden,
        "reference_head": reference_head,
        "labels": labels,
    }


def logits() -> dict[str, Any]:
    """Where a label is ignored the logits are NaN: a loss that counts such a token is NaN too."""
    policy, reference = torch.randn(2, 4, 6, 11).unbind()
    labels = torch.randint(0, 11, (4, 6))
    for tensor, blank in ((labels, -100), (policy, torch.nan), (reference, torch.nan)):
        tensor[:, :2] = blank
    return {
        "policy_logits": policy.requires_grad_(),
        "reference_logits": reference,
        "shift_labels": labels,
        "token_weights": torch.rand(4, 6),
    }


def packed_logits() -> dict[str, Any]:
    policy, reference = torch.randn(2, 9, 11).unbind()
    return {
        "policy_logits": policy.requires_grad_(),
        "reference_logits": reference,
        "labels": torch.randint(0, 11, (9,)),
        "cu_seqlens": torch.tensor([0, 4, 9]),
    }


def packed_hidden_states() -> dict[str, Any]:
    return {
        "hidden": torch.randn(9, 8, requires_grad=True),
        "weight": torch.randn(11, 8, requires_grad=True),
        "teacher_hidden": torch.randn(9, 12),
        "teacher_weight": torch.randn(11, 12),
        "response_mask": torch.arange(9) % 4,
    }


def cache() -> dict[str, Any]:
    states = hidden_states()
    sequences = torch.arange(24).view(4, 6)
    of = {ids.sum().item(): row for ids, row in zip(sequences, states["hidden"], strict=True)}
    return {
        **states,
        "head": states["head"].weight,
        "reference_head": states["reference_head"].weight,
        "sequences": sequences,
        "batch": sequences,
        "hidden_states": lambda ids: of[ids.sum().item()].detach(),
    }


STAND_INS: dict[str, Callable[[], dict[str, Any]]] = {
    "files": files,
    "loop": loop,
    "hidden states": hidden_states,
    "logits": logits,
    "packed logits": packed_logits,
    "packed hidden states": packed_hidden_states,
    "cache": cache,
}


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match[3] == language and match[1] != "not run":
                line = text[: match.start(4)].count("\n") + 1
                found.append(pytest.param(match[2], match[4], id=f"{page.stem}:{line}"))
    return found


@pytest.mark.skipif(bool(MISSING), reason=f"the pages need {MISSING}")
@pytest.mark.parametrize(("needs", "code"), blocks("python"))
def test_python_on_a_page_runs(
    needs: str | None, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = STAND_INS[needs]() if needs else {}
    if not torch.cuda.is_available():  # as the pages say
        code = code.replace('Config("output"', 'Config("output", use_cpu=True')
    exec(compile(code, "page", "exec"), names)
    for output in ("output", "losses", "loss"):
        if isinstance(values := names.get(output), tuple | torch.Tensor):
            loss = values if isinstance(values, torch.Tensor) else values.loss
            assert bool(loss.isfinite().all())


# --- commands -------------------------------------------------------------------------------------

BACKENDS = {"avx2", "cuda-on-cpu", "fallback"}
NOT_NAMES = {"and", "not", "or", "slow"}
NEVER_HERE = ("pip install", "conda install", "export", "git clone", ".ci/run")
"""They change the machine, or run all of this."""


def commands() -> list[Any]:
    lines = {}
    for block in blocks("bash"):
        for line in block.values[1].splitlines():
            command = re.sub(r"\s+#.*", "", line).strip()
            if command and not command.startswith("#"):
                lines.setdefault(command, block.id)
    return [pytest.param(line, id=f"{page}: {line}") for line, page in lines.items()]


def is_in(paths: list[Path], word: str) -> bool:
    files = [file for path in paths for file in ([path] if path.is_file() else path.glob("*.py"))]
    return any(word in file.read_text() for file in files)


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("line", commands())
def test_a_command_on_a_page_leads_somewhere(line: str, tmp_path: Path) -> None:
    """The modules, scripts, options, tests and targets that it names are there. What they do has
    tests of its own: test_system_report.py, test_parity.py, test_examples.py, ..."""
    line = re.sub(r"^(\w+=\S+ )+", "", line).replace(".venv/bin/python", "python")
    words = shlex.split(line)
    if any(part in line for part in NEVER_HERE):
        return
    if words[0] == "make":
        run("make", "--dry-run", "--always-make", *words[1:])
    elif words[:3] == ["python", "-m", "pytest"]:
        paths = [ROOT / word for word in words if word.startswith("tests")]
        assert paths
        assert all(path.exists() for path in paths)
        chosen = words[words.index("-k") + 1].split() if "-k" in words else []
        assert all(word in BACKENDS | NOT_NAMES or is_in(paths, word) for word in chosen)
    elif words[:2] == ["python", "-m"] and words[2].startswith("tdpo_ext"):
        module = importlib.util.find_spec(f"{words[2]}.__main__")
        assert module is not None
        assert module.origin is not None
        assert all(word in Path(module.origin).read_text() for word in words[3:])
    elif words[:2] == ["python", "-c"]:
        run(sys.executable, "-c", words[2])
    elif words[0] in ("python", "bash", "torchrun"):
        [script, *_] = [word for word in words if word.endswith((".py", ".sh"))]
        assert (ROOT / script).exists()
        options = [word for word in words[words.index(script) :] if word.startswith("--")]
        assert all(option.split("=")[0] in (ROOT / script).read_text() for option in options)
    else:
        raise AssertionError("say here what can be tried of it")


# --- links ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check_links() -> Any:
    spec = importlib.util.spec_from_file_location("check_links", ROOT / ".ci" / "check_links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no git")
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a page](../../docs/usage.md#trl) and [one](https://example.org)", ""),
        ("[a page](../../docs/nowhere.md)", "the link ../../docs/nowhere.md leads nowhere"),
        (
            "[a page](../../docs/usage.md#nowhere)",
            "usage.md has no heading for the anchor #nowhere",
        ),
        ("`csrc/token_stats.h`, `token_stats.h` and `tests/docs/`", ""),
        ("`csrc/nothing.h`", "there is no csrc/nothing.h"),
        ("`tests/nothing/`", "there is no tests/nothing/"),
        ("`build/demo/results.json`, `path/to/model/`, `rewards/*`, `/usr/local/`", ""),
        ("`tdpo_ext.TDPOLoss`, `tdpo_ext.outputs.TDPOOutput.metrics`", ""),
        ("`tdpo_ext.nothing`", "there is no tdpo_ext.nothing in the package"),
        ("`tdpo_ext.outputs.nothing`", "there is no tdpo_ext.outputs.nothing in the package"),
        ("`test_an_example_learns`", ""),
        ("`test_of_nothing`", "there is no test test_of_nothing"),
        ("```bash\npython benchmarks/nothing.py\n```", "there is no benchmarks/nothing.py"),
    ],
)
def test_the_link_checker_sees(check_links: Any, text: str, fault: str) -> None:
    page = ROOT / "build" / "pages" / f"{os.getpid()}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    try:
        assert check_links.faults(page) == ([fault] if fault else [])
    finally:
        page.unlink()
