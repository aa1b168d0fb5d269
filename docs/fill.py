"""Put what is made elsewhere between the marks of these pages and of README.md: measured errors,
options of TRL's trainer, and figures of benchmarks/results/ and examples/sentiment/results/ with
the sentences that tell them. All of benchmarks.md is written by benchmarks/render.py instead.

    python docs/fill.py

The errors come from the tests: pytest tests/trainers tests/distributed --record
benchmarks/results/trainers.json
"""

from __future__ import annotations

import ast
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.append(str(Path(__file__).parent.parent / "examples" / "sentiment"))
import render_readme
import render_release
import scaling
import study_page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ERRORS = ROOT / "benchmarks" / "results" / "trainers.json"
INTEGRATIONS = ROOT / "python" / "tdpo_ext" / "integrations"
TEXT = re.compile(r"<!-- text (\w+) -->\n(?:.+\n)*")
TABLE = re.compile(r"<!-- table (\w+) -->\n(?:\|.*\n)*")


def known_tables() -> dict[str, list[dict[str, Any]]]:
    return {
        **json.loads(ERRORS.read_text()),
        **scaling.tables(),
        **render_readme.tables(),
        **render_release.tables(),
        **study_page.tables(),
        **tables_of_options(),
    }


def known_texts() -> dict[str, str]:
    return {
        **scaling.texts(),
        **render_readme.texts(),
        **render_release.texts(),
        **study_page.texts(),
    }


def tables_of_options() -> dict[str, list[dict[str, Any]]]:
    """The options of TDPOConfig, and those of DPO that are refused. Read and not imported: TRL need
    not be installed."""
    own: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    body = [x for path in INTEGRATIONS.glob("*.py") for x in ast.parse(path.read_text()).body]
    constants = {
        node.targets[0].id: node.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    [config] = [x for x in body if isinstance(x, ast.ClassDef) and x.name == "TDPOConfig"]
    for node in config.body:
        if isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            assert isinstance(node.value, ast.Call)  # field(default=..., metadata={"help": ...})
            field = {x.arg: ast.literal_eval(x.value) for x in node.value.keywords}
            default = field["default"]
            shown = f'`"{default}"`' if isinstance(default, str) else str(default)
            meaning = field["metadata"]["help"]
            own.append({"option": f"`{node.target.id}`", "default": shown, "meaning": meaning})
    restricted = constants["RESTRICTED_OPTIONS"]
    assert isinstance(restricted, ast.Tuple)
    for call in restricted.elts:
        assert isinstance(call, ast.Call)  # RestrictedOption(name, allowed, why[, free_from])
        name, allowed, why, *free_from = (
            ast.literal_eval(constants[x.id] if isinstance(x, ast.Name) else x) for x in call.args
        )
        values = ", ".join(f"`{value!r}`" for value in allowed)
        values += "".join(f"; any from TRL {version} on" for version in free_from)
        refused.append({"option": f"`{name}`", "allowed": values, "why": why})
    return {"options_of_tdpo_config": own, "refused_options": refused}


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0e}" if isinstance(value, float) else str(value)


def table(match: re.Match[str]) -> str:
    rows = known_tables()[match[1]]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    text = "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)
    return f"<!-- table {match[1]} -->\n{text}"


def text(match: re.Match[str]) -> str:
    lines = known_texts()[match[1]].splitlines()
    wrapped = [
        textwrap.fill(
            line,
            width=120,
            subsequent_indent="  " if line.startswith("- ") else "",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for line in lines
    ]
    return "\n".join([f"<!-- text {match[1]} -->", *wrapped, ""])


def pages() -> Iterator[tuple[Path, str]]:
    """Each page, and what it should be."""
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        yield page, TEXT.sub(text, TABLE.sub(table, page.read_text()))


def main() -> None:
    for page, wanted in pages():
        if page.read_text() != wanted:
            page.write_text(wanted)


if __name__ == "__main__":
    main()
