"""What the benchmarks of the linear forms share: the cases, the peers, and how a form is measured beside them.

Run as a program, with the arguments of `memory`, it prints the memory of one candidate.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from memory import peak_memory
from suite import declared
from torch import Tensor

import fusedloss as fl
from fusedloss.losses._registry import EXAMPLES, Example
from fusedloss.tools import peers, timing

Shape = tuple[int, int, int]  # rows, features, classes
Loss = Callable[..., Tensor]  # of hidden states (N, D) and weight (V, D), or of whatever is differentiated

MAIN: Shape = (512, 512, 32000)

#: For what is timed beside cross-entropy.
LARGE: Shape = (2048, 512, 32768)

#: The loss of this package that is a yardstick for others.
YARDSTICK = "linear_cross_entropy"


def _log_prob_and_entropy(input: Tensor, target: Tensor, entropy: bool) -> Tensor:
    log_p = input.log_softmax(-1)
    return log_p.gather(-1, target[:, None])[:, 0] - (log_p.exp() * log_p).sum(-1)


_POLY1 = declared(fl.flex_loss)

#: What the registry has no example of. Of log-probabilities and entropies, the mean of their sum is the loss.
BESIDE = [
    Example(fl.log_probs, _log_prob_and_entropy, {"entropy": True}),
    replace(_POLY1, arguments={**_POLY1.arguments, "per_chunk": True}),
]
KNOWN = [*EXAMPLES, *BESIDE]

#: Candidates whose first call takes far longer than those after it.
COMPILED = ("compiled", "cut-cross-entropy")

#: Rows at a time where the formula is computed to compare with: what it stores is many times the logits.
FORMULA_ROWS = 256


class Case(NamedTuple):
    """An output layer to measure on, and for how long."""

    rows: int
    features: int
    classes: int
    dtype: torch.dtype
    rounds: int
    seconds: float  # after which a candidate has no more turns

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}x{self.classes}-{str(self.dtype).removeprefix('torch.')}"


class Extent(NamedTuple):
    """How much to measure."""

    shapes: dict[Shape, tuple[torch.dtype, ...]]
    variants: tuple[torch.dtype, ...]
    rounds: int
    seconds: float


FLOAT = (torch.float32,)
BOTH = (torch.float32, torch.bfloat16)

QUICK = Extent({MAIN: FLOAT}, variants=(), rounds=3, seconds=5)
# Three sizes of N and three of V.
DEFAULT = Extent(
    {
        MAIN: BOTH,
        (128, 512, 32000): FLOAT,
        (2048, 512, 32000): BOTH,
        (512, 512, 8000): FLOAT,
        (512, 512, 128256): FLOAT,
    },
    variants=FLOAT,
    rounds=3,
    seconds=5,
)
GRID = Extent(
    {(n, d, v): BOTH for d in (512, 1024) for v in (32000, 128256) for n in (512, 4096)},
    variants=BOTH,
    rounds=5,
    seconds=60,
)


def cases(extent: Extent) -> list[Case]:
    wanted = [(shape, dtype) for shape, dtypes in extent.shapes.items() for dtype in dtypes]
    return [Case(*shape, dtype, extent.rounds, extent.seconds) for shape, dtype in wanted]


def variant_cases(extent: Extent) -> list[Case]:
    """For the other losses: one shape."""
    return [Case(*MAIN, dtype, extent.rounds, extent.seconds) for dtype in extent.variants]


def large_cases(extent: Extent) -> list[Case]:
    """For what is timed beside cross-entropy: one shape."""
    return [Case(*LARGE, dtype, extent.rounds, extent.seconds) for dtype in (extent.variants and BOTH)]


def data(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets; the logits have variance 1."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.rows, case.features, generator=generator).to(case.dtype)
    weight = torch.randn(case.classes, case.features, generator=generator).div_(case.features**0.5).to(case.dtype)
    return hidden, weight, torch.randint(case.classes, (case.rows,), generator=generator)


def candidates(example: Example, target: Tensor) -> dict[str, Loss]:
    """The mean loss by each way to have it. One that is not installed raises ImportError when called."""

    if example not in BESIDE:
        return peers.linear_candidates(example, target)

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        result = getattr(fl, f"linear_{example.loss.__name__}")(hidden, weight, target, **example.arguments)
        return torch.add(*result).mean() if isinstance(result, fl.LogProbs) else result

    of_rows = "none" if example.loss is fl.log_probs else "mean"
    return {
        "fused": fused,
        "eager": partial(peers.of_layer_eager, example=example, target=target),
        YARDSTICK: lambda *x: fl.linear_cross_entropy(*x, target, reduction=of_rows).mean(),
    }


def step(loss: Loss, *sources: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients, as in training."""
    leaves = [x.detach().requires_grad_() for x in sources]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def expected(example: Example, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Mean loss and gradients by the formula in float32, a few rows at a time."""

    def part(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return example.formula(F.linear(h, w), t, **example.arguments).sum() / len(target)

    weight = weight.float()
    parts = [
        step(partial(part, t=t), h, weight)
        for h, t in zip(hidden.float().split(FORMULA_ROWS), target.split(FORMULA_ROWS), strict=True)
    ]
    losses, by_hidden, by_weight = zip(*parts, strict=True)
    return sum(losses, torch.zeros(())), torch.cat(by_hidden), sum(by_weight, torch.zeros(()))


class Contest:
    """The candidates' turns, one after the other, and their seconds."""

    def __init__(self, case: Any, steps: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
        self.case = case
        self.steps = steps
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}

    def first(self, name: str) -> tuple[Tensor, ...]:
        """The results of a run, to be checked. It is not timed, but where it takes so long that there is no other."""
        start = perf_counter()
        result = self.steps[name]()
        seconds = perf_counter() - start
        if seconds > self.case.seconds and name not in COMPILED:
            self.seconds[name].append(seconds)
        return result

    def turn(self, name: str) -> None:
        """Forward and backward, timed; the results are freed after the clock stops."""
        start = perf_counter()
        result = self.steps[name]()
        self.seconds[name].append(perf_counter() - start)
        del result

    def has_turns(self, name: str) -> bool:
        """Every candidate has one, and then as many as fit into the time."""
        past = self.seconds[name]
        return not past or sum(past) + past[-1] <= self.case.seconds

    def others(self, but: str) -> None:
        """The turns of all others in a round, each after an untimed run that makes its memory warm."""
        for name in self.steps:
            if name != but and self.has_turns(name):
                self.steps[name]()
                self.turn(name)
        self.steps[but]()

    def medians(self) -> dict[str, float]:
        return {name: median(seconds) for name, seconds in self.seconds.items()}


def measure_pair(benchmark: Any, case: Case, formula: Callable[[Tensor, Tensor], Tensor], reduction: str) -> None:
    """Times linear_distillation_loss in turn with its four matrix products, and with the formula on all logits.

    With the reduction "none" they are six: the logits of both models are made for the loss and for the gradient.
    """
    hidden, weight, _ = data(case)
    teacher = [x.detach().roll(1, 0).contiguous() for x in (hidden, weight)]

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return formula(F.linear(hidden, weight), F.linear(*teacher).to(hidden.dtype)).mean()

    def exact() -> tuple[Tensor, ...]:
        return step(eager, *[x.detach().float() for x in (hidden, weight)])

    def fused(*student: Tensor) -> Tensor:
        return fl.linear_distillation_loss(*student, *teacher, reduction=reduction).mean()

    def products() -> tuple[Tensor, ...]:
        made = [torch.mm(teacher[0], teacher[1].t()), *peers.layer_products(hidden, weight)]
        if reduction == "none":
            made += [torch.mm(x, w.t()) for x, w in ((hidden, weight), teacher)]
        return tuple(made)

    ways = {"fused": fused, "eager": eager}
    label = "linear_distillation_loss(" + ("" if reduction == "mean" else f"reduction={reduction!r}") + ")"
    compare(benchmark, case, label, (hidden, weight), ways, products, exact, lambda name: None)
    benchmark.extra_info["classes"] = case.classes


def measure(benchmark: Any, case: Case, example: Example) -> None:
    """Times a linear form in turn with the three matrix products and with its peers, forward and backward."""
    hidden, weight, target = data(case)
    compare(
        benchmark,
        case,
        f"linear_{example}",
        (hidden, weight),
        candidates(example, target),
        partial(peers.layer_products, hidden, weight),
        partial(expected, example, hidden, weight, target),
        partial(memory_in_process, example, case=case),
    )
    benchmark.extra_info["classes"] = case.classes


def compare(
    benchmark: Any,
    case: Any,
    label: str,
    sources: tuple[Tensor, ...],
    ways: dict[str, Loss],
    products: Callable[[], tuple[Tensor, ...]],
    expected: Callable[[], tuple[Tensor, ...]],
    memory_of: Callable[[str], float | None],
) -> None:
    """Times losses of the sources, one of them the fused one, in turn with the products that are the floor.

    pytest-benchmark times the fused one; the others have their turns in the setup of each of its rounds. Memory comes
    first, in a process for each candidate: one that fails there is not timed, and the report says why.

    Raises WrongResult, and so fails, where a candidate's loss or gradients are not those expected.
    """
    memory: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    for name in ways:
        try:
            memory[name] = memory_of(name)
        except ChildFailed as error:
            failed[name] = str(error)
    if "fused" in failed:
        raise RuntimeError(f"{label}, fused, on {case}: {failed['fused']}")

    running = {name: partial(step, way, *sources) for name, way in ways.items() if name not in failed}
    contest = Contest(case, {"products": products, **running})
    right = expected()
    for name in running:
        first = contest.first(name)
        if name != YARDSTICK:
            timing.require(f"{label}, {name},", first, right)
    del right

    benchmark.group = label
    benchmark.pedantic(
        contest.turn, args=("fused",), setup=partial(contest.others, but="fused"), rounds=case.rounds
    )  # fmt: skip
    seconds = contest.medians()
    benchmark.extra_info.update(
        loss=label,
        rows=case.rows,
        features=case.features,
        dtype=str(case.dtype).removeprefix("torch."),
        floor=seconds.pop("products"),
        seconds=seconds,
        turns={name: len(contest.seconds[name]) for name in seconds},
        memory=memory,
        failed=failed,
    )


class ChildFailed(Exception):
    """A candidate did not get through a step; the message is its error."""


def memory_in_process(example: Example, name: str, case: Case) -> float | None:
    """Bytes at the peak of a step beyond its inputs, in a process of its own; None where the kernel does not tell."""
    arguments = (KNOWN.index(example), name, *case[:3], str(case.dtype).removeprefix("torch."))
    return child(Path(__file__), *arguments)


def child(script: Path, *arguments: object) -> float | None:
    """The number that a script prints as JSON."""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode < 0:
        raise ChildFailed(f"ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise ChildFailed(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def memory(example: Example, name: str, case: Case) -> int | None:
    hidden, weight, target = data(case)
    # What comes with a first call: threads, and code that is compiled for this shape.
    if name in COMPILED:
        way = candidates(example, target)[name]
        step(way, hidden, weight)
    else:
        step(candidates(example, target[:8])[name], hidden[:8], weight)
        way = candidates(example, target)[name]
    return peak_memory(partial(step, way, hidden, weight))


if __name__ == "__main__":
    index, name, *sizes, dtype = sys.argv[1:]
    case = Case(*map(int, sizes), getattr(torch, dtype), rounds=1, seconds=0)
    print(json.dumps(memory(KNOWN[int(index)], name, case)))
