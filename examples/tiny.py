"""A tiny model, and preferences it can learn: what the examples run with. Use your own instead."""

from __future__ import annotations

from typing import Any

import datasets
import tokenizers
import torch
import transformers

WORDS = ["<pad>", "<end>", "the", "film", "was", "good", "fine", "great", "bad", "poor", "dull"]
GOOD, BAD = WORDS[5:8], WORDS[8:11]


def language_model() -> Any:
    """The same each time, as a checkpoint would be."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1,  # an even number, to be shared by two processes
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    words = {word: number for number, word in enumerate(WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>"
    )


def preferences() -> datasets.Dataset:
    """Praise is chosen, blame rejected."""
    return datasets.Dataset.from_list(
        [
            {"prompt": "the film was ", "chosen": f"{good} {good}", "rejected": f"{bad} {bad}"}
            for good in GOOD
            for bad in BAD
        ]
    )


def tokenized_preferences() -> list[dict[str, list[int]]]:
    """As token ids, with the names that ``PreferenceCollator`` expects."""
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
    """``input_ids``, ``attention_mask`` and ``labels``, [2B, T], chosen stacked on rejected."""
    from tdpo_ext.integrations.transformers import PreferenceCollator

    loader = torch.utils.data.DataLoader(
        tokenized_preferences(), batch_size=3, collate_fn=PreferenceCollator(pad_token_id=0)
    )
    return [batch for _ in range(epochs) for batch in loader]
