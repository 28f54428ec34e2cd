"""Defects that packages of this kind have shipped, each with a test named after it.

Those of every row loss in every shape, layout and dtype are in `row_suite.py`.
"""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from products import Operators
from row_losses import LOSSES, computed, each_loss, takes

import fusedloss as fl
from fusedloss import _engine, backends
from fusedloss.backends import buffer_pool as memory
from fusedloss.backends import native
from fusedloss.losses import _registry

#: Columns of one partial statistic.
CHUNK = 8192

#: A loss for each way through the engine: compiled over rows and over classes, PyTorch between and beside the passes.
WAYS = ["mixed_cross_entropy", "dsc_loss one_vs_rest", "flex_loss rows", "flex_loss classes"]
each_way = pytest.mark.parametrize("loss", [LOSSES[name] for name in WAYS], ids=WAYS)
each_inplace_way = pytest.mark.parametrize("loss", [LOSSES[name] for name in WAYS[:3]], ids=WAYS[:3])
PARAMETERS = [("focal_loss", "gamma"), ("dsc_loss", "alpha")]
each_parameter = pytest.mark.parametrize(("name", "own"), PARAMETERS)


def problem(rows, classes, generator, dtype=torch.float32):
    """Logits of which the target's and the last class's stand out, so that neither is lost among the others."""
    z = 2 * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    z[torch.arange(rows), target] += math.log(classes)
    z[:, -1] += math.log(classes)
    return z.to(dtype), target


def gradient(loss, z, *arguments, upstream=None, **options):
    z = computed(z) if options.get("inplace_backward") else z.detach().requires_grad_()
    (result,) = torch.autograd.grad(loss(z, *arguments, **options), z, upstream)
    return result


# Gradients


@pytest.mark.covering(1)
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph_twice_gives_the_same_gradient(loss, reduction, impl, generator):
    """A saved gradient that the first backward scales in place, so that a second one is silently wrong."""
    z, target = problem(5, 300, generator)
    z.requires_grad_()
    rows = loss(z, target, reduction=reduction, impl=impl)
    upstream = torch.randn(rows.shape, generator=generator)
    ones = torch.ones_like(upstream)
    first, second, plain = (torch.autograd.grad(rows, z, g, retain_graph=True)[0] for g in (upstream, upstream, ones))
    assert first.abs().sum() > 0 and torch.equal(first, second)
    assert torch.equal(plain, gradient(loss, z, target, upstream=ones, reduction=reduction, impl=impl))


HOST_READS = {f"aten::{name}" for name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero")}


@each_inplace_way  # the others run their forward again in the backward, with its look at the targets on a CPU
def test_no_host_read_in_backward(loss, impl, generator):
    """A look at the upstream gradient ("is it one?") that stalls a device every step."""
    z, target = problem(5, 33, generator)
    target[1] = -100
    options = {"label_smoothing": 0.1} if takes(loss, "label_smoothing") else {}
    result = loss(z.requires_grad_(), target, z_loss=0.1, weight=torch.ones(33), impl=impl, **options)
    with Operators() as seen:
        (3 * result).backward()
    assert seen.calls["aten::mul.Tensor"]  # the mode sees the backward
    assert not HOST_READS & seen.calls.keys()


@each_loss
def test_no_host_read_where_values_are_out_of_reach(loss):
    """A check of values, or a shape that hangs on them, on a device where that means waiting: meta has no values."""
    z = torch.empty(5, 33, device="meta", requires_grad=True)
    target = torch.empty(5, dtype=torch.int64, device="meta")
    number = torch.empty((), device="meta")
    own = {name: number for name in ("gamma", "alpha") if name in getattr(loss, "keywords", {})}
    loss(z, target, weight=torch.empty(33, device="meta"), z_loss=0.1, normalizer=number, **own).backward()
    assert z.grad.shape == z.shape


@each_inplace_way
def test_many_rows_fp16_mean(loss, generator):
    """A mean over more rows than half precision can count: 1 / N is subnormal there, and the sum infinite."""
    rows, scale = 66_000, torch.tensor(2.0**16)  # which keeps the gradients themselves among the normal halves
    z, target = problem(rows, 3, generator, torch.float16)
    result, truth = (loss(x, target) for x in (z, z.double()))
    assert truth * rows > torch.finfo(torch.float16).max / 8
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=0)
    got = gradient(loss, z, target, upstream=scale)
    expected = gradient(loss, z.double(), target, upstream=scale.double())
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=0.51 * torch.finfo(torch.float16).eps, atol=1e-5)


def test_sum_of_exponentials_beyond_fp16(impl):
    """A sum of exponentials kept in half precision, which ends at 65504."""
    z = torch.zeros(2, 100_000, dtype=torch.float16)
    result, stats = fl.cross_entropy(z, torch.tensor([0, 99_999]), impl=impl, return_stats=True)
    torch.testing.assert_close(result, torch.tensor(math.log(100_000)))
    torch.testing.assert_close(stats.lse, torch.full((2,), math.log(100_000)))


@each_way
def test_no_gradient_work_where_none_is_asked_for(loss, impl, generator, kernel_calls):
    """A gradient computed for nobody: under no_grad, in inference, for logits that do not require it."""
    z, target = problem(4, 50, generator)
    expected = loss(z, target, impl=impl)
    with torch.no_grad():
        result = loss(z.clone().requires_grad_(), target, impl=impl)
    with torch.inference_mode():
        assert torch.equal(loss(z, target, impl=impl), expected)
    assert not expected.requires_grad and not result.requires_grad and torch.equal(result, expected)
    attached = loss(z.clone().requires_grad_(), target, impl=impl)
    assert attached.requires_grad and torch.equal(attached, expected)
    assert not kernel_calls["backward", impl]


@each_loss
@pytest.mark.parametrize("classes", [9, 300])
def test_an_upstream_gradient_that_is_not_finite_leaves_ignored_rows_alone(loss, classes, impl, generator):
    """A gradient made with the loss, whose zeros a later factor makes NaN."""
    z, target = problem(4, classes, generator)
    target[1::2] = -100
    own, forms = getattr(loss, "keywords", {}), [loss]
    linear = _registry.LOSSES[getattr(loss, "func", loss).__name__].linear
    if linear is not None and own.get("over") != "classes":
        forms.append(lambda x, *rest, **options: linear(x, torch.eye(classes), *rest, **own, **options))
    for form in forms:
        leaf = z.detach().requires_grad_()
        result = form(leaf, target, impl=impl)
        (found,) = torch.autograd.grad(result, leaf, torch.full_like(result, math.inf))
        assert not found[1::2].any() and not found[::2].isfinite().all()


@pytest.mark.parametrize(("name", "own"), [*PARAMETERS, ("mixed_cross_entropy", "alpha")])
@pytest.mark.parametrize("ignored", [-100, 7])
def test_parameters_of_ignored_rows_may_be_anything(name, own, ignored, impl, generator):
    """A look at what does not count: a schedule's NaN for padding is refused, or reaches a gradient."""
    z, target = problem(4, 9, generator)
    target[1::2] = ignored
    of_rows = torch.tensor([0.25, math.nan, 0.5, -1.0])
    loss = partial(getattr(fl, name), ignore_index=ignored, impl=impl)
    right = gradient(loss, z, target, **{own: of_rows.clamp(min=0).nan_to_num(1)})
    assert torch.equal(gradient(loss, z, target, **{own: of_rows}), right)
    with pytest.raises(ValueError, match=f"{own} must be"):
        loss(z, target.masked_fill(target == ignored, 0), **{own: of_rows})


@each_parameter
@pytest.mark.parametrize("asked", [(1, 0), (0, 1), (0, 0)], ids=str)
def test_requires_grad_combinations(name, own, asked, impl, generator, kernel_calls):
    """Gradients that depend on which other gradients are asked for, or are made though nobody asked."""
    loss = getattr(fl, name)
    z, target = problem(4, 9, generator, torch.float64)
    leaves = [z, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)]
    every = [x.clone().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(loss(every[0], target, impl="reference", **{own: every[1]}), every)
    for x, need in zip(leaves, asked, strict=True):
        x.requires_grad_(bool(need))
    result = loss(z, target, impl=impl, **{own: leaves[1]})
    assert result.requires_grad == any(asked)
    if result.requires_grad:
        result.backward()
    for x, need, truth in zip(leaves, asked, expected, strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad, truth, rtol=1e-10, atol=1e-14)
    assert asked[0] or not kernel_calls["backward", impl]


@each_way
def test_caller_logits_untouched(loss, impl, generator):
    """A gradient written over the caller's logits unasked; and targets, weights or masks that are cleaned in place."""
    z, target = problem(4, 3000, generator)
    target[1] = -100
    tensors = (z, target, torch.rand(3000, generator=generator))
    before = [(x.clone(), x._version) for x in tensors]
    loss(z.requires_grad_(), target, weight=tensors[2], impl=impl).backward()
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), value) and tensor._version == version


@each_inplace_way
def test_inplace_backward_raises_the_version(loss, generator):
    """A kernel that writes over the logits behind autograd's back: whoever still needs them reads gradients."""
    z, target = problem(4, 3000, generator)
    expected = gradient(loss, z, target)
    logits = computed(z.clone())
    result = loss(logits, target, inplace_backward=True)
    assert torch.equal(logits.detach(), z)  # not before the backward
    (got,) = torch.autograd.grad(result, logits, retain_graph=True)
    assert torch.equal(got, expected) and got.data_ptr() == logits.data_ptr() and logits._version > 0
    modified = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with modified:
        torch.autograd.grad(result, logits)
    with modified:  # an operation before the loss has kept its own result
        loss(z.clone().requires_grad_().sigmoid(), target, inplace_backward=True).backward()
    logits = z.clone().requires_grad_() * 1
    other = fl.focal_loss(logits, target)  # whose backward comes later
    with modified:
        (other + loss(logits, target, inplace_backward=True)).backward()


class _Identity(torch.autograd.Function):
    """An identity as packages write them, which autograd cannot know for one."""

    @staticmethod
    def forward(ctx, x, other=None):
        return x.detach() if other is None else x

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.sum() if ctx.needs_input_grad[1:] == (True,) else None


#: From a leaf (8, 9) that requires grad, logits (4, 9) in its memory.
LEAVES: dict[str, Any] = {
    "a leaf": lambda leaf: leaf[:4].detach().requires_grad_(),
    "a view of a view": lambda leaf: leaf.view(2, 2, 2, 9)[1].view_as(leaf[:4]),
    "identities": lambda leaf: torch.nn.functional.dropout(torch.nn.Identity()(leaf[:4]), 0.0, True),
    "functions": lambda leaf: _Identity.apply(_Identity.apply(leaf[:4])),
    "a function of two": lambda leaf: _Identity.apply(leaf[:4], torch.ones((), requires_grad=True)),
}


@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES.keys())
def test_an_in_place_gradient_never_overwrites_a_leaf(make):
    leaf = torch.randn(8, 9, requires_grad=True)
    target, message = torch.arange(4), r"inplace_backward would overwrite a leaf .* the input of shape \(4, 9\)"
    for loss in (fl.cross_entropy, partial(fl.dsc_loss, level="set"), partial(fl.flex_loss, loss_fn=lambda s: s.q)):
        with pytest.raises(RuntimeError, match=message):
            loss(make(leaf), target, inplace_backward=True)
    # Nothing is overwritten without gradients, nor in the memory of a copy.
    with torch.no_grad():
        fl.cross_entropy(make(leaf), target, inplace_backward=True)
    fl.cross_entropy(make(leaf).detach(), target, inplace_backward=True)
    before, copy = leaf.detach().clone(), make(leaf) * 1
    fl.cross_entropy(_Identity.apply(copy.view(2, 2, 9)), target.view(2, 2), inplace_backward=True).backward()
    assert torch.equal(leaf.detach(), before) and not torch.equal(copy, make(leaf))


# Numbers


@each_loss
def test_first_block_all_minus_inf(loss, impl, generator):
    """An online softmax that starts from a block without a finite logit: exp(-inf - -inf) is NaN."""
    visible, target = problem(2, 500, generator, torch.float64)
    expected = loss(visible, target, reduction="none", impl=impl)
    slope = gradient(loss, visible, target, impl=impl)
    hidden = torch.full((2, CHUNK), -torch.inf, dtype=torch.float64)
    for z, first in ((torch.cat([hidden, visible], 1), CHUNK), (torch.cat([visible, hidden], 1), 0)):
        result = loss(z, target + first, reduction="none", impl=impl)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
        got = gradient(loss, z, target + first, impl=impl)
        torch.testing.assert_close(got[:, first : first + 500], slope, rtol=1e-9, atol=1e-14)
        assert got.count_nonzero() == slope.count_nonzero()


@pytest.mark.parametrize("name", ["cross_entropy", "flex_loss rows"])
def test_smoothing_uses_sum_of_logits(name, impl):
    """Smoothing as the mean of log(exp(z - m) / S): from a gap of about 104 on, the logarithm of zero."""
    z, target = torch.zeros(2, 1000), torch.tensor([0, 3])
    z[0, 0], z[1] = 500.0, torch.linspace(-400, 400, 1000)
    options = {"label_smoothing": 0.1, "reduction": "none"}
    result = LOSSES[name](z, target, impl=impl, **options)
    truth = LOSSES[name](z.double(), target, impl="reference", **options)
    torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=0)
    assert name != "cross_entropy" or abs(truth[0].item() - 0.1 * 999 / 1000 * 500) < 1e-9
    assert gradient(LOSSES[name], z, target, impl=impl, label_smoothing=0.1).isfinite().all()


def test_a_divisor_of_0_divides_nothing(impl):
    """Where the caller counts the targets, of which there are none."""
    nothing, target = torch.full((3,), -100), torch.ones(3, dtype=torch.int64)
    z = torch.randn(3, 4, requires_grad=True)
    result = fl.focal_loss(z, nothing, normalizer=(nothing != -100).sum(), impl=impl)
    result.backward()
    assert result.item() == 0 and not z.grad.any()
    assert fl.focal_loss(z, target, normalizer=torch.zeros((), dtype=torch.int64), impl=impl) == torch.inf


# Memory and indexing


@each_loss
def test_targets_are_checked_in_64_bits(loss, impl):
    """Bounds not checked, or checked after a cast to 32 bits, in which 2**32 + 1 is a class."""
    for value in (2**32 + 1, -(2**32) + 1, 2**31 - 1, -1, 5, -(2**31), -(2**63)):
        target = torch.tensor([0, value, -100])
        for given in (target, target.int())[: 1 + (-(2**31) <= value < 2**31)]:
            with pytest.raises(IndexError, match=rf"target {value} is out of range for 5 classes"):
                loss(torch.zeros(3, 5), given, impl=impl)


@each_way
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32], ids=str)
def test_targets_of_every_integer_dtype(loss, dtype, impl, generator):
    """In a narrow dtype, -100 or -1 may be another number, which is then a class."""
    z, target = problem(6, 200, generator)
    target = target % 127
    target[3] = 156 - 256 if dtype == torch.int8 else 156  # as -100 is in eight bits without a sign
    own = {"ignore_index": 5} if dtype != torch.int8 else {}
    target[1] = 5
    narrow = target.to(dtype)
    assert torch.equal(loss(z, narrow, impl=impl, **own), loss(z, target, impl=impl, **own))
    assert fl.normalizer(narrow, **own) == 5
    if dtype == torch.uint8:
        loss(z, narrow, impl=impl)  # -100 is no class
        assert fl.normalizer(narrow) == 6


def test_integers_of_numpy(generator):
    numpy = pytest.importorskip("numpy")
    z, target = problem(6, 9, generator)
    target[2] = 3
    expected = fl.cross_entropy(z, target, ignore_index=3)
    assert torch.equal(fl.cross_entropy(z, target, ignore_index=numpy.int64(3)), expected)
    assert fl.normalizer(target, ignore_index=numpy.int32(3)) == (target != 3).sum()
    layer = fl.nn.LinearFocalLoss(numpy.int64(4), numpy.int64(9), ignore_index=numpy.int64(3), budget=numpy.int64(72))
    assert layer(torch.randn(6, 4, generator=generator), target).isfinite()
    module = fl.nn.CrossEntropyLoss(ignore_index=numpy.int64(3))
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(z, target), expected)
    with pytest.raises(TypeError, match=r"ignore_index must be an int, got np\.float64"):
        fl.cross_entropy(z, target, ignore_index=numpy.float64(3))


@each_way
def test_another_default_device(loss, compiled_impl, generator, monkeypatch):
    """Memory of a tensor's gradient is on its device, not on the default one."""
    z, target = problem(6, 9, generator)
    z.requires_grad_()
    expected = gradient(loss, z, target, impl=compiled_impl)
    for smallest in (0, memory.SMALL):
        monkeypatch.setattr(memory, "SMALL", smallest)
        with torch.device("meta"):
            (got,) = torch.autograd.grad(loss(z, target, impl=compiled_impl), z)
        assert torch.equal(got, expected)


# Compilation, devices, trust


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if "classes" not in name])
def test_the_dtype_and_the_backend_are_those_asked_for(name, dtype, generator, kernel_calls, monkeypatch):
    """A bf16 path that quietly converts to another dtype, or a backend that hands the work to another one."""
    seen, job = [], _engine.Job
    monkeypatch.setattr(_engine, "Job", lambda code, *arguments: (seen.append(code), job(code, *arguments))[1])
    z, target = problem(3, 90, generator, dtype)
    gradient(LOSSES[name], z, target, impl="reference")
    assert not kernel_calls and not seen
    gradient(LOSSES[name], z, target, impl="cpu")
    forward = "statistics" if name == "flex_loss rows" else "forward"
    assert kernel_calls == {(forward, "cpu"): 1, ("backward", "cpu"): 1}
    assert seen == [native.DTYPES[dtype]] * 2


def test_a_missing_extension_is_not_dropped_silently():
    """A backend that failed to load: where it was asked for by name, another one must not answer in its place."""
    code = """
import os, sys
sys.modules["fusedloss._engine"] = None  # importing it raises ImportError
import torch, fusedloss as fl
from fusedloss import backends

z, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
assert backends.unavailable("reference") is None
assert "_engine" in backends.unavailable("cpu")
for argument, environment in (("cpu", ""), (None, "cpu")):
    os.environ["FUSEDLOSS_IMPL"] = environment
    try:
        fl.cross_entropy(z, target, impl=argument)
    except RuntimeError as error:
        print(error)

# Not asked for, the reference answers for itself.
os.environ["FUSEDLOSS_IMPL"] = ""
expected = torch.nn.functional.cross_entropy(z, target)
loss = fl.cross_entropy(z, target)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    first, second, done = result.stdout.splitlines() or ("", "", result.stderr)
    assert done == "done"
    assert first.startswith("impl='cpu' cannot run: the C++ extension did not load") and "fusedloss._engine" in first
    assert second == first.replace("impl='cpu'", "FUSEDLOSS_IMPL='cpu'")
    # Python prefers the folder that it is started in, whose sources are not built, to what is installed.
    sources = Path(fl.__file__).parents[1]
    assert ("losses run in plain PyTorch" in result.stderr and f"sources in {sources};" in first) == (
        sources / "csrc"
    ).is_dir()


def test_the_environment_names_the_default(monkeypatch, generator, kernel_calls):
    """FUSEDLOSS_IMPL counts where no `impl` is given, and a name that does not exist is an error there too."""
    z, target = problem(3, 5, generator)
    for impl in ("triton", "cuda"):  # of other devices
        monkeypatch.setattr(backends.BACKENDS[impl], "runs_on", "cuda")
    calls = 0
    for environment, argument, runs in (
        ("reference", None, 0), ("reference", "cpu", 1), ("cpu", None, 1), ("", None, 1),
        ("triton_fused", None, 1),  # of linear forms alone
        ("triton", None, 1), ("cuda", None, 1),
    ):  # fmt: skip
        monkeypatch.setenv("FUSEDLOSS_IMPL", environment)
        fl.cross_entropy(z, target, impl=argument)
        calls += runs
        assert kernel_calls["forward", "cpu"] == calls == kernel_calls.total(), environment
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run"):
        fl.cross_entropy(z, target, impl="cuda")
    for environment, message in (
        ("reference", "but FUSEDLOSS_IMPL is 'reference'"),
        ("fastest", r"FUSEDLOSS_IMPL must be one of .* got 'fastest'"),
    ):
        monkeypatch.setenv("FUSEDLOSS_IMPL", environment)
        with pytest.raises(ValueError, match=message):
            fl.cross_entropy(z, target, inplace_backward=True)
