"""Random calls of the public functions: each is answered rightly, or refused in words.

    python tests/support/fuzz.py --seconds 300 [--seed 0]

A call is made from one seed: a function, shapes, strides, dtypes, labels, options, upstream
gradients, and at times one thing wrong with it. Right: what tdpo_ext.reference gives in float64 on
the same numbers. Refused: TypeError, ValueError or IndexError that names an argument, and only
where something is wrong. What failed can be repeated with ``--only SEED``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import tdpo_ext
from tdpo_ext.checks import DIVERGENCES
from tdpo_ext.token_statistics import kernels, native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXPECTED = (TypeError, ValueError, IndexError)
ARGUMENT = re.compile(
    r"policy_|reference_|labels|mask|outputs|ignore_index|beta|alpha|variant|reduction|smoothing"
    r"|cu_seqlens|chunk"
)


class WrongAnswerError(AssertionError):
    """A call that was neither answered rightly nor refused in words."""


class Call:
    """One function with arguments that fit, before something is done to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice(DTYPES)
        self.name = self.random.choice(
            (
                "token_stats",
                "token_divergences",
                "tdpo_loss",
                "linear_token_stats",
                "linear_token_divergences",
                "linear_tdpo_loss",
            )
        )
        self.linear = self.name.startswith("linear")
        self.is_loss = self.name.endswith("loss")
        self.is_divergences = self.name.endswith("divergences")
        self.vocabulary = self.random.choice((1, 2, 3, 5, 8, 17, 33, 64, 65, 127, 300, 1030))
        self.arguments: dict[str, Any] = {}
        self._fill()

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def strided(self, x: Tensor) -> Tensor:
        """The same numbers in memory with other strides, and NaN around them."""
        x = x.to(self.dtype)
        if x.dim() < 2 or self.random.random() < 0.4:
            return x
        before, behind = self.random.randrange(4), self.random.randrange(4)
        width = before + x.shape[-1] + behind
        leading = [size + self.random.randrange(2) for size in x.shape[:-1]]
        order = self.random.sample(range(len(leading)), len(leading))
        memory = torch.full([*(leading[at] for at in order), width], torch.nan, dtype=x.dtype)
        back = [order.index(at) for at in range(len(order))]
        room = memory.permute(*back, len(order))
        part = room[tuple(slice(0, size) for size in x.shape[:-1])]
        return part[..., before : before + x.shape[-1]].copy_(x)

    def _shape(self) -> list[int]:
        if not self.is_loss:
            return [self.random.randrange(4) for _ in range(self.random.randrange(4))]
        self.packed = self.random.random() < 0.3
        pairs, tokens = self.random.randrange(3), self.random.randrange(5)
        if not self.packed:
            return [2 * pairs, tokens]
        cuts = sorted(self.random.randrange(tokens + 1) for _ in range(max(0, 2 * pairs - 1)))
        bounds = [0, *cuts, tokens] if pairs else [0]
        total = bounds[-1]
        dtype = self.random.choice((torch.int32, torch.int64))
        self.arguments["cu_seqlens"] = torch.tensor(bounds, dtype=dtype)
        return [total]

    def _fill(self) -> None:
        shape = self._shape()
        ignore_index = self.random.choice((-100, -100, 0, 2**40))
        labels = torch.randint(0, self.vocabulary, shape, generator=self.generator)
        ignored = torch.rand(shape, generator=self.generator) < self.random.choice((0, 0.3, 1))
        labels = labels.masked_fill(ignored, ignore_index)
        fits = ignore_index < 2**31
        if fits and self.random.random() < 0.3:
            labels = labels.to(torch.int32)
        shifted = self.is_loss and self.random.random() < 0.5
        self.arguments["shift_labels" if shifted else "labels"] = labels
        if ignore_index != -100:
            self.arguments["ignore_index"] = ignore_index
        if self.linear:
            self._fill_heads(shape)
        else:
            scale, gap = self.random.choice((0, 1, 8)), self.random.choice((0, 1e-2, 1, 8))
            reference = self.normal(*shape, self.vocabulary, scale=scale)
            policy = reference + self.normal(*shape, self.vocabulary, scale=gap)
            self.arguments["policy_logits"] = self.strided(policy)
            self.arguments["reference_logits"] = self.strided(reference)
            self.arguments["inplace_backward"] = self.random.random() < 0.3
        if self.is_divergences:
            self._choose_divergences()
        if self.is_loss:
            self.arguments |= {
                "beta": self.random.choice((0.05, 1, 2.5)),
                "alpha": self.random.choice((0, 0.5, 2)),
                "variant": self.random.choice(("tdpo1", "tdpo2")),
                "label_smoothing": self.random.choice((0, 0.2)),
                "average_log_prob": self.random.random() < 0.3,
                "reduction": self.random.choice(("mean", "sum", "none")),
            }

    def _choose_divergences(self) -> None:
        names = DIVERGENCES
        if self.random.random() < 0.5:
            labels = self.arguments.pop("labels")
            if self.random.random() < 0.7:
                self.arguments["mask"] = labels != self.arguments.get("ignore_index", -100)
            names = names[2:]
        self.arguments["outputs"] = self.random.sample(names, self.random.randint(1, len(names)))

    def _fill_heads(self, shape: list[int]) -> None:
        for which in ("policy", "reference"):
            width = self.random.choice((1, 3, 8))
            self.arguments[f"{which}_hidden"] = self.strided(self.normal(*shape, width))
            self.arguments[f"{which}_weight"] = self.strided(self.normal(self.vocabulary, width))
            if self.random.random() < 0.3:
                self.arguments[f"{which}_bias"] = self.normal(self.vocabulary).to(self.dtype)
        self.arguments["chunk_bytes"] = self.random.choice((None, 1, 3000, 50_000))
        if self.random.random() < 0.3:
            self.arguments["logit_scale"] = self.random.choice((0.5, -1.0, 2))
        if self.random.random() < 0.3:
            self.arguments["logit_softcap"] = self.random.choice((1.0, 5))


# --- what may be wrong with a call ----------------------------------------------------------------


def _some(call: Call, ending: str) -> str:
    return call.random.choice([name for name in call.arguments if name.endswith(ending)])


def _labels(call: Call) -> str:
    names = ("labels", "shift_labels", "mask")
    return next((name for name in names if name in call.arguments), "")


def _label_outside(call: Call) -> bool:
    name = _labels(call)
    if name in ("", "mask"):
        return False
    labels = call.arguments[name].to(torch.int64).clone()
    if labels.numel() == 0 or (name == "labels" and call.is_loss):
        return False  # the first label of a sequence is never scored
    value = call.random.choice((call.vocabulary, -1, 2**62, -(2**63)))
    if value == call.arguments.get("ignore_index", -100):
        return False
    labels.view(-1)[call.random.randrange(labels.numel())] = value
    call.arguments[name] = labels
    return True


def _other_dtype(call: Call) -> bool:
    name = _some(call, "hidden" if call.linear else "logits")
    call.arguments[name] = call.arguments[name].to(call.random.choice((torch.int64, torch.cfloat)))
    return True


def _other_shape(call: Call) -> bool:
    name = _some(call, "weight" if call.linear else "logits")
    x = call.arguments[name]
    call.arguments[name] = torch.cat((x, x), -1)
    return True


def _float_labels(call: Call) -> bool:
    if not _labels(call):
        return False
    call.arguments[_labels(call)] = call.arguments[_labels(call)].double()
    return True


def _one_label_more(call: Call) -> bool:
    if not _labels(call):
        return False
    labels = call.arguments[_labels(call)]
    call.arguments[_labels(call)] = torch.cat((labels.reshape(-1), labels.new_zeros(1)))
    return True


def _reference_requires_grad(call: Call) -> bool:
    name = f"reference_{'weight' if call.linear else 'logits'}"
    call.arguments[name] = call.arguments[name].detach().requires_grad_()
    return True


def _vocabulary_not_contiguous(call: Call) -> bool:
    if call.linear or call.vocabulary == 1 or call.arguments["policy_logits"].numel() == 0:
        return False
    name = _some(call, "logits")
    call.arguments[name] = call.arguments[name].repeat_interleave(2, -1)[..., ::2]
    call.arguments["inplace_backward"] = False  # which would work on a copy
    return True


def _no_tensor(call: Call) -> bool:
    name = call.random.choice([k for k, v in call.arguments.items() if isinstance(v, Tensor)])
    call.arguments[name] = call.random.choice((3, "x", [1.0]))
    return True


def _sparse(call: Call) -> bool:
    names = [k for k, v in call.arguments.items() if isinstance(v, Tensor) and v.dim() > 0]
    name = call.random.choice([k for k in names if k != "cu_seqlens"] or names)
    call.arguments[name] = call.arguments[name].to_sparse()
    return True


def _wrong_option(call: Call) -> bool:
    wrong: dict[str, list[Any]] = {"ignore_index": [0.5, 2**63, True]}
    if call.is_divergences:
        wrong["outputs"] = ["reverse_kl", (), ("kl",), ["reverse_kl", "jsd"]]
    if call.is_loss:
        wrong |= {"beta": [0, -1, float("nan"), "1"], "alpha": [-1, float("inf")]}
        wrong |= {"variant": ["tdpo3"], "reduction": ["max"], "label_smoothing": [0.5, -0.1]}
    if call.linear:
        wrong |= {"chunk_bytes": [0, -5]}
    name = call.random.choice(list(wrong))
    call.arguments[name] = call.random.choice(wrong[name])
    return True


FAULTS: list[Callable[[Call], bool]] = [
    _label_outside,
    _other_dtype,
    _other_shape,
    _float_labels,
    _one_label_more,
    _reference_requires_grad,
    _vocabulary_not_contiguous,
    _no_tensor,
    _sparse,
    _wrong_option,
]


# --- a call and its verdict -----------------------------------------------------------------------


def _run(call: Call, module: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and gradients, in float64."""
    arguments = dict(call.arguments)
    names = [n for n in arguments if n in ("policy_logits", "policy_hidden", "policy_weight")]
    if call.linear and call.random.random() < 0.3:
        names = ["policy_hidden"]  # a frozen head
    # What is refused may not be able to require a gradient.
    usable = [n for n in names if isinstance(arguments[n], Tensor) and arguments[n].dtype in DTYPES]
    names = [n for n in usable if arguments[n].layout == torch.strided]
    if dtype is not None:
        arguments = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
        arguments.pop("inplace_backward", None)
    leaves = []
    for name in names:
        leaf = arguments[name].detach().requires_grad_()
        leaves.append(leaf)
        arguments[name] = leaf * 1 if arguments.get("inplace_backward") else leaf
    result = getattr(module, call.name)(**arguments)
    result = tuple(x for x in result if x is not None) if call.is_divergences else result
    if call.is_divergences:
        outputs = [x for x in result if x.requires_grad]
    else:
        outputs = [result.loss] if call.is_loss else [result.policy_logps, result.forward_kl]
    upstream = [torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream) if outputs else ()
    return [x.detach().double() for x in (*result, *gradients)]


def _compare(call: Call, ours: list[Tensor], wanted: list[Tensor]) -> None:
    half = call.dtype in (torch.bfloat16, torch.float16)
    rtol = 1e-10 if call.dtype == torch.float64 else 2e-5
    outputs = 8 if call.is_loss else 3
    if call.is_divergences:
        outputs = len(call.arguments["outputs"])
    # What is left of large numbers that cancel has their errors.
    sizes = [float(y.nan_to_num(0, 0, 0).abs().max()) if y.numel() else 0.0 for y in wanted]
    largest = max(1.0, *sizes[:outputs])
    for number, (x, y) in enumerate(zip(ours, wanted, strict=True)):
        stored = torch.finfo(call.dtype).eps if half and number >= outputs else rtol
        atol = 0.1 * rtol * largest if number < outputs else stored * max(1.0, sizes[number])
        if x.shape != y.shape or not torch.allclose(x, y, rtol=stored, atol=atol, equal_nan=True):
            raise WrongAnswerError(
                f"output {number} differs: {x.flatten()[:5]} and {y.flatten()[:5]}"
            )


def one(seed: int) -> str:
    """Make the call of a seed; what became of it. Raises WrongAnswerError."""
    call = Call(seed)
    fault = call.random.choice(FAULTS) if call.random.random() < 0.25 else None
    is_wrong = fault is not None and fault(call)
    state = call.random.getstate()
    try:
        ours = _run(call, tdpo_ext)
    except EXPECTED as error:
        if not is_wrong:
            raise WrongAnswerError(f"refused, but nothing is wrong: {error}") from error
        if not ARGUMENT.search(str(error)):
            raise WrongAnswerError(f"the error names no argument: {error}") from error
        return "refused"
    if is_wrong:
        assert fault is not None
        raise WrongAnswerError(f"answered in spite of {fault.__name__}")
    call.random.setstate(state)
    wanted = _run(call, tdpo_ext.reference, torch.float64)
    _compare(call, ours, wanted)
    return "answered"


def backends() -> list[str]:
    return [*(kernels.core.instruction_sets() if kernels.core else []), "fallback"]


def fuzz(seeds: Any, names: list[str]) -> Counter[str]:
    """One call for each seed, on the backends in turn."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        name = names[seed % len(names)]
        variable = {native.INSTRUCTION_SET_VARIABLE: name} if name != "fallback" else {}
        core = kernels.core if name != "fallback" else None
        with mock.patch.object(kernels, "core", core), mock.patch.dict(os.environ, variable):
            try:
                outcomes[one(seed)] += 1
            except Exception as error:
                call = Call(seed)
                said = f"seed {seed} on {name}: {call.name} {call.dtype}: {error!r}"
                raise WrongAnswerError(said) from error
    return outcomes


def _until(seconds: float, start: int) -> Any:
    end, seed = time.monotonic() + seconds, start
    while time.monotonic() < end:
        yield seed
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--only", type=int, help="make the call of this seed")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = [given.only] if given.only is not None else _until(given.seconds, given.seed)
    try:
        outcomes = fuzz(seeds, backends())
    except WrongAnswerError as error:
        print(error)
        sys.exit(1)
    print(f"{sum(outcomes.values())} calls: {dict(outcomes)}")


if __name__ == "__main__":
    main()
