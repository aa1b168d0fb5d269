"""A language model's head: logits from hidden states, and gradients back through it.

    logits = scale (h W^T + b)                               without a softcap
    logits = softcap tanh(scale (h W^T + b) / softcap)       with one

A tile is the logits of some tokens (rows) over a range of the vocabulary (columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.fused_head import products
from tdpo_ext.fused_head.tiles import Cast, Rows


class Head(NamedTuple):
    """A head and the hidden states it is applied to; its fields have been checked."""

    hidden: Tensor
    """``[N, H]``"""
    weight: Tensor
    """``[V, H]``"""
    bias: Tensor | None
    """``[V]``"""
    scale: float
    softcap: float
    """0: no softcap."""

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
        """Whether that type is narrower than the logits'. The gradient then lies beside them."""
        return self.gradient_dtype != self.accumulation_dtype

    def scale_of_gradient(self, sizes: Tensor) -> Tensor | None:
        """What to multiply upstream gradients by before the gradient of the logits is rounded
        (``products.scale_into_range``); None: nothing. ``sizes`` bound the latter, ``[N]``."""
        return products.scale_into_range(sizes * abs(self.scale), self.gradient_dtype)

    def states_of(self, rows: Rows) -> Tensor:
        """Hidden states ``[n, H]``, ready for products."""
        states = self.hidden[rows]  # a view if the rows are a range, else a copy
        return states.to(products.operand_dtype(states))

    def weight_blocks(self, columns: range, cast: Cast) -> Iterator[tuple[range, Tensor]]:
        """Rows of W for a range of columns, ready for products.

        Weights that have to be cast come in blocks that fit the memory of ``cast``.
        """
        if not self.casts:
            yield columns, self.weight[columns.start : columns.stop]
            return
        step = cast.memory.numel() // self.weight.shape[1]
        for start in range(columns.start, columns.stop, step):
            block = range(start, min(start + step, columns.stop))
            yield block, cast.rows_of(self.weight, block)

    def write_logits(self, states: Tensor, columns: range, tile: Tensor, cast: Cast) -> None:
        """Write the logits of ``states`` over ``columns`` to ``tile``."""
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
        """Multiply a gradient of the logits, in place, by the derivative of the softcap.

        The result is the gradient of the softcap's argument. The logits are overwritten.
        """
        # d/dx softcap tanh(x / softcap) = 1 - tanh(x / softcap)^2
        slope = logits.div_(self.softcap).square_().neg_().add_(1)
        gradient *= slope


class Wanted(NamedTuple):
    """The tensors of the policy's head that get a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients:
    """The gradients of a head's tensors, summed in the accumulation type.

    Rows come in passes: ``begin_pass``, then ``add`` for each tile until all columns are covered,
    then ``end_pass``. Each row is in one pass. The gradients of the logits that ``add`` gets are
    multiplied by ``scale``, which the results are not; None: 1.
    """

    def __init__(self, head: Head, wanted: Wanted, scale: Tensor | None) -> None:
        self.head = head
        self.wanted = wanted
        self.scale = scale
        self.no_pass_yet = True
        dtype, nothing = head.accumulation_dtype, head.hidden.new_empty(0)
        # Zeros, since rows that are left out have gradient 0.
        self.hidden = torch.zeros_like(head.hidden, dtype=dtype) if wanted.hidden else nothing
        self.weight = torch.empty_like(head.weight, dtype=dtype) if wanted.weight else nothing
        self.bias = nothing
        if wanted.bias and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=dtype)
        self.states_gradient = nothing

    def begin_pass(self, rows: Rows, states: Tensor, factor: Tensor | None = None) -> None:
        """Begin a pass over ``rows``, whose hidden states are ``states``.

        The gradients of the logits that ``add`` gets must still be multiplied by ``factor``,
        ``[n]``; None: they are complete.
        """
        self.rows, self.factor, self.states = rows, factor, states
        if factor is not None and self.wanted.weight:
            # dW = dz^T (factor h): the states have far fewer numbers than dz. Half-width states are
            # rounded once more by this.
            self.states = torch.mul(states, factor.unsqueeze(1), out=torch.empty_like(states))
        if self.wanted.hidden:
            # The gradient of a range of rows is summed where it stays.
            in_place = isinstance(rows, slice)
            sums = self.hidden[rows] if in_place else self.hidden.new_zeros(states.shape)
            self.states_gradient = sums

    def add(self, columns: range, gradient: Tensor, cast: Cast) -> None:
        """Add what a tile contributes; ``gradient`` is that of h W^T + b over ``columns``."""
        at = slice(columns.start, columns.stop)
        if self.bias.numel():
            self.add_to_bias(self.bias[at], gradient)
        if self.wanted.hidden:
            for block, weight in self.head.weight_blocks(columns, cast):
                part = slice(block.start - columns.start, block.stop - columns.start)
                products.multiply_add(gradient[:, part], weight, out=self.states_gradient)
        if self.wanted.weight:
            product = products.multiply if self.no_pass_yet else products.multiply_add
            product(gradient.T, self.states, out=self.weight[at])

    def add_to_bias(self, bias: Tensor, gradient: Tensor) -> None:
        if self.factor is None:
            bias += gradient.sum(0, dtype=bias.dtype)
        else:
            # The factor is split into two half-width numbers. Rounded to one it would be off by the
            # same relative error for all entries of a row, which does not average out.
            first = self.factor.to(gradient.dtype)
            second = (self.factor - first).to(gradient.dtype)
            sums = bias.new_empty(bias.numel(), 2)
            products.multiply(gradient.T, torch.stack((first, second), 1), out=sums)
            bias += sums.sum(1)

    def end_pass(self) -> None:
        self.no_pass_yet = False
        if self.wanted.hidden:
            if self.factor is not None:
                self.states_gradient *= self.factor.unsqueeze(1)
            if not isinstance(self.rows, slice):
                self.hidden[self.rows] = self.states_gradient

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden states, weight and bias; empty where not wanted."""
        if self.no_pass_yet:
            self.weight.zero_()
        gradients = self.hidden, self.weight, self.bias
        if self.scale is not None:
            for gradient in gradients:
                gradient /= self.scale
        return gradients
