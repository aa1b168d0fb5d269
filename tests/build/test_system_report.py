"""python -m tdpo_ext: what a bug report needs."""

from __future__ import annotations

import torch
from backends import INSTRUCTION_SETS

import tdpo_ext
from tdpo_ext import __main__ as command
from tdpo_ext.token_statistics import native


def test_it_says_what_a_bug_report_needs(capsys):
    assert command.main() == 0
    said = capsys.readouterr().out
    for part in (
        tdpo_ext.__version__,
        torch.__version__,
        "python ",
        "platform ",
        *INSTRUCTION_SETS,
    ):
        assert part in said
    if native.core is not None:
        assert native.core.build_info()["compiler"] in said
    cuda = tdpo_ext.backends()["cuda"]
    assert cuda["compiled"] or cuda["reason"] in said


def test_without_the_extension_it_says_why(capsys, monkeypatch):
    for module in ("tdpo_ext.token_statistics.native", "tdpo_ext.token_statistics.kernels"):
        monkeypatch.setattr(f"{module}.core", None)
    monkeypatch.setattr(native, "core_absent_because", "it was never built")
    native._no_cuda_because.cache_clear()
    try:
        assert command.main() == 0
    finally:
        native._no_cuda_because.cache_clear()
    said = capsys.readouterr().out
    assert "absent: it was never built" in said
    assert "plain PyTorch: it was never built" in said


def test_an_instruction_set_that_is_not_here_is_named(capsys, monkeypatch):
    if native.core is None:
        return
    monkeypatch.setenv("TDPO_EXT_INSTRUCTION_SET", "avx1024")
    assert command.main() == 1
    assert "avx1024" in capsys.readouterr().err


def test_a_served_card_is_named():
    said = command._cuda(
        {
            "compiled": True,
            "architectures": ["80-real", "90"],
            "runtime": "13.0",
            "driver": "13.2",
            "devices": {"cuda:0 One": "served", "cuda:1 Other": "no kernel image"},
        }
    )
    assert said["cuda:0 One"] == "compiled kernels"
    assert said["cuda:1 Other"] == "plain PyTorch: no kernel image"
    assert said["CUDA they link to"] == "13.0 (driver 580 or newer)"
    assert said["driver supports CUDA"] == "13.2"
