"""The import graph of the package: no circle, no import of a higher layer, at most nine levels.

    python .ci/check_imports.py [--show]

A layer is a line of ``LAYERS``. A file imports from its own layer and from those below it. Imports
for type checkers only do not count. A file's level is one more than the highest level among the
files that it imports. Integrations and parity, which nothing below imports, count their own levels.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "python" / "tdpo_ext"
LAYERS = [  # from the ground up
    ["outputs", "checks", "autograd"],
    ["distributed", "sequences"],
    ["loss"],
    ["token_statistics"],
    ["fused_head"],
    ["functional"],
    ["modules"],
    ["reference"],
    ["__init__"],
    ["integrations"],
    ["parity"],
    ["__main__"],
]
MOST_LEVELS = 9
ON_TOP = {"integrations", "parity"}
# What is tested against the definition of the method must not use it.
MAY_IMPORT_REFERENCE = {"__init__", "parity", "reference"}


def module_of(path: Path) -> str:
    """``fused_head.ops`` for ``fused_head/ops.py``; ``fused_head`` for its ``__init__.py``."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports_of(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tdpo_ext":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if name in modules else base or "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tdpo_ext":
                    yield alias.name.partition(".")[2] or "__init__"
        else:
            yield from imports_of(node, modules)


def graph() -> dict[str, set[str]]:
    files = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {
        name: set(imports_of(ast.parse(path.read_text()), set(files))) - {name}
        for name, path in files.items()
    }


def layer_of(module: str) -> int:
    room = module.split(".")[0]
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def circle_from(module: str, edges: dict[str, set[str]], path: list[str]) -> list[str]:
    if module in path:
        return [*path[path.index(module) :], module]
    for other in sorted(edges[module]):
        if found := circle_from(other, edges, [*path, module]):
            return found
    return []


def level_of(module: str, edges: dict[str, set[str]]) -> int:
    own = edges[module]
    if (room := module.split(".")[0]) in ON_TOP:
        own = {other for other in own if other.split(".")[0] == room}
    return 1 + max((level_of(other, edges) for other in own), default=0)


def faults(edges: dict[str, set[str]]) -> list[str]:
    for module in edges:
        if circle := circle_from(module, edges, []):
            return ["a circle: " + " -> ".join(circle)]
    found = []
    for module, others in sorted(edges.items()):
        for other in sorted(others):
            if layer_of(other) > layer_of(module):
                found.append(f"{module} imports {other}, which stands above it")
            if other == "reference" and module.split(".")[0] not in MAY_IMPORT_REFERENCE:
                found.append(f"{module} imports reference, which it is tested against")
        if (level := level_of(module, edges)) > MOST_LEVELS:
            found.append(f"{module} is on level {level}; at most {MOST_LEVELS} are allowed")
    return found


def show(edges: dict[str, set[str]]) -> None:
    for level in range(MOST_LEVELS, 0, -1):
        here = [module for module in edges if level_of(module, edges) == level]
        print(f"level {level}: {', '.join(sorted(here))}")


if __name__ == "__main__":
    edges = graph()
    wrong = faults(edges)
    print("\n".join(wrong) or f"{len(edges)} modules: no circle, no import of a higher layer")
    if "--show" in sys.argv and not wrong:
        show(edges)
    sys.exit(bool(wrong))
