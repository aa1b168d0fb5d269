"""Preference pairs: examples of token ids, batches of them, and data sets without empty pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


class PreferenceBatch(dict[str, Any]):
    """A batch of ``PreferenceCollator``: a dictionary that is refused where it was cut.

    Accelerate and the Trainer rebuild a batch by its type whenever they move or slice it, so a part
    of one passes through here. Looked at is what costs no waiting for a device: the shapes, whether
    the rows are a slice of a larger tensor, and for tensors on the CPU whether both sequences of
    each pair have the same prompt. ``dict(batch)`` is not looked at: for collators of your own that
    mask more than the prompt.
    """

    def __init__(self, *contents: Any, **named: Any) -> None:
        super().__init__(*contents, **named)
        # Accelerate also rebuilds batches of what describes their tensors.
        if all(isinstance(self.get(name), Tensor) for name in ("input_ids", "labels")):
            self._check_whole(self["input_ids"])

    def _check_whole(self, ids: Tensor) -> None:
        rows = len(ids)
        if rows == 1 and _alone():
            return  # one row is kept aside by the dispatcher of a single process, and not used
        if rows % 2:
            raise ValueError(_CUT.format(f"it has {rows} rows"))
        whole = ids._base
        if whole is not None and whole.shape[1:] == ids.shape[1:] and len(whole) > rows:
            raise ValueError(_CUT.format(f"its {rows} rows are a part of {len(whole)}"))
        if ids.device.type == "cpu":
            self._check_prompts(ids)

    def _check_prompts(self, ids: Tensor) -> None:
        prompts = [self._prompt(ids, row) for row in range(len(ids))]
        half = len(prompts) // 2
        for pair, (chosen, rejected) in enumerate(zip(prompts[:half], prompts[half:], strict=True)):
            both = min(len(chosen), len(rejected))  # cut from the left they may differ in length
            if not torch.equal(chosen[len(chosen) - both :], rejected[len(rejected) - both :]):
                raise ValueError(
                    _CUT.format(f"the prompts of rows {pair} and {half + pair} are different")
                )

    def _prompt(self, ids: Tensor, row: int) -> Tensor:
        mask = self.get("attention_mask")
        present = torch.ones_like(ids[row]) if mask is None else mask[row]
        tokens, labels = ids[row][present != 0], self["labels"][row]
        if labels.shape != present.shape:  # an encoder-decoder's: the input is the prompt
            return tokens
        scored = (labels[present != 0] != -100).nonzero()
        return tokens[: int(scored[0])] if len(scored) else tokens


_CUT = (
    "this batch is not made of whole pairs, the chosen sequences stacked on the rejected ones: {}. "
    "accelerate cuts batches along their rows where one process dispatches them to the others, its "
    "default for an IterableDataset: use Accelerator(dataloader_config=DataLoaderConfiguration("
    "dispatch_batches=False)). A batch of your own that masks more than the prompt is not looked "
    "at as dict(batch)"
)


def _alone() -> bool:
    distributed = torch.distributed
    return not (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


class PreferenceCollator:
    """Examples of one preference each to batches ``[2B, T]``, the chosen responses first.

    An example has ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, lists of token ids as TRL
    names them; the responses end with their end-of-sequence token. If it also has ``chosen_hidden``
    and ``rejected_hidden`` (``[T, H]`` tensors from a reference cache, one row for every token of
    prompt and response) the batch has ``reference_hidden``.

    With "keep_start" a prompt that alone fills ``max_length`` leaves nothing of the responses. Such
    a pair teaches nothing: its loss is the constant log 2. ``TDPOTrainer`` leaves such examples
    out, as TRL does; a collator cannot, since its batch would get smaller: it warns, once.

    Args:
        pad_token_id: what fills the rows on the right; masked in attention and labels.
        max_length: longer sequences (prompt and response together) are cut.
        truncation_mode: "keep_start": they lose their end; "keep_end": their start, so that the
            prompt is cut before the response.
        pad_to_multiple_of: round T up, so that fewer shapes are compiled.
        encoder_decoder: the prompt alone is the input, the response alone the labels; each is cut
            to ``max_length``.

    Called with examples it returns a ``PreferenceBatch``, which is a dictionary: ``input_ids``,
    ``attention_mask``, ``labels`` (-100 on prompt and padding), each ``[2B, T]`` int64; and
    ``reference_hidden`` ``[2B, T, H]``.

    Raises:
        ValueError: an option is outside its range, or an example lacks a field.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        max_length: int | None = None,
        truncation_mode: str = "keep_start",
        pad_to_multiple_of: int = 1,
        encoder_decoder: bool = False,
    ) -> None:
        if truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f'truncation_mode must be "keep_start" or "keep_end", got {truncation_mode!r}'
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be None or at least 1, got {max_length}")
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.truncation_mode = truncation_mode
        self.pad_to_multiple_of = pad_to_multiple_of
        self.encoder_decoder = encoder_decoder
        self.warned = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        self._check(examples)
        ids, labels, hidden = [], [], []
        for response in ("chosen", "rejected"):
            for example in examples:
                prompt = torch.as_tensor(example["prompt_ids"], dtype=torch.int64)
                answer = torch.as_tensor(example[f"{response}_ids"], dtype=torch.int64)
                if self.encoder_decoder:
                    ids.append(self._cut(prompt))
                    labels.append(self._cut(answer))
                    continue
                ids.append(self._cut(torch.cat([prompt, answer])))
                masked = torch.full_like(prompt, -100)
                labels.append(self._cut(torch.cat([masked, answer])))
                if f"{response}_hidden" in example:
                    hidden.append(self._cut(example[f"{response}_hidden"]))
        batch = {
            "input_ids": self._padded(ids, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(row) for row in ids], 0),
            "labels": self._padded(labels, -100),
        }
        if hidden:
            batch["reference_hidden"] = self._padded(hidden, 0)
        return PreferenceBatch(batch)

    def leaves_labels(self, prompt_ids: Any, chosen_ids: Any, rejected_ids: Any) -> bool:
        """Whether a token of each response is left to be scored. Looks at lengths alone."""
        return all(
            self._scored(len(prompt_ids), len(response)) > 0
            for response in (chosen_ids, rejected_ids)
        )

    def _scored(self, prompt: int, response: int) -> int:
        """How many of a response's tokens have a label and something before them."""
        if self.encoder_decoder:
            return response
        total = prompt + response if self.max_length is None else self.max_length
        total = min(prompt + response, total)
        left = min(response, total) if self.truncation_mode == "keep_end" else total - prompt
        return left - 1 if left == total else left

    def _check(self, examples: Sequence[Mapping[str, Any]]) -> None:
        for example in examples:
            missing = [name for name in COLUMNS if name not in example]
            if missing:
                raise ValueError(
                    f"PreferenceCollator takes examples with {', '.join(COLUMNS)}, lists of token "
                    f"ids; one has {', '.join(map(str, example)) or 'nothing'}. Tokenize text "
                    "first, or use tdpo_ext.integrations.trl.TDPOTrainer, which does"
                )
        empty = sum(not self.leaves_labels(*(each[name] for name in COLUMNS)) for each in examples)
        if empty and not self.warned:
            self.warned = True
            warnings.warn(
                f"{empty} of the {len(examples)} examples of a batch {_EMPTY} "
                f"{_limit(self)}, so their loss is a constant; leave them out, raise max_length, "
                'or cut prompts instead with truncation_mode="keep_end"',
                stacklevel=1,
            )

    def _cut(self, row: Tensor) -> Tensor:
        if self.max_length is None:
            return row
        return (
            row[: self.max_length]
            if self.truncation_mode == "keep_start"
            else row[-self.max_length :]
        )

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -padded.shape[1] % self.pad_to_multiple_of
        shape = (padded.shape[0], missing, *padded.shape[2:])
        return torch.cat([padded, padded.new_full(shape, value)], dim=1)


_EMPTY = "keep no token of a response to score within"


def _limit(collator: Any) -> str:
    return f'max_length={collator.max_length}, truncation_mode="{collator.truncation_mode}"'


# --- data sets without empty pairs ----------------------------------------------------------------


def without_empty_pairs(dataset: Any, collator: Any, name: str) -> Any:
    """The data set without examples of which ``collator`` would leave nothing to score.

    Lists, ``datasets.Dataset`` and iterable data sets, and dictionaries of these. A map-style data
    set of another kind is left alone: looking at it may cost as much as an epoch.
    """
    if isinstance(dataset, dict):
        return {
            key: without_empty_pairs(each, collator, f"{name}[{key!r}]")
            for key, each in dataset.items()
        }
    if getattr(collator, "max_length", None) is None or not hasattr(collator, "leaves_labels"):
        return dataset
    columns = getattr(dataset, "column_names", None)
    if columns is not None and not set(COLUMNS) <= set(columns):
        return dataset  # the collator will say so
    if isinstance(dataset, (list, tuple)):
        kept: Any = [each for each in dataset if _leaves_labels(collator, each)]
    elif hasattr(dataset, "filter") and hasattr(dataset, "__len__"):
        kept = dataset.filter(collator.leaves_labels, input_columns=COLUMNS)
    elif hasattr(dataset, "filter") or isinstance(dataset, IterableDataset):
        return _filtered_stream(dataset, collator, name)
    else:
        return dataset
    if len(kept) == len(dataset):
        return dataset
    count = len(dataset)
    if not len(kept):
        raise ValueError(
            f"all {count} examples of {name} {_EMPTY} {_limit(collator)}: raise max_length"
        )
    warnings.warn(
        f"{count - len(kept)} of the {count} examples of {name} are left out: they {_EMPTY} "
        f"{_limit(collator)}",
        stacklevel=1,
    )
    return kept


def _leaves_labels(collator: Any, example: Mapping[str, Any]) -> bool:
    if not all(name in example for name in COLUMNS):
        return True  # the collator will say so
    return bool(collator.leaves_labels(*(example[name] for name in COLUMNS)))


def _filtered_stream(stream: Any, collator: Any, name: str) -> Any:
    said: list[bool] = []

    def kept(example: Mapping[str, Any]) -> bool:
        keep = _leaves_labels(collator, example)
        if not keep and not said:
            said.append(True)
            warnings.warn(
                f"examples of {name} that {_EMPTY} {_limit(collator)} are left out", stacklevel=1
            )
        return keep

    return stream.filter(kept) if hasattr(stream, "filter") else FilteredStream(stream, kept)


class FilteredStream(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, stream: Any, kept: Callable[[Any], bool]) -> None:
        self.stream, self.kept = stream, kept

    def __iter__(self) -> Iterator[Any]:
        return filter(self.kept, self.stream)

    def __getattr__(self, name: str) -> Any:  # set_epoch, generator
        return getattr(self.__dict__["stream"], name)
