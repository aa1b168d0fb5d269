"""Figures measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
from backends import COMPILED

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
needs_core = pytest.mark.skipif(not COMPILED, reason="the extension is not built")


def measure(script: str) -> dict[str, float]:
    """Run a script that prints one JSON object last."""
    preamble = """
        import ctypes, json, os, torch, tdpo_ext
        def peak():  # bytes this process has ever held; ru_maxrss starts with its parent's
            status = open("/proc/self/status").read()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        def forget_peak():  # what inputs took while they were made
            ctypes.CDLL(None).malloc_trim(0)  # what is free would be given out again, unseen
            open("/proc/self/clear_refs", "w").write("5")
    """
    program = textwrap.dedent(preamble) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout.splitlines()[-1])
