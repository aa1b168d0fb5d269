"""Bad input: an error that names the argument, and inputs that are left as they were."""

from __future__ import annotations

import re

import pytest
import torch

import tdpo_ext
from tdpo_ext import checks
from tdpo_ext.distributed import Shard
from tdpo_ext.token_statistics import kernels

B2, T, V = 4, 5, 7


def arguments() -> dict[str, object]:
    return {
        "policy_logits": torch.randn(B2, T, V),
        "reference_logits": torch.randn(B2, T, V),
        "labels": torch.randint(0, V, (B2, T)),
    }


def packed(**changes: object) -> dict[str, object]:
    return {
        "policy_logits": torch.randn(20, V),
        "reference_logits": torch.randn(20, V),
        "labels": torch.randint(0, V, (20,)),
        "cu_seqlens": torch.tensor([0, 5, 10, 15, 20]),
        **changes,
    }


def with_label(value: int, later: int = 0) -> torch.Tensor:
    labels = torch.randint(0, V, (B2, T))
    labels[2, 3], labels[3, 1] = value, later
    return labels


INTEGERS = torch.zeros(B2, T, V, dtype=torch.int64)
OF_TOKEN_STATS = {
    "shapes differ": (
        {"reference_logits": torch.randn(B2, T, V + 1)},
        ValueError,
        "reference_logits",
    ),
    "dtypes differ": (
        {"reference_logits": torch.randn(B2, T, V).bfloat16()},
        TypeError,
        "reference_logits",
    ),
    "integer logits": ({"policy_logits": INTEGERS}, TypeError, "policy_logits"),
    "complex logits": ({"policy_logits": INTEGERS.to(torch.cfloat)}, TypeError, "policy_logits"),
    "sparse logits": (
        {"policy_logits": torch.randn(B2, T, V).to_sparse()},
        TypeError,
        "policy_logits",
    ),
    "no tensor": ({"policy_logits": [[0.0]]}, TypeError, "policy_logits"),
    "no vocabulary": (
        {"policy_logits": torch.randn(B2, T, 0), "reference_logits": torch.randn(B2, T, 0)},
        ValueError,
        "policy_logits.*V >= 1",
    ),
    "no dimensions": ({"policy_logits": torch.tensor(0.0)}, ValueError, "policy_logits"),
    "last dimension not contiguous": (
        {"policy_logits": torch.randn(B2, V, T).transpose(1, 2)},
        ValueError,
        "policy_logits.*contiguous",
    ),
    "reference requires grad": (
        {"reference_logits": torch.randn(B2, T, V, requires_grad=True)},
        ValueError,
        "reference_logits.*detach",
    ),
    "another device": (
        {"reference_logits": torch.randn(B2, T, V, device="meta")},
        ValueError,
        "reference_logits.*device",
    ),
    "labels float": ({"labels": torch.zeros(B2, T)}, TypeError, "labels"),
    "labels bool": ({"labels": torch.zeros(B2, T, dtype=torch.bool)}, TypeError, "labels"),
    "labels of another shape": (
        {"labels": torch.zeros(B2, T - 1, dtype=torch.int64)},
        ValueError,
        "labels",
    ),
    "labels transposed": (
        {"labels": torch.zeros(T, B2, dtype=torch.int64)},
        ValueError,
        "labels must have the shape",
    ),
    "labels on another device": (
        {"labels": torch.zeros(B2, T, dtype=torch.int64, device="meta")},
        ValueError,
        "labels must be on the device",
    ),
    "label too large": ({"labels": with_label(V)}, IndexError, f"labels.*got {V}"),
    "every label too large": ({"labels": torch.full((B2, T), V)}, IndexError, f"labels.*got {V}"),
    "the first of two": ({"labels": with_label(V, V + 1)}, IndexError, f"labels.*got {V}$"),
    "label negative": ({"labels": with_label(-1)}, IndexError, "labels.*got -1"),
    "label huge": ({"labels": with_label(2**40)}, IndexError, "labels"),
    "ignore_index too large": ({"ignore_index": 2**63}, ValueError, "ignore_index"),
    "ignore_index no int": ({"ignore_index": 0.5}, TypeError, "ignore_index"),
    "ignore_index a bool": ({"ignore_index": False}, TypeError, "ignore_index"),
}

OF_LOSS = {
    "odd batch": (
        {
            "policy_logits": torch.randn(3, T, V),
            "reference_logits": torch.randn(3, T, V),
            "labels": torch.zeros(3, T, dtype=torch.int64),
        },
        ValueError,
        "policy_logits.*even",
    ),
    "two dimensions": (packed(cu_seqlens=None), ValueError, "policy_logits.*cu_seqlens"),
    "both kinds of labels": (
        {"shift_labels": torch.zeros(B2, T, dtype=torch.int64)},
        ValueError,
        "labels.*shift_labels.*both",
    ),
    "neither kind of labels": ({"labels": None}, ValueError, "labels.*shift_labels.*neither"),
    "shift_labels float": (
        {"labels": None, "shift_labels": torch.zeros(B2, T)},
        TypeError,
        "shift_labels",
    ),
    "cu_seqlens descend": (
        packed(cu_seqlens=torch.tensor([0, 10, 5, 15, 20])),
        ValueError,
        "cu_seqlens.*ascend",
    ),
    "cu_seqlens end early": (
        packed(cu_seqlens=torch.tensor([0, 5, 10, 15, 19])),
        ValueError,
        "cu_seqlens.*20",
    ),
    "cu_seqlens end late": (
        packed(cu_seqlens=torch.tensor([0, 5, 10, 15, 21])),
        ValueError,
        "cu_seqlens.*20",
    ),
    "cu_seqlens start late": (
        packed(cu_seqlens=torch.tensor([1, 5, 10, 15, 20])),
        ValueError,
        "cu_seqlens",
    ),
    "cu_seqlens of an odd number of sequences": (
        packed(cu_seqlens=torch.tensor([0, 5, 10, 20])),
        ValueError,
        "cu_seqlens",
    ),
    "cu_seqlens float": (
        packed(cu_seqlens=torch.tensor([0.0, 5, 10, 15, 20])),
        TypeError,
        "cu_seqlens",
    ),
    "cu_seqlens of two dimensions": (
        packed(cu_seqlens=torch.tensor([[0, 5, 10, 15, 20]])),
        ValueError,
        "cu_seqlens must have shape",
    ),
    "cu_seqlens on another device": (
        packed(cu_seqlens=torch.zeros(5, dtype=torch.int64, device="meta")),
        ValueError,
        "cu_seqlens must be on the device",
    ),
    "cu_seqlens with padded logits": (
        {"cu_seqlens": torch.tensor([0, 5, 20])},
        ValueError,
        "policy_logits.*cu_seqlens",
    ),
    "unknown variant": ({"variant": "tdpo3"}, ValueError, "variant.*tdpo3"),
    "unknown reduction": ({"reduction": "batchmean"}, ValueError, "reduction.*batchmean"),
    "beta 0": ({"beta": 0.0}, ValueError, "beta"),
    "beta negative": ({"beta": -0.1}, ValueError, "beta"),
    "beta NaN": ({"beta": float("nan")}, ValueError, "beta"),
    "beta infinite": ({"beta": float("inf")}, ValueError, "beta"),
    "beta a bool": ({"beta": True}, TypeError, "beta"),
    "beta a string": ({"beta": "0.1"}, TypeError, "beta"),
    "alpha infinite": ({"alpha": float("inf")}, ValueError, "alpha"),
    "alpha negative": ({"alpha": -0.1}, ValueError, "alpha"),
    "label_smoothing too large": ({"label_smoothing": 0.5}, ValueError, "label_smoothing"),
    "label_smoothing negative": ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
}


def check_raises(function, changes, error, message):
    given = {**arguments(), **changes}
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error) as caught:
        function(**given)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            assert torch.equal(value.to_dense(), kept[name].to_dense()), f"{name} was changed"


@pytest.mark.parametrize("case", OF_TOKEN_STATS)
def test_token_stats_refuses(case):
    check_raises(tdpo_ext.token_stats, *OF_TOKEN_STATS[case])


@pytest.mark.parametrize("case", OF_TOKEN_STATS | OF_LOSS)
def test_tdpo_loss_refuses(case):
    check_raises(tdpo_ext.tdpo_loss, *(OF_TOKEN_STATS | OF_LOSS)[case])


# The backends themselves look at labels; all else is checked before one is chosen.
OF_LABELS = [case for case, (_, error, _) in OF_TOKEN_STATS.items() if error is IndexError]


@pytest.mark.parametrize("function", [tdpo_ext.token_stats, tdpo_ext.tdpo_loss])
@pytest.mark.parametrize("case", OF_LABELS)
def test_every_backend_refuses_labels(on_host, case, function):
    # The first label of a sequence is never scored; the others are.
    check_raises(function, *OF_TOKEN_STATS[case])


@pytest.mark.parametrize("case", OF_TOKEN_STATS)
def test_the_reference_refuses_the_same(case):
    check_raises(tdpo_ext.reference.token_stats, *OF_TOKEN_STATS[case])


@pytest.mark.parametrize("case", OF_LOSS)
def test_the_reference_loss_refuses_the_same(case):
    check_raises(tdpo_ext.reference.tdpo_loss, *OF_LOSS[case])


def test_the_reference_has_no_inplace_backward():
    check_raises(
        tdpo_ext.reference.token_stats, {"inplace_backward": True}, ValueError, "inplace_backward"
    )


@pytest.mark.parametrize("name", tdpo_ext.reference.__all__)
def test_the_reference_takes_the_whole_vocabulary(name):
    if name == "pair_loss":
        return
    function = getattr(tdpo_ext.reference, name)
    given = [torch.randn(4, 3, 5) for _ in range(2)]
    if name.startswith("linear"):
        given = [torch.randn(4, 3, 2), torch.randn(5, 2)] * 2
    labels = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="whole vocabulary on one process, got a process_group"):
        function(*given, labels, process_group=object())


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(1, T, V).expand(B2, T, V),
        torch.randn(200).as_strided((B2, T, V), (4 * V, V - 1, 1)),
    ],
    ids=["expanded", "overlapping"],
)
def test_inplace_backward_needs_memory_of_its_own(on_host, logits):
    changes = {"policy_logits": logits, "inplace_backward": True}
    check_raises(tdpo_ext.token_stats, changes, ValueError, "inplace_backward")


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(T, V).as_strided((1, T, 1, V), (0, V, 0, 1)),
        torch.randn(1, 0, V).expand(B2, 0, V),
    ],
    ids=["dimensions of 1", "no elements"],
)
def test_inplace_backward_takes_strides_of_nothing(on_host, logits):
    """Where a stride is of no consequence it may be 0."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    policy, reference = logits.requires_grad_(), torch.zeros_like(logits)
    stats = tdpo_ext.token_stats(policy * 1, reference, labels)
    ours = tdpo_ext.token_stats(policy, reference, labels, inplace_backward=True)
    wanted, gradient = (torch.autograd.grad(x.policy_logps.sum(), policy)[0] for x in (stats, ours))
    assert torch.equal(gradient, wanted)


ROWS, ENTRIES = torch.randn(2 * B2, T, V), torch.randn(B2, T, 2 * V)


@pytest.mark.parametrize(
    ("policy", "reference"),
    [
        (ROWS[1 : B2 + 1], ROWS[:B2]),
        (ROWS[:B2], ROWS[1 : B2 + 1]),
        (ENTRIES[..., 1 : V + 1], ENTRIES[..., :V]),
        (ROWS[:B2, :-1], ROWS[:B2, 1:]),
        (ROWS[:B2], ROWS[2:3].expand(B2, T, V)),
        (ROWS[:B2, :B2], ROWS[:B2, :B2].transpose(0, 1)),
    ],
    ids=[
        "a row on",
        "a row back",
        "an entry on",
        "a token back",
        "one sequence for all",
        "transposed",
    ],
)
def test_inplace_backward_spares_a_reference_that_shares_memory(on_host, policy, reference):
    labels = torch.zeros(policy.shape[:-1], dtype=torch.int64)
    given = {"policy_logits": policy, "reference_logits": reference, "labels": labels}
    for function in (tdpo_ext.token_stats, tdpo_ext.token_divergences, tdpo_ext.tdpo_loss):
        with pytest.raises(ValueError, match=r"inplace_backward.*reference_logits"):
            function(**given, inplace_backward=True)
    outputs = torch.ops.tdpo_ext.token_stats(*given.values(), -100)
    upstream = torch.ones(2, *labels.shape)
    with pytest.raises(ValueError, match=r"inplace_backward.*reference_logits"):
        torch.ops.tdpo_ext.token_stats_backward_(*given.values(), outputs[3], *upstream, -100)


@pytest.mark.parametrize(
    ("policy", "reference"),
    [
        (ROWS[::2], ROWS[1::2]),
        (ROWS[:B2], ROWS[B2:]),
        (ENTRIES[..., V:], ENTRIES[..., :V]),
        (ROWS[:B2].transpose(0, 1), ROWS[B2:]),
        (ROWS[:B2], ROWS[:B2]),
    ],
    ids=["every other sequence", "halves", "halves of entries", "other strides", "the same"],
)
def test_inplace_backward_takes_parts_of_one_tensor(on_host, policy, reference):
    if policy.shape != reference.shape:
        reference = reference.view(policy.shape)
    labels = torch.zeros(policy.shape[:-1], dtype=torch.int64)
    gradients = []
    for inplace in (False, True):
        # Views of one copy of the memory, as the two given ones are of theirs.
        whole = policy.detach().as_strided((policy.untyped_storage().size() // 4,), (1,), 0).clone()
        z, r = (
            whole.as_strided(x.shape, x.stride(), x.storage_offset()) for x in (policy, reference)
        )
        stats = tdpo_ext.token_stats(
            z.requires_grad_(), r.detach(), labels, inplace_backward=inplace
        )
        gradients += torch.autograd.grad((stats.policy_logps + stats.forward_kl).sum(), z)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("ignore_index", [-(2**63), 2**63 - 1])
def test_any_int64_may_be_the_ignore_index(on_host, ignore_index):
    given = arguments()
    given["labels"][1, 2] = ignore_index
    stats = tdpo_ext.token_stats(**given, ignore_index=ignore_index)
    assert stats.policy_logps[1, 2] == 0
    assert (stats.policy_logps == 0).sum() == 1


@pytest.mark.parametrize("ignore_index", [-(2**63), 2**32])
def test_an_ignore_index_that_int32_does_not_hold_ignores_nothing(on_host, ignore_index):
    """PyTorch compares it with int32 labels as the 0 that its lower half is."""
    policy, reference, labels = arguments().values()
    labels[1] = 0

    def results(module, labels):
        z = policy.clone().requires_grad_()
        options = {"ignore_index": ignore_index}
        stats = module.token_stats(z, reference, labels, **options)
        divergences = module.token_divergences(z, reference, labels, **options)
        options |= {"average_log_prob": True, "shift_labels": labels}
        loss = module.tdpo_loss(z, reference, **options).loss
        total = loss + sum(x.sum() for x in (*stats[::2], *divergences[2:4]))
        return (*stats, *divergences[2:4], loss, *torch.autograd.grad(total, z))

    for module in (tdpo_ext, tdpo_ext.reference):
        pairs = zip(*(results(module, x) for x in (labels, labels.int())), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        with pytest.raises(IndexError, match="got -1"):  # which is the lower half of 2^32 - 1
            module.token_stats(policy, reference, with_label(-1).int(), ignore_index=2**32 - 1)
    hidden, weight = torch.randn(2, B2, T, 3), torch.randn(V, 3)
    for module in (tdpo_ext, tdpo_ext.reference):
        given = hidden[0], weight, hidden[1], weight
        wide, narrow = (
            module.linear_token_stats(*given, x, ignore_index=ignore_index)
            for x in (labels, labels.int())
        )
        assert all(map(torch.equal, wide, narrow))
    part = Shard("", 1, V)
    assert torch.equal(part.own_labels(labels.int(), ignore_index), labels - 1)
    narrow = kernels.labels_with_header(labels.int(), ignore_index)
    assert torch.equal(narrow, kernels.labels_with_header(labels, ignore_index))


def test_a_vocabulary_that_cuda_cannot_count_is_refused():
    """No memory holds one: looked at without a row of it."""
    checks.check_cuda_vocabulary(torch.zeros(1).expand(2**30), 2**30)
    with pytest.raises(ValueError, match=r"policy_logits.*1073741824"):
        checks.check_cuda_vocabulary(torch.zeros(1).expand(2**30 + 1), 2**30)


@pytest.mark.parametrize("name", ["variant", "reduction", "beta", "alpha", "label_smoothing"])
def test_the_module_refuses_when_it_is_made(name):
    wrong = {
        "variant": "TDPO2",
        "reduction": "avg",
        "beta": 0,
        "alpha": -1,
        "label_smoothing": 0.5,
    }
    with pytest.raises(ValueError, match=name):
        tdpo_ext.TDPOLoss(**{name: wrong[name]})


@pytest.mark.parametrize("module", [tdpo_ext.TDPOLoss, tdpo_ext.LinearTDPOLoss])
def test_the_modules_refuse_an_ignore_index_when_they_are_made(module):
    with pytest.raises(TypeError, match="ignore_index"):
        module(ignore_index=-100.0)


PAIRS = {
    "odd": (torch.zeros(3), torch.zeros(3), ValueError, "logps_margin"),
    "two dimensions": (torch.zeros(2, 2), torch.zeros(2, 2), ValueError, "logps_margin"),
    "shapes differ": (torch.zeros(4), torch.zeros(2), ValueError, "seq_kl"),
    "integers": (torch.zeros(4), torch.zeros(4, dtype=torch.int64), TypeError, "seq_kl"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pair_loss_refuses(case):
    margin, seq_kl, error, message = PAIRS[case]
    with pytest.raises(error, match=message):
        tdpo_ext.pair_loss(margin, seq_kl)


def test_an_unknown_instruction_set_is_refused(on_processor, monkeypatch):
    monkeypatch.setenv("TDPO_EXT_INSTRUCTION_SET", "avx1024")
    given = arguments()
    with pytest.raises(ValueError, match=r"TDPO_EXT_INSTRUCTION_SET.*avx1024"):
        tdpo_ext.token_stats(**given)
