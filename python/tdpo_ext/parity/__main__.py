"""python -m tdpo_ext.parity: a table, and exit status 1 if a bound is missed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tdpo_ext import parity
from tdpo_ext.parity.table import show
from tdpo_ext.token_statistics import native


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tdpo_ext.parity",
        description="Check every backend against float64. Exit status: 0 all bounds are kept, 1 "
        "a bound is missed, 2 a device is not present.",
    )
    parser.add_argument("--devices", nargs="+", metavar="NAME", help="default: all present")
    parser.add_argument("--quick", action="store_true", help="small vocabularies only; seconds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows there as well")
    return parser.parse_args()


def main() -> int:
    given = arguments()

    def progress(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    try:
        report = parity.check(given.devices, quick=given.quick, progress=progress)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    show(report)
    if given.json:
        rows = [{**row._asdict(), "kept": row.kept} for row in report.rows]
        written = {"passed": report.passed, "backends": native.backends(), "rows": rows}
        given.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
