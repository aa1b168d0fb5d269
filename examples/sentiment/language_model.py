"""A small GPT-2 from a config: training on the text (SFT), and sampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from data import IGNORE_INDEX, Vocabulary, response_labels
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel


def build_model(vocabulary: Vocabulary, width: int, layers: int, positions: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, as one kernel
        # No dropout, so that the policy starts from exactly the reference's distribution.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=vocabulary.end,
        eos_token_id=vocabulary.end,
        pad_token_id=vocabulary.end,
    )
    return GPT2LMHeadModel(config)


def train_on_text(
    model: GPT2LMHeadModel, tokens: Tensor, *, epochs: int, batch_size: int, learning_rate: float
) -> float:
    """Train by next-token cross-entropy, with warm-up and cosine; return the last mean loss."""
    steps = epochs * math.ceil(len(tokens) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    model.train()
    with tqdm(total=steps, desc="SFT", unit="step") as bar:
        for _ in range(epochs):
            losses = []
            for batch in shuffled_batches(tokens, batch_size):
                loss = next_token_loss(model, batch.to(model.device))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                bar.update()
            mean = torch.stack(losses).mean().item()
            bar.set_postfix(loss=f"{mean:.2f}")
    return mean


def shuffled_batches(tokens: Tensor, batch_size: int) -> list[Tensor]:
    """Batches in random order, each of sentences of about one length and cut to it."""
    lengths = (tokens[:, 1:] != Vocabulary.end).sum(dim=1)
    order = torch.argsort(lengths + torch.rand(len(tokens)))
    batches = order.split(batch_size)
    return [
        tokens[batches[i], : int(lengths[batches[i]].max()) + 2]
        for i in torch.randperm(len(batches)).tolist()
    ]


def next_token_loss(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    labels = response_labels(tokens, prompt_length=1)
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokens: Tensor) -> float:
    model.eval()
    return next_token_loss(model, tokens.to(model.device)).item()


@torch.no_grad()
def sample(model: GPT2LMHeadModel, prompts: Tensor, *, max_tokens: int) -> Tensor:
    """Samples ``[N, prompt + max_tokens]`` from pi itself: temperature 1, no top-k, no top-p.

    With top-k or top-p the samples would not be from the distribution whose KL is measured.
    """
    model.eval()
    prompts = prompts.to(model.device)
    tokens = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
    )
    missing = prompts.shape[1] + max_tokens - tokens.shape[1]
    return F.pad(tokens, (0, missing), value=Vocabulary.end)
