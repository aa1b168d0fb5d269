"""A tiny model and preferences that it can learn, for the examples. Use your own instead."""

from __future__ import annotations

from typing import Any

import datasets
import tokenizers
import torch
import transformers

WORDS = ["<pad>", "<end>", "the", "film", "was", "good", "fine", "great", "bad", "poor", "dull"]
GOOD, BAD = WORDS[5:8], WORDS[8:11]


def language_model(hidden_size: int = 32) -> Any:
    """A Llama with the same random weights at each call, as from a checkpoint."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1,  # an even number, so that two processes can share it
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    """Splits at spaces; every word is one token."""
    words = {word: number for number, word in enumerate(WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>"
    )


def preferences() -> datasets.Dataset:
    """Nine pairs: praise is chosen, blame is rejected."""
    return datasets.Dataset.from_list(
        [
            {"prompt": "the film was ", "chosen": f"{good} {good}", "rejected": f"{bad} {bad}"}
            for good in GOOD
            for bad in BAD
        ]
    )


def tokenized_preferences() -> list[dict[str, list[int]]]:
    """The same as token ids, with the names that ``PreferenceCollator`` expects."""
    encode = tokenizer()
    return [
        {
            "prompt_ids": encode(row["prompt"])["input_ids"],
            "chosen_ids": encode(row["chosen"] + " <end>")["input_ids"],
            "rejected_ids": encode(row["rejected"] + " <end>")["input_ids"],
        }
        for row in preferences()
    ]


def batches(epochs: int = 20) -> list[dict[str, torch.Tensor]]:
    """Batches of three pairs: ``input_ids``, ``attention_mask`` and ``labels``, ``[6, T]`` int64,
    the chosen sequences stacked on the rejected ones."""
    from tdpo_ext.integrations.transformers import PreferenceCollator

    loader = torch.utils.data.DataLoader(
        tokenized_preferences(), batch_size=3, collate_fn=PreferenceCollator(pad_token_id=0)
    )
    return [batch for _ in range(epochs) for batch in loader]
