"""A vocabulary sharded over processes, against whole logits in float64 (``distributed_worker``)."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import small_integers
import torch
import torch.distributed as dist
from distributed_worker import relative, same_bits, scenario
from half_width import take_half_width
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import tdpo_ext
from tdpo_ext import checks, distributed, reference
from tdpo_ext.distributed import shard_of
from tdpo_ext.fused_head.head import Head
from tdpo_ext.fused_head.problem import Problem
from tdpo_ext.token_statistics import kernels

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
VOCABULARY, TOKENS, PAIRS, WIDTH = 240, 7, 2, 16
LOGPS = ("policy_logps", "reference_logps")


def own(whole: Tensor, dim: int = -1) -> Tensor:
    """This process's part, contiguous and its own memory."""
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def group() -> Any:
    return dist.group.WORLD


@contextlib.contextmanager
def core(replacement: Any) -> Iterator[None]:
    before, kernels.core = kernels.core, replacement
    try:
        yield
    finally:
        kernels.core = before


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the collectives that are called."""
    names = (GATHER, "all_reduce")
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def logits(vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference, labels; a row that is ignored holds NaN."""
    ref = 2 * torch.randn(2 * PAIRS, TOKENS, vocabulary, dtype=torch.float64)
    policy = ref + torch.randn_like(ref)
    policy[1] = ref[1] + 1e-3 * torch.randn_like(ref[1])  # a small KL
    labels = torch.randint(0, vocabulary, (2 * PAIRS, TOKENS))
    labels[0, 2] = labels[2, 1] = -100
    policy[0, 2], ref[2, 1] = torch.nan, torch.inf
    return policy, ref, labels


def stats_errors(policy: Tensor, ref: Tensor, labels: Tensor, run: Any) -> dict[str, float]:
    """``run(policy, reference, labels, upstream)`` -> statistics, this process's gradient."""
    upstream = torch.randn(2, *labels.shape)
    ours, gradient = run(policy, ref, labels, upstream)
    leaf = policy.double().clone().requires_grad_()
    truth = reference.token_stats(leaf, ref.double(), labels)
    total = (truth.policy_logps * upstream[0] + truth.forward_kl * upstream[1]).sum()
    (expected,) = torch.autograd.grad(total, leaf)
    expected = torch.where(labels[..., None] == -100, 0, expected)
    errors = {name: relative(getattr(ours, name), getattr(truth, name)) for name in truth._fields}
    errors["kl of close rows"] = relative(ours.forward_kl[1], truth.forward_kl[1])
    errors["gradient"] = relative(gradient, own(expected))
    errors["bits"] = max(map(same_bits, ours))
    return errors


def sharded_stats(
    function: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, float]:
    policy, ref, labels = logits()

    def run(policy: Tensor, ref: Tensor, labels: Tensor, upstream: Tensor) -> Any:
        leaf = own(policy).requires_grad_()
        given = leaf * 1 if options.get("inplace_backward") else leaf
        stats = function(given, own(ref), labels, process_group=group(), **options)
        total = (stats.policy_logps * upstream[0] + stats.forward_kl * upstream[1]).sum()
        return stats, torch.autograd.grad(total, leaf)[0]

    return stats_errors(policy.to(dtype), ref.to(dtype), labels, run)


@scenario
def logits_float32() -> dict[str, float]:
    return sharded_stats(tdpo_ext.token_stats)


@scenario
def logits_float64() -> dict[str, float]:
    return sharded_stats(tdpo_ext.token_stats, torch.float64)


@scenario
def logits_bfloat16() -> dict[str, float]:
    return sharded_stats(tdpo_ext.token_stats, torch.bfloat16)


@scenario
def logits_of_small_integers() -> dict[str, float]:
    """Nothing is rounded in log p, so no number of processes shows."""
    whole = small_integers.logits(9, VOCABULARY)
    leaf = own(whole.policy).float().requires_grad_()
    stats = tdpo_ext.token_stats(
        leaf, own(whole.reference).float(), whole.labels, process_group=group()
    )
    g_m, g_k = whole.upstream.float()
    total = (stats.policy_logps * g_m + stats.forward_kl * g_k).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    exact = [torch.equal(getattr(stats, x).double(), getattr(whole, x)) for x in LOGPS]
    return {
        "bits": float(not all(exact)),
        "forward_kl": relative(stats.forward_kl, whole.forward_kl),
        "gradient": relative(gradient, own(whole.gradient)),
    }


@scenario
def logits_in_place() -> dict[str, float]:
    return sharded_stats(tdpo_ext.token_stats, inplace_backward=True)


@scenario
def logits_in_plain_pytorch() -> dict[str, float]:
    with core(None):
        return sharded_stats(tdpo_ext.token_stats)


@scenario
def logits_on_emulated_cuda() -> dict[str, float]:
    with core(emulated.EmulatedCore()):
        return sharded_stats(tdpo_ext.token_stats)


@scenario
def logits_compiled() -> dict[str, float]:
    compiled = torch.compile(tdpo_ext.token_stats, fullgraph=True, backend="aot_eager")
    return sharded_stats(compiled)


@scenario
def op_of_a_shard() -> dict[str, float]:
    policy, ref, labels = (x.nan_to_num(0, 0, 0) if x.is_floating_point() else x for x in logits())
    shard = shard_of(group(), VOCABULARY // dist.get_world_size())
    arguments = (own(policy.float()), own(ref.float()), labels, -100, *shard)
    torch.library.opcheck(torch.ops.tdpo_ext.token_stats_of_shard.default, arguments)
    return {"opcheck": 0.0}


DIFFERENTIABLE = ("forward_kl", "reverse_kl", "policy_entropy")


def sharded_divergences(
    dtype: torch.dtype = torch.float32, labelled: bool = True, **options: Any
) -> dict[str, float]:
    """As ``sharded_stats``, of everything that ``token_divergences`` gives."""
    policy, ref, labels = (x.to(dtype) if x.is_floating_point() else x for x in logits())
    names = checks.DIVERGENCES if labelled else checks.DIVERGENCES[2:]
    rows = {"labels": labels} if labelled else {"mask": labels != -100}
    upstream = torch.randn(3, *labels.shape)

    def results(function: Any, policy: Tensor, ref: Tensor, **given: Any) -> Any:
        leaf = policy.clone().requires_grad_()
        logits = leaf * 1 if given.get("inplace_backward") else leaf
        found = function(logits, ref, **rows, outputs=names, **given)
        total = sum(
            (getattr(found, name) * weight).sum()
            for name, weight in zip(DIFFERENTIABLE, upstream, strict=True)
        )
        return found, torch.autograd.grad(total, leaf)[0]

    function = tdpo_ext.token_divergences
    ours, gradient = results(function, own(policy), own(ref), process_group=group(), **options)
    truth, expected = results(reference.token_divergences, policy.double(), ref.double())
    expected = torch.where(labels[..., None] == -100, 0, expected)
    errors = {name: relative(getattr(ours, name), getattr(truth, name)) for name in names}
    for name in ("forward_kl", "reverse_kl"):
        pair = (getattr(x, name)[1] for x in (ours, truth))
        errors["kl of close rows"] = max(errors.get("kl of close rows", 0), relative(*pair))
    errors["gradient"] = relative(gradient, own(expected))
    errors["bits"] = max(same_bits(getattr(ours, name)) for name in names)
    return errors


@scenario
def divergences_float32() -> dict[str, float]:
    return sharded_divergences()


@scenario
def divergences_float64_without_labels() -> dict[str, float]:
    return sharded_divergences(torch.float64, labelled=False)


@scenario
def divergences_in_place_without_labels() -> dict[str, float]:
    return sharded_divergences(labelled=False, inplace_backward=True)


@scenario
def divergences_in_plain_pytorch() -> dict[str, float]:
    with core(None):
        return sharded_divergences()


@scenario
def divergences_on_emulated_cuda() -> dict[str, float]:
    with core(emulated.EmulatedCore()):
        return sharded_divergences(labelled=False)


@scenario
def op_of_divergences_of_a_shard() -> dict[str, float]:
    policy, ref, labels = (x.nan_to_num(0, 0, 0) if x.is_floating_point() else x for x in logits())
    shard = shard_of(group(), VOCABULARY // dist.get_world_size())
    arguments = (own(policy.float()), own(ref.float()), labels, -100, False, *shard)
    torch.library.opcheck(torch.ops.tdpo_ext.token_divergences_of_shard.default, arguments)
    return {"opcheck": 0.0}


@scenario
def logits_as_dtensors_of_uneven_width() -> dict[str, float]:
    policy, ref, labels = logits(VOCABULARY + 1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def run(policy: Tensor, ref: Tensor, labels: Tensor, upstream: Tensor) -> Any:
        whole = distribute_tensor(policy, mesh, [Shard(2)]).requires_grad_()
        given = distribute_tensor(labels, mesh, [Replicate()])
        stats = tdpo_ext.token_stats(whole, distribute_tensor(ref, mesh, [Shard(2)]), given)
        total = (stats.policy_logps * upstream[0] + stats.forward_kl * upstream[1]).sum()
        (gradient,) = torch.autograd.grad(total, whole)
        assert isinstance(gradient, DTensor)
        return stats, gradient.to_local()

    return stats_errors(policy.float(), ref.float(), labels, run)


@scenario
def collectives_of_logits() -> dict[str, float]:
    policy, ref, labels = logits()
    leaf = own(policy.float()).requires_grad_()
    with counted() as calls:
        stats = tdpo_ext.token_stats(leaf, own(ref.float()), labels, process_group=group())
        forward = [*calls]
        (stats.policy_logps + stats.forward_kl).sum().backward()
    assert forward == [GATHER], forward
    assert calls == forward, calls
    return {"collectives": 0.0}


def loss_errors(ours: Any, gradients: list[Tensor], truth: Any, expected: Any) -> dict[str, float]:
    errors = {name: relative(getattr(ours, name), getattr(truth, name)) for name in truth._fields}
    for number, (gradient, wanted) in enumerate(zip(gradients, expected, strict=True)):
        errors[f"gradient {number}"] = relative(gradient, wanted)
    errors["bits"] = same_bits(ours.loss)
    return errors


@scenario
def loss_from_logits() -> dict[str, float]:
    policy, ref, labels = (x.nan_to_num(0, 0, 0) if x.is_floating_point() else x for x in logits())
    leaf, whole = own(policy.float()).requires_grad_(), policy.clone().requires_grad_()
    module = tdpo_ext.TDPOLoss(beta=0.3, process_group=group())
    ours = module(leaf, own(ref.float()), labels)
    ours.loss.backward()
    truth = reference.tdpo_loss(whole, ref, labels, beta=0.3)
    truth.loss.backward()
    return loss_errors(ours, [leaf.grad], truth, [own(whole.grad)])


def heads(vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "policy_hidden": normal(2 * PAIRS, TOKENS, WIDTH),
        "policy_weight": normal(vocabulary, WIDTH) / 4,
        "reference_hidden": normal(2 * PAIRS, TOKENS, WIDTH),
        "reference_weight": normal(vocabulary, WIDTH) / 4,
        "policy_bias": normal(vocabulary),
        "reference_bias": normal(vocabulary),
    }


LEAVES = ("policy_hidden", "policy_weight", "policy_bias")


def label_ids(vocabulary: int = VOCABULARY) -> Tensor:
    labels = torch.randint(0, vocabulary, (2 * PAIRS, TOKENS))
    labels[:, :2] = -100
    return labels


def of_whole_head(given: dict[str, Tensor], labels: Tensor, **options: Any) -> Any:
    whole = {n: x.double().clone().requires_grad_(n in LEAVES) for n, x in given.items()}
    truth = reference.linear_tdpo_loss(**whole, labels=labels, **options)
    truth.loss.backward()
    parts = [whole[name].grad for name in LEAVES]
    return truth, [parts[0], own(parts[1], 0), own(parts[2], 0)]


def sharded_head(
    dtype: torch.dtype = torch.float32, function: Any = tdpo_ext.linear_tdpo_loss, **options: Any
) -> dict[str, float]:
    given, labels = heads(), label_ids()
    given = {name: x.to(dtype) for name, x in given.items()}
    parts = {n: x.clone() if "hidden" in n else own(x, 0) for n, x in given.items()}
    parts = {n: x.requires_grad_(n in LEAVES) for n, x in parts.items()}
    ours = function(**parts, labels=labels, process_group=group(), **options)
    ours.loss.backward()
    options.pop("chunk_bytes", None)
    gradients = [parts[name].grad for name in LEAVES]
    errors = loss_errors(ours, gradients, *of_whole_head(given, labels, **options))
    errors["bits"] = max(errors["bits"], same_bits(gradients[0]))
    return errors


@scenario
def head_tdpo2() -> dict[str, float]:
    return sharded_head(chunk_bytes=20_000)


@scenario
def head_tdpo1() -> dict[str, float]:
    return sharded_head(variant="tdpo1", logit_softcap=3.0, logit_scale=0.7)


@scenario
def head_bfloat16() -> dict[str, float]:
    return sharded_head(torch.bfloat16)


@scenario
def head_float16_with_a_scale_of_each_process() -> dict[str, float]:
    """Upstream gradients of 1 and of the number below it, whose powers of 2 differ."""
    given, labels = heads(), label_ids()
    given = {name: x.half() for name, x in given.items() if "bias" not in name}
    whole = {name: x.double().requires_grad_("policy" in name) for name, x in given.items()}
    parts = {name: x if "hidden" in name else own(x, 0) for name, x in given.items()}
    parts = {name: x.clone().requires_grad_("policy" in name) for name, x in parts.items()}
    with pytest.MonkeyPatch.context() as patch:
        take_half_width(patch)
        ours = tdpo_ext.linear_token_stats(**parts, labels=labels, process_group=group())
        weight = 1.0 if dist.get_rank() == 0 else 1 - 2.0**-24
        (weight * ours.policy_logps.sum()).backward()
    truth = reference.linear_token_stats(**whole, labels=labels)
    truth.policy_logps.sum().backward()
    states, rows = (x.grad for x in (whole["policy_hidden"], whole["policy_weight"]))
    return {
        "policy_logps": relative(ours.policy_logps, truth.policy_logps),
        "gradient of hidden states": relative(parts["policy_hidden"].grad, states),
        "gradient of weights": relative(parts["policy_weight"].grad, own(rows, 0)),
    }


@scenario
def head_in_plain_pytorch() -> dict[str, float]:
    with core(None):
        return sharded_head(chunk_bytes=20_000)


@scenario
def head_on_emulated_cuda() -> dict[str, float]:
    with core(emulated.EmulatedCore()):
        return sharded_head()


@scenario
def head_compiled() -> dict[str, float]:
    compiled = torch.compile(tdpo_ext.linear_tdpo_loss, fullgraph=True, backend="aot_eager")
    return sharded_head(function=compiled)


def dtensor_head(function: Any) -> dict[str, float]:
    given, labels = heads(VOCABULARY + 1), label_ids(VOCABULARY + 1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = {}
    for name, x in given.items():
        placement = Replicate() if "hidden" in name else Shard(0)
        parts[name] = distribute_tensor(x.float(), mesh, [placement]).requires_grad_(name in LEAVES)
    ours = function(**parts, labels=labels)
    ours.loss.backward()
    gradients = [parts[name].grad.to_local() for name in LEAVES]
    return loss_errors(ours, gradients, *of_whole_head(given, labels))


@scenario
def head_as_dtensors_of_uneven_width() -> dict[str, float]:
    return dtensor_head(tdpo_ext.linear_tdpo_loss)


@scenario
def chunks_in_plain_pytorch_are_the_same_for_parts_of_any_width() -> dict[str, float]:
    """Each is gathered by all processes together, which would wait for each other for ever."""
    rank, size = dist.get_rank(), dist.get_world_size()
    width = 100 if rank < size - 1 else 7
    shard = distributed.Shard(group().group_name, 100 * rank, 100 * (size - 1) + 7)
    head = Head(torch.zeros(500, WIDTH), torch.zeros(width, WIDTH), None, 1.0, 0.0)
    problem = Problem(head, head, torch.zeros(500, dtype=torch.int64), -100, 50_000, shard)
    plan = problem.plan(slice(0, 500), 2, whole_rows=True)
    assert 1 < plan.rows < 500
    return {"bits": same_bits(torch.tensor(plan.rows))}


def sharded_head_divergences(
    dtype: torch.dtype = torch.float32, labelled: bool = True, **options: Any
) -> dict[str, float]:
    """``linear_token_divergences``, of everything that it gives."""
    given, labels = heads(), label_ids()
    given = {name: x.to(dtype) for name, x in given.items()}
    parts = {n: x.clone() if "hidden" in n else own(x, 0) for n, x in given.items()}
    names = checks.DIVERGENCES if labelled else checks.DIVERGENCES[2:]
    rows = {"labels": labels} if labelled else {"mask": labels != -100}
    upstream = torch.randn(3, *labels.shape, dtype=torch.float64)
    upstream[:2, 0] = 0  # the entropy's gradient needs no reference

    def results(function: Any, tensors: dict[str, Tensor], **options: Any) -> Any:
        tensors = {n: x.clone().requires_grad_(n in LEAVES) for n, x in tensors.items()}
        found = function(**tensors, **rows, outputs=names, **options)
        total = sum(
            (getattr(found, name) * weight).sum()
            for name, weight in zip(DIFFERENTIABLE, upstream, strict=True)
        )
        return found, torch.autograd.grad(total, [tensors[name] for name in LEAVES])

    function = tdpo_ext.linear_token_divergences
    ours, gradients = results(function, parts, process_group=group(), **options)
    options.pop("chunk_bytes", None)
    whole = {name: x.double() for name, x in given.items()}
    truth, wanted = results(reference.linear_token_divergences, whole, **options)
    wanted = [wanted[0], own(wanted[1], 0), own(wanted[2], 0)]
    errors = {name: relative(getattr(ours, name), getattr(truth, name)) for name in names}
    errors["gradient"] = max(relative(a, b) for a, b in zip(gradients, wanted, strict=True))
    errors["bits"] = max(same_bits(x) for x in (*(getattr(ours, n) for n in names), gradients[0]))
    return errors


@scenario
def head_divergences_by_tiles() -> dict[str, float]:
    return sharded_head_divergences(chunk_bytes=20_000, logit_softcap=3.0)


@scenario
def head_divergences_float64_without_labels() -> dict[str, float]:
    return sharded_head_divergences(torch.float64, labelled=False)


@scenario
def head_divergences_bfloat16() -> dict[str, float]:
    return sharded_head_divergences(torch.bfloat16)


@scenario
def head_divergences_in_plain_pytorch() -> dict[str, float]:
    with core(None):
        return sharded_head_divergences(chunk_bytes=20_000, labelled=False)


@scenario
def head_divergences_on_emulated_cuda() -> dict[str, float]:
    with core(emulated.EmulatedCore()):
        return sharded_head_divergences(labelled=False)


@scenario
def head_divergences_as_dtensors_of_uneven_width() -> dict[str, float]:
    """Labels and mask as DTensors too."""
    given, labels = heads(VOCABULARY + 1), label_ids(VOCABULARY + 1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = {}
    for name, x in given.items():
        placement = Replicate() if "hidden" in name else Shard(0)
        parts[name] = distribute_tensor(x.float(), mesh, [placement])
    mask = distribute_tensor(labels != -100, mesh, [Replicate()])
    ours = tdpo_ext.linear_token_divergences(**parts, mask=mask)
    truth = reference.linear_token_divergences(**given, mask=labels != -100)
    return {n: relative(getattr(ours, n), getattr(truth, n)) for n in DIFFERENTIABLE[:2]}


@scenario
def collectives_of_a_head() -> dict[str, float]:
    given = {n: x.float() if "hidden" in n else own(x.float(), 0) for n, x in heads().items()}
    given = {n: x.requires_grad_(n in LEAVES) for n, x in given.items()}
    with counted() as calls:
        output = tdpo_ext.linear_tdpo_loss(
            **given, labels=label_ids(), process_group=group(), chunk_bytes=20_000
        )
        forward = [*calls]
        output.loss.backward()
    assert forward == [GATHER], forward
    assert calls[1:] == ["all_reduce"], calls
    return {"collectives": 0.0}


@scenario
def vocabulary_over_one_dimension_of_a_mesh() -> dict[str, float]:
    """Half of the processes each have the vocabulary between them, and tokens of their own."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "vocabulary"))
    policy, ref, labels = logits()
    tokens, place = mesh["data"].get_local_rank(), mesh["vocabulary"].get_local_rank()
    policy, ref, labels = policy[tokens].float(), ref[tokens].float(), labels[tokens]
    parts = [x.chunk(2, -1)[place].contiguous() for x in (policy, ref)]
    sharded = [DTensor.from_local(x, mesh, [Replicate(), Shard(1)], run_check=False) for x in parts]
    ours = tdpo_ext.token_stats(*sharded, labels)
    vocabulary_group = mesh["vocabulary"].get_group()
    again = tdpo_ext.token_stats(*parts, labels, process_group=vocabulary_group)
    truth = reference.token_stats(policy.double(), ref.double(), labels)
    errors = {n: relative(getattr(ours, n), getattr(truth, n)) for n in truth._fields}
    errors["bits"] = 0.0 if all(map(torch.equal, ours, again)) else 1.0
    return errors


def raises(kind: type[Exception], words: str, call: Any) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        call()


@scenario
def what_cannot_be_right_raises_everywhere() -> dict[str, float]:
    policy, ref, labels = (x.float() if x.is_floating_point() else x for x in logits())
    z, r, rank = own(policy), own(ref), dist.get_rank()
    stats, shared = tdpo_ext.token_stats, {"process_group": group()}

    def uneven() -> None:
        stats(z[..., : 10 + rank], r[..., : 10 + rank], labels * 0, **shared)

    raises(ValueError, "equally wide", uneven)
    # Seen by themselves, the third part and the fourth are where they would be among equal ones.
    part, zeros = torch.zeros(2, 3, [9, 11, 10, 10][rank]), torch.zeros(2, 3, dtype=torch.int64)
    raises(ValueError, "equally wide", lambda: stats(part, part, zeros, **shared))
    one, order = labels.clone(), labels.flip(1) if rank else labels
    one[3, 3] = rank
    for other in (one, order):
        raises(ValueError, "same on all", functools.partial(stats, z, r, other, **shared))
    wrong = labels.masked_fill(labels > 0, VOCABULARY)
    raises(IndexError, "[0, 240)", lambda: stats(z, r, wrong, process_group=group()))
    raises(TypeError, "ProcessGroup", lambda: stats(z, r, labels, process_group="world"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded, tokens = (distribute_tensor(policy, mesh, [Shard(dim)]) for dim in (2, 0))
    raises(ValueError, "reference_logits must be a DTensor", lambda: stats(sharded, ref, labels))
    raises(ValueError, "sharded on the vocabulary", lambda: stats(tokens, tokens, labels))
    raises(ValueError, "must be placed like", lambda: stats(sharded, tokens, labels))
    divided = distribute_tensor(labels, mesh, [Shard(0)])
    raises(ValueError, "labels must be one", lambda: stats(sharded, sharded, divided))
    raises(
        ValueError,
        "process_group and DTensors",
        lambda: stats(sharded, sharded, labels, process_group=group()),
    )
    narrow = distribute_tensor(policy[..., :1].contiguous(), mesh, [Shard(2)])
    raises(ValueError, "without an entry", lambda: stats(narrow, narrow, labels * 0))
    given = {name: x.float() for name, x in heads().items()}
    weight = distribute_tensor(given["policy_weight"], mesh, [Shard(0)])
    hidden = given["policy_hidden"]
    head = tdpo_ext.linear_tdpo_loss
    raises(ValueError, "use attach_tdpo", lambda: head(hidden, weight, hidden, weight, labels))
    everywhere = distribute_tensor(hidden, mesh, [Replicate()])
    raises(
        ValueError,
        "policy_hidden is a DTensor",
        lambda: head(everywhere, given["policy_weight"], hidden, given["policy_weight"], labels),
    )
    plain = given["policy_weight"]
    raises(ValueError, "of one vocabulary", lambda: head(everywhere, weight, hidden, plain, labels))
    return {"errors": 0.0}
