"""What only a card has: streams, graphs, memory of its own, more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import DTYPES, labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import stats_and_gradient
from torch import Tensor

import tdpo_ext
from tdpo_ext.token_statistics import native

CUDA = native.backends()["cuda"]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not CUDA["compiled"], reason=str(CUDA.get("reason"))),
]

# The gradient's last bit where it is stored.
STORED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def batch(
    *shape: int, dtype: torch.dtype = torch.float32, ignored: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    policy, reference = pair_of_logits(*shape, dtype=dtype)
    return policy.cuda(), reference.cuda(), labels_for(policy, ignored).cuda()


def upstream_for(labels: Tensor, dtype: torch.dtype) -> Tensor:
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(2, *labels.shape, dtype=accumulation).to(labels.device)


def loss_and_gradient(policy: Tensor, *arguments: Tensor, **options: Any) -> list[Tensor]:
    output = tdpo_ext.tdpo_loss(policy, *arguments, **options)
    return [*output, *torch.autograd.grad(output.loss, policy)]


def test_every_card_that_the_build_is_for_is_served():
    assert set(CUDA["devices"].values()) == {"served"}, CUDA["devices"]


# Short rows; long rows; few rows, which are split.
@pytest.mark.parametrize("shape", [(9, 40), (600, 5003), (3, 128256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_card_agrees_with_the_processor(dtype, shape):
    arguments = batch(*shape, dtype=dtype)
    upstream = upstream_for(arguments[2], dtype)
    stats, gradient = stats_and_gradient(*arguments, *upstream)
    host = [x.cpu() for x in (*arguments, *upstream)]
    wanted, wanted_gradient = stats_and_gradient(*host)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for ours, theirs in zip(stats, wanted, strict=True):
        assert relative_error(ours, numpy64(theirs)) <= bound
    assert relative_error(gradient, numpy64(wanted_gradient)) <= STORED.get(dtype, bound)


@pytest.mark.parametrize("shape", [(64, 40), (1000, 5003), (2, 128256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_run_to_run(dtype, shape):
    arguments = batch(*shape, dtype=dtype)
    upstream = upstream_for(arguments[2], dtype)
    first, gradient = stats_and_gradient(*arguments, *upstream)
    for _ in range(10):
        again, same_gradient = stats_and_gradient(*arguments, *upstream)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        assert torch.equal(same_gradient, gradient)


@pytest.mark.parametrize("shape", [(64, 40), (64, 5003)], ids=str)
def test_the_kernels_run_on_the_callers_stream(shape):
    """The inputs arrive late on it: whoever runs elsewhere reads zeros."""
    policy, reference, labels = batch(*shape)
    upstream = upstream_for(labels, policy.dtype)
    wanted, wanted_gradient = stats_and_gradient(policy, reference, labels, *upstream)
    late = torch.zeros_like(policy)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        late.copy_(policy)
        stats, gradient = stats_and_gradient(late, reference, labels, *upstream)
        torch.cuda._sleep(200_000_000)
        late.zero_()  # after the gradient, if that is on the stream too
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(stats, wanted, strict=True))
    assert torch.equal(gradient, wanted_gradient)


def packed_options(labels: Tensor) -> dict[str, Any]:
    """Boundaries of sequences, many of them: torch.isin, say, waits for the device from 37 on."""
    total = labels.numel()
    starts = torch.arange(0, total + 1, 4)
    assert starts[-1] == total
    return {"cu_seqlens": starts.cuda()}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_nothing_waits_for_the_device(variant, packed):
    policy, reference, labels = batch(240, 4, 300)
    options: dict[str, Any] = {"variant": variant, "average_log_prob": True}
    if packed:
        policy, reference, labels = policy.flatten(0, 1), reference.flatten(0, 1), labels.flatten()
        options |= packed_options(labels)
    policy.requires_grad_()
    wanted = loss_and_gradient(policy, reference, labels, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = tdpo_ext.tdpo_loss(policy, reference, labels, **options)
        (gradient,) = torch.autograd.grad(output.loss, policy)
        output.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output.loss, wanted[0])
    assert torch.equal(gradient, wanted[-1])


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("vocabulary", [40, 20011])
def test_forward_and_backward_replay_in_a_graph(vocabulary, packed, inplace):
    def fresh() -> tuple[Tensor, ...]:
        policy, reference, labels = batch(80, 4, vocabulary)
        if packed:
            return policy.flatten(0, 1), reference.flatten(0, 1), labels.flatten()
        return policy, reference, labels

    given = fresh()
    options: dict[str, Any] = {"inplace_backward": inplace}
    options |= packed_options(given[2]) if packed else {}
    given[0].requires_grad_()

    def step() -> Tensor:
        logits = given[0] * 1  # a model's: in place the gradient overwrites them
        loss = tdpo_ext.tdpo_loss(logits, *given[1:], **options).loss
        return torch.autograd.grad(loss, given[0])[0]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    for _ in range(3):
        with torch.no_grad():
            for static, new in zip(given, fresh(), strict=True):
                static.copy_(new)
        graph.replay()
        assert torch.equal(gradient, step())
        assert gradient.any()


def last_rows_alone(policy: Tensor, reference: Tensor, labels: Tensor, count: int) -> Any:
    rows = slice(-count, None)
    upstream = torch.ones(2, count, device="cuda")
    return stats_and_gradient(
        policy[rows].clone(), reference[rows].clone(), labels[rows], upstream[0], 0.5 * upstream[1]
    )


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_more_than_two_to_the_31_elements(inplace):
    rows, vocabulary = 17000, 128256
    assert rows * vocabulary > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory on the card")
    policy = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    reference = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    wanted, wanted_gradient = last_rows_alone(policy, reference, labels, 300)
    policy.requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, labels, inplace_backward=inplace)
    total = (stats.policy_logps + 0.5 * stats.forward_kl).sum()
    (gradient,) = torch.autograd.grad(total, policy)
    # 300 rows are split over blocks and 17000 are not, so the sums go in another order.
    for ours, theirs in zip(stats, wanted, strict=True):
        assert relative_error(ours[-300:], numpy64(theirs)) <= 1e-6
    assert relative_error(gradient[-300:], numpy64(wanted_gradient)) <= 2.0**-10


def peak_bytes(function: Callable[[], Any]) -> int:
    """What a function asks for at its highest, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = function()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del kept
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slices", [False, True], ids=["", "slices"])
def test_memory_is_a_few_numbers_a_token_and_one_gradient(dtype, slices):
    policy, reference, labels = batch(4, 257, 32000, dtype=dtype)
    if slices:
        policy, reference, labels = policy[:, :-1], reference[:, :-1], labels[:, :-1]
    policy.requires_grad_()
    size = policy.numel() * policy.element_size()
    numbers_of_tokens = 1024 * labels.numel()  # a kilobyte each, of up to 128

    def step(inplace: bool) -> Tensor:
        loss = tdpo_ext.tdpo_loss(
            policy, reference, shift_labels=labels, inplace_backward=inplace
        ).loss
        return torch.autograd.grad(loss, policy)[0]

    step(False)

    def forward() -> Tensor:
        return tdpo_ext.tdpo_loss(policy, reference, shift_labels=labels).loss

    assert peak_bytes(forward) <= numbers_of_tokens
    assert size <= peak_bytes(lambda: step(False)) <= size + numbers_of_tokens
    assert peak_bytes(lambda: step(True)) <= numbers_of_tokens


@pytest.mark.parametrize("shape", [(64, 40), (8, 20011)], ids=str)
def test_a_wrong_label_is_nan_and_the_context_survives(shape):
    policy, reference, labels = batch(*shape, ignored=0.0)
    labels[1], labels[2] = shape[-1], -1
    upstream = upstream_for(labels, policy.dtype)
    stats, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    torch.cuda.synchronize()
    wrong = torch.zeros(shape[0], dtype=torch.bool, device="cuda")
    wrong[1:3] = True
    for values in (*stats, gradient.sum(-1)):
        assert torch.equal(values.isnan(), wrong)


@pytest.mark.parametrize("bounds", [[0, 9, 4, 12, 16], [0, 4, 8, 12, 15], [1, 4, 8, 12, 16]])
def test_boundaries_that_are_wrong_give_nan(bounds):
    policy, reference, labels = batch(16, 40)
    cu_seqlens = torch.tensor(bounds, device="cuda")
    output = tdpo_ext.tdpo_loss(policy, reference, labels, cu_seqlens=cu_seqlens)
    assert output.loss.isnan()
    torch.cuda.synchronize()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_on_several_devices_are_refused(which):
    arguments = list(batch(8, 40))
    arguments[which] = arguments[which].cpu()
    with pytest.raises(ValueError, match=r"device.*(cuda:0|cpu)"):
        tdpo_ext.token_stats(*arguments)


@pytest.fixture
def other_card() -> Iterator[torch.device]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    assert torch.cuda.current_device() == 0
    yield torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0


def test_a_card_that_is_not_the_current_one(other_card):
    arguments = batch(64, 5003)
    upstream = upstream_for(arguments[2], torch.float32)
    wanted, wanted_gradient = stats_and_gradient(*arguments, *upstream)
    moved = [x.to(other_card) for x in (*arguments, *upstream)]
    stats, gradient = stats_and_gradient(*moved)
    assert gradient.device == other_card
    for ours, theirs in zip((*stats, gradient), (*wanted, wanted_gradient), strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_the_card(mode):
    """`reduce-overhead` replays CUDA graphs."""
    torch.compiler.reset()
    compiled = torch.compile(tdpo_ext.tdpo_loss, fullgraph=True, mode=mode)
    for _ in range(4):
        policy, reference, labels = batch(4, 6, 300)
        wanted = loss_and_gradient(policy.requires_grad_(), reference, labels)
        output = compiled(policy, reference, labels)
        ours = [*(x.clone() for x in output), *torch.autograd.grad(output.loss, policy)]
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)
    torch.compiler.reset()


def heads(*leading: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).cuda()

    return {
        "policy_hidden": normal(*leading, 64).requires_grad_(),
        "policy_weight": (normal(3001, 64) / 8).requires_grad_(),
        "reference_hidden": normal(*leading, 64),
        "reference_weight": normal(3001, 64) / 8,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_bytes", [100_000, None])
def test_the_fused_head_agrees_with_the_processor(dtype, reduction, chunk_bytes):
    given = heads(4, 9, dtype=dtype)
    labels = labels_for(torch.empty(4, 9, 3001), 0.3).cuda()
    options: dict[str, Any] = {"reduction": reduction, "chunk_bytes": chunk_bytes}
    results = []
    for device in ("cuda", "cpu"):
        moved = {name: x.detach().to(device) for name, x in given.items()}
        leaves = [moved[name].requires_grad_() for name in ("policy_hidden", "policy_weight")]
        output = tdpo_ext.linear_tdpo_loss(**moved, shift_labels=labels.to(device), **options)
        results.append([output.loss, *torch.autograd.grad(output.loss, leaves)])
    for ours, wanted in zip(*results, strict=True):
        # dz is rounded as well, before its products.
        assert relative_error(ours, numpy64(wanted)) <= 2 * STORED.get(dtype, 1e-6)


def test_the_fused_head_replays_in_a_graph():
    """All rows are kept then, also those that are ignored."""
    given = heads(4, 9)
    labels = labels_for(torch.empty(4, 9, 3001), 0.3).cuda()
    leaves = [given["policy_hidden"], given["policy_weight"]]

    def step() -> tuple[Tensor, ...]:
        loss = tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels, reduction="none").loss
        return torch.autograd.grad(loss.sum(), leaves)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for ours, wanted in zip(captured, step(), strict=True):
        assert relative_error(ours, numpy64(wanted)) <= STORED[torch.bfloat16]
