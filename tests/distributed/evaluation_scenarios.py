"""Evaluation is the mean over all pairs, each counted once, on any number of processes.

Against the definition in float64 on the whole data set. Numbers of pairs, batch sizes and processes
that do not divide each other, so that accelerate fills the last batches with repetitions.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from distributed_worker import scenario
from tiny_models import tiny_model
from trainer_checks import SizedStream, Stream, as_text, examples, transformers_trainer, trl_trainer

from tdpo_ext import reference
from tdpo_ext.integrations import transformers as of_transformers

COUNTS, BATCH_SIZES = (1, 2, 5, 7), (1, 2, 4)
BETA = 0.5


def truth(rows: list[dict[str, list[int]]]) -> dict[str, float]:
    batch = of_transformers.PreferenceCollator(0)(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [tiny_model(seed=seed).double()(**inputs).logits for seed in (0, 1)]
    output = reference.tdpo_loss(*logits, batch["labels"], beta=BETA)
    return {name: value.item() for name, value in output.metrics().items()} | {
        "loss": output.loss.item()
    }


def error_of(metrics: dict[str, float], rows: Any, prefix: str = "eval") -> float:
    expected = truth(rows)
    return max(
        abs(metrics[f"{prefix}_{name}"] - value) / max(1, abs(value))
        for name, value in expected.items()
    )


@contextlib.contextmanager
def trainer(make: Any = transformers_trainer, **options: Any) -> Any:
    name = "ref_model" if make is trl_trainer else "reference"
    options = {name: tiny_model(seed=1), "loss": {"beta": BETA}, **options}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        yield make(tiny_model(), folder, **options)


def largest_error(of: Callable[[Any], Any], sizes: Any = BATCH_SIZES, **options: Any) -> float:
    """Over numbers of pairs and batch sizes; ``of`` makes a data set of a list."""
    errors = []
    with trainer(**options) as made:
        for size in sizes:
            made.args.per_device_eval_batch_size = size
            for count in COUNTS:
                rows = examples(count, seed=count)
                errors.append(error_of(made.evaluate(of(rows)), rows))
    return max(errors)


@scenario
def evaluation() -> dict[str, float]:
    return {"loss": largest_error(list)}


@scenario
def evaluation_of_a_stream() -> dict[str, float]:
    return {"loss": max(largest_error(Stream), largest_error(SizedStream, sizes=[2]))}


@scenario
def evaluation_of_a_stream_in_shards() -> dict[str, float]:
    """A stream of ``datasets`` with a shard for each process: no process repeats anything."""
    shards = dist.get_world_size()

    def sharded(rows: Any) -> Any:
        whole = [row for row in rows for _ in range(shards)]  # the same number in each
        return datasets.Dataset.from_list(whole).to_iterable_dataset(num_shards=shards)

    return {"loss": largest_error(sharded)}


@scenario
def evaluation_with_split_batches() -> dict[str, float]:
    sizes = [dist.get_world_size(), 2 * dist.get_world_size()]
    options = {"accelerator_config": {"split_batches": True}, "sizes": sizes}
    return {"loss": max(largest_error(list, **options), largest_error(Stream, **options))}


@scenario
def evaluation_in_trl() -> dict[str, float]:
    sets = {str(count): examples(count, seed=count) for count in COUNTS}
    texts = {name: as_text(rows) for name, rows in sets.items()}
    with trainer(trl_trainer, eval_dataset=texts, per_device_eval_batch_size=2) as made:
        metrics = made.evaluate()
        errors = [error_of(metrics, rows, f"eval_{name}") for name, rows in sets.items()]
    return {"loss": max(errors)}


@scenario
def evaluation_of_a_stream_in_trl() -> dict[str, float]:
    """Where the examples to train on are no stream."""
    rows = examples(5, seed=1)
    options = {"eval_dataset": as_text(rows).to_iterable_dataset(), "per_device_eval_batch_size": 2}
    with trainer(trl_trainer, **options) as made:
        return {"loss": error_of(made.evaluate(), rows)}


@scenario
def prediction() -> dict[str, float]:
    rows = examples(5, seed=1)
    with trainer(per_device_eval_batch_size=2) as made:
        return {"loss": error_of(made.predict(rows).metrics, rows, "test")}


@scenario
def streams_of_workers_are_refused() -> dict[str, float]:
    with (
        trainer(dataloader_num_workers=1) as made,
        pytest.raises(ValueError, match="dataloader_num_workers=0"),
    ):
        made.evaluate(Stream(examples(5)))
    return {"loss": 0.0}
