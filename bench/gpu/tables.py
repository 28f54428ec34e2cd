"""Row losses and linear forms beside their floors and their peers, forward and backward."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.tools.timing import distance

from .part import Part
from .timing import Clock

ROUNDS = 9
MIB = 2**20
HALF, FULL = torch.bfloat16, torch.float32

#: By dtype, of `distance`: the relative errors of loss and gradients, added. A peer that computes in bfloat16 itself is
#: given more, and its error is in the table.
ALLOWED = {HALF: 0.03, FULL: 1e-3}
PEER_ALLOWED = 0.2

Result = tuple[Tensor, ...]  # loss and gradients
Step = Callable[[], Any]


class Rows(NamedTuple):
    rows: int
    classes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.rows} × {self.classes} {str(self.dtype).removeprefix('torch.')}"


class Linear(NamedTuple):
    rows: int
    features: int
    classes: int

    def __str__(self) -> str:
        return " × ".join(map(str, self))


#: The most telling first.
ROW_CASES = (
    Rows(8192, 32000, HALF),
    Rows(8192, 128256, HALF),
    Rows(8192, 32000, FULL),
    Rows(512, 32000, HALF),
    Rows(8192, 50257, HALF),  # whose rows begin anywhere
    Rows(8192, 128256, FULL),
    Rows(512, 128256, HALF),
    Rows(8192, 262144, HALF),
)
LINEAR_CASES = (
    Linear(4096, 4096, 128256),
    Linear(4096, 512, 32000),
    Linear(1024, 4096, 128256),
    Linear(4096, 4096, 32000),
    Linear(16384, 1024, 32000),
    Linear(16384, 4096, 128256),
)
TINY_ROWS, TINY_LINEAR = (Rows(4, 300, HALF),), (Linear(4, 16, 300),)


class Candidate(NamedTuple):
    """`make` gives a step; what that gives is compared with `expected` before it is timed, if there is something."""

    make: Callable[[], Step]
    expected: Callable[[], Result] | None = None
    ours: bool = True
    replay: bool = True  # whether a graph can be made of it: not where the host reads


def contest(
    part: Part, clock: Clock, case: str, candidates: dict[str, Candidate], reset: Step, allowed: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each candidate's name and figures. All have their turn in each round, with a cold cache."""
    steps: dict[str, Step] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, candidate in candidates.items():
        if steps and part.late(f"{name}, {case}"):
            continue
        with part.attempt(f"{name}, {case}", candidate.ours):
            step = candidate.make()
            for _ in range(2):  # the first compiles
                result = None
                reset()
                clock.reset_memory()
                result = step()
                memory = clock.peak_memory() / MIB
            error = None
            if candidate.expected is not None:
                error = distance(_detached(result), _detached(candidate.expected()))  # type: ignore[arg-type]
                most = allowed if candidate.ours else PEER_ALLOWED
                if not error <= most:
                    raise AssertionError(f"it is wrong by {error:.1e} where {most:.0e} is allowed, and is not timed")
            steps[name], figures[name] = step, {"MiB": memory, "error": error}
    result = None
    clock.spin()
    times: dict[str, list[Any]] = {name: [] for name in steps}
    for turn in range(1 if part.rehearse else ROUNDS):
        if turn >= 3 and part.left < 0.2 * part.seconds:
            break
        for name, step in steps.items():
            times[name].append(clock.turn(step, reset))
    for name, step in steps.items():
        replayed = None
        if candidates[name].replay and part.left > 0:
            with part.attempt(f"graph of {name}, {case}", ours=False):
                replayed = clock.replayed([step], reset)
        cold, host = (median(column) for column in zip(*times[name], strict=True))
        yield name, {"cold ms": cold, "graph ms": replayed, "host µs": host, **figures[name]}


def _detached(result: Result) -> Result:
    return tuple(x.detach() for x in result)


def peer(module: str, name: str) -> Callable[..., Tensor]:
    """A function, or a module of such a class."""
    loss = getattr(importlib.import_module(module), name)
    return loss() if isinstance(loss, type) else loss


class RowProblem:
    """The floor is 1.5 × the copy of the logits: 3 bytes for each byte of them. "cuda" needs 2 for a mean.

    Logits that a layer has just computed: every turn writes them anew, since some losses take their memory.
    """

    def __init__(self, case: Rows, device: torch.device) -> None:
        self.original = torch.randn(case.rows, case.classes, device=device, dtype=case.dtype)
        # Computed logits: a leaf's memory is not for gradients to take.
        self.logits = torch.zeros_like(self.original).add_(self.original.new_zeros((), requires_grad=True))
        self.target = torch.randint(case.classes, (case.rows,), device=device)
        self.other = torch.empty_like(self.original)
        self.right = self.expected(F.cross_entropy)

    def reset(self) -> None:
        with torch.no_grad():
            self.logits.copy_(self.original)

    def floor(self) -> object:
        return self.other.copy_(self.original)

    def of(self, loss: Callable[..., Tensor], **options: Any) -> Step:
        def step() -> Result:
            value = loss(self.logits, self.target, **options)
            return value, torch.autograd.grad(value, self.logits)[0]

        return step

    def expected(self, loss: Callable[..., Tensor], **options: Any) -> Callable[[], Result]:
        """In float32, computed at the first call."""

        def result() -> Result:
            z = self.original.float().requires_grad_()
            value = loss(z, self.target, **options)
            return value.detach(), torch.autograd.grad(value, z)[0]

        return cache(result)

    def ours(self, every: bool) -> dict[str, Candidate]:
        """Candidates that the kernels are compiled for beforehand, too; `every`: not cross-entropy alone."""
        losses = {"cross_entropy": (fl.cross_entropy, self.right)}
        losses |= {name: (loss, self.expected(loss, impl="reference")) for name, loss in OTHERS.items() if every}
        found: dict[str, Candidate] = {}
        for name, (loss, expected) in losses.items():
            for impl in ("triton", "cuda"):
                found[f"{name} {impl}"] = Candidate(partial(self.of, loss, impl=impl), expected)
        for impl in ("triton", "cuda"):
            make = partial(self.of, fl.cross_entropy, impl=impl, inplace_backward=True)
            found[f"cross_entropy {impl} in place"] = Candidate(make, self.right)
        return found

    def peers(self) -> dict[str, Candidate]:
        liger = ("liger_kernel.transformers", "LigerCrossEntropyLoss")  # which reads on the host, and works in place
        found = {
            "F.cross_entropy": Candidate(lambda: self.of(F.cross_entropy)),
            "liger-kernel": Candidate(lambda: self.of(peer(*liger)), replay=False),
            "quack-kernels": Candidate(lambda: self.of(peer("quack.cross_entropy", "cross_entropy"), reduction="mean")),
        }
        return {name: candidate._replace(expected=self.right, ours=False) for name, candidate in found.items()}


OTHERS: dict[str, Callable[..., Tensor]] = {
    "focal": fl.focal_loss,
    "mixed top 1": partial(fl.mixed_cross_entropy, alpha=0.25),
    "mixed top 2": partial(fl.mixed_cross_entropy, alpha=0.25, top_k=2),
    "dsc": fl.dsc_loss,
    "dsc of classes": partial(fl.dsc_loss, level="class"),
}


class LinearProblem:
    """The floor: the three matrix products of the shapes."""

    def __init__(self, case: Linear, device: torch.device) -> None:
        options: dict[str, Any] = {"device": device, "dtype": HALF}
        self.hidden = torch.randn(case.rows, case.features, **options).requires_grad_()
        self.weight = (torch.randn(case.classes, case.features, **options) / case.features**0.5).requires_grad_()
        self.target = torch.randint(case.classes, (case.rows,), device=device)
        self.expected = cache(self.of(eager))

    def reset(self) -> None:
        pass

    def floor(self) -> None:
        h, w = self.hidden.detach(), self.weight.detach()
        logits = h @ w.t()
        logits @ w
        logits.t() @ h

    def of(self, loss: Callable[..., Tensor], swapped: bool = False, **options: Any) -> Step:
        def step() -> Result:
            inputs = (self.weight, self.hidden) if swapped else (self.hidden, self.weight)
            value = loss(*inputs, self.target, **options)
            return value, *torch.autograd.grad(value, (self.hidden, self.weight))

        return step

    def evaluation(self, impl: str) -> Step:
        def step() -> Result:
            with torch.no_grad():
                return (fl.linear_cross_entropy(self.hidden, self.weight, self.target, impl=impl),)

        return step

    def ours(self) -> dict[str, Candidate]:
        budgets = {"": None, " 128 MiB": 128 * MIB, " 1 GiB": 1024 * MIB, " whole": 2**40}
        makes = {
            f"linear triton{name}": partial(self.of, fl.linear_cross_entropy, impl="triton", budget=budget)
            for name, budget in budgets.items()
        }
        makes["linear cuda"] = partial(self.of, fl.linear_cross_entropy, impl="cuda")
        makes["linear fused"] = partial(self.of, fl.linear_cross_entropy, impl="triton_fused")
        found = {name: Candidate(make, self.expected) for name, make in makes.items()}
        found["linear focal triton"] = Candidate(partial(self.of, fl.linear_focal_loss, impl="triton"))
        for name, impl in (("triton", "triton"), ("fused", "triton_fused")):
            found[f"evaluation {name}"] = Candidate(partial(self.evaluation, impl), lambda: self.expected()[:1])
        return found

    def peers(self) -> dict[str, Candidate]:
        liger = ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
        names = {
            "F.linear_cross_entropy": ("torch.nn.functional", "linear_cross_entropy"),
            "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy"),
            "quack-kernels": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
        }
        found = {
            "eager": Candidate(lambda: self.of(eager)),
            "liger-kernel": Candidate(lambda: self.of(peer(*liger), True)),
        }
        found |= {name: Candidate(lambda where=where: self.of(peer(*where))) for name, where in names.items()}
        return {name: c._replace(expected=self.expected, ours=False, replay=False) for name, c in found.items()}


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _run(
    part: Part, clock: Clock, case: Rows | Linear, problem: Any, ours: dict[str, Candidate], allowed: float
) -> None:
    """Write a row for each candidate."""
    candidates = {"floor": Candidate(lambda: problem.floor)} | ours | problem.peers()
    for impl, word in (("triton", "triton"), ("cuda", "cuda"), ("triton_fused", "fused")):
        reason = backends.unavailable(impl, part.device)  # which is no failure
        for name in [name for name in candidates if reason is not None and word in name.split()]:
            del candidates[name]
            part.left_out(f"{name}, {case}", str(reason))
    is_rows, floor = isinstance(case, Rows), 0.0
    for name, found in contest(part, clock, str(case), candidates, problem.reset, allowed):
        best = found["graph ms"] or found["cold ms"]
        if name == "floor":  # a copy, two thirds of a row loss's floor, or the products
            floor = best = 1.5 * best if is_rows else best
        found["/ floor"] = best / floor
        if is_rows:
            found["GB/s"] = 3 * problem.original.nbytes / best / 1e6
        part.row(case=str(case), candidate=name, **found)


def rows(part: Part) -> None:
    seen: set[torch.dtype] = set()

    def run(clock: Clock, case: Rows) -> None:
        problem = RowProblem(case, part.device)
        _run(part, clock, case, problem, problem.ours(case.dtype not in seen), ALLOWED[case.dtype])
        seen.add(case.dtype)

    _walk(part, TINY_ROWS if part.rehearse else ROW_CASES, run)


def linear(part: Part) -> None:
    def run(clock: Clock, case: Linear) -> None:
        problem = LinearProblem(case, part.device)
        _run(part, clock, case, problem, problem.ours(), ALLOWED[HALF])

    _walk(part, TINY_LINEAR if part.rehearse else LINEAR_CASES, run)


def _walk(part: Part, cases: Sequence[Any], run: Callable[[Clock, Any], None]) -> None:
    clock = Clock(part.device)
    for case in cases:
        if part.late(str(case)):
            continue
        with part.attempt(str(case)):
            run(clock, case)
        clock.empty_memory()


def compiled(part: Part) -> None:
    """torch.compile for a shape of each kind, made for that shape alone."""
    clock = Clock(part.device)
    how: dict[str, Any] = {"dynamic": False, "backend": "aot_eager" if part.rehearse else "inductor"}
    row_case = (TINY_ROWS if part.rehearse else ROW_CASES)[0]
    linear_case = TINY_LINEAR[0] if part.rehearse else Linear(4096, 4096, 32000)
    makes = {
        row_case: lambda: RowProblem(row_case, part.device).of(torch.compile(F.cross_entropy, **how)),
        linear_case: lambda: LinearProblem(linear_case, part.device).of(torch.compile(eager, **how)),
    }
    for case, make in makes.items():
        if part.late(str(case)):
            continue
        torch._dynamo.reset()
        with part.attempt(str(case), ours=False):
            candidates = {"torch.compile": Candidate(make, ours=False)}
            for name, found in contest(part, clock, str(case), candidates, lambda: None, PEER_ALLOWED):
                part.row(case=str(case), candidate=name, **found)
