"""What the kernels allocate, and whose threads they use, measured in processes of their own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from inputs import labels_for, pair_of_logits
from processes import measure, needs_core, needs_linux
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tdpo_ext


class LargestAllocation(TorchDispatchMode):
    """The sizes of the tensors that ops make, largest last."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.data_ptr() not in given:
                self.elements.append(x.numel())
        self.elements.sort()
        return result


@pytest.mark.parametrize("inplace", [False, True])
def test_no_op_makes_a_tensor_of_logits_size_but_the_gradient(compiled, inplace):
    policy, reference = pair_of_logits(4, 9, 1000)
    logits, labels = policy.requires_grad_() * 1, labels_for(policy)
    with LargestAllocation() as forward:
        loss = tdpo_ext.TDPOLoss(inplace_backward=inplace)(logits, reference, labels).loss
    assert forward.elements[-1] <= 4 * 9 * 8  # what is saved for backward: eight numbers a token
    with LargestAllocation() as backward:
        torch.autograd.grad(loss, logits)
    whole = [size for size in backward.elements if size >= 1000]
    assert whole == ([] if inplace else [logits.numel()])


@needs_linux
@needs_core
def test_the_process_grows_by_one_gradient_and_no_more():
    """What C++ allocates shows in the peak of the process."""
    sizes = measure("""
        rows, vocabulary = 400, 150000
        size = rows * vocabulary * 4
        warm = torch.randn(8, 4000, requires_grad=True)
        first = torch.zeros(8, dtype=torch.long)
        tdpo_ext.token_stats(warm, warm.detach(), first).policy_logps.sum().backward()
        logits = torch.zeros(rows, vocabulary)
        logits.normal_()
        reference = torch.zeros(rows, vocabulary).normal_()
        leaf = torch.zeros(1, requires_grad=True)
        labels = torch.randint(0, vocabulary, (rows,))
        grown = {}
        before = peak()
        with torch.no_grad():
            tdpo_ext.token_stats(logits, reference, labels)
        grown["forward"] = (peak() - before) / size
        for inplace in (True, False):
            policy = logits.requires_grad_() if not inplace else logits
            policy.requires_grad_()
            before = peak()
            stats = tdpo_ext.token_stats(policy, reference, labels, inplace_backward=inplace)
            total = stats.policy_logps.sum() + 0.3 * stats.forward_kl.sum()
            gradient = torch.autograd.grad(total, policy)
            grown[str(inplace)] = (peak() - before) / size
        print(json.dumps(grown))
    """)
    assert sizes["forward"] < 0.05
    assert sizes["True"] < 0.05
    assert 0.9 < sizes["False"] < 1.05


@functools.cache
def of_a_new_process() -> dict[str, Any]:
    """What importing loads, then threads, then runtimes: each must not have happened before."""
    return measure("""
        import sys
        names = ("transformers", "trl", "datasets", "matplotlib", "sklearn", "pandas", "rich")
        loaded = [name for name in names if name in sys.modules]
        torch.set_num_threads(1)
        x = torch.randn(64, 40000)
        labels = torch.zeros(64, dtype=torch.long)
        count = lambda: len(os.listdir("/proc/self/task"))
        threads = {"before": count()}
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            tdpo_ext.token_stats(x, x, labels)
            threads[str(number)] = count()
        names = ("libgomp", "libomp", "libiomp")
        lines = open("/proc/self/maps").read().splitlines()
        paths = {line.split()[-1] for line in lines if any(name in line for name in names)}
        runtimes = sorted(os.path.realpath(path) for path in paths)
        print(json.dumps({"loaded": loaded, "threads": threads, "runtimes": runtimes}))
    """)


@needs_linux
@needs_core
def test_one_openmp_runtime():
    assert len(of_a_new_process()["runtimes"]) == 1, of_a_new_process()["runtimes"]


@needs_linux
@needs_core
def test_the_thread_count_follows_torch():
    """A second thread appears with set_num_threads(2), and no sooner."""
    threads = of_a_new_process()["threads"]
    assert threads["1"] == threads["before"]
    assert threads["2"] == threads["before"] + 1
    assert threads["4"] == threads["before"] + 3


@needs_linux
def test_importing_needs_torch_alone():
    assert of_a_new_process()["loaded"] == []


@pytest.mark.parametrize("shape", [(40, 3000), (1, 70000), (3, 70000)])
def test_the_number_of_threads_changes_no_bit(compiled, shape):
    policy, reference = pair_of_logits(*shape)
    labels = labels_for(policy, 0.3)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        z = policy.clone().requires_grad_()
        stats = tdpo_ext.token_stats(z, reference, labels)
        total = (stats.policy_logps + 0.3 * stats.forward_kl).sum()
        results.append((*stats, *torch.autograd.grad(total, z)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
