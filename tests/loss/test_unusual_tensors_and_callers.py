"""Unusual tensors and unusual callers: a clear error or a right answer, never a crash.

What is plainly wrong (dtypes, shapes, options) is in test_errors.py; strides are in
kernels/test_shapes_strides_masks.py.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch
from inputs import labels_for, pair_of_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import tdpo_ext

V, H = 37, 8


def logits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    policy, reference = pair_of_logits(4, 5, V)
    return policy, reference, labels_for(policy, 0.3)


def heads(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "policy_hidden": torch.randn(4, 5, H),
        "policy_weight": torch.randn(V, H),
        "reference_hidden": torch.randn(4, 5, H),
        "reference_weight": torch.randn(V, H),
        "labels": torch.randint(0, V, (4, 5)),
    }


def loss_of(policy: Tensor, reference: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return tdpo_ext.tdpo_loss(policy, reference, labels, **options).loss


def gradient_of(policy: Tensor, reference: Tensor, labels: Tensor, **options: Any) -> Tensor:
    policy = policy.detach().requires_grad_()
    return torch.autograd.grad(loss_of(policy, reference, labels, **options), policy)[0]


def assert_equal(ours: Any, wanted: Any) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


# --- layouts that are not dense -------------------------------------------------------------------

NOT_DENSE = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("which", ["policy_logits", "reference_logits", "labels"])
def test_tensors_that_are_not_dense_are_named(kind, which):
    given = dict(zip(("policy_logits", "reference_logits", "labels"), logits(), strict=True))
    given[which] = NOT_DENSE[kind](given[which])
    for module in (tdpo_ext, tdpo_ext.reference):
        with pytest.raises(TypeError, match=f"{which} must be a dense tensor"):
            module.token_stats(**given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("which", ["policy_hidden", "policy_weight", "reference_weight", "labels"])
def test_heads_that_are_not_dense_are_named(kind, which):
    given = heads()
    given[which] = NOT_DENSE[kind](given[which])
    with pytest.raises(TypeError, match=f"{which} must be a dense tensor"):
        tdpo_ext.linear_token_stats(**given)


@pytest.mark.filterwarnings("ignore")
def test_quantised_float8_and_complex_logits_are_named():
    policy, reference, labels = logits()
    quantised = torch.quantize_per_tensor(policy, 0.1, 0, torch.qint8)
    for wrong in (quantised, policy.to(torch.float8_e4m3fn), policy.to(torch.cfloat)):
        with pytest.raises(TypeError, match="policy_logits must have dtype float32"):
            tdpo_ext.token_stats(wrong, reference, labels)


# --- tensors that are not what their strides say --------------------------------------------------


class Wrapper(Tensor):
    """Looks contiguous; what it hands to an op is another tensor, with strides of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        return function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


def with_odd_strides(x: Tensor) -> Tensor:
    odd = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert odd.stride(-1) != 1
    return odd


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_subclass_may_hide_other_strides(on_host, which):
    given = list(logits())
    wanted = tdpo_ext.token_stats(*given)
    given[which] = Wrapper(with_odd_strides(given[which]))
    assert_equal(tdpo_ext.token_stats(*given), wanted)


def test_in_place_such_a_subclass_is_refused(on_host):
    policy, reference, labels = logits()
    _, _, _, normalizers = torch.ops.tdpo_ext.token_stats(policy, reference, labels, -100)
    upstream = torch.ones(2, 4, 5)
    with pytest.raises(ValueError, match="contiguous in their last dimension"):
        torch.ops.tdpo_ext.token_stats_backward_(
            with_odd_strides(policy), reference, labels, normalizers, *upstream, -100
        )


def test_zeros_without_memory_are_zeros(on_host):
    """PyTorch's own lazy zeros: what an op gets for them has stride 0."""
    policy, reference, labels = logits()
    lazy = torch._efficientzerotensor(4, 5, V)
    zeros = torch.zeros(4, 5, V)
    assert_equal(
        tdpo_ext.token_stats(lazy, reference, labels),
        tdpo_ext.token_stats(zeros, reference, labels),
    )
    assert torch.equal(gradient_of(policy, lazy, labels), gradient_of(policy, zeros, labels))


def test_lazily_negated_tensors(on_host):
    policy, reference, labels = logits()
    assert_equal(
        tdpo_ext.token_stats(torch._neg_view(policy), reference, torch._neg_view(-labels)),
        tdpo_ext.token_stats(-policy, reference, labels),
    )


class Plain(Tensor):
    pass


def test_subclasses_and_parameters_are_tensors(on_host):
    policy, reference, labels = logits()
    wanted = gradient_of(policy, reference, labels)
    assert torch.equal(gradient_of(torch.nn.Parameter(policy), reference, labels), wanted)
    ours = gradient_of(policy.as_subclass(Plain), reference.as_subclass(Plain), labels)
    assert torch.equal(ours.as_subclass(Tensor), wanted)


def test_an_expanded_policy_gets_the_sum_of_its_gradients(on_host):
    policy, reference, labels = logits()
    row = policy[:1].clone().requires_grad_()
    loss_of(row.expand(4, 5, V), reference, labels).backward()
    wanted = gradient_of(row.expand(4, 5, V).contiguous(), reference, labels)
    torch.testing.assert_close(row.grad, wanted.sum(0, keepdim=True))


def test_rows_that_overlap_in_memory_are_read_as_they_are(on_host):
    memory, (_, reference, labels) = torch.randn(200), logits()
    overlapping = memory.as_strided((4, 5, V), (7, 3, 1))
    ours = tdpo_ext.token_stats(overlapping, reference, labels)
    wanted = tdpo_ext.token_stats(overlapping.contiguous(), reference, labels)
    torch.testing.assert_close(ours, wanted)


def test_labels_of_any_strides(on_host):
    policy, reference, labels = logits()
    wanted = tdpo_ext.token_stats(policy, reference, labels)
    assert_equal(tdpo_ext.token_stats(policy, reference, labels.T.contiguous().T), wanted)
    spread = torch.full((8, 10), 10**12)
    spread[::2, ::2] = labels
    assert_equal(tdpo_ext.token_stats(policy, reference, spread[::2, ::2]), wanted)


# --- tensors without numbers ----------------------------------------------------------------------


def losses_of_shapes(make: Any, make_labels: Any) -> list[tuple[Tensor, Tensor]]:
    found = []
    policy = make(4, 5, V).requires_grad_()
    loss = loss_of(policy, make(4, 5, V), make_labels(4, 5))
    found.append((policy, *torch.autograd.grad(loss, policy)))
    hidden, weight = make(4, 5, H).requires_grad_(), make(V, H).requires_grad_()
    arguments = (hidden, weight, make(4, 5, H), make(V, H), make_labels(4, 5))
    for chunk_bytes in (None, 1):
        loss = tdpo_ext.linear_tdpo_loss(*arguments, chunk_bytes=chunk_bytes).loss
        found += zip((hidden, weight), torch.autograd.grad(loss, (hidden, weight)), strict=True)
    return found


def test_meta_tensors_give_shapes():
    found = losses_of_shapes(
        lambda *shape: torch.empty(shape, device="meta"),
        lambda *shape: torch.empty(shape, device="meta", dtype=torch.int64),
    )
    assert all(g.shape == x.shape and g.device.type == "meta" for x, g in found)


def test_fake_tensors_give_shapes():
    with FakeTensorMode():
        found = losses_of_shapes(torch.randn, lambda *shape: torch.zeros(shape, dtype=torch.int64))
    assert all(g.shape == x.shape and g.dtype == x.dtype for x, g in found)


# --- who asks for gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("wanted", range(8))
def test_every_combination_of_heads_that_require_grad(on_host, wanted):
    names = ("policy_hidden", "policy_weight", "policy_bias")
    chosen = [name for bit, name in enumerate(names) if wanted >> bit & 1]
    given = {**heads(), "policy_bias": torch.randn(V)}
    results = []
    for module in (tdpo_ext, tdpo_ext.reference):
        leaves = {name: given[name].clone().requires_grad_() for name in chosen}
        loss = module.linear_tdpo_loss(**{**given, **leaves}).loss
        assert loss.requires_grad == bool(chosen)
        gradients = torch.autograd.grad(loss, list(leaves.values())) if chosen else ()
        results.append((loss.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_does_not_require_grad_gets_no_graph(on_host):
    policy, reference, labels = logits()
    assert not loss_of(policy, reference, labels, inplace_backward=True).requires_grad
    with torch.inference_mode():
        policy = policy.clone()
    assert loss_of(policy, reference, labels).isfinite()


# --- what stands around it ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_it(on_host, reentrant):
    policy, reference, labels = logits()
    leaf = policy.clone().requires_grad_()
    checkpoint(loss_of, leaf, reference, labels, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, gradient_of(policy, reference, labels))
    given = heads()
    gradients = []
    for around in (lambda f, *x: checkpoint(f, *x, use_reentrant=reentrant), lambda f, *x: f(*x)):
        leaves = [given[x].clone().requires_grad_() for x in ("policy_hidden", "policy_weight")]
        rest = [given[x] for x in ("reference_hidden", "reference_weight", "labels")]
        around(lambda *x: tdpo_ext.linear_tdpo_loss(*x).loss, *leaves, *rest).backward()
        gradients.append([x.grad for x in leaves])
    assert_equal(*gradients)


def test_checkpointing_around_a_gradient_in_place(on_host):
    policy, reference, labels = logits()
    leaf = policy.clone().requires_grad_()

    def function(x: Tensor) -> Tensor:
        return loss_of(x * 1, reference, labels, inplace_backward=True)

    checkpoint(function, leaf, use_reentrant=False).backward()
    assert torch.equal(leaf.grad, gradient_of(policy, reference, labels))


def sum_of_stats(policy: Tensor, reference: Tensor, labels: Tensor, **options: Any) -> Tensor:
    stats = tdpo_ext.token_stats(policy, reference, labels, **options)
    return stats.policy_logps.sum() + stats.forward_kl.sum()


def sum_of_divergences(policy: Tensor, reference: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return tdpo_ext.token_divergences(policy, reference, labels, **options).reverse_kl.sum()


@pytest.mark.parametrize("function", [loss_of, sum_of_stats, sum_of_divergences])
def test_a_second_gradient_in_place_raises_where_hooks_keep_the_logits(function, on_host):
    """Autograd does not compare versions of what hooks hand back, here the overwritten logits."""
    policy, reference, labels = logits()
    for packed in (lambda x: x, Tensor.detach):
        leaf = policy.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
            loss = function(leaf * 1, reference, labels, inplace_backward=True)
        torch.autograd.grad(loss, leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="inplace_backward"):
            torch.autograd.grad(loss, leaf)
    leaf = policy.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = function(leaf * 1, reference, labels, inplace_backward=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("function", [loss_of, sum_of_stats, sum_of_divergences])
def test_a_second_gradient_in_place_is_right_where_the_logits_are_computed_anew(function, on_host):
    policy, reference, labels = logits()
    wanted, leaf = [], policy.clone().requires_grad_()
    wanted += torch.autograd.grad(function(leaf, reference, labels), leaf)

    def around(x: Tensor) -> Tensor:
        return function(x * 1, reference, labels, inplace_backward=True)

    loss = checkpoint(around, leaf, use_reentrant=False)
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
        loss = around(leaf)
    gradients += [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)]
    assert_equal(gradients, wanted * 6)


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_saved_tensors(on_host, inplace):
    policy, reference, labels = logits()
    leaf, packed = policy.clone().requires_grad_(), []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(leaf * 1, reference, labels, inplace_backward=inplace)
    assert packed
    (ours,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(ours, gradient_of(policy, reference, labels))


def test_saved_on_the_host(on_host):
    policy, reference, labels = logits()
    leaf = policy.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(leaf, reference, labels)
    (ours,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(ours, gradient_of(policy, reference, labels))


def test_deterministic_algorithms_and_anomaly_detection(on_host):
    policy, reference, labels = logits()
    wanted = gradient_of(policy, reference, labels)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            assert torch.equal(gradient_of(policy, reference, labels), wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_modules_and_outputs_can_be_copied_and_pickled():
    policy, reference, labels = logits()
    modules = tdpo_ext.TDPOLoss(beta=0.3), tdpo_ext.LinearTDPOLoss(alpha=0.2, chunk_bytes=5000)
    for module in modules:
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.options() == module.options()
    output = modules[0](policy, reference, labels)
    assert_equal(pickle.loads(pickle.dumps(output)), output)


def test_exported_and_traced():
    policy, reference, labels = logits()
    wanted = loss_of(policy, reference, labels)
    exported = torch.export.export(tdpo_ext.TDPOLoss(), (policy, reference, labels))
    assert torch.equal(exported.module()(policy, reference, labels).loss, wanted)


# --- torch.func and forward mode ------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "vmap": lambda f, x: vmap(f)(x.unsqueeze(0)),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
}


def forward_mode(function: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", [*TRANSFORMS, "forward mode"])
@pytest.mark.parametrize("what", ["token_stats", "tdpo_loss", "linear_token_stats", "linear loss"])
def test_transforms_are_refused_and_the_reference_is_named(what, transform):
    """Not one of them may give zeros, or constants, in silence."""
    _, reference, labels = logits()
    given = heads()
    rest = [given[x] for x in ("policy_weight", "reference_hidden", "reference_weight", "labels")]
    functions = {
        "token_stats": lambda z: tdpo_ext.token_stats(z, reference, labels).forward_kl,
        "tdpo_loss": lambda z: loss_of(z, reference, labels),
        "linear_token_stats": lambda h: tdpo_ext.linear_token_stats(h, *rest).forward_kl,
        "linear loss": lambda h: tdpo_ext.linear_tdpo_loss(h, *rest).loss,
    }
    function = functions[what]
    x = torch.randn(4, 5, H if what.startswith("linear") else V)
    apply = TRANSFORMS.get(transform, forward_mode)
    scalar = transform != "grad" or "loss" in what
    with pytest.raises(RuntimeError, match=r"torch\.func.*tdpo_ext\.reference"):
        apply(function if scalar else lambda x: function(x).sum(), x)


def test_the_reference_takes_transforms():
    policy, reference, labels = logits()
    policy, reference = policy.double(), reference.double()

    def function(z: Tensor) -> Tensor:
        return tdpo_ext.reference.tdpo_loss(z, reference, labels, variant="tdpo1").loss

    gradient = grad(function)(policy)
    torch.testing.assert_close(gradient, gradient_of(policy, reference, labels, variant="tdpo1"))
    _, slope = jvp(function, (policy,), (policy,))
    torch.testing.assert_close(slope, (gradient * policy).sum())


def test_batched_gradients(on_host):
    """torch.autograd's own vectorisation asks for many gradients at once."""
    policy, reference, labels = logits()
    leaf = policy.requires_grad_()
    kl = tdpo_ext.token_stats(leaf, reference, labels).forward_kl.flatten()
    ones = torch.eye(kl.numel())
    (batched,) = torch.autograd.grad(kl, leaf, ones, is_grads_batched=True, retain_graph=True)
    for row, one in zip(batched, ones, strict=True):
        assert torch.equal(row, torch.autograd.grad(kl, leaf, one, retain_graph=True)[0])


# --- threads and processes ------------------------------------------------------------------------


def test_threads_that_call_at_once(on_processor):
    """Each with inputs of its own, forward and backward; autograd runs in the calling thread."""
    inputs = [logits(seed) for seed in range(8)]
    wanted = [gradient_of(*x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        torch.set_num_threads(1 + number % 2)
        for _ in range(30):
            if not torch.equal(gradient_of(*inputs[number]), wanted[number]):
                wrong.append(number)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert not wrong


def test_one_graph_from_several_threads(on_processor):
    policy, reference, labels = logits()
    leaf = policy.requires_grad_()
    kl = tdpo_ext.token_stats(leaf, reference, labels).forward_kl
    found: list[Tensor] = []

    def work() -> None:
        found.extend(torch.autograd.grad(kl.sum(), leaf, retain_graph=True))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(x, found[0]) for x in found)


def run_in_a_process(script: str) -> str:
    preamble = """
        import os, torch, tdpo_ext
        x, y = torch.randn(64, 4000), torch.zeros(64, dtype=torch.long)
        def divergence():
            z = x.clone().requires_grad_()
            kl = tdpo_ext.token_stats(z, x * 0.5, y).forward_kl.sum()
            kl.backward()
            return kl.item()
    """
    program = textwrap.dedent(preamble) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_after_a_fork_with_one_thread():
    """As DataLoader's workers do. With more, GCC's OpenMP waits for ever, in torch's own operations
    too, if the parent has used threads."""
    run_in_a_process("""
        torch.set_num_threads(2)
        wanted = divergence()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if divergence() == wanted else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_in_the_workers_of_a_data_loader():
    run_in_a_process("""
        torch.set_num_threads(2)
        wanted = divergence()
        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return divergence()
        loader = torch.utils.data.DataLoader(Data(), num_workers=2)
        assert [batch.item() for batch in loader] == [wanted] * 4
    """)


def test_more_threads_than_processors_and_back():
    run_in_a_process("""
        found = []
        for threads in (1, 7, 2, 64, 1):
            torch.set_num_threads(threads)
            found.append(divergence())
        assert len(set(found)) == 1, found
    """)
