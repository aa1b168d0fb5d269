"""The report as a table, by rich if it is installed, else in plain text."""

from __future__ import annotations

import importlib
from itertools import groupby
from typing import Any

from tdpo_ext.parity import Report, Row

HEADINGS = (
    *("dtype", "quantity", "largest", "median", "bound", ""),
    *("eager", "median", "worse", "as run", "worse"),
)
WIDTH = 130


def _number(error: float) -> str:
    return f"{error:.1e}" if error <= 1 else "> 1"


def _cells(row: Row) -> tuple[str, ...]:
    def cases(worse: int | None) -> str:
        return "" if worse is None else f"{worse} of {row.cases}"

    return (
        row.dtype,
        row.quantity,
        *(_number(x) for x in (row.largest, row.median, row.bound)),
        "kept" if row.kept else "MISSED",
        *(_number(x) for x in (row.eager_largest, row.eager_median)),
        cases(row.worse_than_eager),
        "" if row.as_run_largest is None else _number(row.as_run_largest),
        cases(row.worse_than_as_run),
    )


def show(report: Report) -> None:
    try:
        console: Any = importlib.import_module("rich.console").Console(width=WIDTH)
        tables: Any = importlib.import_module("rich.table")
    except ModuleNotFoundError:
        _show_plainly(report)
    else:
        for backend, rows in groupby(report.rows, key=lambda row: row.backend):
            table = tables.Table(*HEADINGS, title=backend, title_justify="left")
            for row in rows:
                table.add_row(*_cells(row), style=None if row.kept else "bold red")
            console.print(table)
    print("\n".join(_closing(report)))


def _show_plainly(report: Report) -> None:
    lines = [HEADINGS, *(_cells(row) for row in report.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    for backend, rows in groupby(report.rows, key=lambda row: row.backend):
        print(f"\n{backend}")
        for line in (HEADINGS, *(_cells(row) for row in rows)):
            print("  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)).rstrip())


def _closing(report: Report) -> list[str]:
    """The lines below the table: how to read it, which bounds were missed, and the totals."""
    lines = [
        "",
        "Errors are relative, against float64. eager: the usual formula in PyTorch, in float32.",
        "as run: the same with a half-width head's products in its own type, as it is run.",
        "worse: cases where our largest error exceeds eager's by more than 1 ulp of the output.",
    ]
    for row in report.misses:
        lines.append(
            f"MISSED: {row.backend}, {row.dtype} {row.quantity}: {row.largest:.1e} > "
            f"{row.bound:.1e} ({row.worst_case})"
        )
    compared = [row for row in report.rows if row.worse_than_eager is not None]
    worse = sum(row.worse_than_eager or 0 for row in compared)
    cases = sum(row.cases for row in compared)
    lines.append(f"Worse than eager by more than 1 ulp: {worse} of {cases}.")
    kept = len(report.rows) - len(report.misses)
    lines.append(f"{kept} of {len(report.rows)} bounds kept.")
    return lines
