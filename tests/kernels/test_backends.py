"""What backends() says, and that the fallback says itself once."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from inputs import pair_of_logits

import tdpo_ext
from tdpo_ext.token_statistics import fallback, native


def test_backends_say_what_was_built(monkeypatch):
    monkeypatch.delenv("TDPO_EXT_INSTRUCTION_SET", raising=False)
    said = tdpo_ext.backends()
    assert set(said) == {"cpu", "cuda"}
    if native.core is None:
        pytest.skip("the extension is not built")
    assert said["cpu"]["compiled"]
    assert said["cpu"]["instruction_set"] == said["cpu"]["instruction_sets"][-1]
    assert said["cpu"]["instruction_sets"][0] == "baseline"
    assert said["cpu"]["threads"] == (torch.get_num_threads() if said["cpu"]["openmp"] else 1)


class OtherCore:
    """A core that was built, or finds itself, otherwise; it says so and computes nothing."""

    def __init__(self, no_cuda_because="", cannot_run_because="", **runtime):
        self.no_cuda_because = no_cuda_because
        self.cannot_run_because = cannot_run_because
        self.runtime = {
            "runtime_version": 13000,
            "driver_version": 13020,
            "devices": 1,
            "architectures": "80-real 90",
            "error": "",
            **runtime,
        }

    def build_info(self):
        because = self.no_cuda_because
        return {"compiler": "", "openmp": "", "cuda": not because, "no_cuda_because": because}

    def instruction_sets(self):
        return ["baseline"]

    def cuda_runtime(self):
        return self.runtime

    def cuda_cannot_run_because(self, device):
        return self.cannot_run_because


@pytest.fixture
def another_core(monkeypatch):
    """Puts another core, or none, in place of what was built."""

    def forget():
        native._no_cuda_because.cache_clear()
        native.cuda_absent_because.cache_clear()

    def put(core):
        monkeypatch.setattr(native, "core", core)
        monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", core)
        forget()

    yield put
    monkeypatch.undo()
    forget()


def test_what_is_absent_has_a_reason(another_core, monkeypatch):
    another_core(None)
    monkeypatch.setattr(native, "core_absent_because", "it was never built")
    for device, said in tdpo_ext.backends().items():
        assert said == {"compiled": False, "reason": "it was never built"}, device


OLD_DRIVER = {"driver_version": 12020, "devices": 0, "error": "CUDA driver version is insufficient"}


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (OtherCore(no_cuda_because="it was built with TDPO_CUDA=OFF"), "TDPO_CUDA=OFF"),
        (OtherCore(driver_version=0, devices=0, error="..."), "no NVIDIA driver is installed"),
        (OtherCore(**OLD_DRIVER), "driver is too old: it supports CUDA 12.2, .* with CUDA 13.0"),
        (OtherCore(devices=0, error="no device"), r"driver finds no GPU \(no device\)"),
    ],
)
def test_why_cuda_is_absent_in_plain_words(another_core, core, reason):
    another_core(core)
    said = tdpo_ext.backends()["cuda"]
    assert not said["compiled"]
    assert re.search(reason, said["reason"]), said


def test_a_torch_without_cuda_is_named(another_core, monkeypatch):
    another_core(OtherCore())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch was built without CUDA" in tdpo_ext.backends()["cuda"]["reason"]


@pytest.mark.parametrize("cannot", ["", "no kernel image is available"])
def test_each_device_is_served_or_says_why(another_core, monkeypatch, cannot):
    another_core(OtherCore(cannot_run_because=cannot))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    said = tdpo_ext.backends()["cuda"]
    assert (said["compiled"], said["runtime"], said["driver"]) == (True, "13.0", "13.2")
    served = said["devices"]["cuda:0 Tesla V100"]
    if cannot:
        assert "compute capability 7.0, and tdpo_ext was built for ['80-real', '90']" in served
        assert "CUDAARCHS=70" in served
    else:
        assert served == "served"


def test_the_core_says_what_the_cuda_runtime_finds():
    """For real: the statically linked runtime answers with or without a driver."""
    if native.core is None or not native.core.build_info()["cuda"]:
        pytest.skip("built without CUDA kernels")
    runtime = native.core.cuda_runtime()
    assert runtime["runtime_version"] >= 11080
    assert runtime["architectures"] != "unknown"
    assert (runtime["devices"] == 0) == bool(runtime["error"])


def test_a_forced_instruction_set_is_used(on_processor):
    assert tdpo_ext.backends()["cpu"]["instruction_set"] == on_processor


def test_the_fallback_says_so_once(monkeypatch):
    monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", None)
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
