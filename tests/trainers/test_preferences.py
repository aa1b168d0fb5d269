"""Batches that are refused where something cut them, and data sets without empty pairs."""

from __future__ import annotations

import copy
import math
import pickle
import types
import warnings
from typing import Any

import accelerate
import accelerate.data_loader
import datasets
import pytest
import torch
from accelerate.utils import DataLoaderConfiguration, operations
from tiny_models import tiny_model
from trainer_checks import Stream, examples, transformers_trainer

from tdpo_ext.integrations.preferences import PreferenceBatch, PreferenceCollator


def batch_of(count: int = 4, **options: Any) -> PreferenceBatch:
    return PreferenceCollator(0, **options)(examples(count))


# --- a dictionary, everywhere ---------------------------------------------------------------------


def test_a_batch_is_a_dictionary_that_others_can_rebuild() -> None:
    batch = batch_of()
    assert [*batch] == ["input_ids", "attention_mask", "labels"]
    assert (lambda **given: given)(**batch).keys() == batch.keys()
    again = [
        operations.send_to_device(batch, "cpu"),
        operations.recursively_apply(torch.clone, batch),
        operations.slice_tensors(batch, slice(0, 8)),
        copy.copy(batch),
        copy.deepcopy(batch),
        pickle.loads(pickle.dumps(batch)),
        batch | {},
        type(batch)((name, tensor) for name, tensor in batch.items()),
    ]
    for each in again:
        assert [*each] == [*batch]
        assert all(torch.equal(each[name], batch[name]) for name in batch)
    described = operations.get_data_structure(batch)  # of no tensors
    assert isinstance(described["input_ids"], operations.TensorInformation)
    assert operations.find_batch_size(batch) == 8
    shapes = {
        name: tensor.shape for name, tensor in operations.initialize_tensors(described).items()
    }
    assert shapes == {name: tensor.shape for name, tensor in batch.items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_comes_through_a_dataloader(workers: int) -> None:
    loader = torch.utils.data.DataLoader(
        examples(5), batch_size=2, collate_fn=PreferenceCollator(0), num_workers=workers
    )
    assert [len(batch["labels"]) for batch in loader] == [4, 4, 2]


# --- cut ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 8), slice(0, 2), slice(1, 7)])
def test_a_part_of_a_batch_is_refused(rows: slice) -> None:
    """Also where all prompts are the same, and on whatever device."""
    row = {"prompt_ids": [3], "chosen_ids": [4, 2], "rejected_ids": [5, 2]}
    batch = PreferenceCollator(0)([row] * 4)
    with pytest.raises(ValueError, match=r"are a part of 8.*dispatch_batches=False"):
        operations.slice_tensors(batch, rows)
    on_meta = PreferenceBatch({name: tensor.to("meta") for name, tensor in batch.items()})
    with pytest.raises(ValueError, match="are a part of 8"):
        operations.slice_tensors(on_meta, rows)


def test_rows_that_cannot_be_pairs_are_refused() -> None:
    batch = batch_of()
    with pytest.raises(ValueError, match="it has 3 rows"):
        PreferenceBatch({name: tensor[:3].clone() for name, tensor in batch.items()})
    with pytest.raises(ValueError, match="prompts of rows 0 and 2 are different"):
        PreferenceBatch({name: tensor[:4].clone() for name, tensor in batch.items()})
    order = torch.arange(8).view(2, 4).T.flatten()  # chosen, rejected, chosen, rejected, ...
    with pytest.raises(ValueError, match="prompts of rows 0 and 4 are different"):
        PreferenceBatch({name: tensor[order] for name, tensor in batch.items()})
    two = [
        {name: torch.nn.functional.pad(tensor, (0, 9))[:, :9] for name, tensor in each.items()}
        for each in (batch_of(2), PreferenceCollator(0)(examples(2, seed=1)))
    ]
    with pytest.raises(ValueError, match="prompts of rows 0 and 4 are different"):
        operations.concatenate([PreferenceBatch(each) for each in two])


@pytest.mark.parametrize(
    "options",
    [{}, {"max_length": 4}, {"max_length": 4, "truncation_mode": "keep_end"}, {"max_length": 1}],
)
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_whatever_the_collator_makes_is_whole(options: Any, encoder_decoder: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = batch_of(11, encoder_decoder=encoder_decoder, pad_to_multiple_of=4, **options)
    assert len(PreferenceBatch({name: tensor.clone() for name, tensor in batch.items()})) == 3


def test_more_may_be_masked_in_a_plain_dictionary() -> None:
    batch = batch_of(1)
    scored = (batch["labels"][1] != -100).nonzero()[0]
    batch["labels"][1, scored] = -100
    with pytest.raises(ValueError, match=r"dict\(batch\), which is not checked"):
        operations.send_to_device(batch, "cpu")
    assert torch.equal(operations.send_to_device(dict(batch), "cpu")["labels"], batch["labels"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerates_dispatcher_does_not_tear_pairs_in_silence(
    split_batches: bool, rank: int, monkeypatch: Any
) -> None:
    """Its own code, with nobody to broadcast to."""
    module = accelerate.data_loader
    monkeypatch.setattr(module, "broadcast_object_list", lambda given, **_: given)
    monkeypatch.setattr(module, "broadcast", lambda given, **_: given)
    row = {"prompt_ids": [3], "chosen_ids": [4, 2], "rejected_ids": [5, 2]}
    loader = module.DataLoaderDispatcher(
        Stream([row] * 6), split_batches, batch_size=4, collate_fn=PreferenceCollator(0)
    )
    loader.state = types.SimpleNamespace(
        process_index=rank, num_processes=2, device=torch.device("cpu")
    )
    if rank:  # the first process has the batches
        loader._fetch_batches = types.MethodType(_fetched_by_the_first, loader)
    with pytest.raises(ValueError, match="dispatch_batches=False"):
        list(loader)


def _fetched_by_the_first(loader: Any, iterator: Any) -> Any:
    loader.state.process_index = 0
    fetched = type(loader)._fetch_batches(loader, iterator)
    loader.state.process_index = 1
    return fetched


def test_one_process_may_dispatch_to_itself() -> None:
    accelerator = accelerate.Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True)
    )
    plain = torch.utils.data.DataLoader(
        Stream(examples(5)), batch_size=2, collate_fn=PreferenceCollator(0)
    )
    prepared = accelerator.prepare_data_loader(plain)
    assert isinstance(prepared, accelerate.data_loader.DataLoaderDispatcher)
    for ours, expected in zip(prepared, plain, strict=True):
        assert torch.equal(ours["input_ids"], expected["input_ids"])


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "length", "ids", "labels"),
    [
        ("keep_start", 4, [[1, 2, 3, 4], [1, 2, 3, 6]], [[0, 0, 0, 4], [0, 0, 0, 6]]),
        ("keep_end", 4, [[2, 3, 4, 5], [1, 2, 3, 6]], [[0, 0, 4, 5], [0, 0, 0, 6]]),
        ("keep_end", 2, [[4, 5], [3, 6]], [[4, 5], [0, 6]]),
        ("keep_end", 9, [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]], [[0, 0, 0, 4, 5], [0, 0, 0, 6, 0]]),
    ],
)
def test_sequences_lose_their_end_or_their_start(
    mode: Any, length: Any, ids: Any, labels: Any
) -> None:
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
    for name in ("chosen", "rejected"):
        row[f"{name}_hidden"] = (
            torch.tensor([*row["prompt_ids"], *row[f"{name}_ids"]])[:, None] * 1.0
        )
    batch = PreferenceCollator(0, max_length=length, truncation_mode=mode)([row])
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].masked_fill(batch["labels"] == -100, 0).tolist() == labels
    assert batch["reference_hidden"][..., 0].long().tolist() == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation_mode": "left"}, r'"keep_start" or "keep_end", got \'left\''),
        ({"max_length": 0}, "at least 1, got 0"),
    ],
)
def test_options_outside_their_range_raise(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(0, **options)


@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_leaves_no_labels_is_told_from_lengths(mode: str, encoder_decoder: bool) -> None:
    """As the labels themselves say, once shifted."""
    for length in (None, 1, 2, 3, 5):
        collator = PreferenceCollator(
            0, max_length=length, truncation_mode=mode, encoder_decoder=encoder_decoder
        )
        collator.warned = True
        for prompt in range(1 if encoder_decoder else 0, 5):
            for chosen, rejected in ((0, 2), (1, 1), (1, 3), (3, 0), (4, 2)):
                if prompt + min(chosen, rejected) == 0:
                    continue
                ids = [[3] * prompt, [4] * chosen, [5] * rejected]
                row = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))
                labels = collator([row])["labels"]
                scored = labels if encoder_decoder else labels[:, 1:]
                left = bool((scored != -100).any(1).all())
                assert collator.leaves_labels(*ids) == left


LONG = {"prompt_ids": list(range(3, 23)), "chosen_ids": [30, 31, 2], "rejected_ids": [40, 2]}
SHORT = {"prompt_ids": [3], "chosen_ids": [30, 31, 2], "rejected_ids": [40, 2]}


def test_a_collator_warns_once_of_pairs_without_labels() -> None:
    collator = PreferenceCollator(0, max_length=16)
    with pytest.warns(UserWarning, match=r"3 of the 4 examples .* max_length=16.*keep_end"):
        collator([LONG, LONG, SHORT, LONG])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator([LONG])
        PreferenceCollator(0, max_length=16, truncation_mode="keep_end")([LONG, SHORT])
        PreferenceCollator(0)([LONG, SHORT])


@pytest.mark.parametrize("kind", [list, tuple, datasets.Dataset.from_list])
def test_a_trainer_leaves_pairs_without_labels_out(kind: Any, tmp_path: Any) -> None:
    options = {"data_collator": PreferenceCollator(0, max_length=16), "max_steps": 2}
    rows = [LONG, SHORT, LONG, LONG, SHORT]
    with pytest.warns(UserWarning, match="left out") as warned:
        made = transformers_trainer(
            tiny_model(),
            tmp_path,
            train_dataset=kind(rows),
            eval_dataset={"a": kind(rows[1:]), "b": kind([SHORT])},
            **options,
        )
    said = [str(each.message) for each in warned if "left out" in str(each.message)]
    assert said[0].startswith("3 of the 5 examples of train_dataset are left out")
    assert said[1].startswith("2 of the 4 examples of eval_dataset['a'] are left out")
    assert len(said) == 2
    assert [len(row["prompt_ids"]) for row in made.train_dataset] == [1, 1]
    assert {name: len(rows) for name, rows in made.eval_dataset.items()} == {"a": 2, "b": 1}
    made.train()
    assert made.state.log_history[0]["num_tokens"] == 14  # two sequences, 4 and 3 tokens, two pairs


@pytest.mark.parametrize(
    "kind", [Stream, lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset()]
)
def test_a_trainer_leaves_them_out_of_streams_as_they_come(kind: Any, tmp_path: Any) -> None:
    made = transformers_trainer(
        tiny_model(),
        tmp_path,
        train_dataset=kind([LONG, SHORT, LONG, SHORT]),
        data_collator=PreferenceCollator(0, max_length=16),
        per_device_train_batch_size=2,
        max_steps=1,
    )
    with pytest.warns(UserWarning, match="examples of train_dataset that .* are left out"):
        made.train()
    assert made.state.log_history[0]["num_tokens"] == 14


def test_a_data_set_of_which_nothing_is_left_is_refused(tmp_path: Any) -> None:
    collator = PreferenceCollator(0, max_length=16)
    with pytest.raises(ValueError, match=r"all 2 examples of train_dataset .* raise max_length"):
        transformers_trainer(
            tiny_model(), tmp_path, train_dataset=[LONG, LONG], data_collator=collator
        )


def test_prompts_cut_from_the_left_keep_their_pairs(tmp_path: Any) -> None:
    made = transformers_trainer(
        tiny_model(),
        tmp_path,
        train_dataset=[LONG, SHORT],
        data_collator=PreferenceCollator(0, max_length=16, truncation_mode="keep_end"),
        per_device_train_batch_size=2,
        max_steps=2,
    )
    assert len(made.train_dataset) == 2
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # older versions round
    assert losses[1] < losses[0]
