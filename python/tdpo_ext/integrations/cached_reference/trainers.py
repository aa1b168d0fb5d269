"""The cached reference of a trainer: computed over its data sets, added to its batches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from tdpo_ext.integrations.adapters import has_adapters
from tdpo_ext.integrations.cached_reference.batches import CachedReferenceCollator
from tdpo_ext.integrations.cached_reference.precompute import precompute_reference
from tdpo_ext.integrations.cached_reference.reference import CachedReference
from tdpo_ext.integrations.models import is_encoder_decoder
from tdpo_ext.integrations.parameters import has_partitioned


def cache_reference_of_trainer(
    trainer: Any, reference: nn.Module | None, folder: str | Path | None = None
) -> CachedReference:
    """Precompute the reference for a trainer's data sets, and add its states to the batches.

    Args:
        trainer: a ``transformers.Trainer`` after its construction; its ``data_collator`` is
            replaced by a ``CachedReferenceCollator``.
        reference: an attached model on its device, which is not needed afterwards. None: the
            trainer's model is a PEFT policy and its own reference.
        folder: the cache's folder. None: ``_reference_cache`` in the trainer's output folder; it is
            not pushed to a hub.

    Returns:
        The reference to train against.

    Raises:
        ValueError: a data set without a length, a policy that is its own reference and will be
            sharded, and what ``precompute_reference`` raises.
    """
    model = trainer.model if reference is None else reference
    if reference is None:
        _check_whole(trainer)
        model.to(trainer.accelerator.device)
    else:
        model.requires_grad_(False)  # so that its head is kept instead of a copy
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
    trainer.data_collator = CachedReferenceCollator(
        trainer.data_collator, cache, encoder_decoder=is_encoder_decoder(model)
    )
    _release(trainer.accelerator, reference)
    return cached


def separate_reference_of_trl(model: Any, ref_model: Any, args: Any, peft_config: Any) -> Any:
    """The ``ref_model`` to construct TRL's trainer with; a copy of the model to precompute it.

    If TRL's trainer gets none, it loads one from where the model came from. But a precomputed
    reference is the model as it was passed, as with TRL's own precomputing.

    Args:
        model: of the trainer.
        ref_model: of the trainer.
        args: ``TDPOConfig``.
        peft_config: of the trainer.

    Raises:
        ValueError: ``sync_ref_model=True``, with ``precompute_ref_log_probs=True``.
    """
    if not args.precompute_ref_log_probs:
        return ref_model
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model=True changes the reference while training, so it cannot be computed "
            "beforehand; precompute_ref_log_probs must be False then"
        )
    if ref_model is not None or isinstance(model, str):
        return ref_model
    if peft_config is not None or has_adapters(model):
        return None
    return None if has_partitioned(model) else copy.deepcopy(model)


@contextmanager
def without_precomputing(args: Any) -> Iterator[None]:
    """Inside, TRL does not precompute: it would keep one number per sequence, and no KL."""
    asked, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    try:
        yield
    finally:
        args.precompute_ref_log_probs = asked


def _check_whole(trainer: Any) -> None:
    """Raise ValueError if the policy's weights are going to be sharded when training starts."""
    zero = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if getattr(trainer, "is_fsdp_enabled", False) or (zero is not None and zero.zero_stage == 3):
        raise ValueError(
            "the policy is its own reference, and FSDP or ZeRO-3 shards it only when training "
            "starts, so the reference cannot be precomputed; pass a reference model, or leave the "
            "option off: the policy without its adapters costs no memory as a reference"
        )


def _release(accelerator: Any, reference: nn.Module | None) -> None:
    """Let the accelerator forget a model that it has prepared, and would save with its state."""
    prepared = getattr(accelerator, "_models", [])
    prepared[:] = [model for model in prepared if model is not reference]


class _Batches:
    """This process's share of the batches of all data sets of a trainer, in their order.

    Args:
        trainer: the sizes of its batches are TRL's ``precompute_ref_batch_size``, or those of
            training and evaluation.
    """

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
            # A generator of its own: the loader must not change the order of training.
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
