"""python -m fusedloss: what is installed here (info), whether it is right (check), how fast it is (bench), and how much
memory a step takes (memory)."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence

import torch

import fusedloss

from . import backends
from .backends import cuda
from .checks import DTYPES
from .tools import peers, selfcheck, timing
from .tools.footprint import footprint

#: Spread of the copies' times (third quartile over first) from which on the machine counts as busy.
BUSY = 1.3


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 for success, 1 for a failed check, 2 for arguments that make no sense."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.run is None:
        parser.print_usage(sys.stderr)
        return 2
    try:
        status: int = parsed.run(parsed)
    except _UsageError as error:
        parser.error(str(error))
    return status


def _parser() -> argparse.ArgumentParser:
    name = "python -m fusedloss"
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} [-h] [--version] info | check [--quick] | bench [--loss NAME ...] | memory --rows N ...",
        description="What is installed here, whether it is right, how fast it is, and how much memory a step takes.",
    )
    parser.add_argument("--version", action="version", version=f"fusedloss {fusedloss.__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(prog=name, metavar="info | check | bench | memory")

    info = commands.add_parser("info", help="versions, instruction sets, and which implementations are ready")
    info.set_defaults(run=lambda _: _info())

    check = commands.add_parser(
        "check", help="losses and gradients on every ready implementation, against the reference"
    )
    check.add_argument("--quick", action="store_true", help="small shapes only: a few seconds")
    check.set_defaults(run=lambda a: _check(a.quick))

    bench = commands.add_parser("bench", help="every loss in every form, beside PyTorch and other packages")
    bench.add_argument(
        "--shape", type=_shape, default=(1024, 32768), metavar="NxV", help="rows x classes, default 1024x32768"
    )
    bench.add_argument("--features", type=_positive, default=256, help="hidden size of linear forms, default 256")
    bench.add_argument("--dtype", choices=[_name(d) for d in timing.TOLERANCE], default="float32")
    bench.add_argument("--rounds", type=_positive, default=5, help="times each loss has its turn, default 5")
    bench.add_argument("--loss", metavar="NAME", help="only losses with this in their names")
    bench.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes a while")
    bench.set_defaults(
        run=lambda a: _bench(a.shape, a.features, getattr(torch, a.dtype), a.rounds, a.loss, not a.no_compile)
    )

    memory = commands.add_parser("memory", help="bytes of a step: logits in hand, and the linear form")
    for size, of in (("rows", "targets of a batch"), ("features", "hidden size"), ("classes", "of the vocabulary")):
        memory.add_argument(f"--{size}", type=_positive, required=True, help=of)
    memory.add_argument("--dtype", choices=[_name(d) for d in DTYPES], default="float32")
    memory.add_argument(
        "--budget", type=_positive, metavar="BYTES", help="of a chunk, default FUSEDLOSS_LINEAR_BUDGET or the device's"
    )
    memory.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="whose rule for chunks to follow")
    memory.set_defaults(
        run=lambda a: _memory(a.rows, a.features, a.classes, getattr(torch, a.dtype), a.budget, a.device)
    )

    return parser


class _UsageError(Exception):
    """An argument that cannot be met; the message is for the user."""


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, classes = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected rows x classes such as 1024x32768, got {text!r}") from None
    if rows < 1 or classes < 2:
        raise argparse.ArgumentTypeError(f"expected at least 1 row and 2 classes, got {text!r}")
    return rows, classes


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _info() -> int:
    rows = [
        ("fusedloss", f"{fusedloss.__version__} from {os.path.dirname(fusedloss.__file__)}"),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cpu", f"{_cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"),
    ]
    for impl in backends.IMPLS:
        reason = backends.unavailable(impl)
        rows.append((f"impl {impl}", "ready" if reason is None else f"not ready: {reason}"))
    if backends.unavailable("cpu") is None:
        from . import _engine

        names, used = _engine.instruction_sets(), _engine.instruction_set()
        rows.append(("instruction sets", ", ".join(f"{n} (in use)" if n == used else n for n in names)))
    rows.append(("cuda kernels", cuda.TARGETS or "none"))
    rows.append(("huge pages", _huge_pages()))
    try:
        default = backends.resolve(None, torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        default = f"none: {error}"
    variable = os.environ.get("FUSEDLOSS_IMPL")
    rows.append(("default on a CPU", default + (f" (FUSEDLOSS_IMPL={variable})" if variable else "")))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    return 0


def _huge_pages() -> str:
    """What the kernel grants: new gradients cost far fewer page faults on them."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="utf-8") as file:
            setting = file.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"
    return f"{setting} (transparent huge pages; {'none for' if setting == 'never' else 'used for'} new gradients)"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _check(quick: bool) -> int:
    results = []
    bar = _Progress(selfcheck.count())
    for result in selfcheck.check(quick):
        results.append(result)
        bar.advance()
    bar.clear()
    table: list[tuple[str, ...]] = [
        ("loss", "implementation", "dtype", "loss error", "allowed", "gradient error", "allowed", "")
    ]
    for r in results:
        errors = (f"{e:.1e}" for e in (*r.loss, *r.gradient))
        table.append((r.name, r.impl, _name(r.dtype), *errors, "PASS" if r.passed else "FAIL"))
    _print_table(table)
    failed = sum(not r.passed for r in results)
    print()
    for what, why in selfcheck.left_out():
        print(f"not checked: {what} ({why})")
    if failed:
        print(f"{failed} of {len(results)} FAILED")
        return 1
    if {r.impl for r in results} == {"reference"}:
        print(f"all {len(results)} passed, but of the reference in PyTorch alone: no kernel was checked")
        return 1
    print(f"all {len(results)} passed: errors within twice those of plain PyTorch and {selfcheck.ULPS} ulps")
    return 0


def _bench(
    shape: tuple[int, int], features: int, dtype: torch.dtype, rounds: int, wanted: str | None, compiled: bool
) -> int:
    rows, classes = shape
    try:
        backends.resolve(None, torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        raise _UsageError(str(error)) from None
    try:
        events = list(peers.events(rows, classes, features, dtype, compiled))
    except RuntimeError as error:
        raise _UsageError(f"no logits of {rows} x {classes}: {_first_line(error)}") from None
    names = dict.fromkeys(event.name.split("(")[0] for event in events)
    events = [event for event in events if wanted is None or wanted in event.name.split("(")[0]]
    if not events:
        raise _UsageError(f"no loss has {wanted!r} in its name; there are {', '.join(names)}")
    size = f"{rows} x {classes} {_name(dtype)}, {features} features before an output layer"
    print(f"forward + backward, {size}, {torch.get_num_threads()} threads")

    table: list[tuple[str, ...]] = [
        ("loss", "floor ms", "fused ms", "in place ms", *(f"{name} / fused" for name in _RATIOS), "peers / fused")
    ]
    notes: dict[str, None] = {}
    bar = _Progress(len(events) * (rounds + 1))
    for event in events:
        contest, expected = event.contest(), event.expected()
        for name in list(contest.losses):
            try:
                timing.require(f"{event.name}, {name},", contest.result(name), expected)
                continue
            except ImportError:
                reason = f"{_label(name)} is not installed"
            except timing.WrongResult as error:
                reason = str(error)
            except Exception as error:
                reason = f"{_label(name)} did not work here: {_first_line(error)}"
                if name in _FUSED:
                    raise
            if name in _FUSED:
                bar.clear()
                print(f"{reason}. See: python -m fusedloss check", file=sys.stderr)
                return 1
            # The others can still be timed.
            del contest.losses[name]
            notes[reason] = None
        bar.advance()
        for _ in range(rounds):
            contest.round()
            bar.advance()
        table.append(_bench_row(event.name, contest))
        if contest.noise > BUSY:
            notes["the machine is busy: the floors' own times spread widely, so take the above roughly"] = None
    bar.clear()
    _print_table(table)
    print(
        "\nRatios: the other's time over that of fused; above 1, fused is faster. Medians of "
        f"{rounds} rounds, all in turn in each.\n"
        f"floor: {timing.FLOOR} x copy_() of the logits; for linear forms and supcon_loss, their three matrix products."
    )
    print("".join(f"note: {note}\n" for note in notes), end="")
    return 0


#: The ways that must be right, those that have columns of their own, and the names of some.
_FUSED = ("fused", "in place")
_RATIOS = ("floor", "eager", "compiled")
_LABELS = {
    "compiled": "torch.compile",
    "torch": "F.linear_cross_entropy",
    "torch chunked": "F.linear_cross_entropy in chunks",
}


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _bench_row(name: str, contest: timing.Contest) -> tuple[str, ...]:
    times = {way: contest.median(way) for way in contest.losses} | {"floor": contest.floor}
    milliseconds = (f"{times[way] * 1e3:.2f}" if way in times else "-" for way in ("floor", *_FUSED))
    ratios = {way: f"{time / times['fused']:.3g}" for way, time in times.items() if way not in _FUSED}
    others = (f"{_label(way)} {ratio}" for way, ratio in ratios.items() if way not in _RATIOS)
    return name, *milliseconds, *(ratios.get(way, "-") for way in _RATIOS), ", ".join(others) or "-"


def _memory(rows: int, features: int, classes: int, dtype: torch.dtype, budget: int | None, device: str) -> int:
    try:
        f = footprint(rows, features, classes, dtype, budget, device)
    except ValueError as error:
        raise _UsageError(str(error)) from None
    chunk = f"a chunk of logits, 1 of {f.chunks} with up to {f.chunk_rows} rows"
    sizes = {
        "hidden states, and their gradient": f.hidden,
        "weight, and its gradient": f.weight,
        "logits, and their gradient": f.logits,
        chunk: f.chunk,
        "the weight's gradient while it is added up": f.weight_sum,
    }
    peaks = {
        "row form": f.row,
        "row form, inplace_backward=True": f.row_in_place,
        "linear form": f.linear,
        "linear form, evaluation": f.evaluation,
    }
    print(f"{rows} rows, {features} features, {classes} classes, {_name(dtype)}\n")
    table = [(name, str(size), f"{size / 2**20:.1f}") for name, size in {**sizes, **peaks}.items()]
    table.insert(len(sizes), ("peak of a step beyond hidden states and weight:", "", ""))
    _print_table([("each of", "bytes", "MiB"), *table])
    return 0


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]).rstrip())


class _Progress:
    """A bar on stderr, where that is a terminal."""

    WIDTH = 40

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.shown = sys.stderr.isatty()

    def advance(self) -> None:
        self.done += 1
        if self.shown:
            full = self.WIDTH * self.done // self.total
            bar = "#" * full + "." * (self.WIDTH - full)
            print(f"\r[{bar}] {self.done}/{self.total}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
