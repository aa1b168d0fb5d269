"""Put what is made elsewhere between the marks of these pages: examples, and measured errors.

    python docs/fill.py

The errors come from the tests: pytest tests/test_attach.py tests/test_architectures.py
tests/test_trainers.py tests/test_distributed.py --record benchmarks/results/trainers.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import scaling

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ERRORS = ROOT / "benchmarks" / "results" / "trainers.json"
EXAMPLE = re.compile(r"<!-- (examples/\w+\.py) -->\n```python\n.*?```\n", re.DOTALL)
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
    rows = {**json.loads(ERRORS.read_text()), **scaling.tables()}[match[1]]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    text = "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)
    return f"<!-- table {match[1]} -->\n{text}"


def main() -> None:
    for page in DOCS.glob("*.md"):
        text = page.read_text()
        filled = TABLE.sub(table, EXAMPLE.sub(example, text))
        if filled != text:
            page.write_text(filled)


if __name__ == "__main__":
    main()
