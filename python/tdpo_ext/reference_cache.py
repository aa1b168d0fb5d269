"""The reference's hidden states on disk, so that training needs no reference model in memory.

A reference that never changes says the same about a token every epoch. Its hidden states before the
head, in bfloat16, are exact for a model that runs in bfloat16 and 1/30 of the size of its logits;
``linear_tdpo_loss`` takes them with the reference's head, which alone stays in memory.

    fingerprint = {"model": "...", "tokenizer": "...", "dataset": "...", "dtype": "bfloat16"}
    write_reference_cache(folder, (hidden_states_of(batch) for batch in batches), fingerprint)
    hidden = read_reference_cache(folder, fingerprint)      # [tokens, H], mapped, not loaded
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DATA, DESCRIPTION = "hidden.bin", "description.json"


def write_reference_cache(
    folder: str | Path, hidden: Iterable[Tensor], fingerprint: Mapping[str, str]
) -> int:
    """Write hidden states, one batch after the other, as bfloat16 ``[tokens, H]``.

    Args:
        folder: made if it does not exist; a cache in it is replaced.
        hidden: tensors ``[..., H]`` of one H, on any device; leading dimensions become tokens in
            their order.
        fingerprint: all that the numbers depend on, as strings: model and revision, tokenizer,
            dataset and its order, dtype, maximum length ...

    Returns:
        How many tokens were written.

    Raises:
        ValueError: no batch, an empty fingerprint, or batches of different H.
    """
    if not fingerprint:
        raise ValueError("fingerprint must say what the hidden states depend on, got nothing")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)  # a cache that was cut short is none
    tokens, width = 0, None
    with (folder / DATA).open("wb") as file:
        for batch in hidden:
            if width is not None and batch.shape[-1] != width:
                raise ValueError(
                    f"hidden must have one width in all batches, got {width} and {batch.shape[-1]}"
                )
            width = batch.shape[-1]
            flat = batch.detach().reshape(-1, width).to("cpu", torch.bfloat16).contiguous()
            file.write(flat.view(torch.int16).numpy().tobytes())
            tokens += flat.shape[0]
    if width is None:
        raise ValueError("hidden must have at least one batch, got none")
    description = {"fingerprint": dict(fingerprint), "tokens": tokens, "width": width}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    return tokens


def read_reference_cache(folder: str | Path, fingerprint: Mapping[str, str]) -> Tensor:
    """The hidden states ``[tokens, H]`` in bfloat16, mapped into memory: what is used is read.

    Index it with the tokens of a batch, then move that to the device.

    Raises:
        FileNotFoundError: there is no complete cache in the folder.
        ValueError: it was written for something else, or its data do not have the size that its
            description says.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists():
        raise FileNotFoundError(
            f"no complete reference cache in {folder}; write one with write_reference_cache"
        )
    description = json.loads((folder / DESCRIPTION).read_text())
    written = description["fingerprint"]
    if written != dict(fingerprint):
        different = sorted(
            key
            for key in written.keys() | fingerprint.keys()
            if written.get(key) != fingerprint.get(key)
        )
        said = ", ".join(
            f"{key}: cached {written.get(key)!r}, asked {fingerprint.get(key)!r}"
            for key in different
        )
        raise ValueError(
            f"the reference cache in {folder} is of something else ({said}); rewrite it"
        )
    tokens, width = description["tokens"], description["width"]
    size, expected = (folder / DATA).stat().st_size, 2 * tokens * width
    if size != expected:
        raise ValueError(
            f"the reference cache in {folder} has {size} bytes of hidden states, its description "
            f"says {expected}; rewrite it"
        )
    if tokens * width == 0:
        return torch.empty(tokens, width, dtype=torch.bfloat16)
    data = torch.from_file(
        str(folder / DATA), shared=False, size=tokens * width, dtype=torch.bfloat16
    )
    return data.view(tokens, width)
