"""Errors that tests have measured, for the tables of the documentation: pytest --record FILE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_rows: dict[str, list[dict[str, Any]]] = {}


def record(table: str, row: dict[str, Any]) -> None:
    """``loss``: of the loss; ``gradient``: of gradients, relative to each parameter's largest."""
    print(row)
    _rows.setdefault(table, []).append(row)


def write(path: Path) -> None:
    """Tables of which this run has measured nothing stay as they are."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **_rows}, indent=1) + "\n")
