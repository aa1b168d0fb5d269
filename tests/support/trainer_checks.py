"""What trainers are held to: every step's loss and gradients, against one process in float64.

The gradient of every parameter, as the optimizer sees it, is compared with that of a float64 copy
of the model, whose loss is the definition on its own logits, the mean over all the step's pairs.
Micro-batches are recorded, so whatever order a trainer takes is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import datasets
import tokenizers
import torch
import transformers
from tiny_models import VOCABULARY

from tdpo_ext import LinearTDPOLoss, TDPOLoss, reference
from tdpo_ext.integrations import transformers as of_transformers
from tdpo_ext.integrations import trl as of_trl
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo

LEARNING_RATE = 0.5
ARGUMENTS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "bf16": False,
}


def examples(count: int = 11, seed: int = 0) -> list[dict[str, list[int]]]:
    """11: the last micro-batch of 2 has one pair, the last step of 4 micro-batches has 3 pairs."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    end = [2]
    return [
        {"prompt_ids": ids(2, 5), "chosen_ids": ids(0, 5) + end, "rejected_ids": ids(1, 6) + end}
        for _ in range(count)
    ]


def as_text(rows: list[dict[str, list[int]]]) -> Any:
    """What TRL, which adds the end-of-sequence token, tokenises back to the same ids."""

    def words(ids: list[int]) -> str:
        return "".join(f"w{number:02} " for number in ids)

    return datasets.Dataset.from_list(
        [
            {
                "prompt": words(row["prompt_ids"]),
                "chosen": words(row["chosen_ids"][:-1]),
                "rejected": words(row["rejected_ids"][:-1]),
            }
            for row in rows
        ]
    )


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Examples that come one after the other, of unknown number."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return iter(self.rows)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.rows)


def pairs_in(batch: Mapping[str, torch.Tensor]) -> list[tuple[list[int], ...]]:
    """Prompt, chosen and rejected tokens of each pair, as the loss sees them."""
    rows = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], labels_of(batch), strict=True
    ):
        response = ids[labels != -100].tolist()
        rows.append((ids[mask == 1].tolist()[: -len(response)], response))
    half = len(rows) // 2
    return [
        (prompt, chosen, rejected) if prompt == other else (prompt, chosen, other, rejected)
        for (prompt, chosen), (other, rejected) in zip(rows[:half], rows[half:], strict=True)
    ]


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """What a trainer fed to its model and to its optimizer."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, torch.Tensor]]] = [[]]
        self.losses = [0.0]
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def watch(self, trainer: Any) -> None:
        trainer.add_callback(self)
        compute = trainer.compute_loss

        def compute_and_record(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = compute(model, inputs, *args, **kwargs)
            if model.training:
                self.batches[-1].append({key: value.clone() for key, value in inputs.items()})
                self.losses[-1] += loss.item()
            return loss

        trainer.compute_loss = compute_and_record

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        named = others["model"].named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_optimizer_step(self, *args: Any, **others: Any) -> None:
        self.batches.append([])
        self.losses.append(0.0)

    def check(self, model: Any, reference_model: Any, **loss: Any) -> dict[str, float]:
        """``check_against_float64`` of what was recorded."""
        recorded = self.batches, self.losses, self.gradients
        return check_against_float64(*recorded, model, reference_model, **loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.logs.append(dict(logs))


def labels_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def check_against_float64(
    steps: list[list[dict[str, torch.Tensor]]],
    losses: list[float],
    gradients: list[dict[str, torch.Tensor]],
    model: Any,
    reference_model: Any,
    **loss: Any,
) -> dict[str, float]:
    """The largest errors, of a loss and, relative to a parameter's largest gradient, of gradients.

    ``steps``: the micro-batches of each optimizer step. ``model``: as it was before training; with
    adapters if ``reference_model`` is None.
    """
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    assert len(gradients) >= 2
    errors = {"loss": 0.0, "gradient": 0.0}
    for batches, step_loss, step_gradients in zip(steps, losses, gradients, strict=False):
        each = []
        for batch in batches:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                if reference_model is None:
                    with model.disable_adapter():
                        reference_logits = model(**inputs).logits
                else:
                    reference_logits = reference_model.double()(**inputs).logits
            logits = model(**inputs).logits
            each.append(
                reference.tdpo_loss(
                    logits, reference_logits, labels_of(batch), reduction="none", **loss
                ).loss
            )
        mean = torch.cat(each).mean()
        optimizer.zero_grad()
        mean.backward()
        errors["loss"] = max(errors["loss"], abs(step_loss - mean.item()) / max(1, mean.item()))
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert not step_gradients or step_gradients.keys() == expected.keys()
        for name, of_trainer in step_gradients.items():
            scale = expected[name].abs().max().clamp(min=1e-5)
            error = ((of_trainer - expected[name]).abs().max() / scale).item()
            errors["gradient"] = max(errors["gradient"], error)
        optimizer.step()
    return errors


def tokenizer() -> Any:
    words = {f"w{number:02}": number for number in range(VOCABULARY)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w03"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="w00", bos_token="w01", eos_token="w02", unk_token="w03"
    )


def plain_loop(
    model: Any,
    recorder: Recorder,
    *,
    reference_model: Any,
    fused: bool,
    accumulation: int,
    compiled: bool,
    loss: dict[str, Any],
) -> None:
    """examples/plain_loop.py with accumulation; without a reference the model without adapters."""
    module = (LinearTDPOLoss if fused else TDPOLoss)(**loss)
    asked = model if reference_model is None else reference_model
    if fused:
        attach_tdpo(model, module)
        attach_tdpo(asked) if asked is not model else None
    run = torch.compile(model, backend="aot_eager") if compiled else model
    rows, collate = examples(), of_transformers.PreferenceCollator(0)
    batches = [collate(rows[start : start + 2]) for start in range(0, len(rows), 2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        pairs = sum(len(batch["labels"]) for batch in step)
        for batch in step:
            recorder.batches[-1].append(batch)
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            off = model.disable_adapter() if reference_model is None else nullcontext()
            with torch.no_grad(), off:
                given = asked(**inputs, tdpo=HEAD_INPUTS) if fused else asked(**inputs).logits
            if fused:
                output = run(**inputs, tdpo=TDPOTargets(given, batch["labels"])).tdpo
            else:
                output = module(run(**inputs).logits, given, batch["labels"])
            share = output.loss * (len(batch["labels"]) / pairs)
            share.backward()
            recorder.losses[-1] += share.item()
        recorder.on_pre_optimizer_step(None, None, None, model=model)
        optimizer.step()
        optimizer.zero_grad()
        recorder.on_optimizer_step()


def transformers_trainer(
    model: Any, tmp_path: Any, *, loss: dict[str, Any] | None = None, **options: Any
) -> Any:
    others = {
        "train_dataset": examples(),
        "data_collator": of_transformers.PreferenceCollator(0),
        **{key: options.pop(key) for key in _NO_ARGUMENTS if key in options},
    }
    return of_transformers.TDPOTrainer(
        model,
        transformers.TrainingArguments(str(tmp_path), **{**ARGUMENTS, **options}),
        loss=LinearTDPOLoss(**(loss or {})),
        **others,
    )


_NO_ARGUMENTS = (
    "reference",
    "precompute_reference",
    "eval_dataset",
    "train_dataset",
    "data_collator",
    "callbacks",
)


def trl_trainer(
    model: Any, tmp_path: Any, *, loss: dict[str, Any] | None = None, **options: Any
) -> Any:
    loss = loss or {}
    names_in_trl = {"alpha": "tdpo_alpha", "variant": "tdpo_variant"}
    renamed = {names_in_trl.get(key, key): value for key, value in loss.items()}
    names = ("ref_model", "eval_dataset", "train_dataset", "callbacks")
    others = {key: options.pop(key) for key in names if key in options}
    return of_trl.TDPOTrainer(
        model,
        args=of_trl.TDPOConfig(str(tmp_path), **{**ARGUMENTS, **options, **renamed}),
        train_dataset=others.pop("train_dataset", None) or as_text(examples()),
        processing_class=tokenizer(),
        **others,
    )
