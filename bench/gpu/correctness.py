"""Every loss by every implementation against the reference in float64 on the CPU, and traps that a GPU may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.losses._registry import EXAMPLES, Example
from fusedloss.losses.distillation import DIVERGENCES, Divergence
from fusedloss.tools import selfcheck

from .part import Part

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Of `_error`. The products of linear forms are in the dtype's own precision.
ROWS_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LINEAR_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}

Loss = Callable[..., Tensor]
_Of = TypeVar("_Of")


def triton(part: Part) -> None:
    _rows(part, "triton")
    _second_rows(part, "triton")
    _linear(part, "triton")


def cuda(part: Part) -> None:
    _rows(part, "cuda")
    _second_rows(part, "cuda")
    _linear(part, "cuda")


def fused(part: Part) -> None:
    _linear(part, "triton_fused")


def _ready(part: Part, impl: str) -> bool:
    reason = backends.unavailable(impl, part.device)
    if reason is not None:
        part.left_out("all of it", reason)
    return reason is None


def _rows(part: Part, impl: str) -> None:
    """By the rule of `python -m fusedloss check`: twice the error of the formula in PyTorch, and a few ulps."""
    if not _ready(part, impl):
        return
    shapes = ((3, 130),) if part.rehearse else selfcheck.QUICK_SHAPES
    problems = [selfcheck._problem(*shape) for shape in shapes]
    with (
        patch.object(selfcheck, "ready", lambda: [impl]),
        patch.object(selfcheck, "_device", lambda name: torch.device("cpu") if name == "reference" else part.device),
    ):
        for example, dtype in _in_each_dtype(part, EXAMPLES):
            what = f"{example} {impl} {str(dtype)[6:]}"
            if part.late(what):
                continue
            with part.attempt(what):
                found = [selfcheck._errors(example, p._replace(logits=p.logits.to(dtype)))[impl] for p in problems]
                _row(part, what, [pair for pairs in found for pair in pairs])


def _in_each_dtype(part: Part, examples: Iterable[_Of]) -> Iterator[tuple[_Of, torch.dtype]]:
    """Yield every example with every dtype; a rehearsal takes the dtypes in turn."""
    for i, example in enumerate(examples):
        for dtype in DTYPES[i % 4 :][:1] if part.rehearse else DTYPES:
            yield example, dtype


def _row(part: Part, what: str, errors: list[tuple[selfcheck.Error, selfcheck.Error]]) -> None:
    loss, gradient = (max(column, key=lambda error: error.severity) for column in zip(*errors, strict=True))
    figures = {"loss": loss.found, "allowed": loss.allowed, "gradient": gradient.found, "allowed ": gradient.allowed}
    part.row(case=what, **figures)
    if not (loss.passed and gradient.passed):
        figures_of = (
            f"{name} {e.found:.1e} of {e.allowed:.1e}" for name, e in (("loss", loss), ("gradient", gradient))
        )
        part.failed(what, f"errors: {', '.join(figures_of)}")


def _second_rows(part: Part, impl: str) -> None:
    """Of a teacher's logits and of soft targets, on rows that are split; of a backend that has such losses."""
    if not _ready(part, impl) or not backends.BACKENDS[impl].epilogues.pairs:
        return
    rows, classes = (3, 130) if part.rehearse else (20, 9000)
    generator = torch.Generator().manual_seed(rows)
    logits, second = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
    target = torch.randint(classes, (rows,), generator=generator)

    def soft_targets(z: Tensor, y: Tensor, **options: Any) -> Tensor:
        return fl.cross_entropy(z, y.softmax(-1), **options)

    def divergence(name: Divergence) -> Loss:
        own: dict[str, Any] = {"divergence": name, "temperature": 2.0, "hard_weight": 0.5}
        return lambda z, y, **options: fl.distillation_loss(z, y, target=target.to(z.device), **own, **options)

    losses: dict[str, Loss] = {"soft targets": soft_targets} | {name: divergence(name) for name in DIVERGENCES}
    for name, dtype in _in_each_dtype(part, losses):
        what = f"{name} {impl} {str(dtype)[6:]}"
        if part.late(what):
            continue
        with part.attempt(what):
            z, y = logits.to(dtype), second.to(dtype)
            expected = _step(partial(losses[name], impl="reference"), z.double(), y.double())
            found = _step(partial(losses[name], impl=impl), z.to(part.device), y.to(part.device))
            _require(part, what, found, expected, ROWS_ALLOWED[dtype])


def _linear(part: Part, impl: str) -> None:
    """Hidden states, weight and bias, over several chunks, a number of rows and classes that no tile divides."""
    if not _ready(part, impl):
        return
    rows, features, classes = (5, 24, 130) if part.rehearse else (150, 72, 2100)
    generator = torch.Generator().manual_seed(rows)
    sources = [torch.randn(s, generator=generator) / 3 for s in ((rows, features), (classes, features), (classes,))]
    target = torch.randint(classes, (rows,), generator=generator)
    target[::5] = -100
    # Losses over the rows, and functions over the classes, have no linear form on kernels.
    some = [e for e in EXAMPLES if not e.over_rows and e.arguments.get("over") != "classes"]
    examples = [e for e in some if hasattr(fl, f"linear_{e.loss.__name__}")]
    for example, dtype in _in_each_dtype(part, examples):
        what = f"linear {example} {impl} {str(dtype)[6:]}"
        if part.late(what):
            continue
        with part.attempt(what):
            own = [x.to(dtype) for x in sources]
            expected = _linear_step(example, [x.double() for x in own], target, "reference")
            found = _linear_step(example, [x.to(part.device) for x in own], target.to(part.device), impl)
            _require(part, what, found, expected, LINEAR_ALLOWED[dtype])


def _linear_step(example: Example, sources: list[Tensor], target: Tensor, impl: str) -> tuple[Tensor, ...]:
    hidden, weight, bias = inputs = [x.requires_grad_() for x in sources]
    loss = getattr(fl, f"linear_{example.loss.__name__}")(
        hidden, weight, target, **example.arguments, linear_bias=bias, softcap=8.0, budget=2**17, impl=impl
    )
    return loss.detach(), *torch.autograd.grad(loss / 3, inputs)


def _error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The relative errors of loss and gradients, added, each in the sum of absolute values; nothing is equal to 0."""
    error = 0.0
    for x, right in zip(found, expected, strict=True):
        difference = float((x.cpu().double() - right).abs().sum())
        error += difference / max(float(right.abs().sum()), 1e-300) if difference != 0 else 0.0
    return error


def _require(part: Part, what: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], allowed: float) -> None:
    error = _error(found, expected)
    part.row(case=what, error=error, allowed=allowed)
    if not error <= allowed:
        part.failed(what, f"error {error:.1e} where {allowed:.0e} is allowed")


# --- traps ---


def traps(part: Part) -> None:
    """Each a line: what a GPU may do that an interpreter and a host do not."""
    for impl in ("triton", "cuda"):
        reason = backends.unavailable(impl, part.device)
        if reason is not None:
            part.left_out(f"traps of {impl}", reason)
            continue
        cross_entropy = partial(fl.cross_entropy, impl=impl)
        for trap in (_repeated, _split, _odd_rows, _sizes, _candidates, _in_place, _ignored, _not_stalled, _captured):
            _spring(part, f"{trap.__name__.strip('_').replace('_', ' ')} {impl}", trap, cross_entropy)
    for precision in ("tf32", "ieee"):
        what = f"triton_fused after fp32_precision = {precision!r}"
        _spring(part, what, partial(_precision, precision=precision), None)


def _spring(part: Part, what: str, trap: Callable[[Part, Any], None], loss: Loss | None) -> None:
    if part.late(what):
        return
    with part.attempt(what):
        begin = part.left
        trap(part, loss)
        part.row(trap=what, found="ok", s=begin - part.left)


def _problem(part: Part, rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(rows, classes, device=part.device, dtype=torch.float32)
    return logits.to(dtype), torch.randint(classes, (rows,), device=part.device)


def _step(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Losses of the rows and their gradient."""
    z = logits.detach().requires_grad_()
    rows = loss(z, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(rows.sum() / 3, z)
    return rows.detach(), gradient


def _equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, x, y in zip(("losses", "gradients"), found, expected, strict=True):
        differ = int((x != y).sum())
        assert differ == 0, f"{differ} of {x.numel()} {name} differ"


def _near(loss: Loss, logits: Tensor, target: Tensor, **options: Any) -> None:
    """The reference in float64 on the CPU."""
    found = _step(loss, logits, target, **options)
    options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    expected = _step(partial(loss, impl="reference"), logits.cpu().double(), target.cpu(), **options)
    error = _error(found, expected)
    allowed = {torch.float64: 1e-10, torch.float32: 1e-4}.get(logits.dtype, 1e-2)
    assert error <= allowed, f"{tuple(logits.shape)} {logits.dtype}: error {error:.1e} where {allowed:.0e} is allowed"


def _repeated(part: Part, loss: Loss) -> None:
    """A race would move a bit once in a while."""
    problem = _problem(part, *(3, 300) if part.rehearse else (64, 32000))
    first = _step(loss, *problem)
    for _ in range(3 if part.rehearse else 200):
        _equal(_step(loss, *problem), first)


def _split(part: Part, loss: Loss) -> None:
    """Few rows are split over programs, many are not: the same bits."""
    logits, target = _problem(part, *(6, 9000) if part.rehearse else (4096, 32000))
    whole = _step(loss, logits, target)
    few = slice(2) if part.rehearse else slice(8)
    _equal(_step(loss, logits[few], target[few]), (whole[0][few], whole[1][few]))


def _odd_rows(part: Part, loss: Loss) -> None:
    """Rows that begin where no load of 16 bytes can."""
    for dtype in (torch.bfloat16, torch.float32):
        logits, target = _problem(part, 5, 200 if part.rehearse else 50257, dtype)
        _near(loss, logits[:, 1:], (target - 1).clamp(min=0))
        _near(loss, logits, target)


def _sizes(part: Part, loss: Loss) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for classes in (1, 2, 33) if part.rehearse else (1, 2, 33, 1025, 262144):
        for dtype in dtypes:
            _near(loss, *_problem(part, 1, classes, dtype))
    for dtype in dtypes:
        _near(loss, *_problem(part, 0, 33, dtype))


def _candidates(part: Part, loss: Loss) -> None:
    rows, classes, count = (3, 300, 4) if part.rehearse else (64, 32000, 64)
    logits, target = _problem(part, rows, classes)
    few = torch.stack([torch.randperm(classes)[:count] for _ in range(rows)]).to(part.device)
    mixed = partial(fl.mixed_cross_entropy, alpha=0.25, impl=loss.keywords["impl"])  # type: ignore[attr-defined]
    for candidates in (few[:, :1], few):
        _near(mixed, logits, target, candidates=candidates)


def _in_place(part: Part, loss: Loss) -> None:
    logits, target = _problem(part, 5, 200 if part.rehearse else 32001)
    for reduction in ("mean", "none"):
        z = logits.clone().requires_grad_()
        computed = z * 1.0
        place = computed.data_ptr()
        (expected,) = torch.autograd.grad(loss(z, target, reduction=reduction).sum(), z)
        value = loss(computed, target, reduction=reduction, inplace_backward=True).sum()
        (found,) = torch.autograd.grad(value, computed)
        assert found.data_ptr() == place, f"{reduction}: the gradient is somewhere else"
        assert torch.equal(found, expected), f"{reduction}: other bits in place"


def _ignored(part: Part, loss: Loss) -> None:
    logits, target = _problem(part, 7, 200 if part.rehearse else 5001)
    target[::2] = -100
    logits[::2] = float("nan")
    _near(loss, logits, target)
    if not part.rehearse:  # a CPU raises
        target[1] = 5001
        rows, gradient = _step(loss, logits, target)
        assert rows[1].isnan() and gradient[1].isnan().all(), "a target out of range must make its row NaN"
        assert not rows[3].isnan() and not gradient[3].isnan().any(), "it must not touch another row"


def _not_stalled(part: Part, loss: Loss) -> None:
    logits, target = _problem(part, 5, 200 if part.rehearse else 32000)
    z = logits.requires_grad_()
    torch.autograd.grad(loss(z, target) / 3, z)  # compiles
    if part.rehearse:
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(loss(z, target) / 3, z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(part: Part, loss: Loss) -> None:
    """A graph of forward and backward, replayed with other inputs."""
    logits, target = _problem(part, 9, 200 if part.rehearse else 32000)
    z = logits.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(z, target)
        return value, torch.autograd.grad(value / 3, z)[0]

    found = step()  # compiles
    if not part.rehearse:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    for _ in range(2):
        logits, other = _problem(part, *logits.shape)
        with torch.no_grad():
            z.copy_(logits)
            target.copy_(other)
        if part.rehearse:
            found = step()
        else:
            graph.replay()
        _equal((found[0][None], found[1]), (step()[0][None], step()[1]))


def _precision(part: Part, _: Any, precision: str) -> None:
    """torch's new way to allow TF32 must not be asked about in the old way."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        hidden, weight = (torch.randn(n, 24, device=part.device, requires_grad=True) for n in (5, 130))
        target = torch.randint(130, (5,), device=part.device)
        loss = fl.linear_cross_entropy(hidden, weight, target, impl="triton_fused")
        loss.backward()
        plain = torch.nn.functional.cross_entropy((hidden.double() @ weight.double().t()), target)
        found, right = float(loss.detach()), float(plain.detach())
        assert abs(found - right) < 1e-2, f"{found} where {right} is right"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
