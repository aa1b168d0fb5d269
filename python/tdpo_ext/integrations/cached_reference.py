"""A reference that runs once: its hidden states are kept on disk, its head in memory.

    attach_tdpo(reference)
    cache, cached = precompute_reference(reference, loader, folder)
    collate = CachedReferenceCollator(collate, cache)        # batches with reference_hidden
    targets = TDPOTargets(cached.with_hidden(batch["reference_hidden"]), batch["labels"])

The trainers do this themselves: ``TDPOConfig(precompute_ref_log_probs=True)`` with TRL,
``precompute_reference=folder`` with transformers.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tdpo_ext.integrations.attach import HEAD_INPUTS
from tdpo_ext.integrations.hidden import (
    HeadInputs,
    decoder_inputs,
    evaluating,
    head_of,
    language_model,
    weight_and_bias,
)
from tdpo_ext.integrations.probe import logit_options_of
from tdpo_ext.integrations.reference_cache import ReferenceCache, ReferenceCacheWriter, sequence_key
from tdpo_ext.integrations.steps import ReferenceAdapter, text_config, unwrapped

__all__ = [
    "CachedReference",
    "CachedReferenceCollator",
    "cache_reference_of_trainer",
    "precompute_reference",
    "reference_fingerprint",
]


@dataclass(frozen=True)
class CachedReference:
    """A reference whose hidden states come with the batches; its head, which stays in memory."""

    head: HeadInputs
    """All that the reference's logits are made of but for the hidden states."""

    @classmethod
    def of(cls, model: nn.Module) -> CachedReference:
        """With the model's head as it is now."""
        weight, bias = weight_and_bias(head_of(model))
        return cls.with_head_of(HeadInputs(weight[:0], weight, bias, logit_options_of(model)))

    @classmethod
    def with_head_of(cls, inputs: HeadInputs) -> CachedReference:
        """With the head of what a reference gave for ``HEAD_INPUTS``. A weight that is trained is
        copied, as it is now."""
        bias = None if inputs.bias is None else _constant(inputs.bias)
        hidden = inputs.hidden.new_empty(0, inputs.hidden.shape[-1])
        return cls(inputs.replace(hidden=hidden, weight=_constant(inputs.weight), bias=bias))

    def to(self, device: torch.device) -> CachedReference:
        return CachedReference(self.head.to(device))

    def with_hidden(self, hidden: Tensor | None) -> HeadInputs:
        """What the reference itself would have given for ``HEAD_INPUTS``.

        Args:
            hidden: ``[..., H]``, ``reference_hidden`` of a batch.
        """
        if hidden is None:
            raise ValueError(
                "the reference is cached, but the batch has no reference_hidden; wrap the collator "
                "in CachedReferenceCollator, or give PreferenceCollator examples with "
                "chosen_hidden and rejected_hidden"
            )
        return self.head.to(hidden.device).replace(hidden=hidden)


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.requires_grad else tensor.detach()


# --- batches --------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A sequence of a batch, without its padding."""

    key: bytes
    start: int
    """The first position that has hidden states."""
    tokens: int


def _rows(batch: Mapping[str, Any], encoder_decoder: bool) -> list[_Row]:
    """The sequences of a batch, and where their hidden states are or belong."""
    _check_batch(batch, encoder_decoder)
    ids, spans = batch["input_ids"], _spans(batch["attention_mask"] != 0, "attention_mask")
    sides = [[row[start:end] for row, (start, end) in zip(ids, spans, strict=True)]]
    if encoder_decoder:  # the hidden states are the decoder's, one for each label
        labels = batch["labels"]
        spans = _spans(labels != -100, "labels")
        sides.append([row[start:end] for row, (start, end) in zip(labels, spans, strict=True)])
    keys = [sequence_key(*of_row) for of_row in zip(*sides, strict=True)]
    return [_Row(key, a, b - a) for key, (a, b) in zip(keys, spans, strict=True)]


def _spans(mask: Tensor, name: str) -> list[tuple[int, int]]:
    """First position that is on, and the one after the last, of each row."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, positions, mask.shape[1]).amin(1)
    end = torch.where(mask, positions + 1, 0).amax(1)
    first = torch.minimum(first, end)
    if not torch.equal(end - first, mask.sum(1)):
        raise ValueError(
            f"{name} has gaps inside a row; the cached reference takes rows that are padded on the "
            "left or on the right"
        )
    return [*zip(first.tolist(), end.tolist(), strict=True)]


_READ = {"input_ids", "attention_mask", "labels", "completion_mask", "decoder_input_ids"}


def _check_batch(batch: Mapping[str, Any], encoder_decoder: bool) -> None:
    wanted = {"input_ids", "attention_mask", *(["labels"] if encoder_decoder else [])}
    if missing := sorted(wanted - {*batch}):
        raise ValueError(f"the cached reference needs batches with {missing}, got {[*batch]}")
    if others := sorted({*batch} - _READ - {"reference_hidden"}):
        raise ValueError(
            f"batches have {others}, but a cached reference finds hidden states by the tokens "
            "alone, which do not determine them if the model takes more (images, token types, "
            "positions); use a reference that is not cached"
        )


class CachedReferenceCollator:
    """Another collator's batches with ``reference_hidden`` ``[2B, T, H]`` from a cache.

    It runs where the other runs, in a worker of the data loader too, reads the rows of the batch
    from disk, and leaves padding 0. Called with a sequence that is not in the cache it raises
    ValueError.

    Args:
        collator: gives ``input_ids`` and ``attention_mask`` ``[2B, T]``, padded on the left or on
            the right; for an encoder-decoder ``labels`` as well. ``PreferenceCollator``, TRL's
            ``DataCollatorForPreference`` ...
        cache: of the reference.
        encoder_decoder: whether the reference is one.
    """

    def __init__(
        self,
        collator: Callable[[Any], Any],
        cache: ReferenceCache,
        *,
        encoder_decoder: bool = False,
    ) -> None:
        self.collator = collator
        self.cache = cache
        self.encoder_decoder = encoder_decoder

    def __call__(self, examples: Any) -> Any:
        batch = self.collator(examples)
        rows = _rows(batch, self.encoder_decoder)
        for number, row in enumerate(rows):
            if row.key not in self.cache:
                raise ValueError(
                    f"row {number} of a batch, a sequence of {row.tokens} tokens, is not among the "
                    f"{len(self.cache)} of the reference cache in {self.cache.folder}. A data set "
                    "must be given to the trainer at construction, and truncation and chat "
                    "template must be what they were then; or run precompute_reference over it"
                )
        batch["reference_hidden"] = self.cache.read(
            [row.key for row in rows],
            starts=[row.start for row in rows],
            length=batch["labels" if self.encoder_decoder else "input_ids"].shape[1],
        )
        return batch


# --- computing it ---------------------------------------------------------------------------------


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
    run = _Run(reference, of_policy, accelerator)
    of_cache = {**reference_fingerprint(run.model, of_policy=of_policy, accelerator=accelerator)}
    of_cache.update(fingerprint or {})
    first_batch, batches = None, []
    for batch in loader:
        first_batch = batch if first_batch is None else first_batch
        batches.append(_rows(batch, run.encoder_decoder))
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


class _Run:
    """A reference and the processes that share it."""

    def __init__(self, model: nn.Module, of_policy: bool, accelerator: Any) -> None:
        self.model, self.of_policy, self.accelerator = model, of_policy, accelerator
        self.inner = language_model(unwrapped(model))
        self.encoder_decoder = bool(self.inner.config.is_encoder_decoder)
        self.device = self.inner.device if accelerator is None else accelerator.device
        self.process = 0 if accelerator is None else accelerator.process_index
        self.processes = 1 if accelerator is None else accelerator.num_processes

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> HeadInputs:
        """What the head takes for a batch, as a step of training would ask the reference."""
        ids, mask = (batch[name].to(self.device) for name in ("input_ids", "attention_mask"))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.encoder_decoder:
            labels = batch["labels"].to(self.device)
            inputs["decoder_input_ids"] = decoder_inputs(self.inner, labels)
        if hasattr(text_config(self.model), "output_router_logits"):
            inputs["output_router_logits"] = False
        adapter = ReferenceAdapter(unwrapped(self.model)) if self.of_policy else nullcontext()
        with _autocast(self.accelerator), evaluating(self.model), adapter:
            result = self.model(**inputs, tdpo=HEAD_INPUTS)
        torch.clear_autocast_cache()  # of casts made without gradients, under a caller's autocast
        assert isinstance(result, HeadInputs)
        shape = (inputs["decoder_input_ids"] if self.encoder_decoder else ids).shape
        if result.hidden.shape[:2] != shape:
            raise ValueError(
                f"the reference has hidden states {[*result.hidden.shape]} for tokens {[*shape]} "
                "(virtual tokens of prompt tuning?); use a reference that is not cached"
            )
        return result

    def check_padding(self, batch: Mapping[str, Any], rows: Sequence[_Row], hidden: Tensor) -> None:
        """Raise ValueError unless the batch's shortest sequence has the same states by itself."""
        number = min(range(len(rows)), key=lambda n: rows[n].tokens or batch["input_ids"].numel())
        row, each = rows[number], slice(number, number + 1)
        on = batch["attention_mask"][number] != 0
        alone = {name: batch[name][each, on] for name in ("input_ids", "attention_mask")}
        if self.encoder_decoder:
            alone["labels"] = batch["labels"][each, batch["labels"][number] != -100]
        wanted = self(alone).hidden[0].float()
        padded = hidden[number, row.start : row.start + row.tokens].float()
        error = ((padded - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()
        if not error <= _ROUNDING:
            raise ValueError(
                "the reference's hidden states of a sequence depend on its padding: beside longer "
                f"ones half of its tokens differ by {error:.1g} or more from those it has alone "
                "(absolute positions and rows padded on the left?), so they cannot be kept by "
                "tokens; pad on the right, or use a reference that is not cached"
            )

    def _of_all(self, number: int) -> Tensor:
        given = torch.tensor([number], device=self.device)
        gathered: Tensor = given if self.accelerator is None else self.accelerator.gather(given)
        return gathered

    def sum(self, number: int) -> int:
        return int(self._of_all(number).sum())

    def max(self, number: int) -> int:
        return int(self._of_all(number).max())

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


_ROUNDING = 0.05
"""bfloat16 through many layers stays below; another position is far above."""


def _autocast(accelerator: Any) -> Any:
    return nullcontext() if accelerator is None else accelerator.autocast()


def _write_missing(
    writer: ReferenceCacheWriter,
    run: _Run,
    loader: Iterable[Mapping[str, Any]],
    batches: Sequence[Sequence[_Row]],
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
            for row, of_row in zip(_rows(batch, run.encoder_decoder), hidden, strict=True):
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
    folder: Path, run: _Run, missing: Mapping[bytes, int], written: int, hidden: Tensor
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


# --- what it is of --------------------------------------------------------------------------------


def reference_fingerprint(
    model: nn.Module, *, of_policy: bool = False, accelerator: Any = None
) -> dict[str, str]:
    """All that a reference's hidden states depend on beside the tokens, as strings.

    Parameters enter by the exact sum of their bits and 64 of their values each: two checkpoints do
    not share that, it is the same on every device, and costs one reading of the parameters where
    they are. Arguments as those of ``precompute_reference``.
    """
    inner = language_model(unwrapped(model))
    with _autocast(accelerator):
        kind = inner.device.type if accelerator is None else accelerator.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "off"
    tensors = [*_tensors(unwrapped(model), of_policy)]
    values = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        values.update(_summary(tensor).encode())
    config = json.dumps(_lasting(inner.config.to_dict()), sort_keys=True, default=str)
    return {
        "model": type(inner).__name__,
        "config": hashlib.blake2b(config.encode(), digest_size=16).hexdigest(),
        "parameters": values.hexdigest(),
        "dtype": ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors})),
        "autocast": str(autocast).removeprefix("torch."),
        "attention": str(getattr(inner.config, "_attn_implementation", None)),
        "transformers": transformers.__version__,
    }


def _lasting(config: Any) -> Any:
    """A config without what hidden states do not depend on."""
    if not isinstance(config, dict):
        return config
    return {key: _lasting(x) for key, x in config.items() if key not in _FLEETING}


_FLEETING = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "output_router_logits",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def _tensors(model: nn.Module, of_policy: bool) -> Iterator[Tensor]:
    """Parameters and buffers that are saved with the model; of a PEFT policy, those that its
    reference uses."""
    idle = _idle_adapters(model) if of_policy else set[int]()
    seen = set(idle)
    for module in model.modules():
        unsaved = module._non_persistent_buffers_set
        saved = [buffer for name, buffer in module._buffers.items() if name not in unsaved]
        for tensor in (*module._parameters.values(), *saved):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _idle_adapters(model: Any) -> set[int]:
    """The ``id`` of what belongs to adapters, but for the adapter "ref"."""
    adapters, idle = {*model.peft_config}, set[int]()
    for module in model.modules():
        # PEFT keeps an adapter's tensors in dictionaries whose keys are names of adapters.
        children = {**module._modules, **module._parameters, **module._buffers}
        if not isinstance(module, _DICTIONARIES) or not children.keys() <= adapters:
            continue
        for name, child in children.items():
            if name != "ref" and isinstance(child, nn.Module):
                idle.update(id(x) for x in (*child.parameters(), *child.buffers()))
            elif name != "ref":
                idle.add(id(child))
    return idle


_DICTIONARIES = (nn.ModuleDict, nn.ParameterDict)


@torch.no_grad()
def _summary(tensor: Tensor) -> str:
    with _gathered(tensor) as whole:
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = whole.detach().contiguous().view(integer[whole.element_size()]).flatten()
        some = bits[:: max(1, bits.numel() // 64)]
        return f"{whole.dtype} {[*whole.shape]} {bits.sum(dtype=torch.int64)} {some.tolist()};"


@contextmanager
def _gathered(tensor: Any) -> Iterator[Tensor]:
    """All of a parameter that FSDP2 or ZeRO-3 has sharded."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# --- in trainers ----------------------------------------------------------------------------------


def cache_reference_of_trainer(
    trainer: Any, reference: nn.Module | None, folder: str | Path | None = None
) -> CachedReference:
    """Precompute the reference for all data sets of a trainer, and let its batches have the states.

    Args:
        trainer: a ``transformers.Trainer`` after its construction; its ``data_collator`` is
            replaced by a ``CachedReferenceCollator``.
        reference: attached and on its device. None: the trainer's model is a PEFT policy, and its
            own reference. The trainer can let go of it afterwards.
        folder: of the cache; None: ``_reference_cache`` in the trainer's output folder, which is
            not pushed to a hub.

    Returns:
        The reference to train against.

    Raises:
        ValueError: a data set without a length, a policy that is not whole as yet, and what
            ``precompute_reference`` raises.
    """
    model = trainer.model if reference is None else reference
    if reference is None:
        _check_whole(trainer)
        model.to(trainer.accelerator.device)
    else:
        model.requires_grad_(False)  # so that its head is kept, and not a copy
    if folder is None:
        folder = Path(trainer.args.output_dir) / "_reference_cache"
    cache, cached = precompute_reference(
        model,
        _Batches(trainer),
        folder,
        of_policy=reference is None,
        accelerator=trainer.accelerator,
        progress=not trainer.args.disable_tqdm,
    )
    encoder_decoder = bool(language_model(unwrapped(model)).config.is_encoder_decoder)
    trainer.data_collator = CachedReferenceCollator(
        trainer.data_collator, cache, encoder_decoder=encoder_decoder
    )
    _release(trainer.accelerator, reference)
    return cached


def separate_reference_of_trl(model: Any, ref_model: Any, args: Any, peft_config: Any) -> Any:
    """The reference with which TRL is to be constructed, if it shall be precomputed.

    Without one TRL loads it once more from where the model came from; but the reference is the
    model as it was given, as with TRL's own precomputing.
    """
    if not args.precompute_ref_log_probs:
        return ref_model
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model=True changes the reference while training; precompute_ref_log_probs "
            "must be False then"
        )
    adapters = peft_config is not None or hasattr(model, "peft_config")
    if ref_model is not None or isinstance(model, str) or adapters:
        return ref_model
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return None if partitioned else copy.deepcopy(model)


@contextmanager
def without_precomputing(args: Any) -> Iterator[None]:
    """TRL's own would keep one number per sequence, which no KL can be made of."""
    asked, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    try:
        yield
    finally:
        args.precompute_ref_log_probs = asked


def _check_whole(trainer: Any) -> None:
    zero = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if getattr(trainer, "is_fsdp_enabled", False) or (zero is not None and zero.zero_stage == 3):
        raise ValueError(
            "the policy is its own reference, and FSDP or ZeRO-3 shards it only when training "
            "starts, so the reference cannot be precomputed; pass a reference model, or leave the "
            "option off: without adapters the policy costs no memory as a reference"
        )


def _release(accelerator: Any, reference: nn.Module | None) -> None:
    """What the accelerator has prepared it would keep, and save with its state."""
    prepared = getattr(accelerator, "_models", [])
    prepared[:] = [model for model in prepared if model is not reference]


class _Batches:
    """This process's share of the batches of all data sets of a trainer, in their order."""

    def __init__(self, trainer: Any) -> None:
        args, accelerator = trainer.args, trainer.accelerator
        of_trl = getattr(args, "precompute_ref_batch_size", None)
        evaluated = trainer.eval_dataset
        sets = [(trainer.train_dataset, of_trl or args.per_device_train_batch_size)]
        for each in evaluated.values() if isinstance(evaluated, dict) else [evaluated]:
            sets.append((each, of_trl or args.per_device_eval_batch_size))
        sets = [(data_set, size) for data_set, size in sets if data_set is not None]
        numbered = [
            (data_set, range(start, min(start + size, _length(data_set))))
            for data_set, size in sets
            for start in range(0, _length(data_set), size)
        ]
        process, processes = accelerator.process_index, accelerator.num_processes
        self.own = numbered[process::processes] or numbered[:1]
        self.options = {
            "collate_fn": trainer.data_collator,
            "num_workers": args.dataloader_num_workers,
        }

    def __iter__(self) -> Iterator[Any]:
        for _, group in itertools.groupby(self.own, key=lambda pair: id(pair[0])):
            pairs = [*group]
            indices = [[*indices] for _, indices in pairs]
            # With a generator of its own the loader leaves the order of training as it is.
            yield from DataLoader(
                pairs[0][0], batch_sampler=indices, generator=torch.Generator(), **self.options
            )


def _length(data_set: Any) -> int:
    if not hasattr(data_set, "__len__"):
        raise ValueError(
            f"the reference cannot be precomputed for a data set without a length "
            f"({type(data_set).__name__}); give one with a length, or leave the option off"
        )
    return len(data_set)
