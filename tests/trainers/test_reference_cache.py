"""Hidden states on disk are the ones that were written, found by their tokens, or none."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from head_checks import arguments_of
from inputs import labels_for
from torch import Tensor
from written_cache import FINGERPRINT, IDS, states, write

import tdpo_ext
from tdpo_ext.integrations.reference_cache import (
    ReferenceCache,
    ReferenceCacheWriter,
    sequence_key,
)
from tdpo_ext.integrations.reference_cache import writer as writing
from tdpo_ext.integrations.reference_cache.files import replace_description

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_comes_back_in_its_own_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path / "cache", dtype=dtype)
    cache = ReferenceCache(tmp_path / "cache", FINGERPRINT)
    assert len(cache) == len(IDS)
    assert (cache.width, cache.dtype) == (8, dtype)
    for ids in reversed(IDS):
        read = cache.read([sequence_key(ids)])[0]
        assert read.dtype == dtype
        assert torch.equal(read, states(ids, dtype=dtype))
    assert sequence_key([1]) not in cache
    with pytest.raises(KeyError):
        cache.read([sequence_key([1])])


def test_a_batch_is_padded_where_its_rows_begin(tmp_path: Path) -> None:
    write(tmp_path)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    read = cache.read([sequence_key(IDS[0]), sequence_key(IDS[1])], starts=[2, 0], length=6)
    assert read.shape == (2, 6, 8)
    assert torch.equal(read[0, 2:5], states(IDS[0]))
    assert torch.equal(read[1, :1], states(IDS[1]))
    assert read[0, :2].eq(0).all()
    assert read[0, 5:].eq(0).all()
    assert read[1, 1:].eq(0).all()
    with pytest.raises(ValueError, match="ends at position 5, length is 4"):
        cache.read([sequence_key(IDS[0])], starts=[2], length=4)


def test_a_key_is_of_all_tokens_and_of_both_sides() -> None:
    keys = [
        sequence_key(*sides)
        for sides in ([[1, 2, 3]], [[1, 2]], [[2, 1, 3]], [[1, 2], [3]], [[1], [2, 3]], [[]])
    ]
    assert len({*keys}) == len(keys)
    assert sequence_key(torch.tensor([1, 2, 3])) == keys[0]
    assert sequence_key(torch.tensor([1, 2, 3], dtype=torch.int32)) == keys[0]
    # Fixed for good: caches on disk are found by it.
    assert keys[0].hex() == "4dfd4e51f6116414449b4f5e20e48f99"


def test_sequences_whose_keys_begin_alike_are_told_apart(tmp_path: Path) -> None:
    alike = [b"a" * 8 + bytes([n]) * 8 for n in range(5)]
    with ReferenceCacheWriter(tmp_path, FINGERPRINT) as writer:
        for number, key in enumerate(alike):
            writer.add(key, torch.full((1, 2), float(number)))
        writer.finish()
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert [cache.read([key]).max().item() for key in alike] == [0, 1, 2, 3, 4]
    assert b"a" * 8 + b"b" * 8 not in cache


def test_a_loss_from_the_cache_is_the_loss_from_the_model(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        given = arguments_of(4, 5, dtype=dtype)
        labels = labels_for(torch.empty(4, 5, 131), 0.2)
        wanted = tdpo_ext.linear_tdpo_loss(**given, labels=labels)
        keys = [sequence_key([n]) for n in range(4)]
        folder = tmp_path / str(dtype)
        with ReferenceCacheWriter(folder, FINGERPRINT) as writer:
            for key, row in zip(keys, given["reference_hidden"], strict=True):
                writer.add(key, row)
            writer.finish()
        cached = ReferenceCache(folder, FINGERPRINT).read(keys)
        ours = tdpo_ext.linear_tdpo_loss(**{**given, "reference_hidden": cached}, labels=labels)
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_it_is_read_by_other_processes(tmp_path: Path) -> None:
    write(tmp_path)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    cache.read([sequence_key(IDS[0])])  # with a file open
    assert len(pickle.dumps(cache)) < 1000  # where it is, not what is in it
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copied.read([sequence_key(IDS[3])])[0], states(IDS[3]))


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_what_was_cut_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, seed: int) -> None:
    """As a process that was killed leaves its files, or a machine that lost its last pages."""
    write(tmp_path / "undisturbed")
    write(tmp_path / "cut", finish=False)
    chance = random.Random(seed)
    sizes = []
    for suffix in (".hidden", ".index"):
        path = tmp_path / "cut" / f"part-00000{suffix}"
        sizes.append(chance.randint(0, path.stat().st_size))
        os.truncate(path, sizes[-1])
    with pytest.raises(FileNotFoundError, match="an unfinished reference cache"):
        ReferenceCache(tmp_path / "cut", FINGERPRINT)
    added = []
    with ReferenceCacheWriter(tmp_path / "cut", FINGERPRINT) as writer:
        known = writer.keys()
        for ids in IDS:
            if sequence_key(ids) not in known:
                added.append(ids)
                writer.add(sequence_key(ids), states(ids))
        writer.finish()
    ends = [4 * 8 * sum(len(ids) for ids in IDS[: n + 1]) for n in range(len(IDS))]
    complete = min(sum(end <= sizes[0] for end in ends), sizes[1] // 32)
    assert added == IDS[complete:]  # what was complete is kept
    assert files(tmp_path / "cut") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("suffix", ["hidden", "index"])
def test_what_was_changed_before_the_end_is_written_again(tmp_path: Path, suffix: str) -> None:
    """A machine that died may have kept a record and lost pages of what it is of."""
    write(tmp_path / "undisturbed")
    write(tmp_path / "changed", finish=False)
    path = tmp_path / "changed" / f"part-00000.{suffix}"
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        write(tmp_path / "changed", finish=False)
        assert path.read_bytes() == whole
    write(tmp_path / "changed")
    assert files(tmp_path / "changed") == files(tmp_path / "undisturbed")


KILLED = """
import os, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from written_cache import write as write_cache
from tdpo_ext.integrations.reference_cache import writer
written, limit = 0, int(sys.argv[2])
def write(file, data):
    global written
    for byte in bytes(data):
        if written == limit:
            os._exit(9)
        written += file.write(bytes([byte]))
writer._write = write
write_cache(Path(sys.argv[1]))
"""


def test_a_killed_writer_is_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path / "undisturbed")
    script = KILLED.format(paths=sys.path)
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), "300"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert (tmp_path / "killed" / "part-00000.index").stat().st_size > 32  # and not in vain
    write(tmp_path / "killed")  # its lock died with it
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("which", [0, 1], ids=["hidden", "index"])
def test_a_write_that_fails_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], which: int
) -> None:
    real, calls = writing._write, []

    def fail(file: Any, data: Any) -> None:
        calls.append(file)
        if len(calls) == 3 + which:
            file.write(bytes(data)[:5])
            raise error
        real(file, data)

    monkeypatch.setattr(writing, "_write", fail)
    with ReferenceCacheWriter(tmp_path / "failed", FINGERPRINT) as writer:
        for ids in IDS:
            with contextlib.suppress(error):
                writer.add(sequence_key(ids), states(ids))
        writer.finish()  # by somebody who goes on after it
    cache = ReferenceCache(tmp_path / "failed", FINGERPRINT)
    cache.verify()
    assert [ids for ids in IDS if sequence_key(ids) not in cache] == [IDS[1]]


def test_a_cache_that_grows_stays_readable(tmp_path: Path) -> None:
    write(tmp_path, IDS[:3])
    before = files(tmp_path)
    write(tmp_path, IDS, finish=False)
    assert len(ReferenceCache(tmp_path, FINGERPRINT)) == 3
    assert files(tmp_path)["description.json"] == before["description.json"]
    write(tmp_path, IDS)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert all(torch.equal(cache.read([sequence_key(ids)])[0], states(ids)) for ids in IDS)


def test_opening_a_finished_cache_to_write_reads_none_of_it(tmp_path: Path) -> None:
    """Hundreds of gigabytes: it is checked where it is read."""
    write(tmp_path)
    data = tmp_path / "part-00000.hidden"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with ReferenceCacheWriter(tmp_path, FINGERPRINT) as writer:
        assert len(writer.keys()) == len(IDS)


def test_several_processes_write_and_fewer_go_on(tmp_path: Path) -> None:
    def parts(processes: int, stop: int) -> None:
        of_processes = [
            ReferenceCacheWriter(tmp_path, FINGERPRINT, process=n, processes=processes)
            for n in range(processes)
        ]
        known = of_processes[0].keys()
        for number, ids in enumerate(IDS[:stop]):
            if sequence_key(ids) not in known:
                of_processes[number % processes].add(sequence_key(ids), states(ids))
        for writer in of_processes:
            writer.close()
        if stop == len(IDS):
            of_processes[0].finish()

    parts(3, 4)
    torn = tmp_path / "part-00002.hidden"
    os.truncate(torn, torn.stat().st_size - 1)
    parts(2, len(IDS))
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    cache.verify()
    assert len(cache) == len(IDS)
    assert torn.stat().st_size == 0
    assert all(torch.equal(cache.read([sequence_key(ids)])[0], states(ids)) for ids in IDS)


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    with ReferenceCacheWriter(tmp_path, FINGERPRINT) as writer:
        writer.add(sequence_key([1]), states([1]))
        with pytest.raises(RuntimeError, match=r"another process is writing .*part-00000"):
            ReferenceCacheWriter(tmp_path, FINGERPRINT)
        writer.add(sequence_key([2]), states([2]))
        writer.finish()
    write(tmp_path)
    ReferenceCache(tmp_path, FINGERPRINT).verify()


# --- what is refused ------------------------------------------------------------------------------


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    write(tmp_path)
    for suffix in (".hidden", ".index"):
        path = tmp_path / f"part-00000{suffix}"
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"part-00000.* changed since .*Remove the folder"):
                ReferenceCache(tmp_path, FINGERPRINT).verify()
        path.write_bytes(whole)
    ReferenceCache(tmp_path, FINGERPRINT).verify()


def test_only_what_is_read_is_checked(tmp_path: Path) -> None:
    write(tmp_path)
    data = tmp_path / "part-00000.hidden"
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    cache.read([sequence_key(ids) for ids in IDS[:-1]])
    with pytest.raises(ValueError, match=r"3 tokens from byte 352 on"):
        cache.read([sequence_key(IDS[-1])])


@pytest.mark.parametrize("suffix", ["hidden", "index"])
def test_a_finished_cache_that_was_cut_is_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path)
    path = tmp_path / f"part-00000.{suffix}"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=rf"{path} has {size - 1} bytes.*says {size}"):
        ReferenceCache(tmp_path, FINGERPRINT)
    with pytest.raises(ValueError, match="shorter than the finished cache"):
        ReferenceCacheWriter(tmp_path, FINGERPRINT)
    path.unlink()
    with pytest.raises(ValueError, match="has 0 bytes"):
        ReferenceCache(tmp_path, FINGERPRINT)


def test_a_file_that_is_cut_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    write(tmp_path)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    cache.read([sequence_key(IDS[0])])
    os.truncate(tmp_path / "part-00000.hidden", 100)
    with pytest.raises(ValueError, match="ends before byte 352: it was cut while"):
        cache.read([sequence_key(IDS[3])])


@pytest.mark.parametrize("key", [*FINGERPRINT, "revision"])
@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("opened", [ReferenceCache, ReferenceCacheWriter])
def test_a_cache_of_something_else_is_refused(
    tmp_path: Path, key: str, finish: bool, opened: Any
) -> None:
    write(tmp_path, finish=finish)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=rf"of something else \({key}: cached .* asked 'other'\)"):
        opened(tmp_path, {**FINGERPRINT, key: "other"})
    assert files(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "other"}', "\0\xff"])
@pytest.mark.parametrize("opened", [ReferenceCache, ReferenceCacheWriter])
def test_a_foreign_description_is_refused(tmp_path: Path, text: str, opened: Any) -> None:
    (tmp_path / "description.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"description.json describes no reference cache"):
        opened(tmp_path, FINGERPRINT)
    assert [*files(tmp_path)] == ["description.json"]


def test_files_without_a_description_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "description.json").unlink()
    with pytest.raises(FileNotFoundError, match="no reference cache"):
        ReferenceCache(tmp_path, FINGERPRINT)
    with pytest.raises(ValueError, match=r"but no description.json beside it"):
        ReferenceCacheWriter(tmp_path, FINGERPRINT)


def test_nothing_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no reference cache"):
        ReferenceCache(tmp_path, FINGERPRINT)
    with (
        pytest.raises(ValueError, match="at least one sequence"),
        ReferenceCacheWriter(tmp_path, FINGERPRINT) as writer,
    ):
        writer.finish()
    assert files(tmp_path) == {}
    with pytest.raises(ValueError, match="fingerprint"):
        ReferenceCacheWriter(tmp_path, {})


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.zeros(2, 9), r"\(8, 'float32'\), got \(9, 'float32'\)"),
        (torch.zeros(2, 8).half(), r"\(8, 'float32'\), got \(8, 'float16'\)"),
        (torch.zeros(1, 2, 8), r"\[tokens, H\], got \(1, 2, 8\)"),
    ],
)
def test_states_of_another_kind_are_refused(tmp_path: Path, hidden: Tensor, message: str) -> None:
    with ReferenceCacheWriter(tmp_path, FINGERPRINT) as writer:
        writer.add(sequence_key([1]), states([1]))
        with pytest.raises(ValueError, match=message):
            writer.add(sequence_key([2, 3]), hidden)
        writer.finish()
    assert len(ReferenceCache(tmp_path, FINGERPRINT)) == 1


def test_the_description_is_replaced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, IDS[:2])
    before = files(tmp_path)["description.json"]

    def fail(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    writer = ReferenceCacheWriter(tmp_path, FINGERPRINT)
    with pytest.raises(OSError, match="no space"):
        replace_description(tmp_path, {"a": "b"})
    with pytest.raises(OSError, match="no space"):
        writer.close()
    assert [*files(tmp_path)] == ["description.json", "part-00000.hidden", "part-00000.index"]
    assert files(tmp_path)["description.json"] == before
    assert json.loads(before)["finished"]
