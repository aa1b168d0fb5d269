"""Check that what the pages name exists: links, anchors, files, modules and tests. No network.

    python .ci/check_links.py [PAGE...]     (without arguments: all pages of the repository)

A link must lead to a file of the repository, and its anchor to a heading of that page. In code
(`so` or fenced), a path, a name below `tdpo_ext` and the name of a test must exist. Exit status 1,
and one line for each that does not.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "tdpo_ext"
PAGES = ("*.md", "docs/*.md", "tests/*.md", "examples/*.md", "benchmarks/results/*.md")

MADE = ("build", "dist", ".venv")  # by commands

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(<?([^()\s>]+)>?\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
EXPLICIT_ANCHOR = re.compile(r'<a (?:id|name)="([^"]+)"')
ENDINGS = r"(?:pyi?|md|h|cpp|inl|cuh?|cmake|txt|sh|json|toml|ya?ml|png|cff)"
FILE, FOLDER = rf"(?:[\w.*-]+/)*[\w.*-]+\.{ENDINGS}", r"(?:[\w.-]+/)+"
PATH = re.compile(rf"(?<![\w./~$<-])({FILE}|{FOLDER})(?![\w/*=<]|\.\.)")
MODULE = re.compile(r"(?<![\w./:])tdpo_ext(?:\.[A-Za-z_]\w*)+")
TEST = re.compile(r"(?<![\w./])test_\w+(?![\w.*/])")


@functools.cache
def files() -> frozenset[str]:
    """All files of the repository, also those that are not committed yet.

    In a copy without git: all but what commands make.
    """
    if not (ROOT / ".git").exists():
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return frozenset(path.as_posix() for path in paths if path.parts[0] not in MADE)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
    return frozenset(name for name in names if (ROOT / name).exists())


@functools.cache
def folders() -> frozenset[str]:
    return frozenset(str(parent) for name in files() for parent in PurePosixPath(name).parents)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    text = FENCE.sub("", page.read_text())
    found = {*EXPLICIT_ANCHOR.findall(text)}
    for heading in HEADING.findall(text):
        name, number = slug(heading), 1
        while name in found:  # a heading that is there twice
            name, number = f"{slug(heading)}-{number}", number + 1
        found.add(name)
    return frozenset(found)


def wrong_links(page: Path, text: str) -> Iterator[str]:
    for link in LINK.findall(INLINE_CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):  # another site: not looked at
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            yield f"the link {link} leads nowhere"
        elif anchor and anchor not in anchors(target):
            yield f"{target.name} has no heading for the anchor #{anchor}"


def path_exists(name: str) -> bool:
    """A path from the root, or the end of one: `simd.h`, `cpu/simd.h` and `csrc/cpu/simd.h`."""
    known = folders() if name.endswith("/") else files()
    pattern = name.rstrip("/")
    return any(fnmatch.fnmatch(x, pattern) or fnmatch.fnmatch(x, f"*/{pattern}") for x in known)


def is_of_the_repository(name: str) -> bool:
    """Not what a command makes, and not somebody else's (path/to/model)."""
    first, _, rest = name.partition("/")
    return not rest or (first not in MADE and path_exists(f"{first}/"))


@functools.cache
def names_in(module: Path) -> frozenset[str]:
    """What a module defines or imports, and Class.attribute of its classes."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found.update(alias.asname or alias.name for alias in node.names)
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + x.id for x in targets if isinstance(x, ast.Name))
            if isinstance(node, (ast.If, ast.Try)):
                visit(node.body, prefix)

    visit(ast.parse(module.read_text()).body, "")
    return frozenset(found)


def module_exists(name: str) -> bool:
    place, parts = PACKAGE, name.split(".")[1:]
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if not parts:
        return True
    for module in (place / f"{parts[0]}.py", place / f"{parts[0]}.pyi"):
        if module.exists():
            return len(parts) == 1 or ".".join(parts[1:3]) in names_in(module)
    return ".".join(parts[:2]) in names_in(place / "__init__.py")


@functools.cache
def tests() -> frozenset[str]:
    """The names of all test functions and of all files of tests."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        found.add(path.stem)
        found.update(re.findall(r"def (test_\w+)", path.read_text()))
    return frozenset(found)


def wrong_names(code: str) -> Iterator[str]:
    for name in PATH.findall(code):
        if is_of_the_repository(name) and not path_exists(name):
            yield f"there is no {name}"
    for name in MODULE.findall(code):
        if not module_exists(name):
            yield f"there is no {name} in the package"
    for name in TEST.findall(code):
        if name not in tests():
            yield f"there is no test {name}"


def faults(page: Path) -> list[str]:
    text = COMMENT.sub("", page.read_text())
    prose = FENCE.sub("", text)
    found = [*wrong_links(page, prose)]
    for code in INLINE_CODE.findall(prose):
        found += wrong_names(code)
    for fence in FENCE.findall(text):
        found += wrong_names(fence)
    return list(dict.fromkeys(found))


def main(names: list[str]) -> int:
    pages = [Path(name).resolve() for name in names]
    pages = pages or [ROOT / x for pattern in PAGES for x in files() if matches(x, pattern)]
    wrong = 0
    for page in sorted(pages):
        for fault in faults(page):
            wrong += 1
            print(f"{page.relative_to(ROOT)}: {fault}")
    print(f"{len(pages)} pages, {wrong} names and links that lead nowhere")
    return 1 if wrong else 0


def matches(name: str, pattern: str) -> bool:
    return PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
