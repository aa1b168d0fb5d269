"""Hidden states on disk are the ones that were written, or none."""

from __future__ import annotations

import pytest
import torch
from conftest import labels_for
from test_linear import arguments_of

import tdpo_ext
from tdpo_ext.reference_cache import read_reference_cache, write_reference_cache

FINGERPRINT = {"model": "m@1", "tokenizer": "t", "dataset": "d", "dtype": "bfloat16"}


def test_what_is_written_comes_back(tmp_path):
    batches = [torch.randn(2, 3, 8), torch.randn(5, 8, requires_grad=True), torch.randn(0, 8)]
    assert write_reference_cache(tmp_path / "cache", iter(batches), FINGERPRINT) == 11
    hidden = read_reference_cache(tmp_path / "cache", FINGERPRINT)
    wanted = torch.cat([batch.detach().reshape(-1, 8) for batch in batches]).bfloat16()
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(hidden, wanted)


def test_a_loss_from_the_cache_is_the_loss_from_the_model(tmp_path):
    """Exactly, for a model that runs in bfloat16."""
    given = arguments_of(4, 5, dtype=torch.bfloat16)
    labels = labels_for(torch.empty(4, 5, 131), 0.2)
    wanted = tdpo_ext.linear_tdpo_loss(**given, labels=labels)
    write_reference_cache(tmp_path, given["reference_hidden"], FINGERPRINT)
    cached = read_reference_cache(tmp_path, FINGERPRINT).view(4, 5, -1)
    ours = tdpo_ext.linear_tdpo_loss(**{**given, "reference_hidden": cached}, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("key", [*FINGERPRINT, "revision"])
def test_a_cache_of_something_else_is_refused(tmp_path, key):
    write_reference_cache(tmp_path, [torch.randn(3, 8)], FINGERPRINT)
    with pytest.raises(ValueError, match=f"{key}: cached .* asked 'other'"):
        read_reference_cache(tmp_path, {**FINGERPRINT, key: "other"})


def test_no_cache_or_half_a_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="write_reference_cache"):
        read_reference_cache(tmp_path, FINGERPRINT)

    def interrupted():
        yield torch.randn(3, 8)
        raise KeyboardInterrupt

    write_reference_cache(tmp_path, [torch.randn(3, 8)], FINGERPRINT)
    with pytest.raises(KeyboardInterrupt):
        write_reference_cache(tmp_path, interrupted(), FINGERPRINT)
    with pytest.raises(FileNotFoundError):
        read_reference_cache(tmp_path, FINGERPRINT)


def test_data_that_were_cut_are_refused(tmp_path):
    write_reference_cache(tmp_path, [torch.randn(3, 8)], FINGERPRINT)
    path = tmp_path / "hidden.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"46 bytes .* says 48"):
        read_reference_cache(tmp_path, FINGERPRINT)


@pytest.mark.parametrize(
    ("hidden", "fingerprint", "message"),
    [
        ([], FINGERPRINT, "at least one batch"),
        ([torch.zeros(1, 8)], {}, "fingerprint"),
        ([torch.zeros(1, 8), torch.zeros(1, 9)], FINGERPRINT, "8 and 9"),
    ],
)
def test_what_cannot_be_a_cache_is_refused(tmp_path, hidden, fingerprint, message):
    with pytest.raises(ValueError, match=message):
        write_reference_cache(tmp_path, hidden, fingerprint)
