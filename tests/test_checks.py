"""Bad arguments: the right exception, with the value in it, before anything runs or changes."""

import math
import re
from fractions import Fraction
from functools import partial
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

NAN, ONES, LABELS = math.nan, torch.ones(3, 5), torch.arange(3) // 2


class Bad(NamedTuple):
    """A call on logits (4, 5) and targets (4,) that raises `error` with every one of `words` in its message."""

    call: Any
    error: Any
    words: tuple[str, ...]


def bad(call, error, *words) -> Bad:
    return Bad(call, error, words)


def of(loss, error, *words, **values) -> Bad:
    """A loss with these arguments."""
    return Bad(lambda z, t: loss(z, t, **values), error, words)


options = partial(of, fl.cross_entropy)
focal, dsc, dice = partial(of, fl.focal_loss), partial(of, fl.dsc_loss), partial(of, fl.dice_loss)
mixed = partial(of, fl.mixed_cross_entropy, alpha=0.25)
flex = partial(of, fl.flex_loss, loss_fn=lambda s: s.ce)


def in_place(view, *words) -> Bad:
    """Logits that the function makes of those in hand."""

    def call(z, t):
        logits = view(z)
        return fl.cross_entropy(logits, t.new_zeros(logits.shape[:-1]), inplace_backward=True)

    return bad(call, ValueError, "inplace_backward", *words)


def tensors(error, *words, z=None, t=None) -> Bad:
    """Other logits or targets than the good ones."""
    return bad(lambda x, y: fl.cross_entropy(x if z is None else z, y if t is None else t), error, *words)


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


CASES: dict[str, Bad] = {
    # logits and targets
    "input is a list": tensors(TypeError, "input", "list", z=[[1.0]]),
    "input is float8": tensors(
        TypeError, "input", "torch.float8_e4m3fn", z=torch.zeros(4, 5).to(torch.float8_e4m3fn)
    ),
    "input is a number": tensors(ValueError, "input", "()", z=torch.tensor(1.0), t=torch.tensor(0)),
    "input has no classes": tensors(ValueError, "input", "(4, 0)", z=torch.zeros(4, 0)),
    "target is a list": tensors(TypeError, "target", "list", t=[0, 1, 2, 3]),
    "target is uint16": tensors(TypeError, "target", "torch.uint16", t=torch.zeros(4, dtype=torch.uint16)),
    "classes come second": tensors(
        ValueError, "target", "(2, 5)", "(2, 3)", z=torch.zeros(2, 5, 3), t=torch.zeros(2, 3, dtype=torch.int64)
    ),
    "target is elsewhere": tensors(ValueError, "meta", "cpu", t=longs(0, 1, 2, 3).to("meta")),
    "target is too large": tensors(IndexError, "target 5 ", "5 classes", "not ignore_index", t=longs(0, 5, -3, 9)),
    "target is negative": tensors(IndexError, "target -1 ", "5 classes", t=longs(0, 2, -1, 2)),
    "target is -100 but that is not ignored": bad(
        lambda z, t: fl.cross_entropy(z, t, ignore_index=0), IndexError, "target -100 ", "not ignore_index"
    ),
    "drop_ignored is a string": bad(
        lambda z, t: fl.linear_cross_entropy(z, z, t, drop_ignored="no"), TypeError, "drop_ignored", "'no'"
    ),
    # shared options
    "unknown smoothing_over": options(ValueError, "smoothing_over", "'rest'", smoothing_over="rest"),
    "label_smoothing above 1": options(ValueError, "label_smoothing", "1.5", label_smoothing=1.5),
    "label_smoothing is a bool": options(TypeError, "label_smoothing", "True", "bool", label_smoothing=True),
    "ignore_index is a bool": options(TypeError, "ignore_index", "False", ignore_index=False),
    "ignore_index is beyond int64": options(ValueError, "ignore_index", str(10**30), ignore_index=10**30),
    "impl is empty": options(ValueError, "impl", "''", impl=""),
    "weight is a list": options(TypeError, "weight", "list", weight=[1.0] * 5),
    "weight is integer": options(TypeError, "weight", "torch.int64", weight=longs(1, 1, 1, 1, 1)),
    "weight is elsewhere": options(ValueError, "weight", "meta", "cpu", weight=torch.ones(5, device="meta")),
    "weight requires grad": options(ValueError, "weight", "requires grad", weight=torch.ones(5, requires_grad=True)),
    "normalizer is negative": options(ValueError, "normalizer", "-1", normalizer=-1),
    "normalizer is a boolean": options(TypeError, "normalizer", "False", normalizer=False),
    "normalizer is a string": options(ValueError, "normalizer", "'4'", normalizer="4"),
    "normalizer is a vector": options(ValueError, "normalizer", "(1,)", normalizer=torch.ones(1)),
    "normalizer is a negative tensor": options(ValueError, "normalizer", "-1", normalizer=torch.tensor(-1.0)),
    "normalizer of a sum": options(ValueError, "normalizer", "'sum'", normalizer=4, reduction="sum"),
    # a schedule
    "step below 0": bad(lambda z, t: fl.alpha_schedule(-1, 10), ValueError, "step", "-1"),
    "no steps": bad(lambda z, t: fl.alpha_schedule(1, 0), ValueError, "total_steps", "0"),
    "maximum above 1": bad(lambda z, t: fl.alpha_schedule(1, 10, 1.5), ValueError, "maximum", "1.5"),
    "step is a bool": bad(lambda z, t: fl.alpha_schedule(True, 10), TypeError, "step", "True"),
    # focal
    "gamma below 0": focal(ValueError, "gamma", "-1.0", gamma=-1.0),
    "gamma is an integer tensor": focal(TypeError, "gamma", "torch.int64", gamma=torch.tensor(2)),
    "gamma has a negative row": focal(ValueError, "gamma", "-0.5", gamma=torch.tensor([0.0, -0.5, 1.0, 2.0])),
    "gamma has a size of one": focal(ValueError, "gamma", "(4,)", "(1,)", gamma=torch.ones(1)),
    "gamma for a target that is a list": bad(
        lambda z, t: fl.focal_loss(z, [0, 1, 2, 3], gamma=torch.ones(4)), TypeError, "target", "list"
    ),
    # mixed
    "alpha above 1": mixed(ValueError, "alpha", "1.25", alpha=1.25),
    "alpha has a row above 1": mixed(ValueError, "alpha", "2.0", alpha=torch.tensor([0.0, 2.0, 1.0, 0.5])),
    "alpha is missing": bad(lambda z, t: fl.mixed_cross_entropy(z, t), TypeError, "alpha"),
    "top_k is 3": mixed(ValueError, "top_k", "3", top_k=3),
    "top_k is a bool": mixed(ValueError, "top_k", "True", top_k=True),
    "top_k of one class": bad(
        lambda z, t: fl.mixed_cross_entropy(z[:, :1], 0 * t.clamp(min=0), alpha=0.5, top_k=2),
        ValueError, "second", "1",
    ),
    "candidates and top_k": mixed(ValueError, "candidates", "top_k=2", candidates=longs(0, 1, 2, 3), top_k=2),
    "candidates are a list": mixed(TypeError, "candidates", "list", candidates=[0, 1, 2, 3]),
    "candidates are floats": mixed(TypeError, "candidates", "torch.float32", candidates=torch.zeros(4)),
    "candidates are too few": mixed(ValueError, "candidates", "(4,)", "(3,)", candidates=longs(0, 1, 2)),
    "candidates are elsewhere": mixed(
        ValueError, "candidates", "meta", "cpu", candidates=torch.zeros(4, dtype=torch.int64, device="meta")
    ),
    "a candidate is too large": mixed(IndexError, "candidate 5 ", "5 classes", candidates=longs(0, 5, 2, 3)),
    "a candidate is negative": mixed(
        IndexError, "candidate -1 ", "5 classes", candidates=torch.tensor([[0, 1], [1, -1], [2, 2], [3, 3]])
    ),
    # dice
    "DSC's alpha below 0": dsc(ValueError, "alpha", "-0.01", alpha=-0.01),
    "unknown form": dsc(ValueError, "form", "'rows'", form="rows"),
    "unknown level": dsc(ValueError, "level", "'batch'", "'example'", level="batch"),
    "the target form of a class": dsc(ValueError, "'class'", "'target'", level="class", form="target"),
    "the target form of the set": dice(ValueError, "'set'", "'target'", level="set", form="target"),
    "z_loss of a class": dsc(ValueError, "z_loss", "'class'", "0.5", level="class", z_loss=0.5),
    "normalizer of a class": dsc(ValueError, "normalizer", "'class'", "7", level="class", normalizer=7),
    "class weights of the set": dsc(ValueError, "weight", "'set'", level="set", weight=torch.ones(5)),
    "no reduction of the set": dsc(ValueError, "reduction", "'none'", level="set", reduction="none"),
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
    "squared is a number": dsc(TypeError, "squared", "2", squared=2),
    "detach_weight is a string": dsc(TypeError, "detach_weight", "'no'", detach_weight="no"),
    "DSC does not smooth labels": dsc(TypeError, "dsc_loss()", "'label_smoothing'", label_smoothing=0.1),
    "dice has no alpha": dice(TypeError, "dice_loss()", "'alpha'", alpha=0.5),
    # flex
    "loss_fn is not callable": flex(TypeError, "loss_fn", "'poly'", loss_fn="poly"),
    "unknown statistic": flex(ValueError, "statistics", "'third'", "'top'", statistics=("top", "third")),
    "statistics is a string": flex(TypeError, "statistics", "'top'", statistics="top"),
    "unknown over": flex(ValueError, "over", "'columns'", over="columns"),
    "statistics over classes": flex(ValueError, "over='classes'", over="classes", statistics=("top",)),
    "second of a list": bad(
        lambda z, t: fl.flex_loss([1.0], t, lambda s: s.ce, statistics=("second",)), TypeError, "input", "list"
    ),
    "a candidate is what an ignored target is": mixed(
        IndexError, "candidate -100 ", "5 classes", candidates=longs(0, -100, 2, 3)
    ),
    # writing over the logits
    "a loss over the classes in place": flex(
        ValueError, "inplace_backward", "compiled", loss_fn=lambda p, q, positive: p * q, over="classes",
        inplace_backward=True,
    ),
    "the reference in place": bad(
        lambda z, t: fl.cross_entropy(z, t, inplace_backward=True, impl="reference"),
        ValueError, "inplace_backward", "'reference'",
    ),
    "transposed logits in place": in_place(lambda z: z.t(), "(1, 5)", "(5, 4)"),
    "expanded logits in place": in_place(lambda z: z[:1].expand(4, 5), "(0, 1)"),
    "overlapping rows in place": in_place(lambda z: z.as_strided((4, 5), (2, 1)), "(2, 1)"),
    "sliced sequences in place": in_place(lambda z: z.view(2, 2, 5).repeat(1, 2, 1)[:, :-1], "(20, 5, 1)"),
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


@pytest.mark.parametrize(
    ("name", "impl"),
    [(name, impl) for name, case in CASES.items() for impl in ("cpu", "reference")[: 1 + (case.error is IndexError)]],
)
def test_bad_argument(name, impl, work, monkeypatch, generator):
    case = CASES[name]
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


def test_good_arguments_do_work(impl, work):
    """What the cases above are held against."""
    z, target = torch.randn(4, 90, requires_grad=True), torch.tensor([0, 3, -100, 4])
    fl.cross_entropy(z, target, impl=impl).backward()
    assert work == (["dense_columns"] if impl == "reference" else ["forward", "backward"])


@each_loss
def test_every_loss_checks_its_tensors_and_options(loss, work):
    z, target = torch.zeros(4, 5), torch.tensor([0, 3, -100, 4])
    for error, words, arguments, values in (
        (TypeError, "torch.int64", (z.long(), target), {}),
        (TypeError, "torch.float32", (z, z[:, 0]), {}),
        (ValueError, r"\(3,\)", (z, target[:3]), {}),
        (IndexError, "target 5 ", (z, target.clamp(min=5)), {}),
        (ValueError, "'avg'", (z, target), {"reduction": "avg"}),
        (ValueError, "-1", (z, target), {"z_loss": -1}),
        (ValueError, r"\(6,\)", (z, target), {"weight": torch.ones(6)}),
        (ValueError, "-3", (z, target), {"normalizer": -3}),
        (ValueError, "'fpga'", (z, target), {"impl": "fpga"}),
        (TypeError, "unexpected keyword argument 'nonsense'", (z, target), {"nonsense": 1}),
    ):
        with pytest.raises(error, match=words):
            loss(*arguments, **values)
    assert not work


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:1], x[1:]])


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged)


ROWS, INDEX = torch.rand(4, 5), torch.tensor([0, 3, 1, 4])


@pytest.mark.parametrize(
    ("name", "call", "good"),
    [
        ("input", lambda x: fl.cross_entropy(x, INDEX), ROWS),
        ("target", lambda x: fl.cross_entropy(ROWS, x), INDEX),
        ("weight", lambda x: fl.cross_entropy(ROWS, INDEX, weight=x), torch.rand(5)),
        ("token_weight", lambda x: fl.cross_entropy(ROWS, INDEX, token_weight=x), torch.rand(4)),
        ("gamma", lambda x: fl.focal_loss(ROWS, INDEX, gamma=x), torch.rand(4)),
        ("input", lambda x: fl.dsc_loss(x, INDEX, level="class"), ROWS),
        ("input", lambda x: fl.linear_cross_entropy(x, ROWS, INDEX), ROWS),
        ("linear_weight", lambda x: fl.linear_cross_entropy(ROWS, x, INDEX), ROWS),
        ("linear_bias", lambda x: fl.linear_cross_entropy(ROWS, ROWS, INDEX, linear_bias=x), torch.rand(4)),
        ("teacher", lambda x: fl.distillation_loss(ROWS, x), ROWS),
        ("index", lambda x: fl.topk_distillation_loss(ROWS, x, ROWS[:, :1]), INDEX[:, None]),
        ("log_prob", lambda x: fl.topk_distillation_loss(ROWS, INDEX[:, None], x), -ROWS[:, :1]),
        ("features", lambda x: fl.supcon_loss(x, INDEX), ROWS),
        ("labels", lambda x: fl.supcon_loss(ROWS, x), INDEX),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_mkldnn, nested, jagged])
def test_a_tensor_that_is_not_dense_is_refused_by_name(name, call, good, layout):
    if layout is Tensor.to_mkldnn and not good.is_floating_point():
        layout = Tensor.to_sparse_coo  # which has no integers
    with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got a (nested tensor|tensor of layout)"):
        call(layout(good))


def test_good_extremes_pass(impl):
    """Values at the ends of their ranges, numbers of other libraries, and shapes without rows."""
    z, target = torch.randn(4, 5), torch.tensor([0, 3, -100, 4])
    numpy = pytest.importorskip("numpy")
    fl.cross_entropy(z, target, label_smoothing=1, impl=impl)
    fl.cross_entropy(z, target, label_smoothing=numpy.float32(0.1), z_loss=numpy.float64(0.1), impl=impl)
    fl.cross_entropy(z, target, normalizer=torch.tensor(3), impl=impl)
    assert fl.cross_entropy(z, target, normalizer=numpy.int64(0), impl=impl) == math.inf
    fl.cross_entropy(z, torch.tensor([0, 3, -(2**63), 4]), ignore_index=-(2**63), impl=impl)
    fl.focal_loss(z, target, gamma=0, impl=impl)
    fl.focal_loss(z, target, gamma=torch.zeros(4, dtype=torch.float64), impl=impl)
    fl.mixed_cross_entropy(z, target, alpha=1, impl=impl)
    fl.mixed_cross_entropy(z, target, alpha=torch.tensor([0.0, 1.0, 0.5, 1.0]).half(), impl=impl)
    fl.mixed_cross_entropy(z, target, alpha=0.5, candidates=torch.tensor([0, 4, 0, 1]).int(), impl=impl)
    fl.dsc_loss(z, target, alpha=0, smooth=0, form="target", impl=impl)
    fl.cross_entropy(z[:0], target[:0], impl=impl)
    assert fl.alpha_schedule(0, 1) == 0 and fl.alpha_schedule(7, 1, 1) == 1


@pytest.mark.parametrize(
    ("value", "arguments", "words"),
    [
        (-2, (0, 1), "between 0 and 1, got -2"),
        (-2, (0,), "at least 0, got -2"),
        (NAN, (0,), "at least 0, got nan"),
        ("2", (0,), "a number, got '2' of type str"),
        (2j, (0,), "a number, got 2j of type complex"),
        (True, (0,), "a number, got True of type bool"),
        (None, (0,), "a number, got None of type NoneType"),
    ],
)
def test_what_is_no_number_in_its_range(value, arguments, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(f"x must be {words}")):
        checks.check_number("x", value, *arguments)
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
def test_there_are_no_values_to_check_of_fake_tensors(loss):
    with FakeTensorMode():
        logits = torch.randn(5, 5, requires_grad=True)
        loss(logits, torch.zeros(5, dtype=torch.int64)).backward()
        assert logits.grad is not None


@pytest.mark.parametrize(
    "value",
    [math.inf, 10**400, 1e39, torch.tensor(math.inf), torch.tensor(1e39, dtype=torch.float64)],
    ids=["inf", "huge", "large", "tensor", "large tensor"],
)
@pytest.mark.parametrize("name, loss", [
    ("gamma", lambda x: fl.focal_loss(ONES, LABELS, gamma=x)),
    ("alpha", lambda x: fl.dsc_loss(ONES, LABELS, alpha=x)),
    ("smooth", lambda x: fl.dice_loss(ONES, LABELS, smooth=x)),
    ("z_loss", lambda x: fl.cross_entropy(ONES, LABELS, z_loss=x)),
    ("hard_weight", lambda x: fl.distillation_loss(ONES, ONES, target=LABELS, hard_weight=x)),
])  # fmt: skip
def test_what_is_infinite_in_float32_is_refused(name, loss, value):
    refused = (
        "number" if isinstance(value, Tensor) and name in ("smooth", "z_loss", "hard_weight") else "finite in float32"
    )
    with pytest.raises(
        (TypeError, ValueError), match=f"{name} must be (a )?{refused}, got (values from )?(inf|1000|1e\\+39|tensor)"
    ):
        loss(value)


@pytest.mark.parametrize("name, loss", [
    ("normalizer", lambda x: fl.cross_entropy(ONES, LABELS, normalizer=x)),
    ("normalizer", lambda x: fl.linear_cross_entropy(ONES, ONES, LABELS, normalizer=x)),
    ("temperature", lambda x: fl.cross_entropy(ONES, LABELS, temperature=x)),
    ("temperature", lambda x: fl.distillation_loss(ONES, ONES, temperature=x)),
    ("temperature", lambda x: fl.supcon_loss(ONES, LABELS, temperature=x)),
])  # fmt: skip
def test_the_loss_is_divided_by_numbers_whose_inverse_is_in_float32(name, loss):
    for value in (1e-31, -1.0, 10**31, 10**400, math.inf, *torch.tensor([1e-31, -1.0, 1e31, math.inf])):
        with pytest.raises(ValueError, match=rf"{name} must be between 1e-30 and 1e\+30, got (-1|1|9.99|inf)"):
            loss(value)
    for value in (10**30, 1e-30, torch.tensor(1e-30)):
        assert loss(value).isfinite()


@pytest.mark.parametrize("zero", [0, 0.0, Fraction(0), torch.tensor(0)], ids=repr)
@pytest.mark.parametrize("loss", [fl.cross_entropy, fl.focal_loss, fl.dsc_loss])
def test_a_count_of_no_targets_divides_nothing(loss, zero):
    z = ONES.clone().requires_grad_()
    nothing = loss(z, torch.full_like(LABELS, -100), normalizer=zero)
    nothing.backward()
    assert nothing == 0 and not z.grad.any()
    assert loss(z, LABELS, normalizer=zero) == math.inf


@pytest.mark.parametrize("loss", [
    lambda x: fl.cross_entropy(ONES, LABELS, normalizer=x),
    lambda x: fl.linear_cross_entropy(ONES, ONES, LABELS, normalizer=x),
    lambda x: fl.cross_entropy(ONES, LABELS, temperature=x),
    lambda x: fl.cross_entropy(ONES, LABELS, z_loss=x),
    lambda x: fl.focal_loss(ONES, LABELS, gamma=x),
    lambda x: fl.dsc_loss(ONES, LABELS, smooth=x),
    lambda x: fl.dsc_loss(ONES, LABELS, smooth=x, form="one_vs_rest", level="class"),
    lambda x: fl.supcon_loss(ONES, LABELS, temperature=x),
    lambda x: fl.linear_cross_entropy(ONES, ONES, LABELS, softcap=x),
], ids=["divisor", "linear", "temperature", "z", "gamma", "smooth", "class smooth", "supcon", "cap"])  # fmt: skip
def test_any_real_number_is_taken(loss):
    """PyTorch itself takes no fraction and no int of more than 64 bits."""
    assert torch.equal(loss(Fraction(1, 2)), loss(0.5))
    assert torch.equal(loss(10**20), loss(1e20))


def test_the_largest_number_of_float32_is_taken_as_it_is_written():
    checks.check_number("x", 3.4028235e38)
    with pytest.raises(ValueError, match="x must be finite in float32"):
        checks.check_number("x", 3.4028236e38)
