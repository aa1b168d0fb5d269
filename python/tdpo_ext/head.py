"""A language model's head: logits from hidden states, and gradients back through it.

    logits = softcap tanh(scale (h W^T + b) / softcap)          without softcap: scale (h W^T + b)

A tile is the logits of some tokens (rows) over a range of the vocabulary (columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext import gemm

Rows = slice | Tensor
"""Tokens: a range of them, or their indices ``[n]``."""


class Cast:
    """Memory for weights that are cast, and what it holds: the next product may take the same."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.held: tuple[int, range] | None = None

    def of(self, weight: Tensor, rows: range) -> Tensor:
        width = weight.shape[1]
        cast = self.memory[: len(rows) * width].view(len(rows), width)
        if self.held != (id(weight), rows):
            cast.copy_(weight[rows.start : rows.stop])
            self.held = id(weight), rows
        return cast


class Head(NamedTuple):
    """Of checked arguments."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    scale: float
    softcap: float
    """0: none"""

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return gemm.accumulation_dtype(self.weight.dtype)

    @property
    def casts(self) -> bool:
        """Whether hidden states and weights are cast before they are multiplied."""
        return gemm.operand_dtype(self.weight) != self.weight.dtype

    def states_of(self, rows: Rows) -> Tensor:
        """Hidden states ``[n, H]``, ready for products."""
        states = self.hidden[rows]  # a view of a range, a copy of others
        return states.to(gemm.operand_dtype(states))

    def weight_blocks(self, columns: range, cast: Cast) -> Iterator[tuple[range, Tensor]]:
        """Rows of W for a range of columns, ready for products; cast some at a time if need be."""
        if not self.casts:
            yield columns, self.weight[columns.start : columns.stop]
            return
        step = cast.memory.numel() // self.weight.shape[1]
        for start in range(columns.start, columns.stop, step):
            block = range(start, min(start + step, columns.stop))
            yield block, cast.of(self.weight, block)

    def write_logits(self, states: Tensor, columns: range, tile: Tensor, cast: Cast) -> None:
        """The logits of ``states`` over ``columns`` to ``tile``."""
        for block, weight in self.weight_blocks(columns, cast):
            at = slice(block.start - columns.start, block.stop - columns.start)
            gemm.multiply(states, weight.T, out=tile[:, at])
        if self.bias is not None:
            tile += self.bias[columns.start : columns.stop]
        if self.scale != 1:
            tile *= self.scale
        if self.softcap:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)

    def chain(self, gradient: Tensor, logits: Tensor) -> None:
        """From a gradient of the logits to one of h W^T + b, in place. Overwrites the logits if
        there is a softcap; reads them only then."""
        if self.softcap:
            # d softcap tanh(x / softcap) / dx = 1 - tanh^2
            slope = logits.div_(self.softcap).square_().neg_().add_(1)
            gradient *= slope
        if self.scale != 1:
            gradient *= self.scale


class Wanted(NamedTuple):
    """Which of the policy's tensors get a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients:
    """Gradients of a head's tensors, added up in the accumulation type.

    The rows come in passes; each goes over all columns, tile by tile.
    """

    def __init__(self, head: Head, wanted: Wanted) -> None:
        self.head = head
        self.wanted = wanted
        self.no_pass_yet = True
        dtype, nothing = head.accumulation_dtype, head.hidden.new_empty(0)
        # Rows that are left out have gradient 0.
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype) if wanted.hidden else nothing
        self.weight = torch.empty_like(head.weight, dtype=dtype) if wanted.weight else nothing
        self.bias = nothing
        if wanted.bias and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=dtype)
        self.of_states = nothing

    def begin_pass(self, states: Tensor) -> None:
        self.states = states
        if self.wanted.hidden:
            self.of_states = torch.zeros_like(states, dtype=self.head.accumulation_dtype)

    def add(self, columns: range, gradient: Tensor, cast: Cast) -> None:
        """A tile's gradient of h W^T + b."""
        at = slice(columns.start, columns.stop)
        if self.bias.numel():
            self.bias[at] += gradient.sum(0)
        gradient = gradient.to(self.states.dtype)
        if self.wanted.hidden:
            for block, weight in self.head.weight_blocks(columns, cast):
                of_block = slice(block.start - columns.start, block.stop - columns.start)
                gemm.multiply_add(gradient[:, of_block], weight, out=self.of_states)
        if self.wanted.weight:
            product = gemm.multiply if self.no_pass_yet else gemm.multiply_add
            product(gradient.T, self.states, out=self.weight[at])

    def end_pass(self, rows: Rows) -> None:
        self.no_pass_yet = False
        if self.wanted.hidden:
            self.hidden[rows] = self.of_states

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden states, weight and bias; empty where not wanted."""
        if self.no_pass_yet:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias
