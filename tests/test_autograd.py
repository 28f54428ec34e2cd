"""Losses through torch.compile, torch.export, torch.jit, autocast, hooks and checkpointing."""

import copy
import pickle
from functools import partial

import pytest
import torch
from row_losses import LOSSES
from row_suite import with_gradient
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fusedloss as fl
from fusedloss import backends

needs_cpu = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="needs the C++ engine")

#: A loss for each autograd function; the last has no gradient in the logits' memory.
FUNCTIONS = {name: LOSSES[name] for name in ("focal_loss", "dsc_loss one_vs_rest", "flex_loss rows")}
FUNCTIONS |= {"dsc_loss set": partial(fl.dsc_loss, level="set"), "flex_loss classes": LOSSES["flex_loss classes"]}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()


def problem(rows, classes, generator, dtype=torch.float32):
    z = 2 * torch.randn(rows, classes, generator=generator)
    return z.to(dtype), torch.randint(classes, (rows,), generator=generator)


def assert_compiles(step, *arguments, backend="aot_eager", **options):
    """To the value and the gradients of eager, but for the order of a few additions; return it for more calls."""
    compiled = torch.compile(step, backend=backend, fullgraph=True, **options)
    assert_same(compiled, step, *arguments)
    return compiled


def assert_same(compiled, step, *arguments):
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    results = []
    for function in (compiled, step):
        for x in leaves:
            x.requires_grad_()
        value = function(*arguments)
        upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
        found = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
        results.append((value.detach(), *(x for x in found if x is not None)))
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-7)


# torch.compile


@pytest.mark.compile
def test_inductor_equals_eager_and_reuses_its_code(generator):
    """Generated code, which makes the logits and uses the statistics, writes all rows, ignored ones too."""

    def step(hidden, weight, target):
        z = torch.nn.functional.linear(hidden, weight).tanh()
        options = {"label_smoothing": 0.1, "return_stats": True, "reduction": "none"}
        result, stats = fl.mixed_cross_entropy(z, target, alpha=0.25, **options)
        return result, (stats.argmax == target).sum(), stats.lse.exp()

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    weight = torch.randn(2100, 8, generator=generator, requires_grad=True)
    for _ in range(2):
        hidden = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
        target = torch.randint(2100, (2, 3), generator=generator)
        target[0, 1] = -100
        outputs = [f(hidden, weight, target) for f in (compiled, step)]
        torch.testing.assert_close(*outputs, equal_nan=True)
        slopes = [torch.autograd.grad(3 * result.mean(), (hidden, weight)) for result, *_ in outputs]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.compile
@pytest.mark.parametrize("layout", ["transposed", "permuted"])
def test_inductor_keeps_the_layout_that_the_kernels_rely_on(layout, generator):
    """Kernels take strides as they were traced; generated code must not hand over a tensor laid out otherwise."""
    make, shape = {
        "transposed": (lambda x: (2 * x).t(), (33, 6)),
        "permuted": (lambda x: (x.sin() + 1).permute(2, 0, 1), (2, 33, 3)),
    }[layout]
    x = torch.randn(shape, generator=generator)
    target = torch.randint(2, make(x).shape[:-1], generator=generator)
    assert_compiles(lambda x, t: fl.focal_loss(make(x), t, reduction="none"), x, target, backend="inductor")


@pytest.mark.compile
def test_inductor_compiles_the_reference(generator):
    """All of it is PyTorch. Inductor of torch 2.11 does not take a mask that was filled with 1 in place of True."""

    def step(z, target):
        return torch.stack(fl.log_probs(z, target, entropy=True, impl="reference"))

    z, target = problem(6, 37, generator)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(z, target), step(z, target))


#: Steps of logits or hidden states, a weight, targets and a number.
ONCE = {
    "row": lambda z, w, t, x: fl.focal_loss(z, t, gamma=x),
    "row of picks": lambda z, w, t, x: fl.mixed_cross_entropy(z, t, alpha=x),
    "class": lambda z, w, t, x: fl.dsc_loss(z, t, alpha=x),
    "class over the rows": lambda z, w, t, x: fl.dsc_loss(z, t, alpha=x, level="class", token_weight=z[:, 0].exp()),
    "set": lambda z, w, t, x: fl.dsc_loss(z, t, alpha=x, level="set", token_weight=z[:, 0].exp()),
    "flex": lambda z, w, t, x: fl.flex_loss(z, t, lambda s: s.ce + x * s.q),
    "linear": lambda z, w, t, x: fl.linear_mixed_cross_entropy(z, w, t, alpha=x),
    "linear, rows": lambda z, w, t, x: fl.linear_mixed_cross_entropy(z, w, t, alpha=x, reduction="none"),
    "contrastive": lambda z, w, t, x: fl.supcon_loss(z, t % 2, temperature=x),
}


@pytest.mark.compile
@pytest.mark.parametrize("step", ONCE.values(), ids=ONCE.keys())
def test_any_rows_and_any_number_compile_once(step, generator):
    """A value that changes each step baked into the graph as a constant: a compilation a step, or a stale value."""

    def of_a_constant(z, weight, target, number):
        return step(z / 4, weight, target, number.detach())

    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(of_a_constant, backend=counter, fullgraph=True)
    weight = torch.randn(33, 33, generator=generator)
    for rows, number in ((8, 0.25), (29, 0.75), (300, 1.0)):
        z, target = problem(rows, 33, generator)
        for tensor in (z, target):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_same(compiled, of_a_constant, z, weight, target, torch.tensor(number))
        counts.append(counter.frame_count)  # Dynamo may take two turns at the first
    assert counts[0] == counts[-1]


@pytest.mark.compile
def test_everything_dynamic(generator):
    """The vocabulary's size too, and rows down to none (which PyTorch compiles for themselves)."""

    def step(z, target):
        return fl.mixed_cross_entropy(z, target, alpha=0.25, label_smoothing=0.1)

    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows, classes in ((5, 33), (33, 2100), (1, 33), (0, 33)):
        assert_same(compiled, step, *problem(rows, classes, generator))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.compile
@pytest.mark.parametrize("what", ["alpha", "softcap"])
def test_a_changing_number_is_never_stale(what, generator):
    """It compiles at most once more. A softcap crosses the operators' boundary in a string."""

    def step(z, weight, target, value):
        if what == "alpha":
            return fl.mixed_cross_entropy(z @ weight.t(), target, alpha=value)
        return fl.linear_cross_entropy(z, weight, target, softcap=value)

    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    z, target = problem(5, 8, generator)
    weight = torch.randn(33, 8, generator=generator)
    for value in (0.375, 0.625, 0.25):
        assert_same(compiled, step, z, weight, target, value if what == "alpha" else 8 * value)
        counts.append(counter.frame_count)
    assert what == "softcap" or counts[1] == counts[2]


@pytest.mark.compile
def test_a_compiled_target_out_of_range_raises(generator):
    z, target = problem(5, 33, generator)
    compiled = assert_compiles(lambda z, target: fl.cross_entropy(z, target), z, target)
    target[3] = 33
    with pytest.raises(IndexError, match="target 33 is out of range for 33 classes"):
        compiled(z, target)


@needs_cpu
@pytest.mark.compile
def test_compiled_inplace_backward(generator):
    """Of logits made in the compiled region; of those made outside, another loss gets its gradient or an error."""
    x, weight = torch.randn(6, 8, generator=generator), torch.randn(8, 33, generator=generator)
    z, target = problem(6, 33, generator)

    def step(x, weight, target):
        return fl.focal_loss(x @ weight, target, inplace_backward=True)

    assert_compiles(step, x, weight, target, backend="inductor")
    compiled = torch.compile(lambda z, t: fl.cross_entropy(z, t, inplace_backward=True), backend="aot_eager")

    def both(second):
        leaf = z.clone().requires_grad_()
        logits = 1 * leaf
        first = fl.focal_loss(logits, target)  # its backward runs last
        return torch.autograd.grad(first + second(logits, target), leaf)[0]

    expected = both(fl.cross_entropy)
    try:
        got = both(compiled)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, expected)


# The rest of PyTorch


@pytest.mark.parametrize("name", list(FUNCTIONS)[:-1])
def test_create_graph_takes_no_gradient_in_place(name, compiled_impl, generator):
    """A gradient penalty: second derivatives are right, whatever `inplace_backward` says."""
    z, target = problem(4, 9, generator, torch.float64)
    target[1] = -100

    def penalty(impl, **options):
        leaf = z.clone().requires_grad_()
        logits = 1 * leaf
        result = FUNCTIONS[name](logits, target, impl=impl, **options)
        (slope,) = torch.autograd.grad(result, leaf, create_graph=True)
        assert torch.equal(logits.detach(), z)
        return slope.detach(), torch.autograd.grad(result + slope.square().sum(), leaf)[0]

    expected = penalty("reference")
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(penalty(compiled_impl, inplace_backward=True), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.compile
@pytest.mark.parametrize("exported", [False, True], ids=["without gradients", "with gradients"])
def test_an_exported_linear_module_runs_with_gradients_on(exported, generator):
    """Autograd does not look into an operator, which writes its products into memory of its own."""
    hidden, target = torch.randn(6, 8, generator=generator), torch.randint(9, (6,), generator=generator)
    for loss in (
        fl.nn.LinearCrossEntropyLoss(8, 9, bias=True, softcap=5.0),
        fl.nn.LinearFlexLoss(8, 9, lambda s: s.ce * s.q, reduction="none"),
    ):
        module = torch.nn.Module()
        module.loss, module.forward = loss, loss.forward
        with torch.set_grad_enabled(exported):
            program = torch.export.export(module, (hidden, target)).module()
        torch.testing.assert_close(program(hidden, target), loss(hidden, target))
        with torch.no_grad():
            torch.testing.assert_close(program(hidden, target), loss(hidden, target))


#: Losses of a target, hidden states (6, 4) and a weight (9, 4).
LINEAR = {
    "sum": lambda h, w, t: fl.linear_cross_entropy(h, w, t, softcap=3.0, drop_ignored=True),
    "rows": lambda h, w, t: fl.linear_dsc_loss(h, w, t, reduction="none").sum(),
    "flex": lambda h, w, t: fl.linear_flex_loss(h, w, t, lambda s: s.ce * s.q),
}


@pytest.mark.parametrize("step", LINEAR.values(), ids=LINEAR.keys())
def test_meta_tensors(step):
    """A device without autocast, as which PyTorch raises where one asks for its state."""
    target = torch.zeros(6, dtype=torch.int64, device="meta")
    hidden, weight = (torch.empty(n, 4, device="meta", requires_grad=True) for n in (6, 9))
    module = fl.nn.LinearFocalLoss(4, 9, device="meta")
    for result in (
        step(hidden, weight, target),
        module(hidden, target),
        module.logits(hidden).sum(),
        fl.supcon_loss(hidden, target, positives="in"),
    ):
        assert result.shape == () and result.device.type == "meta"
        assert torch.autograd.grad(result, hidden)[0].shape == hidden.shape


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced_with_gradients", [False, True])
@pytest.mark.parametrize("loss", LINEAR.values(), ids=LINEAR.keys())
def test_a_traced_linear_form(loss, traced_with_gradients, generator):
    """A trace keeps what it saw in Python: neither the gradients that were asked for then, nor the number of rows."""

    def inputs(rows, gradients):
        sources = [torch.randn(n, 8, generator=generator, requires_grad=gradients) for n in (rows, 9)]
        return *sources, torch.arange(rows) % 9

    traced = torch.jit.trace(loss, inputs(6, traced_with_gradients))
    assert_same(traced, loss, *inputs(11, True))


@each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(name, dtype, impl, generator):
    z, target = problem(4, 50, generator, dtype)
    expected = with_gradient(lambda z: FUNCTIONS[name](z, target, impl=impl), z)

    def step(z):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return FUNCTIONS[name](z, target, impl=impl)

    got = with_gradient(step, z)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@each_function
def test_saved_tensor_hooks(name, impl, generator):
    """Saved tensors that go elsewhere and come back as copies."""
    z, target = problem(4, 50, generator)
    expected = with_gradient(lambda z: FUNCTIONS[name](z, target, impl=impl), z)[1]
    packed = []
    leaf = z.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(1) or pickle.dumps(x.detach()), pickle.loads):
        result = FUNCTIONS[name](1 * leaf, target, impl=impl)
    assert packed and torch.equal(torch.autograd.grad(result, leaf)[0], expected)


@each_function
def test_activation_checkpointing(name, impl, generator):
    hidden, weight = torch.randn(4, 8, generator=generator), torch.randn(8, 50, generator=generator)
    target = torch.randint(50, (4,), generator=generator)
    inplace = impl != "reference" and name != "flex_loss classes"

    def step(hidden, weight):
        return FUNCTIONS[name](hidden @ weight, target, inplace_backward=inplace, impl=impl)

    results = []
    for function in (step, *(lambda *x, r=r: checkpoint(step, *x, use_reentrant=r) for r in (False, True))):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves)
        loss.backward()
        results.append((loss.detach(), *(x.grad for x in leaves)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_what_losses_give_can_be_copied_and_pickled():
    z, seen = torch.randn(3, 5), []
    _, stats = fl.cross_entropy(z, torch.tensor([0, -100, 2]), return_stats=True)
    for other in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert isinstance(other, fl.RowStats)
        torch.testing.assert_close(tuple(other), tuple(stats), equal_nan=True)
    assert pickle.loads(pickle.dumps(fl.cross_entropy)) is fl.cross_entropy
    fl.flex_loss(z, torch.arange(3), lambda s: seen.append(copy.copy(s)) or s.ce, statistics=("top",))
    assert seen[0].top_index.shape == (3,)
    with pytest.raises(AttributeError, match="second"):
        _ = seen[0].second_ce
