"""What backends() says, and that the fallback says itself once."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import pair_of_logits

import tdpo_ext
from tdpo_ext import fallback, native


def test_backends_say_what_was_built():
    said = tdpo_ext.backends()
    assert set(said) == {"cpu", "cuda"}
    if native.core is None:
        pytest.skip("the extension is not built")
    assert said["cpu"]["compiled"]
    assert said["cpu"]["instruction_set"] in said["cpu"]["instruction_sets"]
    assert said["cpu"]["instruction_sets"][0] == "baseline"
    assert said["cpu"]["threads"] == (torch.get_num_threads() if said["cpu"]["openmp"] else 1)


def test_what_is_absent_has_a_reason(monkeypatch):
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "core_absent_because", "it was never built")
    said = tdpo_ext.backends()
    for device in ("cpu", "cuda"):
        assert not said[device]["compiled"]
        assert said[device]["reason"]


def test_a_forced_instruction_set_is_used(on_processor):
    assert tdpo_ext.backends()["cpu"]["instruction_set"] == on_processor


def test_the_fallback_says_so_once(monkeypatch):
    monkeypatch.setattr("tdpo_ext.ops.core", None)
    monkeypatch.setattr(fallback, "_warned", set())
    policy, reference = pair_of_logits(2, 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            tdpo_ext.token_stats(policy, reference, torch.tensor([0, 1]))
    assert len([w for w in caught if "fallback on cpu" in str(w.message)]) == 1


def test_other_devices_get_outputs_of_the_right_kind():
    """The meta device stands for any without kernels: shapes and dtypes come from the fakes."""
    policy = torch.empty(4, 6, 33, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(4, 6, dtype=torch.int64, device="meta")
    stats = tdpo_ext.token_stats(policy, policy, labels)
    assert all(x.shape == (4, 6) and x.dtype == torch.float32 for x in stats)
