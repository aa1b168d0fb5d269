"""Put what is made elsewhere between the marks of these pages and of README.md: examples, measured
errors, and figures of benchmarks/results/ with the sentences that tell them. All of benchmarks.md
is written from there by benchmarks/render.py instead.

    python docs/fill.py

The errors come from the tests: pytest tests/trainers tests/distributed --record
benchmarks/results/trainers.json
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import render_readme
import scaling

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ERRORS = ROOT / "benchmarks" / "results" / "trainers.json"
EXAMPLE = re.compile(r"<!-- (examples/\w+\.py) -->\n```python\n.*?```\n", re.DOTALL)
TEXT = re.compile(r"<!-- text (\w+) -->\n(?:.+\n)*")
TABLE = re.compile(r"<!-- table (\w+) -->\n(?:\|.*\n)*")


def example(match: re.Match[str]) -> str:
    text = (ROOT / match[1]).read_text()
    body = text.split('"""', 2)[2].strip()
    return f"<!-- {match[1]} -->\n```python\n{body}\n```\n"


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0e}" if isinstance(value, float) else str(value)


def table(match: re.Match[str]) -> str:
    known = {**json.loads(ERRORS.read_text()), **scaling.tables(), **render_readme.tables()}
    rows = known[match[1]]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    text = "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)
    return f"<!-- table {match[1]} -->\n{text}"


def text(match: re.Match[str]) -> str:
    lines = {**scaling.texts(), **render_readme.texts()}[match[1]].splitlines()
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
        yield page, TEXT.sub(text, TABLE.sub(table, EXAMPLE.sub(example, page.read_text())))


def main() -> None:
    for page, wanted in pages():
        if page.read_text() != wanted:
            page.write_text(wanted)


if __name__ == "__main__":
    main()
