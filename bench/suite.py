"""What the benchmarks share: the cases, the peers, and how a loss is measured beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from memory import peak_memory

from fusedloss.losses._registry import EXAMPLES, Example
from fusedloss.tools import timing

MAIN = (1024, 32768)

MAX_ROUNDS = 200

#: Logits of fewer bytes are so small that a step's memory is lost among what else comes and goes.
LEAST_MEASURED = 2**24


class Case(NamedTuple):
    """Logits to measure on, and for how long."""

    rows: int
    classes: int
    dtype: torch.dtype
    seconds: float
    rounds: int  # at least

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}-{str(self.dtype).removeprefix('torch.')}"


class Extent(NamedTuple):
    """How much to measure."""

    shapes: dict[tuple[int, int], tuple[torch.dtype, ...]]
    variants: tuple[torch.dtype, ...]
    growth: tuple[tuple[int, int], ...]
    seconds: float
    rounds: int


FLOAT = (torch.float32,)
HALF = (torch.bfloat16,)
BOTH = FLOAT + HALF

# With MAIN, three sizes of N and three of V.
GROWTH = ((256, 32768), (4096, 32768), (1024, 8192), (1024, 131072))

QUICK = Extent({(4096, 9): FLOAT, MAIN: FLOAT}, variants=(), growth=(), seconds=1, rounds=3)
DEFAULT = Extent(
    {(4096, 9): BOTH, MAIN: BOTH, (512, 131072): BOTH, (512, 262144): HALF},
    variants=FLOAT,
    growth=GROWTH,
    seconds=2,
    rounds=5,
)
# From the tags of named entities through translation to the largest vocabularies.
FULL = Extent(
    {(4096, 9): BOTH, (4096, 32000): BOTH, MAIN: BOTH, (512, 131072): BOTH, (512, 262144): BOTH},
    variants=BOTH,
    growth=GROWTH,
    seconds=10,
    rounds=7,
)


def cases(extent: Extent) -> list[Case]:
    wanted = [(shape, dtype) for shape, dtypes in extent.shapes.items() for dtype in dtypes]
    return [Case(*shape, dtype, extent.seconds, extent.rounds) for shape, dtype in wanted]


def variant_cases(extent: Extent) -> list[Case]:
    """For other arguments of a loss: one shape."""
    return [Case(*MAIN, dtype, extent.seconds, extent.rounds) for dtype in extent.variants]


def both_cases(extent: Extent) -> list[Case]:
    """For other arguments whose time depends on the dtype."""
    return variant_cases(extent._replace(variants=extent.variants and BOTH))


def growth_cases(extent: Extent) -> list[Case]:
    """For the growth of time and memory with each size: one loss."""
    return [Case(*shape, torch.float32, extent.seconds, extent.rounds) for shape in extent.growth]


def declared(loss: Callable[..., Any], **arguments: Any) -> Example:
    """The first example that the loss declares with these among its arguments."""
    return next(e for e in EXAMPLES if e.loss is loss and arguments.items() <= e.arguments.items())


def measure(
    benchmark: Any,
    case: Case,
    example: Example,
    same: dict[str, Any] | None = None,
    second: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Times a loss, in place too, in turn with the copy of its logits and with its peers.

    pytest-benchmark times the fused loss with a fresh gradient, forward and backward; all the others have their turns
    in the setup of each of its rounds, and their medians go into the extra information. `same`: the arguments with
    which F.cross_entropy does the same job; without them it is there for a yardstick. `second` makes a second row of
    the logits and of noise, which takes the targets' place; then the floor is twice as much.

    Raises WrongResult, and so fails, where a candidate's loss or gradient is not that of the formula.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.rows, case.classes, generator=generator).to(case.dtype)
    target = torch.randint(case.classes, (case.rows,), generator=generator)
    if second is not None:
        target = second(logits, torch.randn(logits.shape, generator=generator))
    losses = timing.candidates(example, target)
    if second is None:
        losses["F.cross_entropy"] = partial(F.cross_entropy, target=target, **(same or {}))
    contest = timing.Contest(logits, losses)

    expected = timing.expected(example, logits, target)
    for name in losses:
        if name != "F.cross_entropy" or same is not None:
            timing.require(f"{example}, {name},", contest.result(name), expected)
    del expected
    memory = {name: _extra_memory(contest, name) for name in losses if logits.nbytes >= LEAST_MEASURED}

    start = perf_counter()
    contest.round()
    rounds = int(case.seconds / (perf_counter() - start))

    def others() -> None:
        contest.round(leave_out="fused")
        contest.prepare("fused")

    benchmark.group = str(example)
    benchmark.pedantic(contest.step, args=("fused",), setup=others, rounds=max(case.rounds, min(rounds, MAX_ROUNDS)))
    benchmark.extra_info.update(
        loss=str(example),
        same_as_cross_entropy=same is not None,
        rows=case.rows,
        classes=case.classes,
        dtype=str(case.dtype).removeprefix("torch."),
        floor=contest.floor * (1 if second is None else 2),
        noise=contest.noise,
        seconds={name: contest.median(name) for name in losses},
        forward={name: median(step.forward for step in contest.steps[name]) for name in losses},
        backward={name: median(step.backward for step in contest.steps[name]) for name in losses},
        memory=memory,
    )


def _extra_memory(contest: timing.Contest, name: str) -> float | None:
    """The most memory that a step holds beyond logits and gradient, as a multiple of the logits."""
    size = contest.logits.nbytes
    contest.write()
    peak = peak_memory(partial(contest.result, name))
    gradient = 0 if name == "in place" else size
    return None if peak is None else max(0.0, (peak - gradient) / size)
