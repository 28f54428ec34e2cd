"""torch.func, forward mode and batched gradients: every loss by its definition in PyTorch, against a formula."""

from functools import partial

import pytest
import torch
from row_losses import LOSSES, SCENES, leaves_of
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fusedloss as fl
from fusedloss.losses._registry import EXAMPLES

# PyTorch's warnings: a loop over the batch where it has no rule, and its own use of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit")

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
UPSTREAM = torch.linspace(-1, 2, 4, dtype=torch.float64)


def forward_mode(f, z, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, direction))).tangent


def batched_gradients(f, z, direction):
    leaf = z.clone().requires_grad_()
    result = f(leaf)
    # The functions' saved gradients are not used up by the first.
    options = {"is_grads_batched": True, "retain_graph": True}
    return [torch.autograd.grad(result, leaf, UPSTREAM, **options)[0] for _ in range(2)]


def vmapped_backward(f, z, direction):
    leaf = z.clone().requires_grad_()
    result = f(leaf)
    return vmap(lambda g: torch.autograd.grad(result, leaf, g)[0])(UPSTREAM)


#: What is done to a function of (N, V) that gives a number.
TRANSFORMS = {
    "grad": lambda f, z, d: grad(f)(z),
    "vjp": lambda f, z, d: vjp(f, z)[1](torch.tensor(0.5, dtype=z.dtype)),
    "jvp": lambda f, z, d: jvp(f, (z,), (d,)),
    "vmap": lambda f, z, d: vmap(f)(torch.stack([z, d])),
    "vmap of grad": lambda f, z, d: vmap(grad(f), out_dims=1)(torch.stack([z, d])),
    "jvp of grad": lambda f, z, d: jvp(grad(f), (z,), (d,)),
    "hessian": lambda f, z, d: hessian(f)(z),
    "jacrev of jacfwd": lambda f, z, d: jacrev(jacfwd(f))(z),
    "functionalize": lambda f, z, d: functionalize(grad(f))(z),
    "forward mode": forward_mode,
    "batched gradients": batched_gradients,
    "vmapped backward": vmapped_backward,
    "jacobian": lambda f, z, d: torch.autograd.functional.jacobian(f, z, vectorize=True),
    "autograd's hessian": lambda f, z, d: torch.autograd.functional.hessian(f, z, vectorize=True),
}


def problem(rows, classes, generator):
    z, direction = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return z, torch.randint(classes, (rows,), generator=generator), direction


@pytest.mark.covering(1)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_loss_is_its_formula(example, transform, generator):
    z, target, direction = problem(2, 4, generator)
    got = transform(lambda z: example.loss(z, target, **example.arguments), z, direction)
    expected = transform(lambda z: example.formula(z, target, **example.arguments).mean(), z, direction)
    torch.testing.assert_close(got, expected, **TOLERANCE)


# Every function in each of its forms, against the same call without a transform

each_scene = pytest.mark.parametrize("loss", SCENES.values(), ids=SCENES.keys())
TARGETS = torch.tensor([[1, -100, 0, 4, 8, 2, 2], [2, 2, 3, -100, 0, 7, 1]])


def gradients(f, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves)


@each_scene
def test_reverse_and_forward_mode(loss, generator):
    f, inputs, directions = partial(loss, TARGETS[0]), leaves_of(loss, generator), leaves_of(loss, generator)
    expected = gradients(f, inputs)
    torch.testing.assert_close(grad(f, tuple(range(len(inputs))))(*inputs), expected, **TOLERANCE)
    leaves = [x.clone().requires_grad_() for x in inputs]
    got = torch.autograd.grad(f(*leaves), leaves, UPSTREAM, is_grads_batched=True)
    torch.testing.assert_close(got, tuple(torch.stack([x * u for u in UPSTREAM]) for x in expected), **TOLERANCE)
    along = sum((g * d).sum() for g, d in zip(expected, directions, strict=True))
    torch.testing.assert_close(jvp(f, tuple(inputs), tuple(directions)), (f(*inputs), along), **TOLERANCE)
    with forward_ad.dual_level():
        result = f(*map(forward_ad.make_dual, inputs, directions))
        torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, along, **TOLERANCE)


@each_scene
def test_per_sample_gradients(loss, generator):
    """Of one target for all or one for each, in batches that are not in front."""
    targets, batch = TARGETS, [leaves_of(loss, generator) for _ in TARGETS]
    every = tuple(range(len(batch[0])))
    stacked = [torch.stack(x, -1) for x in zip(*batch, strict=True)]
    of_one = grad(loss, tuple(i + 1 for i in every))
    for chosen, dim in ((targets, 0), ([targets[0]] * 2, None)):
        expected = [gradients(partial(loss, t), inputs) for t, inputs in zip(chosen, batch, strict=True)]
        got = vmap(of_one, (dim, *(-1 for _ in every)))(targets if dim == 0 else targets[0], *stacked)
        torch.testing.assert_close(got, tuple(map(torch.stack, zip(*expected, strict=True))), **TOLERANCE)


@pytest.mark.parametrize("loss", [fl.nn.FocalLoss(gamma=1.5), fl.nn.LinearFocalLoss(7, 7)], ids=["row", "linear"])
def test_per_sample_gradients_of_a_model(loss, generator):
    """As differential privacy and influence functions take them."""
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 7), "loss": loss}).double()
    model.forward = lambda x, target: model["loss"](model["body"](x[None]).tanh(), target[None])
    inputs, target = torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.tensor([1, 6, -100, 0, 3])
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    of_one = grad(lambda parameters, *x: functional_call(model, parameters, x))
    got = vmap(of_one, (None, 0, 0))(parameters, inputs, target)
    for i, (x, t) in enumerate(zip(inputs, target, strict=True)):
        expected = torch.autograd.grad(model(x, t), list(model.parameters()))
        torch.testing.assert_close([x[i] for x in got.values()], list(expected), **TOLERANCE)


def test_statistics_and_counts_are_those_of_each_example(generator):
    z, target, _ = problem(6, 5, generator)
    target[3] = -100

    def step(z, target):
        loss, stats = fl.cross_entropy(z[None], target[None], return_stats=True)
        return loss, (*stats[:4], fl.calibration_error(stats, target[None]))

    gradients, stats = vmap(grad(step, has_aux=True))(z, target)
    expected = fl.cross_entropy(z, target, reduction="none", return_stats=True)[1]
    torch.testing.assert_close(tuple(x[:, 0] for x in stats[:-1]), tuple(expected[:4]), equal_nan=True, **TOLERANCE)
    assert gradients[3].eq(0).all()
    targets, token_weights = target.view(3, 2), torch.rand(3, 2, generator=generator).double()
    count = partial(fl.normalizer, weight=torch.linspace(0.5, 2, 5).double())
    got = vmap(lambda t, w: count(t, token_weight=w))(targets, token_weights)
    expected = [count(t, token_weight=w) for t, w in zip(targets, token_weights, strict=True)]
    torch.testing.assert_close(got, torch.stack(expected), **TOLERANCE)


@pytest.mark.parametrize("impl", ["cpu", None])
def test_an_implementation_that_was_named_gives_way_and_must_be_ready(impl, kernel_calls, generator):
    z, target, _ = problem(4, 5, generator)
    expected = grad(lambda z: torch.nn.functional.cross_entropy(z, target))(z)
    torch.testing.assert_close(grad(lambda z: fl.cross_entropy(z, target, impl=impl))(z), expected, **TOLERANCE)
    assert not kernel_calls
    for name, error, message in (("gpu", ValueError, "impl must be one of"), ("cuda", RuntimeError, "cannot run")):
        with pytest.raises(error, match=message):
            grad(lambda z, name=name: fl.cross_entropy(z.cpu(), target, impl=name))(z)


@pytest.mark.parametrize("name", ["cross_entropy", "dsc_loss one_vs_rest", "flex_loss rows"])
def test_half_precision(name, generator):
    z, target, _ = problem(4, 5, generator)
    leaf = z.bfloat16().requires_grad_()
    (expected,) = torch.autograd.grad(LOSSES[name](leaf, target), leaf)
    got = grad(lambda z: LOSSES[name](z, target))(leaf.detach())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
    (got,) = torch.autograd.grad(LOSSES[name](leaf, target), leaf, torch.ones(2), is_grads_batched=True)
    torch.testing.assert_close(got, torch.stack([expected] * 2))


# What cannot be, says so


def test_values_are_checked_beneath_a_transform():
    z, t, bad = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([2.0, -1.0])
    for loss, inputs, error, message in (
        (grad(fl.cross_entropy), (z, t), IndexError, "target 5 is out of range for 5 classes"),
        (lambda z, c: fl.mixed_cross_entropy(z, t[0], alpha=0.5, candidates=c), (z, t), IndexError, "candidate 5 is"),
        (lambda z, g: fl.focal_loss(z, t[0], gamma=g), (z, bad), ValueError, r"gamma .* got values from -1\.0 to 2\.0"),
        (lambda z, n: fl.cross_entropy(z, t[0], normalizer=n), (z, bad), ValueError, r"normalizer .*, got -1\.0"),
        (lambda z, x: fl.supcon_loss(z, t[0], temperature=x), (z, bad), ValueError, r"temperature .*, got -1\.0"),
    ):
        with pytest.raises(error, match=message):
            vmap(loss)(*inputs)


REFUSED = "does not go together with function transforms"


@pytest.mark.parametrize(
    "loss",
    [fl.cross_entropy, partial(fl.dsc_loss, level="class"), partial(fl.flex_loss, loss_fn=lambda s: s.q)],
    ids=["rows", "sums", "flex"],
)
def test_an_in_place_gradient_is_refused(loss, generator):
    z, target, _ = problem(4, 5, generator)
    refused = pytest.raises(RuntimeError, match=f"inplace_backward=True {REFUSED}")

    def in_place(z):
        return loss(z.expand(4, 5) * 1, target, inplace_backward=True)

    for transform in (grad(in_place), vmap(in_place)):
        with refused:
            transform(z)
    logits = z.clone().requires_grad_() * 1
    result = loss(logits, target, inplace_backward=True)
    with refused:
        torch.autograd.grad(result, logits, UPSTREAM, is_grads_batched=True)
    assert torch.equal(logits.detach(), z)


def test_ranks_are_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    z, target = torch.randn(4, 5), torch.arange(4)
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        world = dist.group.WORLD
        shards = fl.VocabularyShards(world, [5])
        for loss in (
            lambda z: fl.cross_entropy(z, target, group=shards),
            lambda z: fl.cross_entropy(z, target, group=world),
            lambda z: fl.supcon_loss(z, target // 2, group=world),
            lambda h: fl.linear_cross_entropy(h, z, target, group=shards),
        ):
            with pytest.raises(RuntimeError, match=f"group {REFUSED}"):
                grad(loss)(z)
        tensor = DTensor.from_local(z, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(RuntimeError, match=f"a DTensor {REFUSED}"), forward_ad.dual_level():
            fl.cross_entropy(tensor, target)
        with pytest.raises(RuntimeError, match=REFUSED):
            grad(lambda z: fl.cross_entropy(z, target))(tensor)
    finally:
        dist.destroy_process_group()


@pytest.mark.compile
def test_a_compiled_transform(generator):
    z, target, _ = problem(4, 5, generator)
    of_each = vmap(grad(lambda z, t: fl.focal_loss(z[None], t[None])))
    torch.compiler.reset()
    got = torch.compile(of_each, backend="aot_eager", fullgraph=True)(z, target)
    torch.testing.assert_close(got, of_each(z, target), **TOLERANCE)
