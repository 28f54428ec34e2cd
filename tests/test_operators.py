"""The operators by themselves: schemas, fakes and kernels agree; what kernels would misread is refused."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

import pytest
import torch
from products import Operators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fusedloss as fl
from fusedloss import backends
from fusedloss.checks import IGNORED, compute_dtype
from fusedloss.definition.projection import Form
from fusedloss.definition.rows import Rows, Spec, decode
from fusedloss.definition.statistics import ALL_MOMENTS, COEFFICIENTS, Picks
from fusedloss.engine import operators as ops

if backends.unavailable("cpu") is not None:
    pytest.skip(str(backends.unavailable("cpu")), allow_module_level=True)

ROWS, CLASSES, FEATURES = 5, 21, (4, 3)

#: How many pairs of hidden states and weight make the logits; 0 for logits in hand.
FORMS = {"row": 0, "linear": 1, "two pairs": 2}
each_form = pytest.mark.parametrize("pairs", FORMS.values(), ids=FORMS.keys())

#: Softcap, chunks of two rows in float32, and the ignored rows last.
CHUNKS = Form(softcap=3.0, budget=2 * CLASSES * 4 * 2, drop_ignored=True)
WITH_TEACHER = CHUNKS._replace(budget=2 * CLASSES * 4 * 3)
DSC = (0.5, 1.0, 1.0, 1.0)
NO_PICKS = Picks()


@dataclass
class Case:
    """Arguments of a forward pass, for either form."""

    epilogue: str = ""
    params: tuple[Any, ...] = ()
    """Numbers; a tuple of one for each row."""
    dtype: torch.dtype = torch.float32
    weighted: bool = False
    candidates: int = 0
    apart: bool = False
    """Whether rows lie apart in memory, and the weight is transposed."""
    picks: Picks = NO_PICKS
    top_q: bool = False
    form: Form = CHUNKS

    def rows(self, pairs: int, count: int = ROWS) -> Rows:
        generator = torch.Generator().manual_seed(1)
        compute = compute_dtype(self.dtype)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator).to(self.dtype)
            return torch.cat([x, x], 1)[:, : shape[1]] if self.apart else x

        hidden = [normal(count, features) for features in FEATURES[:pairs]] or [normal(count, CLASSES)]
        weight = [normal(CLASSES, features) for features in FEATURES[:pairs]]
        target = torch.tensor([0, 20, IGNORED, 7, 7])[:count]
        candidates = torch.arange(count * self.candidates).view(count, self.candidates) if self.candidates else None
        return Rows(
            hidden,
            [w.t().contiguous().t() if self.apart else w for w in weight],
            torch.randn(CLASSES, generator=generator).to(self.dtype) if pairs else None,
            self.teacher(pairs, count),
            target,
            torch.linspace(0.5, 2, CLASSES, dtype=compute) if self.weighted else None,
            candidates,
            [torch.tensor(x[:count] if isinstance(x, tuple) else x, dtype=compute) for x in self.params],
            torch.tensor([0.9, 0.1 / CLASSES, 0.01, 0.8], dtype=compute),
        )

    def teacher(self, pairs: int, count: int) -> list[Tensor]:
        if self.epilogue not in backends.BACKENDS["cpu"].epilogues.pairs:
            return []
        shapes = ((count, 3), (CLASSES, 3), (CLASSES,)) if pairs else ((count, CLASSES),)
        return [torch.linspace(-1, 1, math.prod(shape)).to(self.dtype).view(shape) for shape in shapes]

    def spec(self, **changes: Any) -> Spec:
        common = {"smooths": self.picks.mean, "z_loss": True} if self.epilogue else {}
        return Spec("cpu", self.epilogue, *self.picks, top_q=self.top_q, form=self.form, **common, **changes)

    def calls(self, pairs: int, count: int = ROWS) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Each operator that takes such rows, with its arguments."""
        rows, spec = self.rows(pairs, count), self.spec()
        yield ops.forward, (*rows, None, spec.encode())
        if self.top_q:
            return
        every = self.spec(needed=(True,) * len(rows.sources)).encode()
        some = self.spec(needed=(pairs != 2, *(i % 2 == 0 for i in range(1, len(rows.sources))))).encode()
        _, statistics, index, coefficients, _ = ops.forward(*rows, None, spec.encode())
        saved = (statistics, index)
        if self.epilogue:
            row_weight = torch.linspace(0.5, 1, count, dtype=statistics.dtype)
            yield ops.forward, (*rows, row_weight, every)
            yield ops.forward, (*rows, None, some if pairs else every)
            # What an operator may be given for the upstream gradient is no matter of the epilogue.
            upstreams = [row_weight, None, row_weight.new_ones(()).expand(count)]
            for upstream in upstreams if self.epilogue == "cross_entropy" else upstreams[:1]:
                yield ops.backward, (*rows, *saved, coefficients, upstream, some if pairs else every)
                if not pairs:
                    own = rows._replace(hidden=[rows.logits.clone()])
                    yield ops.backward_, (*own, *saved, coefficients, upstream, every)
        else:
            shape = (COEFFICIENTS + index.shape[0] + spec.more_coefficients, count)
            made = torch.linspace(-1, 1, math.prod(shape), dtype=statistics.dtype).view(shape)
            yield ops.backward, (*rows, *saved, made, None, some if pairs else every)
        known = backends.BACKENDS["cpu"].epilogues
        if self.epilogue in known.classes or self.epilogue in known.pairs:
            yield ops.sums, (*rows, *saved, None, None, spec.encode())
        if self.epilogue == "dsc_over_rows" and not pairs:
            over_rows = (*rows._replace(params=rows.params[:-1]), *saved)
            by_rows = spec._replace(over_rows=True).encode()
            top_q = torch.linspace(0.1, 0.9, count, dtype=statistics.dtype)
            for more in ((None, None), (row_weight, top_q)):
                yield ops.sums, (*over_rows, *more, by_rows)
            yield ops.terms, (*rows, *saved, spec.encode())


CASES = {
    "plain": Case("cross_entropy"),
    "a parameter for each row": Case("focal", ((0.0, 0.5, 1.0, 2.0, 3.0),)),
    "class weights and mean": Case("focal", (0.5,), weighted=True, picks=Picks(mean=True)),
    "top 2": Case("mixed_cross_entropy", (0.25,), picks=Picks(2)),
    "candidates": Case("mixed_cross_entropy", (0.25,), candidates=3),
    "class term": Case("dsc_one_vs_rest", DSC, picks=Picks(1), weighted=True),
    "summed over rows": Case("dsc_over_rows", DSC, picks=Picks(1), weighted=True),
    "bfloat16": Case("mixed_cross_entropy", (0.25,), torch.bfloat16, picks=Picks(1)),
    "float16": Case("cross_entropy", dtype=torch.float16),
    "float64": Case("focal", (2.0,), torch.float64),
    "class term, float16": Case("dsc_over_rows", DSC, torch.float16, picks=Picks(1)),
    "apart, the target masked": Case("cross_entropy", apart=True, form=CHUNKS._replace(mask_target=True)),
    "every statistic": Case(picks=Picks(2, True, True, ALL_MOMENTS), candidates=2, weighted=True),
    "temperature and moments": Case(
        "focal", (2.0,), picks=Picks(1, moments=ALL_MOMENTS), form=CHUNKS._replace(tempered=True)
    ),
    "1 - p of the top class": Case(picks=Picks(1), top_q=True),
    "a teacher": Case("forward_kl", (0.5,), torch.bfloat16, form=WITH_TEACHER._replace(tempered=True)),
    "a teacher and every statistic": Case(
        "mixture_kl", (0.5, 0.5, 0.5, 0.0), picks=Picks(1, moments=ALL_MOMENTS), form=WITH_TEACHER
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


#: By case: the forms that are opchecked. Few cases differ in the operators' code.
OF_FORMS = {
    "plain": (0, 1, 2),
    "class term": (0,),
    "summed over rows": (0,),
    "float16": (2,),
    "apart, the target masked": (1,),
    "temperature and moments": (1,),
    "1 - p of the top class": (0, 1),
    "a teacher": (0, 1),
}


@pytest.mark.compile
@pytest.mark.parametrize(("name", "pairs"), [(name, pairs) for name, forms in OF_FORMS.items() for pairs in forms])
def test_opcheck(name, pairs):
    for operator, arguments in CASES[name].calls(pairs):
        torch.library.opcheck(operator, arguments)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_scale(dtype):
    torch.library.opcheck(
        ops.scale_, (torch.ones(5, 3, dtype=dtype), torch.tensor(0.5, dtype=compute_dtype(dtype)), "cpu")
    )


@pytest.mark.covering(2)
@pytest.mark.parametrize("count", [ROWS, 1, 0])
@each_form
@each_case
def test_fakes_agree_with_kernels(case, pairs, count):
    """In shapes, dtypes, strides and devices; and no kernel leaves memory unwritten."""
    for operator, arguments in case.calls(pairs, count):
        mode = FakeTensorMode()
        given = tree_map_only(Tensor, mode.from_tensor, arguments)
        real = operator(*arguments)
        with mode:
            fake = operator(*given)
        for r, f in zip(tree_leaves(real), tree_leaves(fake), strict=True):
            if isinstance(r, Tensor):
                assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)
                assert not (r.isnan() if r.is_floating_point() else r >= CLASSES).any()


def test_every_operator_has_a_fake_and_declares_what_it_writes():
    names = ("forward", "backward", "backward_", "sums", "terms", "scale_", "gather")
    for name in names:
        operator = getattr(torch.ops.fusedloss, name).default
        assert torch._library.simple_registry.singleton.find(f"fusedloss::{name}").fake_impl.kernel is not None
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
        writes = [x.name for x in operator._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
        assert writes == ([operator._schema.arguments[0].name] if name.endswith("_") else [])


# --- rows and spec ---

VALUES = {str: "focal", int: 2, bool: True, float: 1e-30, tuple[bool, ...]: (False, True), Form: Form(group="a|b#2")}


@pytest.mark.parametrize("kind", [Spec, Form])
def test_a_spec_comes_back_as_it_was(kind):
    """By each of its fields, whose name a group's may hold anything."""
    texts = {Spec("cpu").encode()}
    for name, type_of in get_type_hints(kind).items():
        part = kind(**({"impl": "cpu"} if kind is Spec else {}) | {name: VALUES[type_of]})
        spec = part if kind is Spec else Spec("cpu", form=part)
        back = decode(spec.encode())
        assert back == spec and type(getattr(back if kind is Spec else back.form, name)) is type(VALUES[type_of])
        texts.add(spec.encode())
    assert len(texts) == 1 + len(kind._fields)


GOOD = Spec("cpu", "focal", needed=(True,)).encode()


@pytest.mark.parametrize("change", [("|0|", "|zero|"), ("|0|", "||"), ("|1|", "|2|"), (GOOD, "")])
def test_what_is_no_spec_is_refused(change):
    text, rows = GOOD.replace(*change, 1), CASES["a parameter for each row"].rows(0)
    for mode in (torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises(ValueError, match=r"spec must be what Spec\.encode\(\) gives.* got '"):
            ops.forward(*rows, None, text)


# --- what is refused ---

OPERATORS = ("forward", "backward", "backward_", "sums", "sums over rows", "terms")
OF_LOGITS = ("backward_", "sums over rows", "terms")
each_operator = pytest.mark.parametrize(
    ("name", "pairs"),
    [(name, pairs) for name in OPERATORS for pairs in FORMS.values() if not pairs or name not in OF_LOGITS],
)


def good_arguments(name: str, pairs: int, impl: str = "cpu") -> tuple[Any, dict[str, Any], Spec]:
    """An operator, its arguments by the schema's names, and the spec among them. All of a class term."""
    over_rows = name == "sums over rows"
    case = CASES["summed over rows"]
    rows, spec = case.rows(pairs), case.spec(needed=(True,) * (1 if not pairs else 2 * pairs + 1), over_rows=over_rows)
    spec = spec._replace(impl=impl)
    _, statistics, index, coefficients, _ = ops.forward(*rows, None, case.spec().encode())
    given = rows._asdict() | {
        "row_weight": torch.linspace(0.5, 1, ROWS),
        "statistics": statistics,
        "index": index,
        "coefficients": coefficients,
        "upstream": torch.ones(()).expand(ROWS),
        "top_q": torch.linspace(0.1, 0.9, ROWS),
        "spec": spec.encode(),
    }
    if over_rows:
        given["params"] = rows.params[:-1]
    operator = getattr(ops, name.split()[0])
    return operator, {x.name: given[x.name] for x in operator._schema.arguments}, spec


def strided(x: Tensor) -> Tensor:
    """The same values, two apart along the last dimension."""
    return x.repeat_interleave(2, -1)[..., ::2]


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


def at(i: int, change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda xs: [*xs[:i], change(xs[i]), *xs[i:][1:]]


def _changes(pairs: int) -> dict[str, list[Callable[[Any], Any]]]:
    """By argument: changes after which it is refused."""
    if pairs:
        of_hidden = [Tensor.long, Tensor.double, lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[0], meta]
        of_weight = [*of_hidden, lambda x: x[0, 0]]
    else:
        of_hidden = [Tensor.long, strided, lambda x: x.t().contiguous().t(), lambda x: x[None], lambda x: x[0]]
        of_weight = []
    last = max(pairs - 1, 0)
    # One number stands for all rows of logits in hand.
    of_rows = [Tensor.double, lambda x: x[:-1], lambda x: x[0] if pairs else x[None], meta]
    return {
        "hidden": [*(at(last, change) for change in of_hidden), lambda x: [], lambda x: [*x, x[0]]],
        "weight": [*(at(last, change) for change in of_weight), lambda x: [*x, torch.ones(CLASSES, 4)]],
        "bias": [Tensor.double, lambda x: x[:-1], lambda x: x[None], meta] if pairs else [],
        "teacher": [lambda x: [torch.zeros(ROWS, CLASSES)]],
        "target": [Tensor.int, strided, lambda x: x[:-1], lambda x: x[None], meta],
        "class_weight": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[None], meta],
        "candidates": [lambda x: torch.zeros(ROWS, 1).int(), lambda x: torch.zeros(ROWS - 1, 1).long(),
                       lambda x: torch.zeros(ROWS).long(), lambda x: torch.zeros(3, ROWS).long().t()],
        "params": [at(0, change) for change in (Tensor.double, lambda x: x.expand(9), lambda x: x.view(1, 1), meta)],
        "scalars": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[None]],
        "row_weight": of_rows,
        "upstream": of_rows,
        "statistics": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[0], meta],
        "index": [Tensor.int, strided, lambda x: x[:, :-1], lambda x: x[0], lambda x: x[0, 0]],
        "coefficients": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[:, :-1]],
        "top_q": [Tensor.double, strided, lambda x: x[:-1]],
    }  # fmt: skip


#: What else may be named, where two arguments disagree on a size.
OR = {
    "hidden": "there must be|logits|weight|target",
    "weight": "there must be|rows|hidden|bias|class_weight",
    "teacher": "there must be",
    "index": "statistics",
}


@each_operator
def test_arguments_that_are_not_as_the_kernels_take_them_are_refused(name, pairs):
    """Each by itself, with the operator and the argument named; also where only shapes are computed."""
    operator, good, _ = good_arguments(name, pairs)
    operator(*good.values())
    mode = FakeTensorMode()
    for argument, changes in _changes(pairs).items():
        if argument not in good or (argument == "candidates" and name != "forward"):
            continue
        for change in changes:
            arguments = good_arguments(name, pairs)[1]
            arguments[argument] = change(arguments[argument])
            expected = rf"{name.split()[0]}: ({argument}|{OR.get(argument, argument)})\b.* got "
            with pytest.raises((TypeError, ValueError), match=expected):
                operator(*arguments.values())
            with mode, pytest.raises((TypeError, ValueError), match=expected):
                operator(*tree_map_only(Tensor, mode.from_tensor, arguments).values())


@each_operator
def test_specs_and_numbers_of_parameters_that_do_not_fit_are_refused(name, pairs):
    operator, good, spec = good_arguments(name, pairs)
    few, many = len(good["params"]), [*good["params"], torch.ones(())]
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"impl": "magic"}, {}, "impl must be one of .*'cpu'.* on a cpu device, got 'magic'"),
        ({"impl": "cuda"}, {}, "impl must be one of .*'cpu'.* on a cpu device, got 'cuda'"),
        ({"epilogue": "perplexity"}, {}, "no epilogue named 'perplexity'; there are .*'dsc_over_rows'"),
        ({"needed": (True,) * 6}, {}, "needs, got "),
        ({"top_k": -1}, {}, "top_k must be 0, 1 or 2, got -1"),
        ({"top_k": 3}, {}, "top_k must be 0, 1 or 2, got 3"),
        ({}, {"params": []}, f"'dsc_over_rows' takes {few} params, got 0"),
        ({}, {"params": many}, f"'dsc_over_rows' takes {few} params, got {few + 1}"),
    ]
    if name == "forward":
        cases += [
            ({"top_k": 0}, {}, "'dsc_over_rows' needs top_k >= 1, got 0"),
            ({"epilogue": "", "top_k": 0, "top_q": True}, {"params": []}, "'top_q' needs top_k >= 1, got 0"),
            ({"epilogue": "focal"}, {"params": []}, "'focal' takes 1 params, got 0"),
        ]
    else:
        cut = {"statistics": -1, "index": 0, "coefficients": -1}
        none = {key: good[key][:rows].contiguous() for key, rows in cut.items() if key in good}
        cases += [({}, none, "'dsc_over_rows' needs the top class among the picks, got 0 picks")]
    if name == "backward" and pairs:
        cases += [({"needed": ()}, {}, r"needs, got \(\)")]
    for of_spec, changes, expected in cases:
        arguments = good | changes | {"spec": spec._replace(**of_spec).encode()}
        for mode in (torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True)):
            with mode, pytest.raises(ValueError, match=rf"{name.split()[0]}: .*{expected}"):
                operator(*arguments.values())


@pytest.mark.parametrize("name", OF_LOGITS)
def test_what_takes_logits_in_hand_refuses_a_weight(name):
    """There are as many features as classes, so that no size is wrong."""
    operator, arguments, spec = good_arguments(name, 0)
    arguments |= {"weight": [torch.zeros(CLASSES, CLASSES)], "spec": spec._replace(needed=()).encode()}
    with pytest.raises(ValueError, match=rf"{name.split()[0]}: .*logits in hand.* got 1 weight"):
        operator(*arguments.values())


def test_gradients_are_not_written_to_rows_that_overlap():
    operator, arguments, _ = good_arguments("backward_", 0)
    for logits in (torch.zeros(CLASSES).expand(ROWS, -1), torch.zeros(50).as_strided((ROWS, CLASSES), (4, 1))):
        ops.backward(*(arguments | {"hidden": [logits]}).values())
        with pytest.raises(ValueError, match=r"backward_: logits must have rows that do not overlap, got strides \("):
            operator(*(arguments | {"hidden": [logits]}).values())


@pytest.mark.parametrize("impl", ["cpu", "triton", "triton_fused"])
def test_every_backend_is_behind_the_same_check(impl):
    if backends.unavailable(impl, torch.device("cpu")) is not None:
        pytest.skip(str(backends.unavailable(impl, torch.device("cpu"))))
    operator, arguments, spec = good_arguments("forward", 1, impl)
    operator(*arguments.values())
    with pytest.raises(TypeError, match=r"class_weight must be contiguous, torch\.float32 .* got torch\.float64"):
        operator(*(arguments | {"class_weight": arguments["class_weight"].double()}).values())
    with pytest.raises(ValueError, match="'dsc_over_rows' needs top_k >= 1, got 0"):
        operator(*(arguments | {"spec": spec._replace(top_k=0).encode()}).values())
    if impl == "triton_fused":
        operator, arguments, _ = good_arguments("forward", 2, impl)
        with pytest.raises(ValueError, match="impl='triton_fused' takes one pair of hidden and weight, got 2"):
            operator(*arguments.values())


@each_form
def test_a_gradient_is_not_written_outside_of_its_rows(pairs):
    operator, arguments, _ = good_arguments("backward", pairs)
    for argument, kind in (("target", "target"), ("index", "pick")):
        for bad in (CLASSES, 2**40):
            outside = arguments[argument].clone()
            outside.view(-1)[-1] = bad
            with pytest.raises(IndexError, match=f"{kind} {bad} is out of range for {CLASSES} classes"):
                operator(*(arguments | {argument: outside}).values())
    if not pairs:
        for bad in (-1, CLASSES):
            operator, arguments, _ = good_arguments("terms", 0)
            arguments["target"][0] = bad
            with pytest.raises(IndexError, match=f"target {bad} is out of range"):
                operator(*arguments.values())


def test_scale():
    gradient = torch.ones(3, 4)
    for factor in (torch.ones(1), torch.ones((), dtype=torch.float64), torch.ones((), device="meta")):
        with pytest.raises(
            (TypeError, ValueError), match=r"scale_: factor must be torch\.float32 of shape \(\) .* got "
        ):
            ops.scale_(gradient, factor, "cpu")
    with pytest.raises(TypeError, match=r"scale_: gradient must be one of .* got torch\.int64"):
        ops.scale_(gradient.long(), torch.ones(()), "cpu")
    with pytest.raises(ValueError, match=r"scale_: impl must be one of .* got 'magic'"):
        ops.scale_(gradient, torch.ones(()), "magic")


@pytest.mark.compile
def test_a_compiled_gradient_is_not_written_outside_of_its_rows():
    """Fakes do not look at the values of indices."""
    torch._dynamo.reset()
    operator, arguments, _ = good_arguments("backward", 0)

    def step(index):
        return 2 * operator(*(arguments | {"index": index}).values())[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    index = arguments["index"]
    assert torch.equal(compiled(index), step(index))
    with pytest.raises(IndexError, match="pick 21 is out of range"):
        compiled(index.clone().fill_(21))
    torch._dynamo.reset()


def test_a_strided_bias_is_read_right_where_kernels_make_the_logits():
    if backends.unavailable("triton_fused", torch.device("cpu")) is not None:
        pytest.skip(str(backends.unavailable("triton_fused", torch.device("cpu"))))
    rows = CASES["plain"].rows(1)
    losses = [
        fl.linear_cross_entropy(rows.hidden[0], rows.weight[0], rows.target, linear_bias=bias, impl="triton_fused")
        for bias in (rows.bias, strided(rows.bias))
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("linear", [False, True], ids=["row", "linear"])
def test_whoever_looks_at_operators_sees_them(linear, generator):
    """A mode and a profiler. Where nobody looks, they are not dispatched, and the bits are the same."""
    x, weight = torch.randn(6, 90 if not linear else 4, generator=generator), torch.randn(90, 4, generator=generator)
    target = torch.arange(6)

    def run() -> tuple[Tensor, Tensor]:
        z = x.clone().requires_grad_()
        loss = fl.linear_focal_loss(z, weight, target) if linear else fl.focal_loss(z, target)
        (3 * loss).backward()
        return loss, z.grad

    alone = run()
    with Operators() as mode:
        watched = run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        profiled = run()
    names = {"fusedloss::forward", "fusedloss::scale_" if linear else "fusedloss::backward"}
    assert names <= mode.calls.keys()
    assert names <= {event.key for event in profile.key_averages()}
    for loss, gradient in (watched, profiled):
        assert torch.equal(loss, alone[0]) and torch.equal(gradient, alone[1])


def test_operators_are_not_dispatched_where_nobody_looks(generator, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "_check", lambda *arguments, **_: calls.append(arguments[0]))
    z = torch.randn(6, 90, generator=generator).requires_grad_()
    fl.focal_loss(z, torch.arange(6)).backward()
    assert not calls


def negative(x: Tensor) -> Tensor:
    """The same values, of which a bit of the tensor says that those in memory are to be negated."""
    view = torch._neg_view(-x)
    assert view.is_neg() and torch.equal(view, x)
    return view


@pytest.mark.parametrize("loss", [
    lambda of: fl.cross_entropy(of(torch.linspace(-1, 2, 12).view(3, 4)), torch.arange(3)),
    lambda of: fl.cross_entropy(torch.linspace(-1, 2, 12).view(3, 4), torch.arange(3), weight=of(torch.arange(1.0, 5))),
    lambda of: fl.focal_loss(torch.linspace(-1, 2, 12).view(3, 4), torch.arange(3), gamma=of(torch.tensor(2.0))),
    lambda of: fl.distillation_loss(torch.eye(3), of(torch.linspace(-1, 2, 9).view(3, 3))),
], ids=["logits", "class weight", "parameter", "teacher"])  # fmt: skip
def test_a_negative_view_has_the_values_that_it_shows(loss):
    assert torch.equal(loss(negative), loss(lambda x: x))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_zeros_without_memory_upstream_make_zeros(reduction):
    """Formulas of PyTorch's backward hand on such tensors, whose pointer is null."""
    z = torch.linspace(-1, 2, 12).view(3, 4).requires_grad_()
    loss = fl.focal_loss(z, torch.arange(3), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, z, torch._efficientzerotensor(loss.shape))
    assert not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_upstream_gradient_that_is_a_negative_view(reduction):
    z = torch.linspace(-1, 2, 12).view(3, 4).requires_grad_()
    for loss in (
        fl.cross_entropy(z, torch.arange(3), reduction=reduction),
        fl.linear_cross_entropy(z, torch.eye(4), torch.arange(3), reduction=reduction),
    ):
        upstream = torch.arange(1.0, 4) if reduction == "none" else torch.tensor(2.0)
        found, right = (torch.autograd.grad(loss, z, g, retain_graph=True)[0] for g in (negative(upstream), upstream))
        assert torch.equal(found, right)
