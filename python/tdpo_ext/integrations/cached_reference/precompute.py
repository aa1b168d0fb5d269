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
    """Write the reference's hidden states of all sequences that are not in the cache yet.

    The reference runs in evaluation mode under the accelerator's autocast, on the batches as they
    are given: a run that was interrupted goes on with the first batch that is not complete, and
    ends with the same bytes. How much it will write is said before it starts.

    Args:
        reference: a model after ``attach_tdpo``.
        loader: batches ``[2B, T]`` of a collator, the same ones each time it is iterated over (no
            shuffling), which is twice. Of several processes each has its own part, and at least
            one batch.
        folder: one that all processes see.
        of_policy: the model is a PEFT policy; its reference is its adapter "ref" or, without one,
            the model without adapters.
        fingerprint: what the states depend on beside ``reference_fingerprint``, as strings.
        accelerator: of Accelerate, for its device, precision and processes; None: one process, the
            model's device, the autocast in force.
        progress: show a progress bar.

    Returns:
        The cache of all that is on disk, and the reference's head.

    Raises:
        ValueError: batches whose tokens do not determine the states, a reference whose states
            depend on padding, a loader that shuffles, a cache of something else.
        OSError: the disk has no room for what is missing.
        RuntimeError: others are writing the same cache.
    """
    run = ReferenceRun(reference, of_policy, accelerator)
    of_cache = {**reference_fingerprint(run.model, of_policy=of_policy, accelerator=accelerator)}
    of_cache.update(fingerprint or {})
    first_batch, batches = None, []
    for batch in loader:
        first_batch = batch if first_batch is None else first_batch
        batches.append(rows_of(batch, run.encoder_decoder))
    if first_batch is None:
        raise ValueError("loader gave no batch; each process needs at least one")
    first = run(first_batch)
    run.check_padding(first_batch, batches[0], first.hidden)
    try:
        cache = ReferenceCache(folder, of_cache)
        missing = sum(row.key not in cache for rows in batches for row in rows)
    except FileNotFoundError:
        missing = len(batches)
    if run.sum(missing):
        process = {"process": run.process, "processes": run.processes}
        with ReferenceCacheWriter(folder, of_cache, **process) as writer:
            run.wait()  # until all have cut off what was half written
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
        for _ in range(len(todo), bar.total):  # a sharded model needs all processes to run
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
    sequences, tokens = run.sum(len(missing)), run.sum(sum(missing.values()))
    size = tokens * hidden.shape[-1] * hidden.element_size()
    dtype = str(hidden.dtype).removeprefix("torch.")
    free = shutil.disk_usage(folder).free
    what = (
        f"reference cache in {folder}: {written} sequences are there, {sequences} are missing; "
        f"{tokens} tokens x {hidden.shape[-1]} x {dtype} = {_readable(size)}"
    )
    if size > free:
        raise OSError(errno.ENOSPC, f"{what}, but only {_readable(free)} are free")
    if run.process == 0:
        tqdm.write(f"{what} ({_readable(free)} are free)", file=sys.stderr)


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
