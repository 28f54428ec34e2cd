"""torch.func, forward mode and batched gradients: every loss by its definition in PyTorch, against a formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from row_losses import LOSSES
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fusedloss as fl
from fusedloss.losses._registry import EXAMPLES, Example

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}

Function = Callable[[Tensor], Tensor]


def forward_mode(f: Function, z: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, direction))).tangent


def batched_gradients(f: Function, z: Tensor, direction: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    upstream = torch.linspace(-1, 2, 4, dtype=z.dtype)
    (first,) = torch.autograd.grad(f(leaf), leaf, upstream, is_grads_batched=True)
    # The functions' saved gradients are not used up by the first.
    result = f(leaf)
    for _ in range(2):
        (again,) = torch.autograd.grad(result, leaf, upstream, is_grads_batched=True, retain_graph=True)
        torch.testing.assert_close(again, first, **TOLERANCE)
    return first


def vmapped_backward(f: Function, z: Tensor, direction: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    result = f(leaf)
    return vmap(lambda g: torch.autograd.grad(result, leaf, g)[0])(torch.linspace(-1, 2, 4, dtype=z.dtype))


#: What is done to a function of (N, V) that gives a number.
TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "grad": lambda f, z, d: grad(f)(z),
    "vjp": lambda f, z, d: vjp(f, z)[1](torch.tensor(0.5, dtype=z.dtype)),
    "jvp": lambda f, z, d: jvp(f, (z,), (d,)),
    "vmap": lambda f, z, d: vmap(f)(torch.stack([z, d])),
    "vmap of grad": lambda f, z, d: vmap(grad(f), out_dims=1)(torch.stack([z, d])),
    "jvp of grad": lambda f, z, d: jvp(grad(f), (z,), (d,)),
    "hessian": lambda f, z, d: hessian(f)(z),
    "jacrev of jacfwd": lambda f, z, d: jacrev(jacfwd(f))(z),
    "forward mode": forward_mode,
    "batched gradients": batched_gradients,
    "vmapped backward": vmapped_backward,
    "jacobian": lambda f, z, d: torch.autograd.functional.jacobian(f, z, vectorize=True),
    "jacobian, forward": lambda f, z, d: torch.autograd.functional.jacobian(
        f, z, vectorize=True, strategy="forward-mode"
    ),
    "autograd's hessian": lambda f, z, d: torch.autograd.functional.hessian(f, z, vectorize=True),
}

each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


@pytest.fixture(autouse=True)
def _others_warnings() -> Any:
    """PyTorch's: a loop over the batch where it has no rule, and its own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        warnings.filterwarnings("ignore", "`torch.jit")
        yield


def problem(rows: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    z, direction = 2 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return z, torch.randint(classes, (rows,), generator=generator), direction


@each_transform
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_every_loss_is_its_formula(example: Example, transform: Callable[..., Any], generator: torch.Generator) -> None:
    z, target, direction = problem(2, 4, generator)
    got = transform(lambda z: example.loss(z, target, **example.arguments), z, direction)
    expected = transform(lambda z: example.formula(z, target, **example.arguments).mean(), z, direction)
    torch.testing.assert_close(got, expected, **TOLERANCE)


# Everything else against the same call without a transform


def _poly(s: fl.Statistics) -> Tensor:
    return s.ce + s.q * s.second_ce - s.candidate_ce.mean(-1) + s.mean_ce


def _module(module: torch.nn.Module) -> Callable[..., Tensor]:
    return lambda target, *inputs: module(*inputs, target)


def _linear_module(make: Callable[..., Any]) -> Callable[..., Tensor]:
    module = make(7, CLASSES, bias=True).double()

    def call(target: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(module, {"linear.weight": weight, "linear.bias": bias}, (hidden, target))

    return call


ROWS, CLASSES = 4, 5
LOGITS, VECTOR, NUMBER = (ROWS, CLASSES), (ROWS,), ()
LAYER = ((ROWS, 7), (CLASSES, 7), (CLASSES,))
WEIGHT = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
LABELS = torch.tensor([1, 1, 2, 1])
CANDIDATES = torch.tensor([[0, 1], [3, 3], [2, 4], [1, 0]])


def _linear(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda t, h, w, b: loss(h, w, t, linear_bias=b, **options)


def _closure(t: Tensor, z: Tensor, a: Tensor, over: str) -> Tensor:
    def of_classes(p: Tensor, q: Tensor, positive: Tensor) -> Tensor:
        return torch.where(positive, a * q, p).square()

    return fl.flex_loss(z, t, (lambda s: s.ce + a * s.q) if over == "rows" else of_classes, over=over)


#: The loss of a target and of tensors in (0.1, 0.9), and these tensors' shapes.
SCENES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    **{
        f"{name}, options": (
            partial(lambda loss, t, z: loss(z, t, weight=WEIGHT, z_loss=0.3, reduction="sum"), loss),
            (LOGITS,),
        )
        for name, loss in LOSSES.items()
    },
    "smoothing": (
        lambda t, z: fl.focal_loss(z, t, label_smoothing=0.2, smoothing_over="others", weight=WEIGHT),
        (LOGITS,),
    ),
    "rows": (lambda t, z: fl.cross_entropy(z, t, reduction="none").square().sum(), (LOGITS,)),
    "candidates": (lambda t, z: fl.mixed_cross_entropy(z, t, alpha=0.3, candidates=CANDIDATES), (LOGITS,)),
    "candidates and picks": (
        lambda t, z: fl.flex_loss(z, t, _poly, statistics=("second", "mean"), candidates=CANDIDATES, weight=WEIGHT),
        (LOGITS,),
    ),
    "token weights": (lambda t, z, w: fl.focal_loss(z, t, token_weight=w), (LOGITS, VECTOR)),
    "their sum for a divisor": (
        lambda t, z, w: fl.dsc_loss(z, t, token_weight=w, normalizer="token_weight"),
        (LOGITS, VECTOR),
    ),
    "divisor": (lambda t, z, n: fl.cross_entropy(z, t, normalizer=n), (LOGITS, NUMBER)),
    "learnt, of rows": (lambda t, z, g: fl.focal_loss(z, t, gamma=g), (LOGITS, VECTOR)),
    "learnt, of classes": (lambda t, z, a: fl.dsc_loss(z, t, alpha=a), (LOGITS, VECTOR)),
    "learnt, of sums": (lambda t, z, a: fl.dsc_loss(z, t, alpha=a, level="class"), (LOGITS, NUMBER)),
    "learnt, by closure": (partial(_closure, over="rows"), (LOGITS, NUMBER)),
    "learnt, by closure over classes": (partial(_closure, over="classes"), (LOGITS, NUMBER)),
    "class sums": (
        lambda t, z, w: fl.dsc_loss(z, t, alpha=0.5, level="class", token_weight=w, weight=WEIGHT),
        (LOGITS, VECTOR),
    ),
    "set": (lambda t, z: fl.dice_loss(z, t, level="set"), (LOGITS,)),
    "statistics": (lambda t, z: fl.cross_entropy(z, t, return_stats=True)[0], (LOGITS,)),
    "module": (_module(fl.nn.MixedCrossEntropyLoss(alpha=fl.nn.AlphaSchedule(9))), (LOGITS,)),
    "linear, mean": (_linear(fl.linear_focal_loss, softcap=2.0, budget=100), LAYER),
    "linear, sum": (_linear(fl.linear_cross_entropy, reduction="sum", weight=WEIGHT), LAYER),
    "linear, rows": (lambda *x: _linear(fl.linear_dsc_loss, reduction="none")(*x).square().sum(), LAYER),
    **{
        f"supcon, {name}": (
            partial(lambda o, t, *x: fl.supcon_loss(x[0], LABELS, temperature=x[1], **o), o),
            (LOGITS, ()),
        )
        for name, o in {
            "out": {},
            "in": {"positives": "in", "reduction": "mean_all"},
            "as they are": {"normalize": False, "reduction": "sum"},
        }.items()
    },
    "supcon, rows": (
        lambda t, f: fl.supcon_loss(f, LABELS, reduction="none").square().sum(),
        (LOGITS,),
    ),
    **{
        f"supcon, contrast, {positives}": (
            partial(
                lambda p, t, f, c: fl.supcon_loss(
                    f, LABELS, contrast=c, contrast_labels=torch.tensor([1, 0, 3]), positives=p
                ),
                positives,
            ),
            (LOGITS, (3, CLASSES)),
        )
        for positives in ("out", "in")
    },
    "linear, flex": (_linear(fl.linear_flex_loss, loss_fn=lambda s: s.ce + s.q), LAYER),
    "linear module": (_linear_module(partial(fl.nn.LinearMixedCrossEntropyLoss, alpha=0.3)), LAYER),
}


each_scene = pytest.mark.parametrize(("loss", "shapes"), SCENES.values(), ids=SCENES.keys())


def tensors(shapes: tuple[tuple[int, ...], ...], generator: torch.Generator) -> list[Tensor]:
    return [torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1 for shape in shapes]


def gradients(f: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves, upstream)


@each_scene
def test_reverse_mode(loss: Callable[..., Any], shapes: Any, generator: torch.Generator) -> None:
    target = torch.tensor([1, -100, 0, 4])
    f, inputs, every = partial(loss, target), tensors(shapes, generator), tuple(range(len(shapes)))
    expected = gradients(f, inputs)
    torch.testing.assert_close(grad(f, every)(*inputs), expected, **TOLERANCE)
    upstream = torch.tensor([0.5, -2.0], dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    got = torch.autograd.grad(f(*leaves), leaves, upstream, is_grads_batched=True)
    torch.testing.assert_close(got, tuple(torch.stack([x * u for u in upstream]) for x in expected), **TOLERANCE)


@each_scene
def test_forward_mode(loss: Callable[..., Any], shapes: Any, generator: torch.Generator) -> None:
    target = torch.tensor([1, -100, 0, 4])
    f, inputs, directions = partial(loss, target), tensors(shapes, generator), tensors(shapes, generator)
    along = sum((g * d).sum() for g, d in zip(gradients(f, inputs), directions, strict=True))
    got = jvp(f, tuple(inputs), tuple(directions))
    torch.testing.assert_close(got, (f(*inputs), along), **TOLERANCE)
    with forward_ad.dual_level():
        result = f(*map(forward_ad.make_dual, inputs, directions))
        torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, along, **TOLERANCE)


@each_scene
def test_per_sample_gradients(loss: Callable[..., Any], shapes: Any, generator: torch.Generator) -> None:
    """Of one target for all or one for each, in batches that are not in front."""
    targets = torch.tensor([[1, -100, 0, 4], [2, 2, 3, -100], [0, 1, 2, 3]])
    every, batch = tuple(range(len(shapes))), [tensors(shapes, generator) for _ in targets]
    stacked = [torch.stack(x, -1) for x in zip(*batch, strict=True)]
    for chosen, dim in ((targets, 0), ([targets[0]] * 3, None)):
        expected = [gradients(partial(loss, t), inputs) for t, inputs in zip(chosen, batch, strict=True)]
        of_one = grad(loss, tuple(i + 1 for i in every))
        got = vmap(of_one, (dim, *(-1 for _ in every)))(targets if dim == 0 else targets[0], *stacked)
        torch.testing.assert_close(got, tuple(map(torch.stack, zip(*expected, strict=True))), **TOLERANCE)


class _Model(torch.nn.Module):
    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 7))
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.body(x[None]), target[None])


@pytest.mark.parametrize(
    "loss", [fl.nn.FocalLoss(gamma=1.5), fl.nn.LinearFocalLoss(7, 7, gamma=1.5)], ids=["row", "linear"]
)
def test_per_sample_gradients_of_a_model(loss: torch.nn.Module, generator: torch.Generator) -> None:
    """As differential privacy and influence functions take them."""
    model = _Model(loss).double()
    inputs = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    target = torch.tensor([1, 6, -100, 0, 3])
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    of_one = grad(lambda parameters, *x: functional_call(model, parameters, x))
    got = vmap(of_one, (None, 0, 0))(parameters, inputs, target)
    for i, (x, t) in enumerate(zip(inputs, target, strict=True)):
        expected = torch.autograd.grad(model(x, t), list(model.parameters()))
        torch.testing.assert_close([x[i] for x in got.values()], list(expected), **TOLERANCE)


def test_statistics_are_those_of_each_example(generator: torch.Generator) -> None:
    z, target, _ = problem(6, 5, generator)
    target[3] = -100

    def step(z: Tensor, target: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, stats = fl.cross_entropy(z[None], target[None], return_stats=True)
        return loss, (*stats, fl.calibration_error(stats, target[None]))

    gradients, stats = vmap(grad(step, has_aux=True))(z, target)
    expected = fl.cross_entropy(z, target, reduction="none", return_stats=True)[1]
    torch.testing.assert_close(tuple(x[:, 0] for x in stats[:-1]), tuple(expected), equal_nan=True, **TOLERANCE)
    assert gradients[3].eq(0).all()


def test_normalizer_counts_for_each_example(generator: torch.Generator) -> None:
    targets, token_weights = torch.tensor([[0, 4], [-100, 1], [3, 3]]), torch.rand(3, 2, generator=generator).double()
    count = partial(fl.normalizer, weight=WEIGHT)
    got = vmap(lambda t, w: count(t, token_weight=w))(targets, token_weights)
    expected = [count(t, token_weight=w) for t, w in zip(targets, token_weights, strict=True)]
    torch.testing.assert_close(got, torch.stack(expected), **TOLERANCE)


@pytest.mark.parametrize("impl", ["cpu", "reference", None])
def test_an_implementation_that_was_named_gives_way_and_must_be_ready(
    impl: str | None, kernel_calls: Any, generator: torch.Generator
) -> None:
    z, target, _ = problem(4, 5, generator)
    expected = grad(lambda z: torch.nn.functional.cross_entropy(z, target))(z)
    torch.testing.assert_close(grad(lambda z: fl.cross_entropy(z, target, impl=impl))(z), expected, **TOLERANCE)
    assert not kernel_calls
    with pytest.raises(ValueError, match="impl must be one of"):
        grad(lambda z: fl.cross_entropy(z, target, impl="gpu"))(z)
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run"):
        grad(lambda z: fl.cross_entropy(z.cpu(), target, impl="cuda"))(z)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    z, target, _ = problem(4, 5, generator)
    z = z.to(dtype)
    leaf = z.clone().requires_grad_()
    for loss in (fl.cross_entropy, partial(fl.dsc_loss, level="class"), partial(fl.flex_loss, loss_fn=lambda s: s.q)):
        (expected,) = torch.autograd.grad(loss(leaf, target), leaf)
        got = grad(lambda z, loss=loss: loss(z, target))(z)
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected)
        (got,) = torch.autograd.grad(loss(leaf, target), leaf, torch.ones(2), is_grads_batched=True)
        torch.testing.assert_close(got, torch.stack([expected] * 2))


# What cannot be, says so


def test_values_are_checked_beneath_a_transform() -> None:
    z, targets = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 5]])
    with pytest.raises(IndexError, match="target 5 is out of range for 5 classes"):
        vmap(grad(fl.cross_entropy))(z, targets)
    with pytest.raises(IndexError, match="candidate 5 is out of range for 5 classes"):
        vmap(lambda z, c: fl.mixed_cross_entropy(z, targets[0], alpha=0.5, candidates=c))(z, targets)
    with pytest.raises(ValueError, match=r"gamma must be at least 0, got values from -1\.0 to 2\.0"):
        vmap(lambda z, g: fl.focal_loss(z, targets[0], gamma=g))(z, torch.tensor([2.0, -1.0]))
    with pytest.raises(ValueError, match=r"normalizer must be at least 0, got -1\.0"):
        vmap(lambda z, n: fl.cross_entropy(z, targets[0], normalizer=n))(z, torch.tensor([2.0, -1.0]))
    with pytest.raises(ValueError, match=r"temperature must be greater than 0, got 0\.0"):
        vmap(lambda z, t: fl.supcon_loss(z, targets[0], temperature=t))(z, torch.tensor([2.0, 0.0]))


REFUSED = "does not go together with function transforms"


@pytest.mark.parametrize(
    "loss",
    [fl.cross_entropy, partial(fl.dsc_loss, level="class"), partial(fl.flex_loss, loss_fn=lambda s: s.q)],
    ids=["rows", "sums", "flex"],
)
def test_an_in_place_gradient_is_refused(loss: Callable[..., Any], generator: torch.Generator) -> None:
    z, target, _ = problem(4, 5, generator)

    def in_place(z: Tensor) -> Tensor:
        return loss(z.expand(4, 5) * 1, target, inplace_backward=True)

    for transform in (grad(in_place), vmap(in_place)):
        with pytest.raises(RuntimeError, match=f"inplace_backward=True {REFUSED}"):
            transform(z)
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    result = loss(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match=f"inplace_backward=True {REFUSED}"):
        torch.autograd.grad(result, leaf, torch.ones(2).double(), is_grads_batched=True)
    assert torch.equal(logits.detach(), z)


def test_ranks_are_refused() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    z, target = torch.randn(4, 5), torch.arange(4)
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        shards = fl.VocabularyShards(dist.group.WORLD, [5])
        for group in (shards, dist.group.WORLD):
            with pytest.raises(RuntimeError, match=f"group {REFUSED}"):
                grad(lambda z, group=group: fl.cross_entropy(z, target, group=group))(z)
        with pytest.raises(RuntimeError, match=f"group {REFUSED}"):
            grad(lambda z: fl.supcon_loss(z, target // 2, group=dist.group.WORLD))(z)
        with pytest.raises(RuntimeError, match=f"group {REFUSED}"):
            grad(lambda h: fl.linear_cross_entropy(h, z, target, group=shards))(z)
        mesh = init_device_mesh("cpu", (1,))
        tensor = DTensor.from_local(z, mesh, [Replicate()])
        with pytest.raises(RuntimeError, match=f"a DTensor {REFUSED}"), forward_ad.dual_level():
            fl.cross_entropy(tensor, target)
        with pytest.raises(RuntimeError, match=REFUSED):
            grad(lambda z: fl.cross_entropy(z, target))(tensor)
    finally:
        dist.destroy_process_group()


@pytest.mark.compile
def test_a_compiled_transform(generator: torch.Generator) -> None:
    z, target, _ = problem(4, 5, generator)
    of_each = vmap(grad(lambda z, t: fl.focal_loss(z[None], t[None])))
    torch.compiler.reset()
    got = torch.compile(of_each, backend="aot_eager", fullgraph=True)(z, target)
    torch.testing.assert_close(got, of_each(z, target), **TOLERANCE)


@pytest.mark.parametrize("positives", ["out", "in"])
def test_a_memory_bank_beneath_a_transform(positives: str, generator: torch.Generator) -> None:
    """The anchors are left out of a contrast set that holds them, and views are rows."""
    features = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels, bank = torch.tensor([0, 1, 0, 2, 1, 2]), torch.randn(3, 4, generator=generator, dtype=torch.float64)
    own = {"contrast_labels": torch.cat([labels, torch.tensor([0, 1, 2])]), "positives": positives}
    index = torch.tensor([0, 1, 2, 3, 4, -1])

    def loss(x: Tensor, **options: Any) -> Tensor:
        return fl.supcon_loss(x, labels, contrast=torch.cat([x, bank]), **own, **options)

    for options in ({"contrast_includes_batch": True}, {"self_index": index}):
        leaf = features.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, **options), leaf)
        torch.testing.assert_close(torch.func.grad(lambda x, o=options: loss(x, **o))(features), expected)
        batch = torch.stack([features, 2 * features.flip(0)])
        got = torch.func.vmap(lambda x, o=options: loss(x, **o))(batch)
        torch.testing.assert_close(got, torch.stack([loss(x, **options) for x in batch]))
    views = features.view(3, 2, 4)
    rows = torch.func.grad(lambda x: fl.supcon_loss(x, torch.tensor([0, 1, 0]), reduction="sum"))(views)
    flat = features.clone().requires_grad_()
    fl.supcon_loss(flat, torch.tensor([0, 0, 1, 1, 0, 0]), reduction="sum").backward()
    torch.testing.assert_close(rows.flatten(0, 1), flat.grad)
