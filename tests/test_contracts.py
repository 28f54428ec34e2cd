"""What the operators refuse: arguments that a kernel would read other memory for, and names that nobody has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedloss as fl
from fusedloss import backends
from fusedloss.engine import operators as ops

ROWS, CLASSES, FEATURES = 5, 21, 4

OPERATORS = [
    *("row_statistics", "row_loss", "row_loss_gradient", "row_loss_gradient_", "row_gradient", "row_gradient_"),
    *("class_sums", "class_terms", "term_sums"),
    *("product_row_statistics", "product_row_loss", "product_row_gradient_", "product_term_sums"),
    *("linear_row_statistics", "linear_row_loss", "linear_gradient", "linear_term_sums"),
]
each_operator = pytest.mark.parametrize("name", OPERATORS)

#: Of a class term with its top class, all of which the operators take.
DSC = ("dsc_over_rows", [0.5, 1.0, 1.0, 1.0])


def names_of(name: str) -> list[str]:
    return [argument.name for argument in getattr(ops, name)._schema.arguments]


def good_arguments(name: str) -> dict[str, Any]:
    """By the schema's names. Every operator takes them."""
    generator = torch.Generator().manual_seed(1)
    epilogue, values = DSC
    params = [torch.tensor(x) for x in values]
    if name == "class_sums":
        params.pop()
    statistics = torch.rand(ops.STATISTICS + 1, ROWS, generator=generator)
    statistics[ops.SUM_EXP] += 1
    arguments = {
        "logits": torch.randn(ROWS, CLASSES, generator=generator),
        "gradient": torch.zeros(ROWS, CLASSES),
        "hidden": torch.randn(ROWS, FEATURES, generator=generator),
        "linear_weight": torch.randn(CLASSES, FEATURES, generator=generator),
        "linear_bias": torch.randn(CLASSES, generator=generator),
        "target": torch.tensor([0, 20, -100, 7, 7]),
        "weight": torch.linspace(0.5, 2, CLASSES),
        "candidates": None,
        "params": params,
        "row_weight": torch.linspace(0.5, 1, ROWS),
        "grad_output": torch.ones(()).expand(ROWS),
        "statistics": statistics,
        "index": torch.tensor([[3, 3, -1, 0, 20]]),
        "coefficients": torch.rand(ops.COEFFICIENTS + 1, ROWS, generator=generator),
        "top_q": torch.rand(ROWS, generator=generator),
        "needed": [True, True, True],
        "epilogue": epilogue,
        "common": torch.tensor([1.0, 0.0, 0.0]),
        "top_k": 1,
        "below": False,
        "mean": False,
        "of_top": False,
        "softcap": 0.0,
        "budget": 2**20,
        "drop_ignored": False,
        "mask_target": False,
        "group": "",
        "row_parts": 1,
        "most_rows": 0,
        "impl": "triton_fused" if name.startswith("product") else "cpu",
    }
    return {key: arguments[key] for key in names_of(name)}


def call(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(ops, name)(*arguments.values())


def skip_unless_ready(name: str) -> None:
    impl = good_arguments(name)["impl"]
    reason = backends.unavailable(impl, torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")


def strided(x: Tensor) -> Tensor:
    """The same values, two apart along the last dimension."""
    return x.repeat_interleave(2, -1)[..., ::2]


#: By argument: changes after which it is refused.
CHANGES: dict[str, list[Callable[[Any], Any]]] = {
    "logits": [Tensor.long, strided, lambda x: x.t().contiguous().t(), lambda x: x[None], lambda x: x[0]],
    "gradient": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[:1].expand_as(x)],
    "hidden": [Tensor.long, lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[0]],
    "linear_weight": [Tensor.double, lambda x: x[:, :-1], lambda x: x[0], lambda x: x[0, 0]],
    "linear_bias": [Tensor.double, lambda x: x[:-1]],
    "target": [Tensor.int, strided, lambda x: x[:-1], lambda x: x[None]],
    "weight": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[None]],
    "params": [lambda x: [x[0].double(), *x[1:]], lambda x: [x[0].expand(ROWS + 1), *x[1:]]],
    "row_weight": [Tensor.double, lambda x: x[:-1], lambda x: x[0]],
    "grad_output": [Tensor.double, lambda x: x[:-1], lambda x: x[0]],
    "statistics": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[:, :-1], lambda x: x[0]],
    "index": [Tensor.int, strided, lambda x: x[:, :-1], lambda x: x[0], lambda x: x[0, 0]],
    "coefficients": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[:, :-1]],
    "top_q": [Tensor.double, strided, lambda x: x[:-1]],
    "common": [Tensor.double, strided, lambda x: x[:-1], lambda x: x[None]],
    "top_k": [lambda x: -1, lambda x: 3],
}

#: What else may be named, where two arguments disagree on a size.
OR = {
    "logits": "target|weight",
    "hidden": "linear_weight|target|gradient",
    "linear_weight": "linear_bias|weight|gradient",
    "index": "statistics",
}


@each_operator
def test_arguments_that_are_not_as_the_kernels_take_them_are_refused(name: str) -> None:
    """Each by itself, with the operator and the argument named; also where only shapes are computed."""
    skip_unless_ready(name)
    call(name, good_arguments(name))
    mode = FakeTensorMode()
    for argument in set(names_of(name)) & set(CHANGES):
        for change in CHANGES[argument]:
            arguments = good_arguments(name)
            arguments[argument] = change(arguments[argument])
            expected = rf"{name}: ({argument}|{OR.get(argument, argument)})\b.* got "
            with pytest.raises((TypeError, ValueError), match=expected):
                call(name, arguments)
            with mode, pytest.raises((TypeError, ValueError), match=expected):
                call(name, torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))


@each_operator
def test_names_that_nobody_has_are_refused(name: str) -> None:
    skip_unless_ready(name)
    arguments = good_arguments(name)
    with pytest.raises(ValueError, match=r"impl must be one of .*'(cpu|triton_fused)'.*, got 'magic'"):
        call(name, arguments | {"impl": "magic"})
    if "epilogue" not in arguments:
        return
    with pytest.raises(ValueError, match=r"no epilogue named 'perplexity'; there are .*'dsc_over_rows'"):
        call(name, arguments | {"epilogue": "perplexity"})
    for params in ([], [*arguments["params"], torch.ones(())]):
        with pytest.raises(ValueError, match=rf"takes {len(arguments['params'])} params, got {len(params)}"):
            call(name, arguments | {"params": params})


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_backend_is_behind_the_same_check(backend: str) -> None:
    if backends.unavailable(backend, torch.device("cpu")) is not None:
        pytest.skip(str(backends.unavailable(backend, torch.device("cpu"))))
    arguments = good_arguments("row_loss") | {"impl": backend}
    expected = call("row_loss", arguments)[0]
    with pytest.raises(TypeError, match=r"row_loss: weight must be contiguous, torch\.float32 .* got torch\.float64"):
        call("row_loss", arguments | {"weight": arguments["weight"].double()})
    with pytest.raises(ValueError, match="'dsc_over_rows' needs top_k >= 1, got 0"):
        call("row_loss", arguments | {"top_k": 0})
    for name in ("focal", "mixed_cross_entropy"):
        with pytest.raises(ValueError, match=f"'{name}' takes 1 params, got 0"):
            call("row_loss", arguments | {"epilogue": name, "params": []})
    assert torch.equal(call("row_loss", arguments)[0], expected)


@pytest.mark.parametrize("name", ["class_sums", "class_terms", "term_sums", "row_gradient"])
def test_a_class_term_needs_the_top_class(name: str) -> None:
    skip_unless_ready(name)
    arguments = good_arguments(name)
    cut = {"statistics": -1, "index": 0, "coefficients": -1}
    none = {key: arguments[key][:rows].contiguous() for key, rows in cut.items() if key in arguments}
    with pytest.raises(ValueError, match=f"{name}: 'dsc_over_rows' needs an index with the top class, got 0 picks"):
        call(name, arguments | none)


def test_a_gradient_is_not_written_outside_of_its_rows() -> None:
    skip_unless_ready("row_gradient")
    arguments = good_arguments("row_gradient")
    for argument, kind in (("target", "target"), ("index", "pick")):
        for bad in (CLASSES, 2**40):
            outside = arguments[argument].clone()
            outside.view(-1)[-1] = bad
            with pytest.raises(IndexError, match=f"{kind} {bad} is out of range for {CLASSES} classes"):
                call("row_gradient", arguments | {argument: outside})
    for bad in (-1, CLASSES):
        outside = good_arguments("class_terms")
        outside["target"][0] = bad
        with pytest.raises(IndexError, match=f"target {bad} is out of range"):
            call("class_terms", outside)


def test_scale() -> None:
    skip_unless_ready("row_loss")
    gradient = torch.ones(3, 4)
    for factor in (torch.ones(1), torch.ones((), dtype=torch.float64)):
        with pytest.raises(
            (TypeError, ValueError), match=r"scale_: factor must be torch\.float32 of shape \(\) .* got "
        ):
            ops.scale_(gradient, factor, "cpu")
    with pytest.raises(TypeError, match=r"scale_: gradient must be one of .* got torch\.int64"):
        ops.scale_(gradient.long(), torch.ones(()), "cpu")
    with pytest.raises(ValueError, match=r"scale_: impl must be one of .* got 'magic'"):
        ops.scale_(gradient, torch.ones(()), "magic")


@pytest.mark.compile
def test_the_check_is_in_a_compiled_graph_too() -> None:
    """Where fakes do not look at it: the epilogue, and the values of indices."""
    skip_unless_ready("row_gradient")
    torch._dynamo.reset()
    arguments = good_arguments("row_gradient")

    def step(index: Tensor, params: list[Tensor]) -> Tensor:
        return 2 * call("row_gradient", arguments | {"index": index, "params": params})

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    index, params = arguments["index"], arguments["params"]
    assert torch.equal(compiled(index, params), step(index, params))
    with pytest.raises(ValueError, match="'dsc_over_rows' takes 4 params, got 3"):
        compiled(index, params[:3])
    with pytest.raises(IndexError, match="pick 21 is out of range"):
        compiled(index.clone().fill_(21), params)
    torch._dynamo.reset()


def test_a_strided_bias_is_read_right_where_kernels_make_the_logits() -> None:
    skip_unless_ready("product_row_loss")
    x = good_arguments("linear_row_loss")
    losses = [
        fl.linear_cross_entropy(x["hidden"], x["linear_weight"], x["target"], linear_bias=bias, impl="triton_fused")
        for bias in (x["linear_bias"], strided(x["linear_bias"]))
    ]
    assert torch.equal(*losses)
