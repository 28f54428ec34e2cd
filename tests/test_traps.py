"""Defects that packages of this kind have shipped: one test, named after it, for each."""

import math
import mmap
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from row_losses import INPLACE, LOSSES, computed, each_inplace_loss, each_loss, is_over_classes, takes
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss as fl
from fusedloss import _engine, backends
from fusedloss.backends import buffer_pool as memory
from fusedloss.backends import native

#: Columns that the compiled passes take at a time, and those of one partial statistic.
BLOCK, CHUNK = 2048, 8192


def problem(
    rows: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits of which the target's and the last class's stand out, so that neither is lost among the others."""
    z = 2 * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    z[torch.arange(rows), target] += math.log(classes)
    z[:, -1] += math.log(classes)
    return z.to(dtype), target


def gradient(
    loss: Callable[..., Any], z: Tensor, *arguments: Any, upstream: Tensor | None = None, **options: Any
) -> Tensor:
    z = computed(z) if options.get("inplace_backward") else z.detach().requires_grad_()
    (result,) = torch.autograd.grad(loss(z, *arguments, **options), z, upstream)
    return result


# Gradients


@each_loss
def test_upstream_gradient_is_not_assumed_one(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """A backward that forgets the upstream gradient, or reads an expanded or strided one as if it were packed."""
    z, target = problem(6, 131, generator, torch.float64)
    target[2] = -100
    of_ones = gradient(loss, z, target, upstream=torch.ones(6).double(), reduction="none", impl=impl)
    assert of_ones.abs().sum() > 0.1
    vector = torch.randn(12, generator=generator, dtype=torch.float64)
    for upstream in (vector[:6], vector[6:7].expand(6), vector[::2], vector[0] * torch.ones(6).double()):
        got = gradient(loss, z, target, upstream=upstream, reduction="none", impl=impl)
        torch.testing.assert_close(got, upstream[:, None] * of_ones, rtol=1e-11, atol=1e-15)
    matrix = torch.randn(2, 3, generator=generator, dtype=torch.float64).t()
    got = gradient(loss, z.view(3, 2, -1), target.view(3, 2), upstream=matrix, reduction="none", impl=impl)
    torch.testing.assert_close(got, matrix[..., None] * of_ones.view(3, 2, -1), rtol=1e-11, atol=1e-15)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradient_of_a_reduced_loss_is_not_assumed_one(
    loss: Callable[..., Any], reduction: str, impl: str, generator: torch.Generator
) -> None:
    """The same where the loss is a scalar, whose gradient reaches the rows as an expanded number."""
    z, target = problem(5, 77, generator, torch.float64)
    of_one = gradient(loss, z, target, reduction=reduction, impl=impl)
    for factor in (-0.37, 0.0, 1024.0):
        upstream = torch.tensor(factor, dtype=torch.float64)
        got = gradient(loss, z, target, upstream=upstream, reduction=reduction, impl=impl)
        torch.testing.assert_close(got, factor * of_one, rtol=1e-11, atol=1e-15)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph_twice_gives_the_same_gradient(
    loss: Callable[..., Any], reduction: str, impl: str, generator: torch.Generator
) -> None:
    """A saved gradient that the first backward scales in place, so that a second one is silently wrong."""
    z, target = problem(5, 300, generator)
    z.requires_grad_()
    rows = loss(z, target, reduction=reduction, impl=impl)
    upstream = torch.randn(rows.shape, generator=generator)
    first, second, ones = (
        torch.autograd.grad(rows, z, g, retain_graph=True)[0] for g in (upstream, upstream, torch.ones_like(upstream))
    )
    assert first.abs().sum() > 0
    assert torch.equal(first, second)
    assert torch.equal(
        ones, gradient(loss, z, target, upstream=torch.ones_like(upstream), reduction=reduction, impl=impl)
    )


class _Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


HOST_READS = {
    "aten._local_scalar_dense.default",
    "aten.item.default",
    "aten.is_nonzero.default",
    "aten.equal.default",
    "aten.allclose.default",
    "aten.nonzero.default",
}


@each_inplace_loss  # the others run their forward again in the backward, with its look at the targets on a CPU
def test_no_host_read_in_backward(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """A look at the upstream gradient ("is it one?") that stalls a device every step."""
    z, target = problem(5, 33, generator)
    target[1] = -100
    z.requires_grad_()
    options = {"label_smoothing": 0.1} if takes(loss, "label_smoothing") else {}
    result = loss(z, target, z_loss=0.1, weight=torch.ones(33), impl=impl, **options)
    with _Operators() as seen:
        (3 * result).backward()
    assert seen.names["aten.mul.Tensor"]  # the mode sees the backward
    assert not HOST_READS & seen.names.keys()


@each_loss
def test_no_host_read_where_values_are_out_of_reach(loss: Callable[..., Any]) -> None:
    """A check of values, or a shape that hangs on them, on a device where that means waiting: meta has no values."""
    z = torch.empty(5, 33, device="meta", requires_grad=True)
    target = torch.empty(5, dtype=torch.int64, device="meta")
    number = torch.empty((), device="meta")
    own = {name: number for name in ("gamma", "alpha") if name in getattr(loss, "keywords", {})}
    result = loss(z, target, weight=torch.empty(33, device="meta"), z_loss=0.1, normalizer=number, **own)
    result.backward()
    assert z.grad is not None and z.grad.shape == z.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss", "mixed_cross_entropy", "flex_loss rows"])
def test_p_minus_one_not_formed_in_bf16(name: str, dtype: torch.dtype, impl: str, generator: torch.Generator) -> None:
    """p_t - 1 made from a p_t that was rounded to the logits' dtype, where nothing is left of it as p_t -> 1."""
    z = torch.randn(24, 1000, generator=generator)
    target = torch.randint(1000, (24,), generator=generator)
    z[torch.arange(24), target] = torch.arange(24) / 2 + 7.0
    z = z.to(dtype)
    options = {"reduction": "sum"}
    got = gradient(LOSSES[name], z, target, impl=impl, upstream=torch.tensor(256.0), **options)
    truth = gradient(
        LOSSES[name], z.double(), target, impl="reference", upstream=torch.tensor(256.0).double(), **options
    )
    probability = z.double().softmax(-1)[torch.arange(24), target]
    assert probability.min() < 0.7 and probability.max() > 0.9999
    of_target, its_truth = got[torch.arange(24), target].double(), truth[torch.arange(24), target]
    info = torch.finfo(dtype)
    assert (its_truth.abs() > 0).all()
    assert ((of_target - its_truth).abs() <= 0.55 * info.eps * its_truth.abs() + info.tiny * info.eps).all()


def _certain(gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose target is that far ahead."""
    others = torch.tensor([0.0, 0.5, -1.0]).expand(len(gaps), 3)
    return torch.cat([gaps[:, None], others], 1), torch.zeros(len(gaps), dtype=torch.int64)


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss", "mixed_cross_entropy", "flex_loss rows"])
def test_one_minus_p_is_not_a_difference(name: str, impl: str) -> None:
    """1 - p_t, and all that hangs on it, as a difference of numbers near one: no digits left from a gap of 17 on."""
    z, target = _certain(torch.arange(4.0, 81, 4))
    ones = torch.ones(len(target))
    options = {"reduction": "none"}
    got = gradient(LOSSES[name], z, target, upstream=ones, impl=impl, **options)
    truth = gradient(LOSSES[name], z.double(), target, upstream=ones.double(), impl="reference", **options)
    assert truth[:, 0].abs().min() > 0
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-37)
    rows, exact = (LOSSES[name](x, target, impl=impl, **options).double() for x in (z, z.double()))
    torch.testing.assert_close(rows, exact, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("name", ["dsc_loss one_vs_rest", "dsc_loss target", "dice_loss", "dice_loss target"])
def test_one_minus_p_is_not_a_difference_in_dice(name: str, compiled_impl: str) -> None:
    """The same of the dice family (whose reference in float64 is a difference itself, and so no truth for long)."""
    loss = LOSSES.get(name, partial(fl.dice_loss, form="target"))
    z, target = _certain(torch.arange(4.0, 19))
    ones = torch.ones(len(target))
    got = gradient(loss, z, target, upstream=ones, reduction="none", impl=compiled_impl)
    truth = gradient(loss, z.double(), target, upstream=ones.double(), reduction="none", impl="reference")
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-20)


@each_inplace_loss
def test_many_rows_fp16_mean(loss: Callable[..., Any], generator: torch.Generator) -> None:
    """A mean over more rows than half precision can count: 1 / N is subnormal there, and the sum infinite."""
    rows = 66_000
    z, target = problem(rows, 3, generator, torch.float16)
    scale = torch.tensor(2.0**16)  # keeps the gradients themselves among the normal halves
    result = loss(z, target)
    truth = loss(z.double(), target)
    assert truth * rows > torch.finfo(torch.float16).max / 8
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=0)
    got = gradient(loss, z, target, upstream=scale)
    expected = gradient(loss, z.double(), target, upstream=scale.double())
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=0.51 * torch.finfo(torch.float16).eps, atol=1e-5)


def test_sum_of_exponentials_beyond_fp16(impl: str) -> None:
    """A sum of exponentials kept in half precision, which ends at 65504."""
    z = torch.zeros(2, 100_000, dtype=torch.float16)
    result, stats = fl.cross_entropy(z, torch.tensor([0, 99_999]), impl=impl, return_stats=True)
    torch.testing.assert_close(result, torch.tensor(math.log(100_000)))
    torch.testing.assert_close(stats.lse, torch.full((2,), math.log(100_000)))


@each_loss
def test_no_gradient_work_where_none_is_asked_for(
    loss: Callable[..., Any], impl: str, generator: torch.Generator, kernel_calls: Counter[tuple[str, str]]
) -> None:
    """A gradient computed for nobody: under no_grad, in inference, for logits that do not require it."""
    z, target = problem(4, 50, generator)
    expected = loss(z, target, impl=impl)
    assert not expected.requires_grad
    with torch.no_grad():
        result = loss(z.clone().requires_grad_(), target, impl=impl)
        assert not result.requires_grad and torch.equal(result, expected)
    with torch.inference_mode():
        assert torch.equal(loss(z, target, impl=impl), expected)
    attached = loss(z.clone().requires_grad_(), target, impl=impl)
    assert attached.requires_grad and torch.equal(attached, expected)
    assert not kernel_calls["backward", impl] + kernel_calls["backward", impl]


@pytest.mark.parametrize(
    "name, own", [("focal_loss", "gamma"), ("mixed_cross_entropy", "alpha"), ("dsc_loss", "alpha")]
)
@pytest.mark.parametrize("of_logits", [True, False])
@pytest.mark.parametrize("of_parameter", [True, False])
def test_requires_grad_combinations(
    name: str,
    own: str,
    of_logits: bool,
    of_parameter: bool,
    impl: str,
    generator: torch.Generator,
    kernel_calls: Counter[tuple[str, str]],
) -> None:
    """Gradients that depend on which other gradients are asked for, or are made though nobody asked."""
    loss = getattr(fl, name)
    z, target = problem(4, 9, generator, torch.float64)
    parameter = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    everything = [z.clone().requires_grad_(), parameter.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(everything[0], target, impl="reference", **{own: everything[1]}), everything)

    z.requires_grad_(of_logits)
    parameter.requires_grad_(of_parameter)
    result = loss(z, target, impl=impl, **{own: parameter})
    assert result.requires_grad == (of_logits or of_parameter)
    if result.requires_grad:
        result.backward()
    for tensor, asked, truth in zip((z, parameter), (of_logits, of_parameter), expected, strict=True):
        assert (tensor.grad is not None) == asked
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, truth, rtol=1e-10, atol=1e-14)
    if not of_logits:
        assert not kernel_calls["backward", impl]


@each_loss
def test_caller_logits_untouched(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """A gradient written over the caller's logits unasked; and targets, weights or masks that are cleaned in place."""
    z, target = problem(4, 3000, generator)
    target[1] = -100
    weight = torch.rand(3000, generator=generator)
    tensors = (z, target, weight)
    before = [(x.clone(), x._version) for x in tensors]
    z.requires_grad_()
    loss(z, target, weight=weight, impl=impl).backward()
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), value)
        assert tensor._version == version


@each_inplace_loss
def test_inplace_backward_raises_the_version(loss: Callable[..., Any], generator: torch.Generator) -> None:
    """A kernel that writes over the logits behind autograd's back: whoever still needs them reads gradients."""
    z, target = problem(4, 3000, generator)
    expected = gradient(loss, z, target)

    logits = computed(z.clone())
    result = loss(logits, target, inplace_backward=True)
    assert torch.equal(logits.detach(), z)  # not before the backward
    (got,) = torch.autograd.grad(result, logits, retain_graph=True)
    assert torch.equal(got, expected)
    assert got.data_ptr() == logits.data_ptr()
    assert logits._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result, logits)

    # An operation before the loss that has kept its own result.
    leaf = z.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(leaf.sigmoid(), target, inplace_backward=True).backward()

    # Another loss on the same logits, whose backward comes later.
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    other = fl.focal_loss(logits, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss(logits, target, inplace_backward=True)).backward()


class _Identity(torch.autograd.Function):
    """An identity as packages write them, which autograd cannot know for one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None = None) -> Tensor:
        return x.detach() if other is None else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad, grad.sum() if ctx.needs_input_grad[1:] == (True,) else None


#: From a leaf (8, 9) that requires grad, logits (4, 9) in its memory.
LEAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf": lambda leaf: leaf[:4].detach().requires_grad_(),
    "narrow": lambda leaf: leaf.narrow(0, 2, 4),
    "chunk": lambda leaf: leaf.chunk(2)[1],
    "a view of a view": lambda leaf: leaf.view(2, 2, 2, 9)[1].view_as(leaf[:4]),
    "identities": lambda leaf: torch.nn.functional.dropout(torch.nn.Identity()(leaf[:4]), 0.0, True),
    "a function": lambda leaf: _Identity.apply(leaf)[:4],
    "functions": lambda leaf: _Identity.apply(_Identity.apply(leaf[:4])),
    "a function of two": lambda leaf: _Identity.apply(leaf[:4], torch.ones((), requires_grad=True)),
}


@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES.keys())
def test_an_in_place_gradient_never_overwrites_a_leaf(make: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(8, 9, requires_grad=True)
    target, message = torch.arange(4), r"inplace_backward would overwrite a leaf .* the input of shape \(4, 9\)"
    for loss in (fl.cross_entropy, partial(fl.dsc_loss, level="set"), partial(fl.flex_loss, loss_fn=lambda s: s.q)):
        with pytest.raises(RuntimeError, match=message):
            loss(make(leaf), target, inplace_backward=True)
    # Nothing is overwritten without gradients, nor in the memory of a copy.
    with torch.no_grad():
        fl.cross_entropy(make(leaf), target, inplace_backward=True)
    fl.cross_entropy(make(leaf).detach(), target, inplace_backward=True)
    before = leaf.detach().clone()
    copy = make(leaf) * 1
    fl.cross_entropy(_Identity.apply(copy.view(2, 2, 9)), target.view(2, 2), inplace_backward=True).backward()
    assert torch.equal(leaf.detach(), before) and not torch.equal(copy, make(leaf))


# Numbers


@each_loss
@pytest.mark.parametrize("masked", [BLOCK, CHUNK])
def test_first_block_all_minus_inf(
    loss: Callable[..., Any], masked: int, impl: str, generator: torch.Generator
) -> None:
    """An online softmax that starts from a block without a finite logit: exp(-inf - -inf) is NaN."""
    visible, target = problem(2, 500, generator, torch.float64)
    expected = loss(visible, target, reduction="none", impl=impl)
    slope = gradient(loss, visible, target, impl=impl)
    hidden = torch.full((2, masked), -torch.inf, dtype=torch.float64)
    for z, first in ((torch.cat([hidden, visible], 1), masked), (torch.cat([visible, hidden], 1), 0)):
        result = loss(z, target + first, reduction="none", impl=impl)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
        got = gradient(loss, z, target + first, impl=impl)
        torch.testing.assert_close(got[:, first : first + 500], slope, rtol=1e-9, atol=1e-14)
        assert got.count_nonzero() == slope.count_nonzero()


@each_loss
def test_only_the_target_is_finite(loss: Callable[..., Any], impl: str) -> None:
    """The same at its end: a masked vocabulary that leaves a single class, p_t = 1."""
    z = torch.full((1, 2 * CHUNK + 1), -torch.inf, dtype=torch.float64)
    z[0, -1] = 3.0
    result = loss(z, torch.tensor([2 * CHUNK]), impl=impl)
    one_class = (
        loss(torch.full((1, 1), 3.0, dtype=torch.float64), torch.tensor([0]), impl=impl)
        if ("top_k" not in getattr(loss, "keywords", {}))
        else torch.tensor(torch.inf, dtype=torch.float64)
    )  # the second most likely class has no probability
    torch.testing.assert_close(result, one_class)
    if result.isfinite():
        assert not gradient(loss, z, torch.tensor([2 * CHUNK]), impl=impl).any()


@each_loss
@pytest.mark.parametrize("hidden", ["the target", "all classes"])
def test_a_target_without_probability_spoils_nothing_else(
    loss: Callable[..., Any], hidden: str, impl: str, generator: torch.Generator
) -> None:
    """-inf at the target, or everywhere: a loss that is NaN rather than infinite, or one that reaches other rows."""
    z, target = problem(3, 50, generator)
    expected = loss(z, target, reduction="none", impl=impl)
    slopes = gradient(loss, z, target, upstream=torch.ones(3), reduction="none", impl=impl)
    if hidden == "the target":
        z[1, target[1]] = -torch.inf
    else:
        z[1] = -torch.inf
    result = loss(z, target, reduction="none", impl=impl)
    bounded = not takes(loss, "label_smoothing") or is_over_classes(loss)
    if hidden == "the target":
        assert result[1].isfinite() if bounded else result[1] == torch.inf
    else:  # there is no softmax of such a row
        assert result[1] == torch.inf if loss is fl.cross_entropy else not (result[1] < 0)
    assert torch.equal(result[::2], expected[::2])
    got = gradient(loss, z, target, upstream=torch.ones(3), reduction="none", impl=impl)
    assert torch.equal(got[::2], slopes[::2])


# A quiet NaN may carry any payload; arithmetic on the bits of floats can lose those with low bits set.
NANS = [0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFC00123]


@each_loss
@pytest.mark.parametrize("hide_first_block", [False, True])
def test_nan_reaches_its_own_row_and_no_other(
    loss: Callable[..., Any], hide_first_block: bool, impl: str, generator: torch.Generator
) -> None:
    """A guard against -inf, or a maximum that skips NaN, that swallows a real one; or one that leaves its row."""
    z, target = problem(3, BLOCK + 40, generator)
    target = target % 30 + BLOCK  # finite where the first block is not
    if hide_first_block:
        z[1, :BLOCK] = -torch.inf
    expected = loss(z, target, reduction="none", impl=impl)
    ones = torch.ones(3)
    slopes = gradient(loss, z, target, upstream=ones, reduction="none", impl=impl)
    survived = []
    for bits in NANS:
        for column in (BLOCK + 35, BLOCK + 16, int(target[1])):
            spoiled = z.clone()
            spoiled.view(torch.int32)[1, column] = bits - 2**32 if bits >= 2**31 else bits
            assert spoiled.isnan().sum() == 1
            result = loss(spoiled, target, reduction="none", impl=impl)
            got = gradient(loss, spoiled, target, upstream=ones, reduction="none", impl=impl)
            assert torch.equal(result[::2], expected[::2])
            assert torch.equal(got[::2], slopes[::2])
            if not (result[1].isnan() and got[1].isnan().any()):
                survived.append((hex(bits), column, result[1].item()))
    assert not survived


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss", "mixed_cross_entropy", "flex_loss rows"])
def test_smoothing_uses_sum_of_logits(name: str, impl: str) -> None:
    """Smoothing as the mean of log(exp(z - m) / S): from a gap of about 104 on, the logarithm of zero."""
    z = torch.zeros(2, 1000)
    z[0, 0], z[1] = 500.0, torch.linspace(-400, 400, 1000)
    target = torch.tensor([0, 3])
    options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
    result = LOSSES[name](z, target, impl=impl, **options)
    truth = LOSSES[name](z.double(), target, impl="reference", **options)
    assert result.isfinite().all()
    torch.testing.assert_close(result.double(), truth, rtol=1e-6, atol=0)
    assert abs(truth[0].item() - 0.1 * 999 / 1000 * 500) < 1e-9 if name == "cross_entropy" else True
    assert gradient(LOSSES[name], z, target, impl=impl, label_smoothing=0.1).isfinite().all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_lse_are_fp32(
    loss: Callable[..., Any], dtype: torch.dtype, impl: str, generator: torch.Generator
) -> None:
    """Losses or statistics rounded to the logits' half precision, which holds two or three digits."""
    z, target = problem(5, 2000, generator, dtype)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in ("none", "mean", "sum"):
        result, stats = loss(z, target, reduction=reduction, return_stats=True, impl=impl)
        assert result.dtype == full
        assert stats.lse.dtype == stats.target_log_prob.dtype == stats.argmax_log_prob.dtype == full
    assert gradient(loss, z, target, impl=impl).dtype == dtype
    lse = z.double().logsumexp(-1)
    torch.testing.assert_close(stats.lse.double(), lse, rtol=1e-6, atol=0)
    if full == torch.float32:  # the digits are there, not only the name
        assert (stats.lse != stats.lse.to(torch.bfloat16)).any()


@each_loss
def test_common_offset_keeps_the_digits(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """The loss as lse - z_t: of two numbers near 1e4 that differ by 1, four digits of the difference are left."""
    z, target = problem(6, 3000, generator)
    z = (z * 512).round() / 512  # exact beside the offset too
    for offset in (1e4, -1e4):
        shifted = z + offset
        assert torch.equal(shifted - offset, z)
        plain, moved = (loss(x, target, reduction="none", impl=impl) for x in (z, shifted))
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            gradient(loss, shifted, target, impl=impl), gradient(loss, z, target, impl=impl), rtol=1e-4, atol=1e-9
        )


@each_loss
@pytest.mark.parametrize("options", [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"weight": torch.full((7,), 2.0)},
    {"normalizer": 12},
    {"normalizer": torch.tensor(12)},
    {"ignore_index": 3},
], ids=str)  # fmt: skip
def test_all_ignored_is_zero_and_attached(loss: Callable[..., Any], options: dict[str, Any], impl: str) -> None:
    """A batch of padding alone: 0 / 0, or a constant that ends a backward pass with an error."""
    z = torch.full((2, 3, 7), torch.nan, requires_grad=True)
    target = torch.full((2, 3), options.get("ignore_index", -100))
    result, stats = loss(z, target, impl=impl, return_stats=True, **options)
    assert result.requires_grad
    assert torch.equal(result, torch.zeros_like(result))
    result.sum().backward()
    assert z.grad is not None and torch.equal(z.grad, torch.zeros_like(z))
    assert stats.lse.isnan().all() and stats.target_log_prob.isnan().all()
    assert (stats.argmax < 0).all() and not (stats.argmax == target).any()


def test_nothing_valid_under_a_normalizer_that_counts_it(impl: str) -> None:
    """The same where the caller counts the targets, and so divides by a tensor that holds 0."""
    z = torch.randn(3, 7, requires_grad=True)
    target = torch.full((3,), -100)
    result = fl.focal_loss(z, target, normalizer=(target != -100).sum(), impl=impl)
    result.backward()
    assert result.item() == 0
    assert z.grad is not None and not z.grad.any()


def test_weights_that_sum_to_zero_divide_by_nothing(impl: str) -> None:
    """The weighted mean of cross-entropy over targets that all have weight zero."""
    z = torch.randn(2, 4, requires_grad=True)
    result = fl.cross_entropy(z, torch.tensor([1, 1]), weight=torch.tensor([1.0, 0, 1, 1]), impl=impl)
    result.backward()
    assert result.item() == 0
    assert z.grad is not None and not z.grad.any()


@each_loss
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_empty_batch(loss: Callable[..., Any], shape: tuple[int, ...], impl: str) -> None:
    """No rows at all: a grid of no blocks, a mean over nothing, a reshape that cannot infer -1."""
    z = torch.zeros(*shape, 5, requires_grad=True)
    target = torch.zeros(shape, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        result, stats = loss(z, target, reduction=reduction, return_stats=True, impl=impl)
        assert result.shape == (shape if reduction == "none" else ())
        assert not result.sum().item()
        assert stats.lse.shape == stats.argmax.shape == shape
        (got,) = torch.autograd.grad(result.sum(), z)
        assert got.shape == z.shape


@each_loss
def test_one_class(loss: Callable[..., Any], impl: str) -> None:
    """V = 1: p_t = 1, no other class to look at, no logit to learn from."""
    if "top_k" in getattr(loss, "keywords", {}):
        pytest.skip("the second most likely of one class")
    z = torch.tensor([[3.0], [-2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 0, -100])
    result, stats = loss(z, target, reduction="none", return_stats=True, impl=impl)
    if "dsc" not in repr(loss):  # its p (1 - p)^alpha is 0 at p = 1 too
        assert not result.detach().any()
    assert result[2] == 0 and result.isfinite().all()
    (got,) = torch.autograd.grad(result.sum(), z)
    assert not got.any()
    assert stats.argmax.tolist() == [0, 0, -1]
    torch.testing.assert_close(stats.lse, torch.tensor([3.0, -2.0, torch.nan], dtype=torch.float64), equal_nan=True)


@each_loss
@pytest.mark.parametrize("classes", [2, 17, BLOCK + 1, CHUNK + 1])
@pytest.mark.parametrize("target", [0, -1])
def test_one_row_and_a_last_block_of_one_column(
    loss: Callable[..., Any], classes: int, target: int, impl: str, generator: torch.Generator
) -> None:
    """Edges of the blocks: one row, which several threads share, and a last block that holds one column."""
    z = torch.randn(1, classes, generator=generator)
    z[0, 0] += math.log(classes)
    z[0, -1] += math.log(classes) + 1
    index = torch.tensor([target % classes])
    result = loss(z, index, impl=impl)
    truth = loss(z.double(), index, impl="reference")
    torch.testing.assert_close(result.double(), truth, rtol=2e-6, atol=1e-7)
    slope = gradient(loss, z.double(), index, impl="reference")
    assert slope[0, -1].abs() > 0.3 * slope.abs().max() > 1e-4
    torch.testing.assert_close(gradient(loss, z, index, impl=impl).double(), slope, rtol=1e-4, atol=1e-7)


# Memory and indexing


def _far_apart_rows(values: Tensor, stride: int) -> Tensor:
    """`values` (N, V) as rows `stride` elements apart in memory that is reserved but, all between, never used."""
    rows, classes = values.shape
    count = (rows - 1) * stride + classes
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, count * values.element_size(), flags=flags)
    flat = torch.frombuffer(memory, dtype=values.dtype, count=count)
    return flat.as_strided((rows, classes), (stride, 1)).copy_(values)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs anonymous mappings")
@each_inplace_loss
def test_offsets_beyond_32_bits(loss: Callable[..., Any], generator: torch.Generator) -> None:
    """row * stride in 32 bits, signed or not, which wraps to memory that belongs to another row or to no one."""
    values, target = problem(3, 1000, generator, torch.bfloat16)
    stride = 2**31 + 5
    z = _far_apart_rows(values, stride)
    assert z.stride() == (stride, 1) and 2 * stride > 2**32
    expected = gradient(loss, values, target)
    assert torch.equal(loss(z, target, reduction="none"), loss(values, target, reduction="none"))
    assert torch.equal(gradient(loss, z, target), expected)
    in_place = gradient(loss, z, target, inplace_backward=True)
    assert in_place.data_ptr() == z.data_ptr()
    assert torch.equal(in_place, expected)


@each_loss
def test_targets_are_checked_in_64_bits(loss: Callable[..., Any], impl: str) -> None:
    """Bounds not checked, or checked after a cast to 32 bits, in which 2**32 + 1 is a class."""
    z = torch.zeros(3, 5)
    for value in (2**32 + 1, -(2**32) + 1, 2**31, -1, 5, 2**62, -(2**63)):
        with pytest.raises(IndexError, match=rf"target {value} is out of range for 5 classes"):
            loss(z, torch.tensor([0, value, -100]), impl=impl)


@pytest.mark.parametrize("value", [-1, 5, 2**31 - 1, -(2**31)])
def test_int32_targets_are_checked(value: int, impl: str) -> None:
    """The same of targets in 32 bits, whose extremes must not wrap into the classes."""
    with pytest.raises(IndexError, match=f"target {value} is"):
        fl.cross_entropy(torch.zeros(2, 5), torch.tensor([1, value], dtype=torch.int32), impl=impl)


def test_candidates_of_ignored_rows_are_not_looked_at(impl: str, generator: torch.Generator) -> None:
    """An argmax from an earlier pass, which for ignored rows is none, refused or read at -1."""
    z, target = problem(4, 9, generator)
    target[1] = -100
    _, stats = fl.cross_entropy(z, target, return_stats=True, impl=impl)
    result = fl.mixed_cross_entropy(z, target, alpha=0.25, candidates=stats.argmax, impl=impl)
    torch.testing.assert_close(result, fl.mixed_cross_entropy(z, target, alpha=0.25, impl=impl))


@each_loss
@pytest.mark.parametrize("ignore_index", [-100, 2, -1, 10**12])
def test_every_row_of_output_is_written(
    loss: Callable[..., Any], ignore_index: int, impl: str, generator: torch.Generator
) -> None:
    """An early return for ignored rows over memory that nobody initialised (which here holds NaN)."""
    assert torch.empty(3).isnan().all()  # or this test could not fail
    z, target = problem(6, 2100, generator)
    z[2] = torch.nan  # whatever an ignored row holds
    target[target == ignore_index] = 3
    target[[2, 5]] = ignore_index
    for reduction in ("none", "mean"):
        result, stats = loss(z, target, ignore_index=ignore_index, reduction=reduction, return_stats=True, impl=impl)
        assert not result.isnan().any()
    assert stats.lse.isnan().tolist() == [False, False, True, False, False, True]
    assert (stats.argmax[[2, 5]] < 0).all() and (stats.argmax[[2, 5]] != ignore_index).all()
    assert stats.argmax[[0, 1, 3, 4]].tolist() == z[[0, 1, 3, 4]].argmax(-1).tolist()
    got = gradient(loss, z, target, ignore_index=ignore_index, impl=impl)
    assert not got.isnan().any()
    assert not got[[2, 5]].any() and got[[0, 1, 3, 4]].abs().sum(-1).min() > 0


@each_loss
def test_targets_that_are_a_slice(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """A non-contiguous, expanded or 32-bit tensor of targets, read as if it were packed 64-bit numbers."""
    z, target = problem(6, 50, generator)
    target[4] = -100
    expected = gradient(loss, z, target, impl=impl)
    for other in (
        torch.stack([target, target + 1], 1)[:, 0],
        torch.stack([target, target + 1], 1).int()[:, 0],
        target.int(),
    ):
        assert torch.equal(gradient(loss, z, other, impl=impl), expected)
    shifted = torch.cat([target.new_tensor([7]), target])[1:]  # the usual next-token target
    assert torch.equal(gradient(loss, z, shifted, impl=impl), expected)
    grid = target.view(2, 3).t().contiguous().t()
    assert torch.equal(gradient(loss, z.view(2, 3, 50), grid, impl=impl).view(6, 50), expected)
    same = target[:1].expand(6)
    assert torch.equal(gradient(loss, z, same, impl=impl), gradient(loss, z, same.clone(), impl=impl))


@each_loss
def test_logits_in_any_layout(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """Row stride assumed to be V, rows assumed aligned, or a transposed input read as it lies."""
    z, target = problem(6, 261, generator)
    expected = gradient(loss, z, target, impl=impl)
    for laid_out in (
        z.t().contiguous().t(),
        torch.cat([z, z], 1)[:, :261],
        torch.cat([torch.zeros(6, 3), z], 1)[:, 3:],
        torch.cat([torch.zeros(1), z.flatten()])[1:].view(6, 261),
        torch.stack([z, -z], 1)[:, 0],
        torch.stack([z, -z], 2)[..., 0],
    ):
        assert torch.equal(laid_out, z)
        assert torch.equal(gradient(loss, laid_out, target, impl=impl), expected)
    expanded = z[:1].expand(6, 261)
    assert torch.equal(
        gradient(loss, expanded, target, impl=impl), gradient(loss, expanded.contiguous(), target, impl=impl)
    )


# Compilation, devices, trust


def _step(name: str, own: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda z, target, value: getattr(fl, name)(z, target, **{own: value})


@pytest.mark.compile
@pytest.mark.parametrize(
    "name, own", [("focal_loss", "gamma"), ("mixed_cross_entropy", "alpha"), ("dsc_loss", "alpha")]
)
def test_a_changing_parameter_compiles_once(name: str, own: str, generator: torch.Generator) -> None:
    """A value that changes each step baked into the graph as a constant: a compilation a step, or a stale value."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = _step(name, own)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    z, target = problem(5, 33, generator)
    target[2] = -100
    losses = set()
    for value in (0.0, 0.125, 0.25, 0.5, 1.0):
        value = torch.tensor(value)
        result = compiled(z.requires_grad_(), target, value)
        torch.testing.assert_close(result, step(z, target, value), rtol=1e-6, atol=0)
        (got,) = torch.autograd.grad(result, z)
        torch.testing.assert_close(got, gradient(step, z, target, value), rtol=1e-6, atol=1e-8)
        losses.add(result.item())
    assert len(losses) == 5
    assert counter.frame_count == 1
    per_row = torch.linspace(0, 1, 5)
    torch.testing.assert_close(compiled(z, target, per_row), step(z, target, per_row), rtol=1e-6, atol=0)


@pytest.mark.compile
def test_a_changing_number_is_never_stale(generator: torch.Generator) -> None:
    """The same of a Python number, which may recompile but must not keep an old value, nor become a float64 one."""
    torch._dynamo.reset()
    step = _step("mixed_cross_entropy", "alpha")
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    z, target = problem(5, 33, generator)
    for value in (0.1, 0.2, 0.3):
        result = compiled(z, target, value)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, step(z, target, value), rtol=1e-6, atol=0)


@pytest.mark.compile
def test_compiled_rows_are_all_written(generator: torch.Generator) -> None:
    """A shortcut under torch.compile, or a graph break, that leaves rows of the outputs as they were allocated."""
    torch._dynamo.reset()

    def step(z: Tensor, target: Tensor) -> Any:
        return fl.cross_entropy(z, target, reduction="none", return_stats=True)

    z, target = problem(6, 2100, generator)
    target[[0, 4]] = -100
    z.requires_grad_()
    result, stats = torch.compile(step, fullgraph=True)(z, target)
    assert not result.isnan().any()
    assert stats.lse.isnan().tolist() == [True, False, False, False, True, False]
    (got,) = torch.autograd.grad(result.sum(), z)
    assert not got.isnan().any() and not got[[0, 4]].any()
    (expected,) = torch.autograd.grad(step(z, target)[0].sum(), z)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in LOSSES if "classes" not in name])
def test_the_dtype_and_the_backend_are_those_asked_for(
    name: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    kernel_calls: Counter[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bf16 path that quietly converts to another dtype, or a backend that hands the work to another one."""
    seen = []
    job = _engine.Job

    def recorded(dtype_code: int, *arguments: Any) -> Any:
        seen.append(dtype_code)
        return job(dtype_code, *arguments)

    monkeypatch.setattr(_engine, "Job", recorded)
    z, target = problem(3, 40, generator, dtype)
    gradient(LOSSES[name], z, target, impl="reference")
    assert not kernel_calls and not seen
    gradient(LOSSES[name], z, target, impl="cpu")
    forward = "statistics" if name == "flex_loss rows" else "forward"
    assert kernel_calls == {(forward, "cpu"): 1, ("backward", "cpu"): 1}
    assert seen == [native.DTYPES[dtype]] * 2


def test_a_missing_extension_is_not_dropped_silently() -> None:
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
    assert first.startswith("impl='cpu' cannot run: the C++ extension did not load")
    assert second == first.replace("impl='cpu'", "FUSEDLOSS_IMPL='cpu'")
    assert "fusedloss._engine" in first


def test_the_environment_names_the_default(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, kernel_calls: Counter[tuple[str, str]]
) -> None:
    """FUSEDLOSS_IMPL counts where no `impl` is given, and a name that does not exist is an error there too."""
    z, target = problem(3, 5, generator)
    monkeypatch.setenv("FUSEDLOSS_IMPL", "reference")
    fl.cross_entropy(z, target)
    assert not kernel_calls
    with pytest.raises(ValueError, match="but FUSEDLOSS_IMPL is 'reference'"):
        fl.cross_entropy(z, target, inplace_backward=True)
    fl.cross_entropy(z, target, impl="cpu")
    assert kernel_calls == {("forward", "cpu"): 1}
    monkeypatch.setenv("FUSEDLOSS_IMPL", "cpu")
    fl.cross_entropy(z, target)
    assert kernel_calls == {("forward", "cpu"): 2}
    monkeypatch.setenv("FUSEDLOSS_IMPL", "fastest")
    with pytest.raises(ValueError, match=r"FUSEDLOSS_IMPL must be one of .* got 'fastest'"):
        fl.cross_entropy(z, target)
    monkeypatch.setenv("FUSEDLOSS_IMPL", "triton_fused")  # of linear forms alone
    fl.cross_entropy(z, target)
    assert kernel_calls == {("forward", "cpu"): 3}
    for impl in ("triton", "cuda"):  # of other devices
        monkeypatch.setattr(backends.BACKENDS[impl], "runs_on", "cuda")
        monkeypatch.setenv("FUSEDLOSS_IMPL", impl)
        fl.cross_entropy(z, target)
    assert kernel_calls == {("forward", "cpu"): 5}
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run"):
        fl.cross_entropy(z, target, impl="cuda")
    monkeypatch.setenv("FUSEDLOSS_IMPL", "")
    fl.cross_entropy(z, target)
    assert kernel_calls == {("forward", "cpu"): 6}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@each_loss
def test_targets_of_every_integer_dtype(loss: Any, dtype: torch.dtype, impl: str, generator: torch.Generator) -> None:
    """In a narrow dtype, -100 or -1 may be another number, which is then a class."""
    z, target = problem(6, 200, generator)
    target = target % 127
    target[3] = 156 - 256 if dtype == torch.int8 else 156  # as -100 is in eight bits without a sign
    own = {"ignore_index": 5, "impl": impl} if dtype != torch.int8 else {"impl": impl}
    target[1] = 5
    expected = loss(z, target, **own)
    narrow = target.to(dtype)
    torch.testing.assert_close(loss(z, narrow, **own), expected, rtol=0, atol=0)
    assert fl.normalizer(narrow, ignore_index=own.get("ignore_index", -100)) == 5
    if dtype == torch.uint8:
        loss(z, narrow, impl=impl)  # -100 is no class
        assert fl.normalizer(narrow) == 6


def test_integers_of_numpy(generator: torch.Generator) -> None:
    numpy = pytest.importorskip("numpy")
    z, target = problem(6, 9, generator)
    target[2] = 3
    expected = fl.cross_entropy(z, target, ignore_index=3)
    assert torch.equal(fl.cross_entropy(z, target, ignore_index=numpy.int64(3)), expected)
    assert fl.normalizer(target, ignore_index=numpy.int32(3)) == (target != 3).sum()
    hidden, weight = torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator)
    expected = fl.linear_cross_entropy(hidden, weight, target, budget=72)
    assert torch.equal(fl.linear_cross_entropy(hidden, weight, target, budget=numpy.int64(72)), expected)
    layer = fl.nn.LinearFocalLoss(numpy.int64(4), numpy.int64(9), ignore_index=numpy.int64(3))
    assert layer(hidden, target).isfinite()
    module = fl.nn.CrossEntropyLoss(ignore_index=numpy.int64(3))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, target), fl.cross_entropy(z, target, ignore_index=3))
    with pytest.raises(TypeError, match=r"ignore_index must be an int, got np\.float64"):
        fl.cross_entropy(z, target, ignore_index=numpy.float64(3))


@each_loss
def test_another_default_device(loss: Any, compiled_impl: str, generator: torch.Generator, monkeypatch: Any) -> None:
    """Memory of a tensor's gradient is on its device, not on the default one."""
    z, target = problem(6, 9, generator)
    z.requires_grad_()
    expected = torch.autograd.grad(loss(z, target, impl=compiled_impl), z)[0]
    for smallest in (0, memory.SMALL):
        monkeypatch.setattr(memory, "SMALL", smallest)
        torch.set_default_device("meta")
        try:
            (gradient,) = torch.autograd.grad(loss(z, target, impl=compiled_impl), z)
        finally:
            torch.set_default_device(None)
        assert torch.equal(gradient, expected)


@each_loss
@pytest.mark.parametrize("shape", [(3, 20_000), (300, 300)], ids=["rows shared by threads", "rows to each thread"])
def test_same_bits_twice(
    loss: Callable[..., Any], shape: tuple[int, int], compiled_impl: str, generator: torch.Generator
) -> None:
    """Sums whose order is that in which threads happen to finish."""
    z, target = problem(*shape, generator)
    results = [(loss(z, target, impl=compiled_impl), gradient(loss, z, target, impl=compiled_impl)) for _ in range(2)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


#: Losses with a compiled epilogue; the others call torch.log, of which the note below is true too.
COMPILED = [name for name in INPLACE if not name.startswith("flex_loss")]


def _check_losses(z: Tensor, target: Tensor, expected: list[tuple[Tensor, Tensor]]) -> None:
    # No operator of torch that runs on several threads belongs here: those do hang in a forked child.
    torch.use_deterministic_algorithms(False)  # or large new tensors are filled
    for name, (result, slope) in zip(COMPILED, expected, strict=True):
        rows = LOSSES[name](z, target, reduction="none", impl="cpu")
        (got,) = torch.autograd.grad(rows.sum(), z)
        for x, y in ((rows.detach(), result.detach()), (got, slope)):
            assert abs(x.numpy() - y.numpy()).max() < 1e-6


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("shape", [(2, 40_000), (300, 700)], ids=["rows shared by threads", "rows to each thread"])
def test_fork_after_threads_does_not_hang(shape: tuple[int, int], generator: torch.Generator) -> None:
    """A child that waits for worker threads which only its parent has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        z, target = problem(*shape, generator)
        z.requires_grad_()
        expected = []
        for name in COMPILED:
            rows = LOSSES[name](z, target, reduction="none", impl="cpu")
            expected.append((rows, *torch.autograd.grad(rows.sum(), z)))
        child = multiprocessing.get_context("fork").Process(target=_check_losses, args=(z, target, expected))
        child.start()
        child.join(30)
        hung = child.is_alive()
        if hung:
            child.kill()
            child.join()
        assert not hung
        assert child.exitcode == 0
        _check_losses(z, target, expected)  # and the parent still has its threads
    finally:
        torch.set_num_threads(threads)


class _Scored(torch.utils.data.Dataset[Tensor]):
    """Items that are losses, computed where the item is asked for."""

    def __init__(self, z: Tensor, target: Tensor) -> None:
        self.z, self.target = z, target

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(2)  # a worker has one, which would hide the hazard
        return fl.cross_entropy(self.z[i], self.target[i], impl="cpu")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_data_loader_worker_after_threads_does_not_hang(generator: torch.Generator) -> None:
    """The same where it happens to users: a worker that scores its examples after the parent has trained a step."""
    z, target = problem(4, 40_000, generator)
    expected = fl.cross_entropy(z, target, reduction="none", impl="cpu")
    loader = torch.utils.data.DataLoader(
        _Scored(z, target), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(torch.cat(list(loader)), expected)
