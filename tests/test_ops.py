"""Losses through torch.compile, torch.export, torch.jit, function transforms, autocast and checkpointing."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from row_losses import INPLACE, LOSSES, each_inplace_loss, each_loss
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fusedloss as fl
from fusedloss import backends

needs_cpu = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ engine")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(
    rows: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    z = 2 * torch.randn(rows, classes, generator=generator)
    return z.to(dtype), torch.randint(classes, (rows,), generator=generator)


def with_gradient(step: Callable[..., Tensor], z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    result = step(z, *arguments)
    upstream = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)
    (slope,) = torch.autograd.grad(result, z, upstream)
    return result.detach(), slope


def assert_same(compiled: tuple[Tensor, ...], eager: tuple[Tensor, ...]) -> None:
    """Equal but for the order of a few additions."""
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=4 * torch.finfo(y.dtype).eps, atol=1e-8)


# torch.compile


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_equals_eager_and_reuses_its_code(generator: torch.Generator) -> None:
    """Through generated code, with logits made and statistics used inside of the compiled region."""

    def step(hidden: Tensor, weight: Tensor, target: Tensor) -> Any:
        z = torch.nn.functional.linear(hidden, weight).tanh()
        result, stats = fl.mixed_cross_entropy(z, target, alpha=0.25, label_smoothing=0.1, return_stats=True)
        return result, (stats.argmax == target).sum(), stats.lse.exp()

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    weight = torch.randn(33, 8, generator=generator, requires_grad=True)
    for _ in range(2):
        hidden = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
        target = torch.randint(33, (2, 3), generator=generator)
        target[0, 1] = -100
        outputs = [f(hidden, weight, target) for f in (compiled, step)]
        torch.testing.assert_close(*outputs, equal_nan=True)
        slopes = [torch.autograd.grad(3 * result, (hidden, weight)) for result, *_ in outputs]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", ["transposed", "permuted"])
def test_inductor_keeps_the_layout_that_the_kernels_rely_on(layout: str, generator: torch.Generator) -> None:
    """Kernels take strides as they were traced; generated code must not hand over a tensor laid out otherwise."""
    make, shape = {
        "transposed": (lambda x: (2 * x).t(), (33, 6)),
        "permuted": (lambda x: (x.sin() + 1).permute(2, 0, 1), (2, 33, 3)),
    }[layout]

    def step(x: Tensor, target: Tensor) -> Tensor:
        return fl.focal_loss(make(x), target, reduction="none")

    x = torch.randn(shape, generator=generator)
    target = torch.randint(2, make(x).shape[:-1], generator=generator)
    compiled = torch.compile(step, fullgraph=True)
    assert_same(with_gradient(compiled, x, target), with_gradient(step, x, target))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["cross_entropy", "mixed_cross_entropy", "dsc_loss one_vs_rest", "flex_loss rows"])
def test_dynamic_rows_compile_once(name: str, generator: torch.Generator) -> None:
    loss = LOSSES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda z, target: loss(z, target), backend=counter, fullgraph=True)
    for rows in (5, 7, 64, 2, 300):
        z, target = problem(rows, 33, generator)
        for tensor in (z, target):
            torch._dynamo.mark_dynamic(tensor, 0)
        z.requires_grad_()
        result = compiled(z, target)
        (slope,) = torch.autograd.grad(result, z)
        expected = loss(z, target)
        assert_same((result, slope), (expected, *torch.autograd.grad(expected, z)))
    assert counter.frame_count == 1


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_everything_dynamic(generator: torch.Generator) -> None:
    """The vocabulary's size too, and rows down to none (which PyTorch compiles for themselves)."""

    def step(z: Tensor, target: Tensor) -> Tensor:
        return fl.mixed_cross_entropy(z, target, alpha=0.25, label_smoothing=0.1)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for rows, classes in ((5, 33), (9, 40), (4, 2100), (33, 5), (1, 33), (0, 33)):
        z, target = problem(rows, classes, generator)
        assert_same(with_gradient(compiled, z, target), with_gradient(step, z, target))
        counts.append(counter.frame_count)
    assert counts[0] == counts[3]


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_a_changing_number_compiles_at_most_once_more(generator: torch.Generator) -> None:
    def step(z: Tensor, target: Tensor, alpha: float) -> Tensor:
        return fl.mixed_cross_entropy(z, target, alpha=alpha)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    z, target = problem(5, 33, generator)
    for i, alpha in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
        assert_same(with_gradient(compiled, z, target, alpha), with_gradient(step, z, target, alpha))
        if i == 1:
            compilations = counter.frame_count
    assert counter.frame_count == compilations


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_a_changing_softcap_is_not_kept(generator: torch.Generator) -> None:
    """It crosses the operators' boundary in a string, which the compiler must not take for the first one."""

    def step(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float) -> Tensor:
        return fl.linear_cross_entropy(hidden, weight, target, softcap=softcap)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    hidden, target = problem(6, 8, generator)
    weight = torch.randn(33, 8, generator=generator)
    for softcap in (3.0, 5.0, 0.25, 5.5):
        arguments = (weight, target, softcap)
        assert_same(with_gradient(compiled, hidden, *arguments), with_gradient(step, hidden, *arguments))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_parameter_gets_its_gradient(generator: torch.Generator) -> None:
    z, target = problem(5, 33, generator)
    gamma = torch.tensor(1.5, requires_grad=True)

    def step(z: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
        return fl.focal_loss(z, target, gamma=gamma)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    z.requires_grad_()
    slopes = [torch.autograd.grad(f(z, target, gamma), (z, gamma)) for f in (compiled, step)]
    assert_same(*slopes)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_target_out_of_range_raises(generator: torch.Generator) -> None:
    z, target = problem(5, 33, generator)
    compiled = torch.compile(lambda z, target: fl.cross_entropy(z, target), backend="aot_eager", fullgraph=True)
    compiled(z, target)
    target[3] = 33
    with pytest.raises(IndexError, match="target 33 is out of range for 33 classes"):
        compiled(z, target)


@needs_cpu
@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_inplace_backward(backend: str, generator: torch.Generator) -> None:
    def step(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return fl.focal_loss(x @ weight, target, inplace_backward=True)

    x = torch.randn(6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(8, 33, generator=generator, requires_grad=True)
    target = torch.randint(33, (6,), generator=generator)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    slopes = [torch.autograd.grad(2 * f(x, weight, target), (x, weight)) for f in (compiled, step)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)


@needs_cpu
@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_inplace_backward_is_never_silently_wrong(backend: str, generator: torch.Generator) -> None:
    """Logits made outside of the compiled region, which another loss still needs: its gradient is right or an error."""
    z, target = problem(6, 33, generator)
    compiled = torch.compile(
        lambda z, target: fl.cross_entropy(z, target, inplace_backward=True), backend=backend, fullgraph=True
    )

    def both(leaf: Tensor, second: Callable[..., Tensor]) -> Tensor:
        leaf.requires_grad_()
        logits = 1 * leaf
        first = fl.focal_loss(logits, target)  # its backward runs last
        return torch.autograd.grad(first + second(logits, target), leaf)[0]

    expected = both(z.clone(), fl.cross_entropy)
    try:
        got = both(z.clone(), compiled)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
def test_the_reference_compiles_too(generator: torch.Generator) -> None:
    def step(z: Tensor, target: Tensor) -> Tensor:
        return fl.dsc_loss(z, target, impl="reference")

    z, target = problem(6, 33, generator)
    target[2] = -100
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_same(with_gradient(compiled, z, target), with_gradient(step, z, target))


# The rest of PyTorch


@pytest.mark.parametrize("inplace", [False, True])
@each_inplace_loss
def test_create_graph_gives_the_reference_derivatives(
    loss: Callable[..., Any], inplace: bool, compiled_impl: str, generator: torch.Generator
) -> None:
    """A gradient penalty: second derivatives are right, and an in-place gradient is not taken in place then."""
    z, target = problem(4, 9, generator, torch.float64)
    target[1] = -100

    def penalty(impl: str, **options: Any) -> tuple[Tensor, Tensor]:
        leaf = z.clone().requires_grad_()
        logits = 1 * leaf
        result = loss(logits, target, impl=impl, **options)
        (slope,) = torch.autograd.grad(result, leaf, create_graph=True)
        assert torch.equal(logits.detach(), z)
        return slope.detach(), torch.autograd.grad(result + slope.square().sum(), leaf)[0]

    expected = penalty("reference")
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(penalty(compiled_impl, inplace_backward=inplace), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # by forward mode itself
@each_loss
def test_function_transforms_are_right(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """Whichever implementation was named; test_transforms.py has all transforms of the default."""
    z, target = problem(4, 9, generator)
    direction = torch.randn(4, 9, generator=generator)
    expected = with_gradient(lambda z: loss(z, target, impl=impl), z)[1] / -1  # the upstream gradient there
    torch.testing.assert_close(torch.func.grad(lambda z: loss(z, target, impl=impl))(z), expected)
    _, along = torch.func.jvp(lambda z: loss(z, target, impl=impl), (z,), (direction,))
    torch.testing.assert_close(along, (expected * direction).sum())
    leaf = z.clone().requires_grad_()
    result = loss(leaf, target, impl=impl)
    (got,) = torch.autograd.grad(result, leaf, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    torch.testing.assert_close(got, torch.stack([expected, -2 * expected]))


def export(module: torch.nn.Module, inputs: tuple[Tensor, ...], grad_mode: bool) -> Any:
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = module

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.loss(*inputs)

    with torch.set_grad_enabled(grad_mode):
        return torch.export.export(Whole(), inputs).module()


@pytest.mark.compile
@pytest.mark.parametrize("exported", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_exported_linear_module_runs_with_gradients_on(
    reduction: str, exported: bool, generator: torch.Generator
) -> None:
    """Autograd does not look into an operator, which writes its products into memory of its own."""
    hidden, target = torch.randn(6, 8, generator=generator), torch.randint(9, (6,), generator=generator)
    for module in (
        fl.nn.LinearCrossEntropyLoss(8, 9, bias=True, softcap=5.0, reduction=reduction),
        fl.nn.LinearFlexLoss(8, 9, lambda s: s.ce * s.q, reduction=reduction),
    ):
        program = export(module, (hidden, target), exported)
        torch.testing.assert_close(program(hidden, target), module(hidden, target))
        with torch.no_grad():
            torch.testing.assert_close(program(hidden, target), module(hidden, target))


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=True)


@pytest.mark.parametrize(
    ("step", "sources"),
    [
        (
            lambda t, h, w, b: fl.linear_cross_entropy(h, w, t, linear_bias=b, softcap=3.0, drop_ignored=True),
            [(6, 4), (9, 4), (9,)],
        ),
        (lambda t, h, w: fl.linear_dsc_loss(h, w, t, reduction="none").sum(), [(6, 4), (9, 4)]),
        (lambda t, h, w: fl.linear_flex_loss(h, w, t, lambda s: s.ce * s.q), [(6, 4), (9, 4)]),
        (lambda t, h: fl.nn.LinearFocalLoss(4, 9, device="meta")(h, t), [(6, 4)]),
        (lambda t, h: fl.nn.LinearFocalLoss(4, 9, device="meta").logits(h).sum(), [(6, 4)]),
        (lambda t, f: fl.supcon_loss(f, t, positives="in"), [(6, 4)]),
    ],
    ids=["sum", "rows", "flex", "module", "logits", "contrastive"],
)
def test_meta_tensors(step: Callable[..., Tensor], sources: list[tuple[int, ...]]) -> None:
    """A device without autocast, as which PyTorch raises where one asks for its state."""
    target, inputs = torch.zeros(6, dtype=torch.int64, device="meta"), [on_meta(*shape) for shape in sources]
    result = step(target, *inputs)
    assert result.shape == () and result.device.type == "meta"
    for slope, x in zip(torch.autograd.grad(result, inputs), inputs, strict=True):
        assert slope.shape == x.shape and slope.device.type == "meta"


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced_with_gradients", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        fl.linear_cross_entropy,
        lambda h, w, t: fl.linear_dsc_loss(h, w, t, reduction="none").sum(),
        lambda h, w, t: fl.linear_flex_loss(h, w, t, lambda s: s.ce * s.q),
        lambda h, w, t: fl.linear_cross_entropy(h, w, t, impl="reference"),
    ],
    ids=["sum", "rows", "flex", "reference"],
)
def test_a_traced_linear_form(
    loss: Callable[..., Tensor], traced_with_gradients: bool, generator: torch.Generator
) -> None:
    """A trace keeps what it saw in Python: neither the gradients that were asked for then, nor the number of rows."""

    def inputs(rows: int, gradients: bool) -> tuple[Tensor, ...]:
        sources = [torch.randn(n, 8, generator=generator, requires_grad=gradients) for n in (rows, 9)]
        return *sources, torch.arange(rows) % 9

    traced = torch.jit.trace(loss, inputs(6, traced_with_gradients))
    hidden, weight, target = inputs(11, True)
    results = [f(hidden, weight, target) for f in (traced, loss)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(x, (hidden, weight)) for x in results))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(
    loss: Callable[..., Any], dtype: torch.dtype, impl: str, generator: torch.Generator
) -> None:
    z, target = problem(4, 50, generator, dtype)

    def step(z: Tensor) -> Tensor:
        return loss(z, target, impl=impl)

    expected, slope = with_gradient(step, z)
    z.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
        result = step(z)
    (got,) = torch.autograd.grad(-result, z)
    assert result.dtype == torch.float32 and got.dtype == dtype
    assert torch.equal(result, expected) and torch.equal(got, slope)


def test_logits_of_an_autocast_layer(impl: str, generator: torch.Generator) -> None:
    layer = torch.nn.Linear(8, 50)
    hidden = torch.randn(4, 8, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(hidden)
        result = fl.cross_entropy(logits, torch.arange(4), impl=impl)
    assert logits.dtype == torch.bfloat16 and result.dtype == torch.float32
    torch.testing.assert_close(result, torch.nn.functional.cross_entropy(logits.float(), torch.arange(4)))
    result.backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


@each_loss
def test_saved_tensor_hooks(loss: Callable[..., Any], impl: str, generator: torch.Generator) -> None:
    """Saved tensors that go elsewhere and come back as copies."""
    z, target = problem(4, 50, generator)
    expected = with_gradient(lambda z: loss(z, target, impl=impl), z)[1]
    packed = 0

    def pack(tensor: Tensor) -> bytes:
        nonlocal packed
        packed += 1
        return pickle.dumps(tensor.detach())

    leaf = z.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, pickle.loads):
        result = loss(1 * leaf, target, impl=impl)
    assert packed
    (slope,) = torch.autograd.grad(result, leaf, torch.tensor(-1.0))
    assert torch.equal(slope, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing(name: str, reentrant: bool, impl: str, generator: torch.Generator) -> None:
    hidden = torch.randn(4, 8, generator=generator, requires_grad=True)
    weight = torch.randn(8, 50, generator=generator, requires_grad=True)
    target = torch.randint(50, (4,), generator=generator)
    inplace = impl != "reference" and name in INPLACE

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return LOSSES[name](hidden @ weight, target, inplace_backward=inplace, impl=impl)

    results = [step(hidden, weight), checkpoint(step, hidden, weight, use_reentrant=reentrant)]
    assert torch.equal(*results)
    for result in results:
        result.backward()
        if result is results[0]:
            expected = hidden.grad, weight.grad
            hidden.grad = weight.grad = None
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])


def test_a_module_that_holds_the_loss_can_be_copied_and_pickled() -> None:
    z = torch.randn(3, 5)
    _, stats = fl.cross_entropy(z, torch.tensor([0, -100, 2]), return_stats=True)
    for other in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert isinstance(other, fl.RowStats)
        torch.testing.assert_close(tuple(other), tuple(stats), equal_nan=True)
    assert pickle.loads(pickle.dumps(fl.cross_entropy)) is fl.cross_entropy


def test_statistics_can_be_copied() -> None:
    seen = []

    def keep(s: fl.Statistics) -> Tensor:
        seen.append(copy.copy(s))
        return s.ce

    fl.flex_loss(torch.randn(3, 5), torch.arange(3), keep, statistics=("top",))
    assert seen[0].top_index.shape == (3,)
    with pytest.raises(AttributeError, match="second"):
        _ = seen[0].second_ce
