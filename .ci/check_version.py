"""Before a release: the tag, the package, CITATION.cff and CHANGELOG.md name one version.

    python .ci/check_version.py [--dated]

The tag is that of GITHUB_REF, if it is one. Then, and with --dated, the changelog must also have a
date for the version.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def found(pattern: str, file: str) -> str:
    match = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert match, f"{file} has no line like {pattern}"
    return match[1]


def versions() -> dict[str, str]:
    return {
        "python/tdpo_ext/__init__.py": found(
            r'^__version__ = "(.+)"$', "python/tdpo_ext/__init__.py"
        ),
        "CITATION.cff": found(r"^version: (\S+)$", "CITATION.cff"),
        "CHANGELOG.md": found(r"^## (\S+) \(.+\)$", "CHANGELOG.md"),
    }


def main() -> int:
    named = versions()
    tag = re.fullmatch(r"refs/tags/v(.+)", os.environ.get("GITHUB_REF", ""))
    if tag:
        named["the tag"] = tag[1]
    if len(set(named.values())) > 1:
        print(f"versions differ: {named}")
        return 1
    if tag or "--dated" in sys.argv:
        found(r"^## \S+ \((\d{4}-\d{2}-\d{2})\)$", "CHANGELOG.md")
    print(f"version {named['CHANGELOG.md']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
