"""A language model's head: logits from hidden states, and gradients back through it.

    logits = softcap tanh(scale (h W^T + b) / softcap)          without softcap: scale (h W^T + b)

A tile is the logits of some tokens (rows) over a range of the vocabulary (columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.fused_head import products

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
        return products.accumulation_dtype(self.weight.dtype)

    @property
    def casts(self) -> bool:
        """Whether hidden states and weights are cast before they are multiplied."""
        return products.operand_dtype(self.weight) != self.weight.dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The type in which a gradient of the logits enters its products."""
        return products.operand_dtype(self.weight)

    @property
    def rounds_gradient(self) -> bool:
        """Whether that is narrower than the logits'; the gradient lies beside them then."""
        return self.gradient_dtype != self.accumulation_dtype

    def states_of(self, rows: Rows) -> Tensor:
        """Hidden states ``[n, H]``, ready for products."""
        states = self.hidden[rows]  # a view of a range, a copy of others
        return states.to(products.operand_dtype(states))

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
            products.multiply(states, weight.T, out=tile[:, at])
        if self.bias is not None:
            tile += self.bias[columns.start : columns.stop]
        if self.scale != 1:
            tile *= self.scale
        if self.softcap:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)

    def chain_softcap(self, gradient: Tensor, logits: Tensor) -> None:
        """From a gradient of the logits to one of what the softcap takes. Overwrites both."""
        # d softcap tanh(x / softcap) / dx = 1 - tanh^2
        slope = logits.div_(self.softcap).square_().neg_().add_(1)
        gradient *= slope


class Wanted(NamedTuple):
    """Which of the policy's tensors get a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients:
    """Gradients of a head's tensors, added up in the accumulation type.

    The rows come in passes, each row in one; a pass goes over all columns, tile by tile.
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

    def begin_pass(self, rows: Rows, states: Tensor, factor: Tensor | None = None) -> None:
        """``factor``: ``[n]``, which the gradients of the logits still lack, row by row."""
        self.rows, self.factor, self.states = rows, factor, states
        if factor is not None and self.wanted.weight:
            # The states are few numbers beside dz. They are rounded once more by it.
            self.states = torch.mul(states, factor.unsqueeze(1), out=torch.empty_like(states))
        if self.wanted.hidden:
            # Of a range of rows the gradient is added up in its place.
            of_range = isinstance(rows, slice)
            self.of_states = self.hidden[rows] if of_range else self.hidden.new_zeros(states.shape)

    def add(self, columns: range, gradient: Tensor, cast: Cast) -> None:
        """A tile's gradient of h W^T + b."""
        at = slice(columns.start, columns.stop)
        if self.bias.numel():
            self.add_to_bias(self.bias[at], gradient)
        if self.wanted.hidden:
            for block, weight in self.head.weight_blocks(columns, cast):
                of_block = slice(block.start - columns.start, block.stop - columns.start)
                products.multiply_add(gradient[:, of_block], weight, out=self.of_states)
        if self.wanted.weight:
            product = products.multiply if self.no_pass_yet else products.multiply_add
            product(gradient.T, self.states, out=self.weight[at])

    def add_to_bias(self, bias: Tensor, gradient: Tensor) -> None:
        if self.factor is None:
            bias += gradient.sum(0, dtype=bias.dtype)
        else:
            # In two parts, so that its rounding, which all entries of a row share, does not show.
            first = self.factor.to(gradient.dtype)
            second = (self.factor - first).to(gradient.dtype)
            sums = bias.new_empty(bias.numel(), 2)
            products.multiply(gradient.T, torch.stack((first, second), 1), out=sums)
            bias += sums.sum(1)

    def end_pass(self) -> None:
        self.no_pass_yet = False
        if self.wanted.hidden:
            if self.factor is not None:
                self.of_states *= self.factor.unsqueeze(1)
            if not isinstance(self.rows, slice):
                self.hidden[self.rows] = self.of_states

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden states, weight and bias; empty where not wanted."""
        if self.no_pass_yet:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias
