"""Divergences from hidden states: values, gradients, what they cost, and what torch asks of ops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from half_width import take_half_width
from head_checks import (
    NAMES,
    OPTIONS,
    CountedProducts,
    arguments_of,
    bound_of,
    oracle_heads,
    requiring_grad,
)
from inputs import DTYPES, labels_for, numpy64, relative_error
from torch.autograd import gradcheck, gradgradcheck

import tdpo_ext
from tdpo_ext.checks import DIVERGENCES
from tdpo_ext.distributed import IGNORED
from tdpo_ext.fused_head import products

OPS = torch.ops.tdpo_ext
DIFFERENTIABLE = ("policy_logps", "forward_kl", "reverse_kl", "policy_entropy")
OF_ROWS = DIVERGENCES[2:]
CHUNKS = [1, 20_000, 150_000, 10**9]  # a token and 64 entries at a time, some, more, everything
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def upstream_of(rows, dtype, labelled=True):
    """Random weights; among the rows are some of each kind of gradient."""
    names = DIFFERENTIABLE if labelled else DIFFERENTIABLE[1:]
    upstream = {name: torch.randn(rows, dtype=products.accumulation_dtype(dtype)) for name in names}
    upstream["forward_kl"][4:7] = 0
    upstream["reverse_kl"][5:9] = 0  # rows 5 and 6 need no reference
    upstream["policy_entropy"][7:9] = 0  # rows 7 and 8 need statistics alone
    if labelled:
        upstream["policy_logps"][8] = upstream["forward_kl"][8]  # and 8 no policy
    for weight in upstream.values():
        weight[9] = 0  # nothing
    return upstream


def results_of(given, upstream, labels=None, module=tdpo_ext, **options):
    """All outputs, and the gradients of their sum with the weights of ``upstream``, by name."""
    given, leaves = requiring_grad(given)
    names = OF_ROWS if labels is None else DIVERGENCES
    found = module.linear_token_divergences(**given, labels=labels, outputs=names, **options)
    total = sum((getattr(found, name) * weight).sum() for name, weight in upstream.items())
    return found, torch.autograd.grad(total, leaves)


def truth_of(given, upstream, labels, kept):
    """The oracle's outputs by name, and its gradients of hidden states, weight and bias."""
    policy, reference = oracle_heads(given)
    z, r = policy.logits(), reference.logits()
    truth = oracle.divergences(z, r)
    values = {name: getattr(truth, name) * kept for name in OF_ROWS}
    weights = {name: numpy64(weight)[:, None] for name, weight in upstream.items()}
    of_rows = zip(DIFFERENTIABLE[1:], truth.gradients, strict=True)
    dz = sum(weights[name] * derivative for name, derivative in of_rows)
    if labels is not None:
        flat = labels.cpu().numpy()
        stats = oracle.token_stats(z, r, flat)
        values |= {"policy_logps": stats[0], "reference_logps": stats[1]}
        zero = np.zeros(len(flat))
        dz = dz + oracle.token_stats_gradient(z, z, flat, weights["policy_logps"][:, 0], zero)
    return values, policy.gradients(dz * kept[:, None])


def check(given, labels, bound, rows=11, factor=1.0):
    """Every output and gradient beside the oracle; without labels some rows are masked."""
    dtype = given["policy_hidden"].dtype
    upstream = upstream_of(rows, dtype, labels is not None)
    upstream = {name: factor * weight for name, weight in upstream.items()}
    mask = torch.arange(rows) % 7 != 3 if labels is None else None
    found, gradients = results_of(given, upstream, labels, mask=mask)
    kept = numpy64(mask if labels is None else labels != -100)
    values, wanted = truth_of(given, upstream, labels, kept)
    for name, value in values.items():
        ours = getattr(found, name)
        assert ours.dtype == products.accumulation_dtype(dtype)
        assert relative_error(ours, value) <= (1e-12 if dtype == torch.float64 else 1e-6), name
    for leaf, ours, theirs in zip(NAMES, gradients, wanted, strict=False):
        assert ours.dtype == dtype
        assert relative_error(ours.reshape(theirs.shape), theirs) <= bound, leaf
    return found


def labels_of(labelled, rows=11, vocabulary=131):
    if not labelled:
        return None
    return torch.randint(0, vocabulary, (rows,)).masked_fill(torch.arange(rows) == 3, -100)


LABELLED = pytest.mark.parametrize("labelled", [True, False], ids=["labels", "mask"])


@LABELLED
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_any_upstream_gradients(backend, dtype, options, labelled):
    for chunk_bytes in CHUNKS:
        given = arguments_of(11, dtype=dtype, chunk_bytes=chunk_bytes, **OPTIONS[options])
        check(given, labels_of(labelled), bound_of(dtype))


def test_rows_that_need_the_reference_alone_do_not_meet_the_policy(backend):
    """e^(r - max z), which cancels, would be infinite."""
    given = arguments_of(11, dtype=torch.float64, chunk_bytes=20_000, reference_bias=True)
    given["reference_bias"] += 2000
    labels, weights = labels_of(True), torch.randn(11, dtype=torch.float64)
    upstream = dict.fromkeys(("policy_logps", "forward_kl"), weights)
    _, gradients = results_of(given, upstream, labels)
    zero = torch.zeros(11, dtype=torch.float64)
    every = dict.fromkeys(DIFFERENTIABLE, zero) | upstream
    _, wanted = truth_of(given, every, labels, numpy64(labels != -100))
    for ours, theirs in zip(gradients, wanted, strict=False):
        assert relative_error(ours, theirs) <= 1e-11


@LABELLED
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_width_products(on_host, monkeypatch, dtype, options, labelled):
    """As on CUDA: the gradient of the logits is rounded before its products."""
    take_half_width(monkeypatch)
    for chunk_bytes in CHUNKS:
        given = arguments_of(11, dtype=dtype, chunk_bytes=chunk_bytes, **OPTIONS[options])
        check(given, labels_of(labelled), HALF[dtype])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("factor", [2.0**-10, -1.0, 2.0**4])
def test_float16_keeps_the_digits_of_gradients_of_any_size(on_host, monkeypatch, name, factor):
    """One output alone, whose gradient of the logits must neither vanish nor overflow."""
    take_half_width(monkeypatch)
    given = arguments_of(6, vocabulary=3000, dtype=torch.float16, chunk_bytes=10**6)
    for which in ("policy", "reference"):  # divergences from under 1 to some 100 nats
        given[f"{which}_hidden"] *= torch.tensor([[0.01], [2], [4], [4], [8], [32]]).half()
    labels = torch.arange(6)
    upstream = {name: torch.full((6,), factor)}
    found, gradients = results_of(given, upstream, labels)
    assert getattr(found, name).isfinite().all()
    policy, reference = oracle_heads(given)
    truth = oracle.divergences(policy.logits(), reference.logits())
    if name == "policy_logps":
        zero, one = np.zeros(6), np.ones(6)
        dz = oracle.token_stats_gradient(*[policy.logits()] * 2, labels.numpy(), one, zero)
    else:
        dz = truth.gradients[DIFFERENTIABLE.index(name) - 1]
    for ours, wanted in zip(gradients, policy.gradients(factor * dz), strict=False):
        # Subnormal results lose digits when they are stored.
        lost = 2.0**-25 * math.sqrt(wanted.size)
        error = np.linalg.norm(numpy64(ours) - wanted)
        assert error <= 2.0**-10 * np.linalg.norm(wanted) + lost


def test_infinite_divergences_without_upstream_gradient_leave_float16_its_range(
    on_host, monkeypatch
):
    """Infinity times 0 must not come into the scale that all tokens share."""
    take_half_width(monkeypatch)
    given = arguments_of(6, dtype=torch.float16, reference_bias=True)
    given["reference_bias"][100] = -math.inf
    upstream = {name: torch.full((6,), 2.0**-10) for name in ("forward_kl", "policy_entropy")}
    found, gradients = results_of(given, upstream)
    assert (found.reverse_kl == math.inf).all()
    policy, reference = oracle_heads(given)
    truth = oracle.divergences(policy.logits(), reference.logits())
    dz = 2.0**-10 * (truth.gradients[0] + truth.gradients[2])
    assert relative_error(gradients[0], policy.gradients(dz)[0]) <= 2.0**-10


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_vocabularies_and_ignored_tokens(backend, vocabulary, ignored):
    for chunk_bytes in CHUNKS:
        given = arguments_of(3, 4, vocabulary=vocabulary, chunk_bytes=chunk_bytes)
        mask = torch.rand(3, 4) >= ignored
        weights = {name: torch.randn(3, 4) for name in DIFFERENTIABLE[1:]}
        found, gradients = results_of(given, weights, mask=mask)
        flat = {name: weight.reshape(-1) for name, weight in weights.items()}
        values, wanted = truth_of(given, flat, None, numpy64(mask).reshape(-1))
        for name, value in values.items():
            ours = numpy64(getattr(found, name)).reshape(-1)
            np.testing.assert_allclose(ours, value, rtol=3e-6, atol=1e-7)  # of one entry it is 0
        for ours, theirs in zip(gradients, wanted, strict=False):
            error = np.linalg.norm(numpy64(ours).reshape(theirs.shape) - theirs)
            assert error <= 2e-6 * np.linalg.norm(theirs) + 1e-6
        assert not gradients[0][~mask].any()


@LABELLED
def test_the_chunk_size_changes_nothing_but_rounding(backend, labelled):
    given = arguments_of(11, vocabulary=700, policy_bias=True)
    labels, upstream = labels_of(labelled, vocabulary=700), upstream_of(11, torch.float32, labelled)
    results = []
    for chunk_bytes in [1, 3000, 10_000, 30_000, 100_000, 10**7, None]:
        found, gradients = results_of(given, upstream, labels, chunk_bytes=chunk_bytes)
        results.append([*(x for x in found if x is not None), *gradients])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert relative_error(a, numpy64(b)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_token_divergences_of_the_logits(backend, dtype):
    given = arguments_of(8, vocabulary=1000, dtype=dtype)
    labels = labels_for(torch.empty(8, 1000), 0.2)
    ours = tdpo_ext.linear_token_divergences(**given, labels=labels, outputs=DIVERGENCES)
    logits = [given[f"{x}_hidden"] @ given[f"{x}_weight"].T for x in ("policy", "reference")]
    wanted = tdpo_ext.token_divergences(*logits, labels, outputs=DIVERGENCES)
    bound = 1e-13 if dtype == torch.float64 else 1e-6
    for a, b in zip(ours, wanted, strict=True):
        assert relative_error(a, numpy64(b)) <= bound


def test_outputs_are_those_asked_for_and_statistics_those_of_linear_token_stats(backend):
    given, labels = arguments_of(4, 5), labels_for(torch.empty(4, 5, 131), 0.2)
    every = tdpo_ext.linear_token_divergences(**given, labels=labels, outputs=DIVERGENCES)
    stats = tdpo_ext.linear_token_stats(**given, labels=labels)
    for names in itertools.combinations(reversed(DIVERGENCES), 2):
        found = tdpo_ext.linear_token_divergences(**given, labels=labels, outputs=names)
        for name in DIVERGENCES:
            ours = getattr(found, name)
            if name not in names:
                assert ours is None
                continue
            assert ours.shape == (4, 5)
            torch.testing.assert_close(ours, getattr(every, name), rtol=3e-6, atol=1e-7)
            if set(names) <= set(stats._fields):
                assert torch.equal(ours, getattr(stats, name))


@LABELLED
@pytest.mark.parametrize("module", [tdpo_ext, tdpo_ext.reference], ids=["ours", "reference"])
def test_what_stands_at_tokens_left_out_changes_no_bit(backend, labelled, module):
    labels, upstream = labels_of(labelled), upstream_of(11, torch.float32, labelled)
    mask = torch.arange(11) != 3
    given, results = arguments_of(11, chunk_bytes=20_000), []
    for poison in (0.0, math.nan, math.inf):
        for name in ("policy_hidden", "reference_hidden"):
            given[name][~mask] = poison
        options = {} if labelled else {"mask": mask}
        found, gradients = results_of(given, upstream, labels, module, **options)
        results.append([*(x for x in found if x is not None), *gradients])
        assert not any(x[~mask].any() for x in (*results[-1][: len(upstream)], gradients[0]))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


def test_a_policy_that_is_its_reference_has_no_divergence(backend):
    given = arguments_of(6, reference_width=19, chunk_bytes=10_000)
    for name in ("hidden", "weight"):
        given[f"reference_{name}"] = given[f"policy_{name}"]
    found = tdpo_ext.linear_token_divergences(**given, outputs=OF_ROWS)
    assert not found.forward_kl.any()
    assert not found.reverse_kl.any()
    assert torch.equal(found.policy_entropy, found.reference_entropy)


def test_entries_that_one_side_excludes(backend):
    """A bias of -inf is a masked entry."""
    given = arguments_of(3, policy_bias=True, reference_bias=True, chunk_bytes=10_000)
    for bias, name in (("policy_bias", "forward_kl"), ("reference_bias", "reverse_kl")):
        changed = {**given, bias: given[bias].clone()}
        changed[bias][100] = -math.inf
        found = tdpo_ext.linear_token_divergences(**changed, outputs=OF_ROWS)
        for other in OF_ROWS:
            values = getattr(found, other)
            assert (values == math.inf if other == name else values.isfinite()).all()


@LABELLED
def test_no_tokens(backend, labelled):
    labels = torch.zeros(0, dtype=torch.int64) if labelled else None
    found, gradients = results_of(arguments_of(0), {"reverse_kl": torch.ones(0)}, labels)
    assert found.reverse_kl.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("labelled", [True, False])
def test_as_in_a_graph_that_is_captured(on_host, monkeypatch, labelled):
    """Where the host cannot tell kinds of rows apart, all are computed, and the same comes out."""
    labels, upstream = labels_of(labelled), upstream_of(11, torch.float32, labelled)
    options = {} if labelled else {"mask": torch.arange(11) != 3}
    given = arguments_of(11, chunk_bytes=20_000)
    plain = results_of(given, upstream, labels, **options)
    given["reference_hidden"][3] = math.nan
    monkeypatch.setattr("tdpo_ext.fused_head.problem.is_captured", lambda tensor: True)
    ours = results_of(given, upstream, labels, **options)
    for a, b in zip((*ours[0], *ours[1]), (*plain[0], *plain[1]), strict=True):
        assert (a is None and b is None) or relative_error(a, numpy64(b)) <= 2e-6


# --- what it costs --------------------------------------------------------------------------------

TOKENS, WIDTH, VOCABULARY = 12, 16, 640
# The outputs that have an upstream gradient: GEMM units of the logits that backward makes.
UNITS = {
    ("policy_entropy",): 1,
    ("policy_logps",): 1,
    ("policy_logps", "policy_entropy"): 1,
    ("policy_logps", "forward_kl"): 1,  # with equal weights p cancels
    ("forward_kl",): 2,
    ("reverse_kl",): 2,
    DIFFERENTIABLE: 2,
}


@pytest.mark.parametrize("left_out", [0, 6])
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)], ids=["hidden", "weight", "both"])
@pytest.mark.parametrize("names", UNITS, ids="-".join)
def test_units(on_host, monkeypatch, names, asked, left_out):
    given = arguments_of(TOKENS, vocabulary=VOCABULARY, width=WIDTH, reference_width=WIDTH)
    leaves = [given[NAMES[index]].requires_grad_() for index in asked]
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[:left_out] = -100
    counted = CountedProducts(monkeypatch, TOKENS - left_out, VOCABULARY, WIDTH)
    found = tdpo_ext.linear_token_divergences(**given, labels=labels, outputs=DIVERGENCES)
    assert counted.units() == 2
    torch.autograd.grad(sum(getattr(found, name).sum() for name in names), leaves)
    of_logits = 2 if on_host == "fallback" else UNITS[names]
    assert counted.units() == of_logits + len(asked)


def test_tokens_masked_or_without_gradient_cost_nothing(on_host, monkeypatch):
    given = arguments_of(TOKENS, vocabulary=VOCABULARY, width=WIDTH, reference_width=WIDTH)
    given, leaves = requiring_grad(given)
    counted = CountedProducts(monkeypatch, TOKENS, VOCABULARY, WIDTH)
    mask = torch.arange(TOKENS) % 2 == 0
    found = tdpo_ext.linear_token_divergences(**given, mask=mask)
    assert counted.units() == 2 / 2
    torch.autograd.grad(found.reverse_kl[: TOKENS // 2].sum(), leaves)
    assert counted.units() == 4 / 4
    with torch.no_grad():
        tdpo_ext.linear_token_divergences(**given)
    assert counted.units() == 2


# --- autograd, the ops, compilation ---------------------------------------------------------------


def small(labelled=True, **options):
    given = arguments_of(
        4, 2, vocabulary=7, width=3, reference_width=2, dtype=torch.float64, **options
    )
    labels = torch.randint(0, 7, (4, 2))
    labels[0, 1] = -100
    rows = {"labels": labels} if labelled else {"mask": labels != -100}
    return *requiring_grad(given), rows | {"outputs": DIFFERENTIABLE[not labelled :]}


@LABELLED
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(on_host, softcap, labelled):
    given, leaves, rows = small(labelled, policy_bias=True, logit_softcap=softcap)

    def function(*tensors, module=tdpo_ext):
        changed = {**given, **dict(zip(NAMES, tensors, strict=True))}
        found = module.linear_token_divergences(**changed, **rows)
        return tuple(x for x in found if x is not None)

    assert gradcheck(function, leaves)
    if on_host == "fallback":
        assert gradgradcheck(lambda *x: function(*x, module=tdpo_ext.reference), leaves)


def test_a_second_derivative_names_the_reference(on_host):
    given, leaves, rows = small()
    found = tdpo_ext.linear_token_divergences(**given, **rows)
    with pytest.raises(RuntimeError, match=r"tdpo_ext\.reference"):
        differentiate_twice(found.reverse_kl.sum(), leaves)


def differentiate_twice(value, leaves):
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    sum(g.square().sum() for g in gradients).backward()


@LABELLED
def test_the_reference_is_the_oracle(labelled):
    labels = labels_of(labelled)
    upstream = upstream_of(11, torch.float64, labelled)
    mask = None if labelled else torch.arange(11) != 3
    for options in OPTIONS.values():
        given = arguments_of(11, dtype=torch.float64, **options)
        found, gradients = results_of(
            given, upstream, labels, module=tdpo_ext.reference, mask=mask, chunk_bytes=1
        )
        kept = numpy64(torch.arange(11) != 3)
        values, wanted = truth_of(given, upstream, labels, kept)
        for name, value in values.items():
            assert relative_error(getattr(found, name), value) <= 1e-12, name
        for ours, theirs in zip(gradients, wanted, strict=False):
            assert relative_error(ours, theirs) <= 1e-12


def test_only_what_depends_on_the_policy_has_a_gradient(on_host):
    given, _ = requiring_grad(arguments_of(5))
    labels = torch.randint(0, 131, (5,))
    found = tdpo_ext.linear_token_divergences(**given, labels=labels, outputs=DIVERGENCES)
    with_gradient = [name for name in DIVERGENCES if getattr(found, name).requires_grad]
    assert tuple(with_gradient) == DIFFERENTIABLE


@LABELLED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(on_host, dtype, labelled):
    given = arguments_of(5, vocabulary=33, dtype=dtype, policy_bias=True, reference_bias=True)
    sides, parts = ("policy", "reference"), ("hidden", "weight", "bias")
    heads = [given[f"{side}_{part}"] for side, part in itertools.product(sides, parts)]
    labels = torch.tensor([1, -100, 3, 32, 0] if labelled else [-1, IGNORED, -1, -1, -1])
    ignored = -100 if labelled else IGNORED
    options = (0.7, 3.0, 1.0, 0.0, ignored, 10_000, "", 0, 0)
    arguments = (*heads, labels, *options, not labelled)
    torch.library.opcheck(OPS.linear_token_divergences.default, arguments)
    normalizers = OPS.linear_token_divergences(*arguments)[-1]
    upstream, wanted = torch.randn(4, 5), [True, True, True]
    arguments = (*heads, labels, normalizers, *upstream, *options, wanted)
    torch.library.opcheck(OPS.linear_token_divergences_backward.default, arguments)


@LABELLED
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(labelled, compiler):
    torch.compiler.reset()
    names = ("reverse_kl", "policy_entropy")

    def function(rows, **given):
        rows = {"labels" if labelled else "mask": rows}
        found = tdpo_ext.linear_token_divergences(**given, **rows, outputs=names)
        return (found.reverse_kl - 0.1 * found.policy_entropy).sum()

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for tokens in (5, 7, 9):
        given, leaves = requiring_grad(arguments_of(4, tokens, policy_bias=True))
        labels = labels_for(torch.empty(4, tokens, 131), 0.2)
        results = []
        for run in (compiled, function):
            loss = run(labels if labelled else labels != -100, **given)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for ours, wanted in zip(*results, strict=True):
            torch.testing.assert_close(ours, wanted)


def test_under_autocast_operands_get_its_dtype(on_host):
    given, leaves = requiring_grad(arguments_of(4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        ours = tdpo_ext.linear_token_divergences(**given).reverse_kl
    half = {name: x.bfloat16() for name, x in given.items()}
    assert torch.equal(ours, tdpo_ext.linear_token_divergences(**half).reverse_kl)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(ours.sum(), leaves))


def test_a_reference_computed_in_inference_mode(on_host):
    given, leaves = requiring_grad(arguments_of(4, 5, chunk_bytes=10_000))
    with torch.inference_mode():
        for name in ("reference_hidden", "reference_weight"):
            given[name] = given[name].clone()
    found = tdpo_ext.linear_token_divergences(**given)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.reverse_kl.sum(), leaves))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [tdpo_ext, tdpo_ext.reference])
def test_errors_name_the_argument(module):
    given, labels = arguments_of(3, vocabulary=9), torch.zeros(3, dtype=torch.int64)
    mask = torch.ones(3, dtype=torch.bool)

    def call(kind, words, **options):
        with pytest.raises(kind, match=words):
            module.linear_token_divergences(**given, **options)

    call(ValueError, "outputs must be some of", outputs=("reverse",))
    call(TypeError, "outputs must be a tuple", outputs="reverse_kl")
    call(ValueError, "policy_logps.*needs labels", outputs=("policy_logps",))
    call(ValueError, "labels and mask", labels=labels, mask=mask)
    call(TypeError, "mask must have dtype bool", mask=mask.long())
    call(ValueError, "mask must have the shape of logits or hidden states", mask=mask[:2])
    call(ValueError, "labels must have the shape", labels=labels[:2])
    call(IndexError, "labels must lie in", labels=torch.tensor([0, 1, 9]))
    call(IndexError, "labels must lie in", labels=torch.tensor([0, 1, -1]))


def test_a_label_outside_the_vocabulary_gives_nan_where_nobody_looks(cuda_unchecked, monkeypatch):
    monkeypatch.setattr("tdpo_ext.checks.check_label_range", lambda *x: None)
    labels = torch.tensor([0, 131, -1, -100])
    upstream = {"reverse_kl": torch.ones(4)}
    found, _ = results_of(arguments_of(4), upstream, labels)
    for name in DIVERGENCES:
        assert getattr(found, name).isnan().tolist() == [False, True, True, False]
