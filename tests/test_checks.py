"""Bad arguments: the right exception, with the value in it, before anything runs or changes."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from row_losses import each_loss
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fusedloss as fl
from fusedloss import backends, checks
from fusedloss.backends import cpu
from fusedloss.definition import reference

NAN = math.nan


class Bad(NamedTuple):
    """A call on logits (4, 5) and targets (4,) that raises `error` with every one of `words` in its message."""

    call: Callable[..., Any]
    error: type[Exception]
    words: tuple[str, ...]


def bad(call: Callable[..., Any], error: type[Exception], *words: str) -> Bad:
    return Bad(call, error, words)


def options(error: type[Exception], *words: str, **values: Any) -> Bad:
    """An option that every loss shares, here passed to cross-entropy."""
    return bad(lambda z, t: fl.cross_entropy(z, t, **values), error, *words)


def focal(gamma: Any, error: type[Exception], *words: str) -> Bad:
    return bad(lambda z, t: fl.focal_loss(z, t, gamma=gamma), error, "gamma", *words)


def mixed(error: type[Exception], *words: str, alpha: Any = 0.25, **values: Any) -> Bad:
    return bad(lambda z, t: fl.mixed_cross_entropy(z, t, alpha=alpha, **values), error, *words)


def dsc(error: type[Exception], *words: str, loss: Callable[..., Any] = fl.dsc_loss, **values: Any) -> Bad:
    return bad(lambda z, t: loss(z, t, **values), error, *words)


def flex(error: type[Exception], *words: str, loss_fn: Any = lambda s: s.ce, **values: Any) -> Bad:
    return bad(lambda z, t: fl.flex_loss(z, t, loss_fn, **values), error, *words)


def tensors(error: type[Exception], *words: str, z: Any = None, t: Any = None) -> Bad:
    """Other logits or targets than the good ones."""

    def call(good_z: Tensor, good_t: Tensor) -> Any:
        return fl.cross_entropy(good_z if z is None else z, good_t if t is None else t)

    return bad(call, error, *words)


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


CASES: dict[str, Bad] = {
    # logits and targets
    "input is a list": tensors(TypeError, "input", "list", z=[[1.0]]),
    "input is integer": tensors(TypeError, "input", "torch.int64", z=torch.zeros(4, 5, dtype=torch.int64)),
    "input is bool": tensors(TypeError, "input", "torch.bool", z=torch.zeros(4, 5, dtype=torch.bool)),
    "input is complex": tensors(TypeError, "input", "torch.complex64", z=torch.zeros(4, 5, dtype=torch.complex64)),
    "input is float8": tensors(
        TypeError, "input", "torch.float8_e4m3fn", z=torch.zeros(4, 5).to(torch.float8_e4m3fn)
    ),
    "input is a number": tensors(ValueError, "input", "()", z=torch.tensor(1.0), t=torch.tensor(0)),
    "input has no classes": tensors(ValueError, "input", "(4, 0)", z=torch.zeros(4, 0)),
    "target is a list": tensors(TypeError, "target", "list", t=[0, 1, 2, 3]),
    "target is None": bad(lambda z, t: fl.cross_entropy(z, None), TypeError, "target", "NoneType"),
    "target is float": tensors(TypeError, "target", "torch.float32", t=torch.zeros(4)),
    "target is bool": tensors(TypeError, "target", "torch.bool", t=torch.zeros(4, dtype=torch.bool)),
    "target is uint16": tensors(TypeError, "target", "torch.uint16", t=torch.zeros(4, dtype=torch.uint16)),
    "target is shorter": tensors(ValueError, "target", "(4,)", "(3,)", t=longs(0, 1, 2)),
    "target has a dimension more": tensors(ValueError, "(4,)", "(4, 1)", t=longs(0, 1, 2, 3)[:, None]),
    "target holds probabilities": tensors(TypeError, "target", "torch.float32", t=torch.zeros(4, 5)),
    "classes come second": tensors(
        ValueError, "target", "(2, 5)", "(2, 3)", z=torch.zeros(2, 5, 3), t=torch.zeros(2, 3, dtype=torch.int64)
    ),
    "target is elsewhere": tensors(ValueError, "meta", "cpu", t=longs(0, 1, 2, 3).to("meta")),
    "target is too large": tensors(IndexError, "target 5 ", "5 classes", "not ignore_index", t=longs(0, 5, 1, 2)),
    "target is negative": tensors(IndexError, "target -1 ", "5 classes", t=longs(0, 2, -1, 2)),
    "target is near ignore_index": tensors(IndexError, "target -101 ", t=longs(0, 2, -101, 2)),
    "target needs 64 bits": tensors(IndexError, "target 4294967297 ", t=longs(0, 2**32 + 1, 1, 2)),
    "target is -100 but that is not ignored": bad(
        lambda z, t: fl.cross_entropy(z, t, ignore_index=0), IndexError, "target -100 ", "not ignore_index"
    ),
    # shared options
    "unknown reduction": options(ValueError, "reduction", "'avg'", "'mean', 'sum', 'none'", reduction="avg"),
    "reduction is None": options(ValueError, "reduction", "None", reduction=None),
    "reduction is a list": options(ValueError, "reduction", "['mean']", reduction=["mean"]),
    "unknown impl": options(ValueError, "impl", "'abacus'", "'reference', 'cpu'", impl="abacus"),
    "impl is a number": options(ValueError, "impl", "3", impl=3),
    "unknown smoothing_over": options(ValueError, "smoothing_over", "'rest'", smoothing_over="rest"),
    "label_smoothing above 1": options(ValueError, "label_smoothing", "1.5", label_smoothing=1.5),
    "label_smoothing below 0": options(ValueError, "label_smoothing", "-0.1", label_smoothing=-0.1),
    "label_smoothing is NaN": options(ValueError, "label_smoothing", "nan", label_smoothing=NAN),
    "label_smoothing is a bool": options(TypeError, "label_smoothing", "True", "bool", label_smoothing=True),
    "label_smoothing is a string": options(TypeError, "label_smoothing", "'0.1'", "str", label_smoothing="0.1"),
    "label_smoothing is None": options(TypeError, "label_smoothing", "None", label_smoothing=None),
    "z_loss below 0": options(ValueError, "z_loss", "-0.5", z_loss=-0.5),
    "z_loss is NaN": options(ValueError, "z_loss", "nan", z_loss=NAN),
    "z_loss is a bool": options(TypeError, "z_loss", "True", z_loss=True),
    "ignore_index is a float": options(TypeError, "ignore_index", "1.0", ignore_index=1.0),
    "ignore_index is a bool": options(TypeError, "ignore_index", "False", ignore_index=False),
    "ignore_index is None": options(TypeError, "ignore_index", "None", ignore_index=None),
    "weight is a list": options(TypeError, "weight", "list", weight=[1.0] * 5),
    "weight is integer": options(TypeError, "weight", "torch.int64", weight=longs(1, 1, 1, 1, 1)),
    "weight is of the wrong size": options(ValueError, "weight", "(5,)", "(4,)", weight=torch.ones(4)),
    "weight is a matrix": options(ValueError, "weight", "(1, 5)", weight=torch.ones(1, 5)),
    "weight is elsewhere": options(ValueError, "weight", "meta", "cpu", weight=torch.ones(5, device="meta")),
    "weight requires grad": options(ValueError, "weight", "requires grad", weight=torch.ones(5, requires_grad=True)),
    "normalizer is zero": options(ValueError, "normalizer", "0", normalizer=0),
    "normalizer is negative": options(ValueError, "normalizer", "-2.5", normalizer=-2.5),
    "normalizer is NaN": options(ValueError, "normalizer", "nan", normalizer=NAN),
    "normalizer is a bool": options(TypeError, "normalizer", "True", normalizer=True),
    "normalizer is a string": options(ValueError, "normalizer", "'4'", normalizer="4"),
    "normalizer is a vector": options(ValueError, "normalizer", "(1,)", normalizer=torch.ones(1)),
    "normalizer is a negative tensor": options(ValueError, "normalizer", "-1", normalizer=torch.tensor(-1.0)),
    "normalizer is a NaN tensor": options(ValueError, "normalizer", "nan", normalizer=torch.tensor(NAN)),
    "normalizer of a sum": options(ValueError, "normalizer", "'sum'", normalizer=4, reduction="sum"),
    "normalizer of rows": options(ValueError, "normalizer", "'none'", normalizer=4, reduction="none"),
    "unknown keyword": options(TypeError, "cross_entropy()", "'lable_smoothing'", lable_smoothing=0.1),
    "torch's old keyword": options(TypeError, "'size_average'", size_average=True),
    # focal
    "gamma below 0": focal(-1.0, ValueError, "-1.0"),
    "gamma just below 0": focal(-1e-9, ValueError, "-1e-09"),
    "gamma is NaN": focal(NAN, ValueError, "nan"),
    "gamma is a bool": focal(True, TypeError, "True", "bool"),
    "gamma is a string": focal("2", TypeError, "'2'"),
    "gamma is None": focal(None, TypeError, "None"),
    "gamma is complex": focal(2j, TypeError, "2j"),
    "gamma is an integer tensor": focal(torch.tensor(2), TypeError, "torch.int64"),
    "gamma is a negative tensor": focal(torch.tensor(-2.0), ValueError, "-2.0"),
    "gamma has a negative row": focal(torch.tensor([0.0, 1.0, -0.5, 2.0]), ValueError, "-0.5"),
    "gamma has a NaN row": focal(torch.tensor([0.0, 1.0, NAN, 2.0]), ValueError, "nan"),
    "gamma is of the wrong size": focal(torch.ones(3), ValueError, "(4,)", "(3,)"),
    "gamma has a size of one": focal(torch.ones(1), ValueError, "(4,)", "(1,)"),
    "gamma for a target that is a list": bad(
        lambda z, t: fl.focal_loss(z, [0, 1, 2, 3], gamma=torch.ones(4)), TypeError, "target", "list"
    ),
    "unknown keyword of focal": bad(
        lambda z, t: fl.focal_loss(z, t, alpha=0.25), TypeError, "focal_loss()", "'alpha'"
    ),
    # mixed
    "alpha above 1": mixed(ValueError, "alpha", "1.25", alpha=1.25),
    "alpha below 0": mixed(ValueError, "alpha", "-0.25", alpha=-0.25),
    "alpha is NaN": mixed(ValueError, "alpha", "nan", alpha=NAN),
    "alpha is a bool": mixed(TypeError, "alpha", "True", alpha=True),
    "alpha is a tensor above 1": mixed(ValueError, "alpha", "1.5", alpha=torch.tensor(1.5)),
    "alpha has a row below 0": mixed(ValueError, "alpha", "-1.0", alpha=torch.tensor([0.0, 1.0, -1.0, 0.5])),
    "alpha is missing": bad(lambda z, t: fl.mixed_cross_entropy(z, t), TypeError, "alpha"),
    "top_k is 3": mixed(ValueError, "top_k", "3", top_k=3),
    "top_k is 0": mixed(ValueError, "top_k", "0", top_k=0),
    "top_k is a bool": mixed(ValueError, "top_k", "True", top_k=True),
    "top_k is None": mixed(ValueError, "top_k", "None", top_k=None),
    "top_k of one class": bad(
        lambda z, t: fl.mixed_cross_entropy(z[:, :1], 0 * t.clamp(min=0), alpha=0.5, top_k=2),
        ValueError, "second", "1",
    ),
    "top_k of a list": bad(
        lambda z, t: fl.mixed_cross_entropy([1.0], t, alpha=0.5, top_k=2), TypeError, "input", "list"
    ),
    "top_k of a number": bad(
        lambda z, t: fl.mixed_cross_entropy(z[0, 0], t[0], alpha=0.5, top_k=2), ValueError, "input", "()"
    ),
    "candidates and top_k": mixed(ValueError, "candidates", "top_k=2", candidates=longs(0, 1, 2, 3), top_k=2),
    "candidates are a list": mixed(TypeError, "candidates", "list", candidates=[0, 1, 2, 3]),
    "candidates are floats": mixed(TypeError, "candidates", "torch.float32", candidates=torch.zeros(4)),
    "candidates are too few": mixed(ValueError, "candidates", "(4,)", "(3,)", candidates=longs(0, 1, 2)),
    "candidates are none each": mixed(
        ValueError, "candidates", "(4, 0)", candidates=torch.zeros(4, 0, dtype=torch.int64)
    ),
    "candidates have two dimensions more": mixed(
        ValueError, "candidates", "(4, 1, 1)", candidates=torch.zeros(4, 1, 1, dtype=torch.int64)
    ),
    "candidates are elsewhere": mixed(
        ValueError, "candidates", "meta", "cpu", candidates=torch.zeros(4, dtype=torch.int64, device="meta")
    ),
    "a candidate is too large": mixed(IndexError, "candidate 5 ", "5 classes", candidates=longs(0, 5, 2, 3)),
    "a candidate is negative": mixed(
        IndexError, "candidate -1 ", "5 classes", candidates=torch.tensor([[0, 1], [1, -1], [2, 2], [3, 3]])
    ),
    "a candidate is ignore_index": mixed(IndexError, "candidate -100 ", candidates=longs(-100, 1, 2, 3)),
    "a candidate needs 64 bits": mixed(IndexError, "candidate 4294967297 ", candidates=longs(0, 2**32 + 1, 2, 3)),
    # dice
    "DSC's alpha below 0": dsc(ValueError, "alpha", "-0.01", alpha=-0.01),
    "DSC's alpha is NaN": dsc(ValueError, "alpha", "nan", alpha=NAN),
    "DSC's alpha is a bool": dsc(TypeError, "alpha", "True", alpha=True),
    "unknown form": dsc(ValueError, "form", "'rows'", form="rows"),
    "unknown level": dsc(ValueError, "level", "'batch'", "'example'", level="batch"),
    "smooth is negative in a class": dsc(ValueError, "smooth", "-1.0", smooth=-1.0, level="class"),
    "the target form of a class": dsc(ValueError, "'class'", "'target'", level="class", form="target"),
    "the target form of the set": dsc(
        ValueError, "'set'", "'target'", loss=fl.dice_loss, level="set", form="target"
    ),
    "z_loss of a class": dsc(ValueError, "z_loss", "'class'", "0.5", level="class", z_loss=0.5),
    "z_loss of the set": dsc(ValueError, "z_loss", "'set'", "0.5", level="set", z_loss=0.5),
    "normalizer of a class": dsc(ValueError, "normalizer", "'class'", "7", level="class", normalizer=7),
    "normalizer of the set": dsc(ValueError, "normalizer", "'set'", "7", level="set", normalizer=7),
    "class weights of the set": dsc(ValueError, "weight", "'set'", level="set", weight=torch.ones(5)),
    "no reduction of the set": dsc(ValueError, "reduction", "'none'", level="set", reduction="none"),
    "the sum of the set": dsc(ValueError, "reduction", "'sum'", level="set", reduction="sum"),
    "unknown keyword of a class": dsc(TypeError, "dsc_loss()", "'gamma'", level="class", gamma=2.0),
    "target is too large for a class": bad(
        lambda z, t: fl.dsc_loss(z, t + 3, level="class"), IndexError, "target 6 ", "5 classes"
    ),
    "a class of hidden states": bad(
        lambda z, t: fl.linear_dsc_loss(z, z.new_zeros(7, 5), t, level="class"), ValueError, "linear", "'class'"
    ),
    "a learnt alpha of a class in place": dsc(
        ValueError, "inplace_backward", "compiled", level="class", alpha=torch.tensor(0.5, requires_grad=True),
        inplace_backward=True,
    ),
    "a class of the reference in place": dsc(
        ValueError, "inplace_backward", "'reference'", level="class", inplace_backward=True, impl="reference"
    ),
    "smooth is 0 in one_vs_rest": dsc(ValueError, "smooth", "0", smooth=0),
    "smooth is negative": dsc(ValueError, "smooth", "-1.0", smooth=-1.0, form="target"),
    "smooth is NaN": dsc(ValueError, "smooth", "nan", smooth=NAN),
    "smooth is a bool": dsc(TypeError, "smooth", "True", smooth=True),
    "squared is a number": dsc(TypeError, "squared", "2", squared=2),
    "detach_weight is a string": dsc(TypeError, "detach_weight", "'no'", detach_weight="no"),
    "DSC does not smooth labels": dsc(TypeError, "dsc_loss()", "'label_smoothing'", label_smoothing=0.1),
    "dice does not smooth labels": dsc(
        TypeError, "dice_loss()", "'smoothing_over'", loss=fl.dice_loss, smoothing_over="all"
    ),
    "dice has no alpha": dsc(TypeError, "dice_loss()", "'alpha'", loss=fl.dice_loss, alpha=0.5),
    # flex
    "loss_fn is not callable": flex(TypeError, "loss_fn", "'poly'", loss_fn="poly"),
    "unknown statistic": flex(ValueError, "statistics", "'third'", "'top'", statistics=("top", "third")),
    "statistics is a string": flex(TypeError, "statistics", "'top'", statistics="top"),
    "statistics is None": flex(TypeError, "None", statistics=None),
    "unknown over": flex(ValueError, "over", "'columns'", over="columns"),
    "statistics over classes": flex(ValueError, "over='classes'", over="classes", statistics=("top",)),
    "second of a list": bad(
        lambda z, t: fl.flex_loss([1.0], t, lambda s: s.ce, statistics=("second",)), TypeError, "input", "list"
    ),
    "flex candidates out of range": flex(IndexError, "candidate 9 ", candidates=longs(0, 9, 2, 3)),
    "unknown keyword of flex": flex(TypeError, "flex_loss()", "'gamma'", gamma=2.0),
    # writing over the logits
    "transposed logits in place": bad(
        lambda z, t: fl.cross_entropy(z.t(), longs(0, 1, 2, 3, 0), inplace_backward=True),
        ValueError, "inplace_backward", "(1, 5)", "(5, 4)",
    ),
    "every second column in place": bad(
        lambda z, t: fl.cross_entropy(z[:, ::2], longs(0, 1, 2, 0), inplace_backward=True),
        ValueError, "inplace_backward", "(5, 2)",
    ),
    "expanded logits in place": bad(
        lambda z, t: fl.cross_entropy(z[:1].expand(4, 5), t, inplace_backward=True),
        ValueError, "inplace_backward", "(0, 1)",
    ),
    "overlapping rows in place": bad(
        lambda z, t: fl.cross_entropy(z.as_strided((4, 5), (2, 1)), t, inplace_backward=True),
        ValueError, "inplace_backward", "(2, 1)",
    ),
    "sliced sequences in place": bad(
        lambda z, t: fl.cross_entropy(
            z.view(2, 2, 5).repeat(1, 2, 1)[:, :-1], t.new_zeros(2, 3), inplace_backward=True
        ),
        ValueError, "inplace_backward", "(20, 5, 1)",
    ),
    "a loss over the classes in place": flex(
        ValueError, "inplace_backward", "compiled", loss_fn=lambda p, q, positive: p * q, over="classes",
        inplace_backward=True,
    ),
    "the reference in place": bad(
        lambda z, t: fl.cross_entropy(z, t, inplace_backward=True, impl="reference"),
        ValueError, "inplace_backward", "'reference'",
    ),
    # where it runs
    "the CPU engine elsewhere": bad(
        lambda z, t: fl.cross_entropy(z.to("meta"), t.to("meta"), impl="cpu"), RuntimeError, "impl='cpu'", "meta"
    ),
}  # fmt: skip


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that ran, of whichever implementation."""
    done: list[str] = []

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            done.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(reference, "dense_columns")
    if backends.unavailable("cpu") is None:
        watch(cpu._engine, "forward")
        watch(cpu._engine, "class_sums")
        watch(cpu._engine, "backward")
    return done


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_argument(
    case: Bad, impl: str, work: list[str], monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    z, target = torch.randn(4, 5, generator=generator), torch.tensor([0, 3, -100, 4])
    before = z.clone(), target.clone(), z._version, target._version
    monkeypatch.setenv("FUSEDLOSS_IMPL", impl)
    with pytest.raises(case.error) as raised:
        case.call(z, target)
    message = str(raised.value)
    assert [word for word in case.words if word not in message] == [], message
    assert raised.type is case.error
    assert not work
    assert torch.equal(z, before[0]) and torch.equal(target, before[1])
    assert (z._version, target._version) == before[2:]


def test_good_arguments_do_work(impl: str, work: list[str]) -> None:
    """What the cases above are held against."""
    z, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 3, -100, 4])
    fl.cross_entropy(z, target, impl=impl).backward()
    assert work == (["dense_columns"] if impl == "reference" else ["forward", "backward"])


@each_loss
def test_every_loss_checks_its_tensors_and_options(loss: Callable[..., Any], impl: str, work: list[str]) -> None:
    z, target = torch.zeros(4, 5), torch.tensor([0, 3, -100, 4])
    for error, words, arguments, values in (
        (TypeError, "torch.int64", (z.long(), target), {}),
        (TypeError, "torch.float32", (z, z[:, 0]), {}),
        (ValueError, r"\(3,\)", (z, target[:3]), {}),
        (IndexError, "target 5 ", (z, target.clamp(min=5)), {}),
        (ValueError, "'avg'", (z, target), {"reduction": "avg"}),
        (ValueError, "-1", (z, target), {"z_loss": -1}),
        (TypeError, "2.0", (z, target), {"ignore_index": 2.0}),
        (ValueError, r"\(6,\)", (z, target), {"weight": torch.ones(6)}),
        (ValueError, "-3", (z, target), {"normalizer": -3}),
        (TypeError, "unexpected keyword argument 'nonsense'", (z, target), {"nonsense": 1}),
    ):
        with pytest.raises(error, match=words):
            loss(*arguments, impl=impl, **values)
    assert not work
    with pytest.raises(ValueError, match="'fpga'"):
        loss(z, target, impl="fpga")


@pytest.mark.parametrize("arguments, error, words", [
    ((-1, 10), ValueError, "step .*-1"),
    ((1, 0), ValueError, "total_steps .*0"),
    ((1, -5), ValueError, "total_steps .*-5"),
    ((1, 10, 1.5), ValueError, r"maximum .*1\.5"),
    ((1, 10, -0.5), ValueError, r"maximum .*-0\.5"),
    ((NAN, 10), ValueError, "step .*nan"),
    ((True, 10), TypeError, "step .*True"),
    (("1", 10), TypeError, "step .*'1'"),
    ((1, None), TypeError, "total_steps .*None"),
])  # fmt: skip
def test_bad_schedule(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fl.alpha_schedule(*arguments)


@pytest.mark.parametrize("result, words", [
    (lambda s: s.ce.sum(), r"4 rows, got \(\)"),
    (lambda s: s.ce[:, None], r"4 rows, got \(4, 1\)"),
    (lambda s: s.ce[1:], r"4 rows, got \(3,\)"),
    (lambda s: None, "4 rows, got NoneType"),
    (lambda s: 1.0, "4 rows, got float"),
])  # fmt: skip
def test_a_loss_function_must_give_a_loss_for_each_row(result: Callable[..., Any], words: str, impl: str) -> None:
    z, target = torch.zeros(4, 5), torch.tensor([0, 3, -100, 4])
    with pytest.raises(ValueError, match=words):
        fl.flex_loss(z, target, result, impl=impl)


@pytest.mark.parametrize("result", [
    lambda p, q, positive: (p * q).sum(-1),
    lambda p, q, positive: p[:, :1],
    lambda p, q, positive: None,
])  # fmt: skip
def test_a_loss_function_over_classes_must_give_a_loss_for_each_class(result: Callable[..., Any], impl: str) -> None:
    z, target = torch.zeros(4, 5), torch.tensor([0, 3, -100, 4])
    with pytest.raises(ValueError, match=r"\(4, 5\).*got"):
        fl.flex_loss(z, target, result, over="classes", impl=impl)


@pytest.mark.parametrize("name, words", [
    ("top_ce", r"statistics=\('top',\)"),
    ("second_index", r"statistics=\('second',\)"),
    ("below_logit", r"statistics=\('below',\)"),
    ("mean_ce", r"statistics=\('mean',\)"),
    ("candidate_ce", "candidates="),
    ("entropy", "no statistic named 'entropy'"),
])  # fmt: skip
def test_a_statistic_that_was_not_asked_for_says_how_to_ask(name: str, words: str, compiled_impl: str) -> None:
    z, target = torch.zeros(4, 5), torch.tensor([0, 3, -100, 4])
    with pytest.raises(AttributeError, match=words):
        fl.flex_loss(z, target, lambda s: getattr(s, name), impl=compiled_impl)


def test_a_loss_with_one_bad_row_names_the_first(impl: str) -> None:
    with pytest.raises(IndexError, match="target 7 is out of range for 5 classes, and not ignore_index"):
        fl.cross_entropy(torch.zeros(4, 5), torch.tensor([0, 7, -3, 9]), impl=impl)


def test_good_extremes_pass(impl: str) -> None:
    """Values at the ends of their ranges, numbers of other libraries, and shapes without rows."""
    z, target = torch.randn(4, 5), torch.tensor([0, 3, -100, 4])
    numpy = pytest.importorskip("numpy")
    fl.cross_entropy(z, target, label_smoothing=1, impl=impl)
    fl.cross_entropy(z, target, label_smoothing=numpy.float32(0.1), z_loss=numpy.float64(0.1), impl=impl)
    fl.cross_entropy(z, target, normalizer=torch.tensor(3), impl=impl)
    fl.cross_entropy(z, torch.tensor([0, 3, -(2**63), 4]), ignore_index=-(2**63), impl=impl)
    fl.focal_loss(z, target, gamma=0, impl=impl)
    fl.focal_loss(z, target, gamma=torch.zeros(4, dtype=torch.float64), impl=impl)
    fl.mixed_cross_entropy(z, target, alpha=1, impl=impl)
    fl.mixed_cross_entropy(z, target, alpha=torch.tensor([0.0, 1.0, 0.5, 1.0]).half(), impl=impl)
    fl.mixed_cross_entropy(z, target, alpha=0.5, candidates=torch.tensor([0, 4, 0, 1]).int(), impl=impl)
    fl.dsc_loss(z, target, alpha=0, smooth=0, form="target", impl=impl)
    fl.cross_entropy(z[:0], target[:0], impl=impl)
    assert fl.alpha_schedule(0, 1) == 0 and fl.alpha_schedule(7, 1, 1) == 1


def test_ranges_are_said_in_words() -> None:
    for arguments, words in (
        ((0, 1), "between 0 and 1"),
        ((0,), "at least 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"x must be {words}, got -2")):
            checks.check_number("x", -2, *arguments)
    with pytest.raises(ValueError, match="x must be greater than 0, got 0"):
        checks.check_number("x", 0, 0, above=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t: fl.focal_loss(z, t, gamma=torch.full((), 2.0)),
        lambda z, t: fl.cross_entropy(z, t, normalizer=torch.full((), 3.0)),
        lambda z, t: fl.cross_entropy(z, t, impl="reference"),
        lambda z, t: fl.linear_cross_entropy(z, z.detach(), t, impl="reference"),
        lambda z, t: z.sum() * fl.normalizer([t], weight=torch.ones(5)),
        lambda z, t: fl.supcon_loss(z, t, temperature=torch.full((), 0.3)),
    ],
    ids=["parameter", "normalizer", "reference", "linear reference", "count", "supcon"],
)
def test_there_are_no_values_to_check_of_fake_tensors(loss: Any) -> None:
    with FakeTensorMode():
        logits = torch.randn(5, 5, requires_grad=True)
        loss(logits, torch.zeros(5, dtype=torch.int64)).backward()
        assert logits.grad is not None
