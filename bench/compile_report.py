"""Compile the kernels for GPUs that need not be here, and write what the compilers make of them.

bench/results/compile.md shows the main kernels, compile.csv every one of Triton's in each release that is at hand, and
compile_cuda.csv those of CUDA C++.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import compile_cuda
import compile_triton
import sass
import triton
import tritons
from writing import table

from fusedloss.backends import triton as backend

RESULTS = Path(__file__).parent / "results"
TABLE, TRITON, CUDA = (RESULTS / name for name in ("compile.md", "compile.csv", "compile_cuda.csv"))
Row = dict[str, str]  # a line of a .csv file by its columns
IDENTITY = [field.name for field in fields(compile_triton.Launch)]

NOTES = """\
# What the compilers make of the kernels

`make compile-report` wrote it; no GPU took part. All kernels are in [compile.csv](compile.csv) and
[compile_cuda.csv](compile_cuda.csv). Where there are two figures they are of Triton {releases}.

- *instructions* of a thread for each of its logits: in the main loop, or in the program if that has no loop, on the
  shortest way that loads logits. *apart*: instructions of rare branches beside that way. *around*: of the loop around
  the main one, for each time that this is done. *barriers* and *shuffles* are those on the way. Of the passes over
  pairs of rows a logit is one of either row.
- *registers* of a thread. *programs*: how many of them the registers and warps of a multiprocessor allow at a time.
- *spills*: instructions that move registers to local memory and back; for gfx942 vector registers that go there.
"""


def rows_of(kernels: Iterable[compile_triton.Compiled]) -> list[dict[str, Any]]:
    return [{"triton": triton.__version__} | asdict(kernel) for kernel in kernels]


def compile_everything() -> list[dict[str, Any]]:
    configurations = list(compile_triton.everything())
    found: dict[compile_triton.Compiled, None] = {}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_triton.compile_for, *one) for one in configurations]
        for configuration, job in zip(configurations, jobs, strict=True):
            found |= dict.fromkeys(job.result())
            print(triton.__version__, *configuration, file=sys.stderr)
    return rows_of(found)


def faults(rows: list[Row]) -> list[str]:
    """What is wrong with the rows of a release: other kernels than are launched now, or one that spills."""
    listed = {tuple(row[name] for name in IDENTITY): row for row in rows}
    launched = {
        tuple(map(str, astuple(one)))
        for configuration in compile_triton.everything()
        for one, _ in compile_triton.launches(*configuration)
    }
    return [
        *(f"not in the table: {', '.join(one)}" for one in sorted(launched - listed.keys())),
        *(f"launched no more: {', '.join(one)}" for one in sorted(listed.keys() - launched)),
        *(f"spills {row['spills']}: {', '.join(one)}" for one, row in sorted(listed.items()) if row["spills"] != "0"),
        *(f"{row['error']}: {', '.join(one)}" for one, row in sorted(listed.items()) if row["error"]),
    ]


def own(rows: list[Row]) -> list[Row]:
    """Those of the Triton that runs, or of the newest if there are none of it."""
    releases = {row["triton"] for row in rows}
    release = triton.__version__ if triton.__version__ in releases else max(releases, key=_version, default="")
    return [row for row in rows if row["triton"] == release]


def _version(release: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", release)]


def markdown(rows: list[Row], cuda: list[Row]) -> str:
    releases = sorted({row["triton"] for row in rows}, key=_version, reverse=True)
    by_identity: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        # A release may have register limits of its own in the last of it, the tile.
        by_identity.setdefault(tuple(row[name] for name in IDENTITY[:-1]), {})[row["triton"]] = row

    def of_releases(known: dict[str, Row], name: str) -> str:
        figures = [known[release][name] if release in known else "-" for release in releases]
        return figures[0] if len(set(figures)) == 1 else " / ".join(figures)

    main = [
        (target, kernel, loss, dtype, classes)
        for target, loss, dtype, classes, *_ in map(tuple[Any, ...], compile_triton.counted())
        for kernel in dict.fromkeys(row["kernel"] for row in rows if row["loss"] == loss)
    ]
    head = ("kernel", "loss", "dtype", "instructions", "barriers", "shuffles", "apart", "around", "registers",
            "programs", "spills")  # fmt: skip
    figures = ("per_logit", "barriers", "shuffles", "apart", "around", "registers", "programs", "spills")
    shown = []
    for target, kernel, loss, dtype, classes in main:
        known = by_identity.get((target, kernel, loss, str(dtype)[6:], str(classes)))
        if known and "split" not in kernel and "merge" not in kernel:
            shown.append((kernel, loss, str(dtype)[6:], *(of_releases(known, name) for name in figures)))
    targets = []
    for target in dict.fromkeys(row["target"] for row in rows):
        summary = []
        for release in releases:
            some = [row for row in rows if (row["target"], row["triton"]) == (target, release)]
            registers, spilled = ([int(row[name]) for row in some] for name in ("registers", "spills"))
            summary.append((len(some), max(registers, default=0), sum(map(bool, spilled)), max(spilled, default=0)))
        targets.append((target, *(" / ".join(map(str, column)) for column in zip(*summary, strict=True))))
    lines = [NOTES.format(releases=" and ".join(releases)), "sm_90, 32000 classes:\n", *table(head, shown, 3)]
    lines += ["\nAll of Triton's:\n"]
    lines += table(("target", "kernels", "most registers", "that spill", "most spills"), targets)
    if cuda:
        lines += ["", *compile_cuda.markdown(cuda)]
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> list[Row]:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
    print(f"wrote {os.path.relpath(path)}")
    return read(path)


def print_counts(losses: list[str], listings: Path | None) -> None:
    """The instructions of a thread for each logit in the main loops; into a folder their listings, the way marked."""
    print(f"triton {triton.__version__}, sm_90, {compile_triton.CLASSES} classes. {sass.__doc__}")
    for configuration in compile_triton.counted():
        if losses and configuration[1].partition(", ")[0] not in losses:
            continue
        for one, compiled in compile_triton.launches(*configuration):
            binary = compiled()
            found = compile_triton.Compiled(**asdict(one), **compile_triton.resources(one, binary))
            print(f"{one.kernel}, {one.loss}, {one.dtype}, {one.tile}: ", end="")
            print(f"{found.registers} registers, {found.spills} spills, {found.programs} programs")
            for loop in compile_triton.main_loops(one, binary):
                print(
                    f"  {loop.per_logit:6.2f} a logit = {loop.instructions} / {loop.logits} "
                    f"({f'loop {loop.loop}' if loop.loop else 'the program'}), {loop.barriers} barriers, "
                    f"{loop.shuffles} shuffles; {loop.apart} apart, {loop.around} in the loop around it, "
                    f"{loop.once} once, {loop.tails} in other loops"
                )
                for turn in loop.way:
                    print(f"         {turn}")
            if listings is not None:
                name = re.sub(r"\W+", "-", f"{one.kernel} {one.loss} {one.dtype} triton {triton.__version__}")
                listings.mkdir(parents=True, exist_ok=True)
                text = sass.marked(compile_triton.disassembled(binary.asm["cubin"]))
                (listings / f"{name}.sass").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("triton", "cuda"), help="leave the other part as it is")
    parser.add_argument("--count", nargs="*", metavar="LOSS", help="print the instructions for each logit")
    parser.add_argument("--listings", type=Path, help="with --count: a folder for the listings, what counts is marked")
    parser.add_argument("--json", choices=("quick", "everything"), help="print the figures that this Triton yields")
    parser.add_argument("--check", action="store_true", help="compile nothing; say what is wrong with what is written")
    options = parser.parse_args(arguments)
    if backend.INTERPRETED and options.only != "cuda":
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled")
    if options.count is not None:
        print_counts(options.count, options.listings)
        return 0
    if options.json == "quick":
        quick = rows_of(row for one in compile_triton.quick() for row in compile_triton.compile_for(*one))
        print(json.dumps({"faults": check(), "kernels": quick}))
        return 0
    if options.json:
        print(json.dumps(compile_everything()))
        return 0
    if options.check:
        return _complain(check())
    rows, cuda = read(TRITON), read(CUDA)
    if options.only != "triton":
        if compile_cuda.unavailable() is None:
            cuda = write(CUDA, compile_cuda.rows_of(compile_cuda.compile_all()))
        else:
            print(f"the CUDA kernels are left as they are: {compile_cuda.unavailable()}", file=sys.stderr)
    if options.only != "cuda":
        if tritons.unavailable() is not None:
            print(f"what the oldest Triton makes is left as it is: {tritons.unavailable()}", file=sys.stderr)
        made = {release: _in_process(environment) for release, environment in tritons.environments().items()}
        kept = [row for row in rows if row["triton"] == tritons.OLDEST and tritons.OLDEST not in made]
        rows = write(TRITON, [*(row for some in made.values() for row in some), *kept])
    TABLE.write_text(markdown(rows, cuda), encoding="utf-8")
    print(f"wrote {os.path.relpath(TABLE)}")
    return _complain(check())


def _in_process(environment: dict[str, str]) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--json", "everything"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def check() -> list[str]:
    """What is wrong with the files as they are, for the Triton that runs."""
    rows = read(TRITON)
    current = TABLE.exists() and TABLE.read_text(encoding="utf-8") == markdown(rows, read(CUDA))
    return faults(own(rows)) + ([] if current else [f"{os.path.relpath(TABLE)} is not what the .csv files say"])


def _complain(about: list[str]) -> int:
    for line in about:
        print(line, file=sys.stderr)
    return 1 if about else 0


if __name__ == "__main__":
    sys.exit(main())
