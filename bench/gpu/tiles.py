"""Each Triton pass alone with other tiles than it has, by a graph's replay: what the tables in launch.py should say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.backends import triton as backend
from fusedloss.tools.timing import distance

from .part import Part
from .tables import FULL, HALF, ROW_CASES, Rows
from .timing import FLUSH_BYTES, Clock

BLOCKS, WARPS, BYTES_OF_A_THREAD = (1024, 2048, 4096, 8192), (2, 4, 8, 16), range(16, 65)
COLUMN_TILES = tuple((rows, block, 4) for rows in (2, 4, 8, 16) for block in (128, 256, 512))
REPEATS = 10
BEST = 3

Shape = tuple[int, int, int]  # rows, columns, warps


class Sweep(NamedTuple):
    """A kernel among those that the loss launches. `bytes_moved`: of each byte of logits."""

    kernel: str
    loss: Callable[[Tensor, Tensor], Tensor]
    bytes_moved: int


class Launch(NamedTuple):
    """`table`: the one in launch.py that has its tile; `again` launches it once more."""

    kernel: str
    table: str
    tile: Shape
    again: Callable[[], None]


def _in_one(logits: Tensor, target: Tensor) -> Tensor:
    """Of a linear form, which makes a chunk's gradient with its loss. Some of the logits are the hidden states."""
    features = min(64, len(logits))
    weight = logits.detach()[:features].t().contiguous()
    return fl.linear_cross_entropy(logits[:, :features], weight, target, impl="triton", budget=2**40)


_CE, _DSC = partial(fl.cross_entropy, impl="triton"), partial(fl.dsc_loss, impl="triton")
SWEEPS = (
    Sweep("statistics_pass", _CE, 1),
    Sweep("gradient_pass", _CE, 2),
    Sweep("statistics_pass", _in_one, 2),
    Sweep("class_terms_pass", _DSC, 1),
    Sweep("gradient_pass", _DSC, 2),
    Sweep("class_sums_pass", partial(_DSC, level="class"), 1),
)
CASES = (*ROW_CASES[:7], Rows(512, 32000, FULL))
TINY = (Rows(2, 500, HALF),)  # a span of the interpreter's, so that loss and gradient are made in one


def tiles_of(table: str, itemsize: int) -> list[Shape]:
    """Those to try."""
    if table == "COLUMN_TILES":
        return list(COLUMN_TILES)
    some = [(1, block, warps) for block in BLOCKS for warps in WARPS]
    return [tile for tile in some if tile[1] * itemsize // (32 * tile[2]) in BYTES_OF_A_THREAD]


def launched(loss: Callable[[], object], table: str = "", tile: Shape | None = None) -> list[Launch]:
    """Run the loss, with that tile where it asks that table, and return what it launches.

    All that knows how the backend launches and how launch.py chooses is here and in `entry`.
    """
    found: list[Launch] = []
    asked = [""]
    launch, run = backend._kernels().launch, backend._run

    def chosen(choose: Any, default: Any) -> Callable[..., Any]:
        def call(classes: int, itemsize: int, tiles: Any = default) -> Any:
            asked[0] = next(name for name, value in vars(launch).items() if value is tiles)
            forced = tile is not None and asked[0] == table
            return launch.Tile(*tile) if forced else choose(classes, itemsize, *[tiles] * (tiles is not default))

        return call

    def recorded(kernel: Any, grid: tuple[int, ...], tile: Any, *arguments: Any, **constants: Any) -> None:
        again = partial(run, kernel, grid, tile, *arguments, **constants)
        again()
        if not constants.get("MERGE"):
            found.append(Launch(kernel.__name__, asked[0], tuple(tile[:3]), again))

    with (
        patch.object(backend, "_run", recorded),
        patch.object(launch, "tile", chosen(launch.tile, launch.TILES)),
        patch.object(launch, "column_tile", chosen(launch.column_tile, launch.COLUMN_TILES)),
    ):
        loss()
    return found


def entry(tile: Shape, case: Rows) -> Shape:
    """What the table must hold for it: of wider elements a tile has fewer columns than is written there."""
    launch, (rows, block, warps) = backend._kernels().launch, tile
    written = [(rows, block * wider, warps) for wider in (1, 2, 4)]
    gives = (launch.tile(case.classes, case.dtype.itemsize, {2**31: launch.Tile(*x)})[:3] for x in written)
    return next((x for x, given in zip(written, gives, strict=True) if tuple(given) == tile), tile)


def tiles(part: Part) -> None:
    reason = backends.unavailable("triton", part.device)
    if reason is not None:
        return part.left_out("all of it", reason)
    clock = Clock(part.device)
    best: dict[tuple[str, str], list[str]] = {}
    for case in TINY if part.rehearse else CASES:
        size = case.rows * case.classes * case.dtype.itemsize
        copies = 1 if part.rehearse else max(1, min(REPEATS, FLUSH_BYTES // size))  # no run finds its logits in the L2
        problems = [_problem(part, case) for _ in range(copies)]
        copy = clock.median(lambda x=problems[0][0]: x.detach().clone()) / 2  # of a byte moved for each byte of logits
        for sweep in SWEEPS:
            what = f"{sweep.kernel}, {case}"
            if part.late(what):
                continue
            with part.attempt(what):
                table, times = _times(part, clock, sweep, case, problems)
                fastest = sorted(times, key=lambda x: x[1])[:BEST]
                for tile, milliseconds in dict.fromkeys([*fastest, times[0]]):
                    about = {"kernel": sweep.kernel, "table": table, "case": str(case)}
                    about["tile"] = ", ".join(map(str, tile)) + " (now)" * (tile == times[0][0])
                    rates = {"GB/s": sweep.bytes_moved * size / milliseconds / 1e6}
                    rates["/ copy"] = milliseconds / copy / sweep.bytes_moved
                    part.row(**about, ms=milliseconds, **rates)
                line = f"    {case.classes}: Tile{entry(fastest[0][0], case)},  # {case}"
                best.setdefault((table, sweep.kernel), []).append(line)
        problems = []
        clock.empty_memory()
    for (table, kernel), entries in best.items():
        part.text(f"{table} = {{  # {kernel}", *entries, "}")


def _problem(part: Part, case: Rows) -> tuple[Tensor, Tensor]:
    logits = torch.randn(case.rows, case.classes, device=part.device, dtype=case.dtype).requires_grad_()
    return logits, torch.randint(case.classes, (case.rows,), device=part.device)


def _times(
    part: Part, clock: Clock, sweep: Sweep, case: Rows, problems: list[tuple[Tensor, Tensor]]
) -> tuple[str, list[tuple[Shape, float]]]:
    """The kernel's table, and the milliseconds of tiles that give the same loss and gradient; first the table's."""
    found: list[tuple[Shape, float]] = []
    (expected, first) = run_once(sweep, *problems[0])
    table = first.table
    some = tiles_of(table, case.dtype.itemsize)
    for tile in (None, *(some[:2] if part.rehearse else some)):
        if found and part.left < 0:
            break
        what = f"{sweep.kernel} of {table}, {case}, {tile or 'as it is'}"
        with part.attempt(what, ours=tile is None):
            calls = []
            for problem in problems:
                result, one = run_once(sweep, *problem, table, tile)
                calls.append(one.again)
                if problem is problems[0] and not (error := distance(result, expected)) <= 1e-2:
                    raise AssertionError(f"loss and gradient are others than with the table's tile, by {error:.1e}")
            steps = (calls * REPEATS)[:REPEATS]
            took = clock.replayed(steps) or clock.median(steps[0])
            found.append((one.tile, took))
            print(what, took, flush=True)
    return table, found


def run_once(
    sweep: Sweep, logits: Tensor, target: Tensor, table: str = "", tile: Shape | None = None
) -> tuple[tuple[Tensor, Tensor], Launch]:
    """Return loss and gradient, and the launch of the kernel that is looked at."""
    result: list[Tensor] = []

    def step() -> None:
        value = sweep.loss(logits, target)
        result[:] = value.detach(), torch.autograd.grad(value, logits)[0]

    launches = launched(step, table, tile)
    return (result[0], result[1]), next(one for one in launches if one.kernel == sweep.kernel)
