"""What SECURITY.md promises about the package's text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tdpo_ext

FILES = sorted(Path(tdpo_ext.__file__).parent.rglob("*.py"))
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "load", "loads", "system", "popen"}
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "ctypes",
    "subprocess",
    "socket",
    "urllib",
    "http",
}
ALLOWED = {"json.loads", "torch.compile", "re.compile"}


def faults(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith(".eval") and not node.args:
                continue  # a module's, into evaluation mode
            if called.split(".")[-1] in CALLS and called not in ALLOWED:
                found.append(f"line {node.lineno}: {called}()")
            continue
        else:
            continue
        found += [f"line {node.lineno}: {x}" for x in names if x.split(".")[0] in MODULES]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda x: x.name)
def test_nothing_is_deserialised_evaluated_fetched_or_started(file):
    assert faults(file.read_text()) == []


def test_the_package_was_found():
    assert {"__init__.py", "ops.py", "kernels.py", "writer.py"} <= {x.name for x in FILES}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from subprocess import run",
        "import urllib.request",
        "eval('1')",
        "torch.load(path)",
        "marshal = __import__('marshal')",
        "os.system('x')",
        "import torch\ndef f():\n    exec(text)",
    ],
)
def test_it_would_be_seen(text):
    assert faults(text)
