"""Preference pairs: from examples of token ids to batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
"""What an example has, under the names that TRL gives them."""


class PreferenceBatch(dict[str, Any]):
    """A batch of ``PreferenceCollator``: a dictionary that raises if pairs were cut apart.

    Accelerate and the Trainer make a new object of a batch's type whenever they move or slice it,
    so a part of a batch passes through this constructor. It checks what needs no waiting for a
    device: the number of rows, that they are no slice of a larger tensor, and on the CPU that both
    sequences of each pair have the same prompt. A collator of your own that masks more than the
    prompt can return ``dict(batch)``, which is not checked.

    Raises:
        ValueError: the rows are not whole pairs, the chosen sequences first.
    """

    def __init__(self, *contents: Any, **named: Any) -> None:
        super().__init__(*contents, **named)
        # Accelerate also makes batches whose values only describe tensors: those pass.
        if all(isinstance(self.get(name), Tensor) for name in ("input_ids", "labels")):
            self._check_whole(self["input_ids"])

    def _check_whole(self, ids: Tensor) -> None:
        rows = len(ids)
        if rows == 1 and _is_single_process():
            return  # a single process's dispatcher sets one row aside and does not use it
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
            # Sequences that are cut at their start may have prompts of different lengths.
            both = min(len(chosen), len(rejected))
            if not torch.equal(chosen[len(chosen) - both :], rejected[len(rejected) - both :]):
                raise ValueError(
                    _CUT.format(f"the prompts of rows {pair} and {half + pair} are different")
                )

    def _prompt(self, ids: Tensor, row: int) -> Tensor:
        """The tokens of a row before its first label."""
        mask = self.get("attention_mask")
        present = torch.ones_like(ids[row]) if mask is None else mask[row]
        tokens, labels = ids[row][present != 0], self["labels"][row]
        if labels.shape != present.shape:  # an encoder-decoder: its input is the prompt
            return tokens
        scored = (labels[present != 0] != -100).nonzero()
        return tokens[: int(scored[0])] if len(scored) else tokens


_CUT = (
    "this batch is not made of whole pairs, the chosen sequences stacked on the rejected ones: {}. "
    "accelerate cuts batches along their rows where one process dispatches them to the others, its "
    "default for an IterableDataset: use Accelerator(dataloader_config=DataLoaderConfiguration("
    "dispatch_batches=False)). If your own collator masks more than the prompt, let it return "
    "dict(batch), which is not checked"
)


def _is_single_process() -> bool:
    distributed = torch.distributed
    return not (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


class PreferenceCollator:
    """Makes a batch ``[2B, T]`` of B examples, the chosen sequences stacked on the rejected ones.

    An example has ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, lists of token ids under
    TRL's names; the responses end with their end-of-sequence token. It may also have
    ``chosen_hidden`` and ``rejected_hidden``, ``[T, H]`` tensors from a reference cache, with a row
    for every token of prompt and response: then the batch has ``reference_hidden``.

    With "keep_start" a prompt that alone fills ``max_length`` leaves nothing of the responses. The
    loss of such a pair is the constant log 2, so it teaches nothing. ``TDPOTrainer`` leaves such
    examples out, as TRL does. The collator keeps them, since its batch would get smaller, and warns
    once.

    Called with a sequence of examples it returns a ``PreferenceBatch``, which is a dictionary:
    ``input_ids``, ``attention_mask`` and ``labels`` (-100 on prompt and padding), each ``[2B, T]``
    int64; and ``reference_hidden`` ``[2B, T, H]``.

    Args:
        pad_token_id: fills the rows on the right; masked in attention and labels.
        max_length: longer sequences (prompt and response together) are cut. None: none is.
        truncation_mode: "keep_start" cuts off the end of a sequence; "keep_end" its start, so that
            the prompt is cut before the response.
        pad_to_multiple_of: rounds T up, so that fewer shapes are compiled.
        encoder_decoder: the prompt alone is the input, the response alone the labels; each is cut
            to ``max_length``.

    Raises:
        ValueError: an option is outside its range; or, when called, an example lacks a field.
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
        """True if at least one token of each response is scored after truncation.

        Args:
            prompt_ids: token ids; only the lengths matter.
            chosen_ids: token ids of the chosen response.
            rejected_ids: token ids of the rejected response.
        """
        return all(
            self._scored(len(prompt_ids), len(response)) > 0
            for response in (chosen_ids, rejected_ids)
        )

    def _scored(self, prompt: int, response: int) -> int:
        """The number of a response's tokens that are scored: those left, with one before them."""
        if self.encoder_decoder:
            return response
        total = prompt + response if self.max_length is None else self.max_length
        total = min(prompt + response, total)
        left = min(response, total) if self.truncation_mode == "keep_end" else total - prompt
        return left - 1 if left == total else left  # the first token of a row has none before it

    def _check(self, examples: Sequence[Mapping[str, Any]]) -> None:
        for example in examples:
            missing = [name for name in COLUMNS if name not in example]
            if missing:
                raise ValueError(
                    f"PreferenceCollator takes examples with {', '.join(COLUMNS)}, lists of token "
                    f"ids; one has {', '.join(map(str, example)) or 'nothing'}. Tokenize text "
                    "first, or use tdpo_ext.integrations.trl.TDPOTrainer, which tokenizes it"
                )
        empty = sum(not self.leaves_labels(*(each[name] for name in COLUMNS)) for each in examples)
        if empty and not self.warned:
            self.warned = True
            warnings.warn(
                f"{empty} of the {len(examples)} examples of a batch {EMPTY} "
                f"{limit_of(self)}, so their loss is a constant; leave them out, raise max_length, "
                'or cut the prompts instead with truncation_mode="keep_end"',
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


EMPTY = "keep no token of a response to score within"
"""The middle of three messages, between examples and ``limit_of``."""


def limit_of(collator: Any) -> str:
    return f'max_length={collator.max_length}, truncation_mode="{collator.truncation_mode}"'
