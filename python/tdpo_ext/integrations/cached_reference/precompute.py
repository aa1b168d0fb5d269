"""Write the hidden states of the sequences that a cache does not hold yet."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from tdpo_ext.integrations.cached_reference.batches import Row, rows_of
from tdpo_ext.integrations.cached_reference.fingerprint import reference_fingerprint
from tdpo_ext.integrations.cached_reference.reference import CachedReference
from tdpo_ext.integrations.cached_reference.run import ReferenceRun
from tdpo_ext.integrations.models import dtype_name
from tdpo_ext.integrations.reference_cache.reader import ReferenceCache
from tdpo_ext.integrations.reference_cache.writer import ReferenceCacheWriter


def precompute_reference(
    reference: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    of_policy: bool = False,
    fingerprint: Mapping[str, str] | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> tuple[ReferenceCache, CachedReference]:
    """Write the reference's hidden states of all sequences that the cache does not hold yet.

    The reference runs in evaluation mode under the accelerator's autocast, on the batches as they
    come. An interrupted run goes on with the first batch that is not complete, and ends with the
    same bytes. Before it starts, it prints how much it will write.

    Args:
        reference: a model after ``attach_tdpo``.
        loader: batches ``[2B, T]`` of a collator. It is iterated over twice and must give the same
            batches (no shuffling). Each process has a part of its own with at least one batch.
        folder: a folder that all processes see.
        of_policy: ``reference`` is a PEFT policy; its reference is its adapter "ref" or, without
            one, the model without adapters.
        fingerprint: strings for whatever else the states depend on, beside
            ``reference_fingerprint``.
        accelerator: an ``Accelerator``, for its device, precision and processes. None: one process,
            the model's device, the autocast in force.
        progress: show a progress bar.

    Returns:
        The cache with all that is on disk, and the reference's head.

    Raises:
        ValueError: batches whose tokens do not determine the states, a reference whose states
            depend on padding, a loader that shuffles, or a cache of another reference.
        OSError: the disk has no room for what is missing.
        RuntimeError: another process is writing the same part of the cache.
    """
    run = ReferenceRun(reference, of_policy, accelerator)
    of_cache = {**reference_fingerprint(run.model, of_policy=of_policy, accelerator=accelerator)}
    of_cache.update(fingerprint or {})
    first_batch, padded_batch, batches = None, None, []
    for batch in loader:
        first_batch = batch if first_batch is None else first_batch
        batches.append(rows_of(batch, run.encoder_decoder))
        if padded_batch is None and bool((batch["attention_mask"] == 0).any()):
            padded_batch = batch
    if first_batch is None:
        raise ValueError(
            "loader gave no batch, but each process needs at least one; take more examples or "
            "fewer processes"
        )
    first = run(first_batch)
    checked = first_batch if padded_batch is None else padded_batch
    # A sharded model runs on all processes together, so all of them run once more, or none does.
    again = run.sum(checked is not first_batch) > 0
    states = run(checked).hidden if again else first.hidden
    run.check_padding(checked, rows_of(checked, run.encoder_decoder), states)
    try:
        cache = ReferenceCache(folder, of_cache)
        missing = sum(row.key not in cache for rows in batches for row in rows)
    except FileNotFoundError:
        missing = len(batches)
    if run.sum(missing):
        process = {"process": run.process, "processes": run.processes}
        with ReferenceCacheWriter(folder, of_cache, **process) as writer:
            run.wait()  # until all processes have cut off half-written records
            _write_missing(writer, run, loader, batches, first_batch, first.hidden, progress)
        run.wait()
        if run.process == 0:
            writer.finish()
        run.wait()
        cache = ReferenceCache(folder, of_cache)
    return cache, CachedReference.with_head_of(first)


def _write_missing(
    writer: ReferenceCacheWriter,
    run: ReferenceRun,
    loader: Iterable[Mapping[str, Any]],
    batches: Sequence[Sequence[Row]],
    first_batch: Mapping[str, Any],
    hidden: Tensor,
    progress: bool,
) -> None:
    """Run the batches that hold a missing sequence, and write the missing ones.

    Args:
        writer: of this process.
        run: the reference.
        loader: iterated over for the second time.
        batches: the sequences of all its batches, from the first time.
        first_batch: its first batch.
        hidden: the reference's hidden states of that batch, for their size and dtype.
        progress: show a progress bar.
    """
    written = writer.keys()
    missing = {row.key: row.tokens for rows in batches for row in rows if row.key not in written}
    _tell_size(writer.folder, run, missing, len(written), hidden)
    todo = {number for number, rows in enumerate(batches) if any(x.key in missing for x in rows)}
    bar = tqdm(
        total=run.max(len(todo)),
        desc="Computing the reference's hidden states",
        unit="batch",
        disable=not progress or run.process != 0,
    )
    with bar:
        for number, batch in enumerate(loader):
            if number not in todo:
                continue
            hidden = run(batch).hidden.cpu()
            for row, of_row in zip(rows_of(batch, run.encoder_decoder), hidden, strict=True):
                if missing.pop(row.key, None) is not None:
                    writer.add(row.key, of_row[row.start : row.start + row.tokens])
            bar.update()
        for _ in range(len(todo), bar.total):  # a sharded model runs on all processes together
            run(first_batch)
            bar.update()
    if missing:
        raise ValueError(
            f"{len(missing)} sequences did not come again when loader was iterated over a second "
            "time; it must give the same batches each time, without shuffling"
        )


def _tell_size(
    folder: Path, run: ReferenceRun, missing: Mapping[bytes, int], written: int, hidden: Tensor
) -> None:
    """Print how much is going to be written; raise OSError if the disk has less room."""
    sequences, tokens = run.sum(len(missing)), run.sum(sum(missing.values()))
    size = tokens * hidden.shape[-1] * hidden.element_size()
    dtype = dtype_name(hidden.dtype)
    free = shutil.disk_usage(folder).free
    what = (
        f"reference cache in {folder}: {written} sequences are there, {sequences} are missing; "
        f"{tokens} tokens x {hidden.shape[-1]} x {dtype} = {_readable(size)}"
    )
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"{what}, but only {_readable(free)} are free; make room, or take another folder",
        )
    if run.process == 0:
        tqdm.write(f"{what} ({_readable(free)} are free)", file=sys.stderr)


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
