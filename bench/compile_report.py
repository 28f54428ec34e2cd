"""Compiles the Triton kernels as they are launched, for GPUs that need not be there, and says what came of it.

The operators run on CPU tensors, whose logits are never read, with a launch that compiles instead; so the kernels get
just the constants, types and alignments that they get on a GPU. Registers, shared memory and instructions are read from
the binary with the cuobjdump of the triton wheel (for AMD from the assembler text).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import compile_cuda
import sass
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedloss import ops
from fusedloss.backends import triton as backend
from fusedloss.triton_kernels import epilogues, launch

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Epilogues with the number of their parameters and of the top classes that they look at.
LOSSES = {
    "cross_entropy": (0, 0),
    "log_sum_exp": (0, 0),
    "focal": (1, 0),
    "mixed_cross_entropy": (1, 2),
    "dsc_target": (4, 0),
    "tversky_target": (3, 0),
    "dsc_one_vs_rest": (4, 1),
    "tversky_one_vs_rest": (3, 1),
    "dsc_over_rows": (4, 1),
    "tversky_over_rows": (3, 1),
}
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ROWS, CLASSES, DEPTH = 4096, 32000, 1024
ODD_CLASSES = 50257  # whose rows begin anywhere
MANY_CLASSES = 128256  # with the widest tile where loss and gradient are made in one
FEW_ROWS = 8  # which are split over programs
REGISTERS, WARPS = 65536, 64  # of a multiprocessor, sm_80 to sm_100

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OUTPUT = Path(__file__).parent / "results/compile.md"

HEAD = (
    "kernel", "loss", "dtype", "classes", "rows × columns", "registers", "shared", "spills", "programs",
    "16-byte loads", "stores", "products",
)  # fmt: skip
IDENTITY, SPILLS = HEAD.index("registers"), HEAD.index("spills")

NOTES = """\
`make compile-report` with triton {version}; no GPU took part.

- *registers* of a thread (*at most*: as many as the compiler is told that there are), *shared* memory of a program in
  bytes. *programs*: how many of them the registers and warps of a multiprocessor allow at a time.
- *spills*: instructions that move registers to local memory and back; for gfx942 vector registers that go there. Its
  *scalars* that find no register go to lanes of vector registers and to no memory: they are counted beside.
- *16-byte* loads and stores among all of them, in the code of a program; the others are of what a row has but one.
  What goes to shared memory on the way is not counted.
- *products*: instructions of the tensor cores.
"""


@dataclass(frozen=True)
class Launch:
    """A kernel as it is launched for a GPU: what a line of the table begins with."""

    target: str
    kernel: str
    loss: str
    dtype: str
    classes: int
    tile: str


@dataclass(frozen=True)
class Compiled(Launch):
    """A kernel as a machine would run it."""

    registers: int
    shared: int
    spills: int
    scalars: int
    programs: int | None
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    products: int
    loops: list[sass.Count]


class _Driver:
    """What a launch asks of the machine, answered for one that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of its compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


def run_operators(loss: str, dtype: torch.dtype, classes: int) -> None:
    """A loss and its gradient, or "statistics": all that there are. After a comma "plain": without label smoothing,
    "few rows", "weighted" by class, "in one": a chunk's loss and gradient, "candidates", "product": of hidden states,
    or "whole product": with bias, softcap and masked targets too."""
    of_rows = ("row_statistics", "row_loss", "row_loss_gradient_", "row_gradient")
    row_statistics, row_loss, row_loss_gradient_, row_gradient, class_sums, class_terms, term_sums = (
        ops.kernel(name, "CUDA", "triton") for name in (*of_rows, "class_sums", "class_terms", "term_sums")
    )
    loss, _, variant = loss.partition(", ")
    rows = FEW_ROWS if variant == "few rows" else ROWS
    params_count, top_k = LOSSES.get(loss, (0, 2))
    logits = torch.empty(rows, classes, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    candidates = torch.zeros(rows, 3, dtype=torch.int64)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scalar = torch.empty((), dtype=compute)
    upstream = scalar.expand(rows)
    params: list[Tensor] = [scalar] * params_count
    of_classes = torch.ones(classes, dtype=compute)
    weight = of_classes if variant == "weighted" else None
    if loss.endswith("over_rows"):
        saved = row_statistics(logits, target, None, None, top_k, False, False)
        class_sums(logits, target, upstream, *saved, params[:-1], loss, None)
        params[-1] = torch.empty(rows, dtype=compute)
        coefficients = class_terms(logits, target, of_classes, *saved, params, loss)[1]
        term_sums(logits, target, of_classes, *saved, params, loss)
        row_gradient(logits, target, of_classes, *saved, coefficients, upstream, params, loss)
        return
    if loss == "statistics":
        saved = row_statistics(logits, target, weight, candidates, top_k, True, True)
        coefficients = torch.empty(9, rows, dtype=compute)
        row_gradient(logits, target, weight, *saved, coefficients, None, [], "")
        return
    smooths = not variant.startswith("plain") and loss not in epilogues.CLASS_TERMS
    common = torch.empty(3, dtype=compute) if smooths else None
    picked, top_k = (candidates, 0) if variant == "candidates" else (None, top_k)
    names = (loss, smooths, top_k)
    if variant.endswith("in one"):
        row_loss_gradient_(logits, target, weight, picked, params, common, upstream, *names)
        return
    if variant.endswith("product"):
        bias, *form = (logits[0], 30.0, True) if variant.startswith("whole") else (None, 0.0, False)
        product = (torch.empty(rows, DEPTH, dtype=dtype), torch.empty(classes, DEPTH, dtype=dtype), bias, *form)
        kernels = (ops.kernel(f"product_{name}", "CUDA", "triton_fused") for name in ("row_loss", "row_gradient_"))
        loss_of, gradient_of = kernels
        saved = loss_of(*product, target, weight, None, params, common, *names)[1:]
        gradient_of(logits, *product, target, weight, *saved, upstream, params, loss)
        return
    saved = row_loss(logits, target, weight, picked, params, common, *names)[1:]
    if loss in epilogues.CLASS_TERMS and variant != "few rows":  # which are split in any case
        term_sums(logits, target, weight, *saved[:2], params, loss)
    row_gradient(logits, target, weight, *saved, upstream, params, loss)


def launches(
    target: str, loss: str, dtype: torch.dtype, classes: int, only: str = ""
) -> Iterator[tuple[Launch, Callable[[], Any]]]:
    """The kernels of `run_operators` for that GPU, or one of them, each with a function that returns its binary."""
    found: list[tuple[Launch, Callable[[], Any]]] = []

    def find_instead(
        kernel: Any, grid: tuple[int, ...], tile: launch.Tile, where: tuple[Any, ...], *arguments: Any, **constants: Any
    ) -> None:
        options = backend.launch_options(kernel, tile, where, constants)
        role = next((f", {role.lower()}" for role in ("SPLIT", "MERGE") if constants.get(role)), "")
        shown = f"{tile.rows} × {tile.block}{f' × {tile.depth}' * bool(tile.depth)}, {tile.warps} warps"
        if "maxnreg" in options:
            shown += f", at most {options['maxnreg']}"
        one = Launch(target, f"{kernel.fn.__name__}{role}", loss, str(dtype)[6:], classes, shown)
        if only in ("", one.kernel):
            call = partial(kernel.warmup, where, *arguments, grid=grid, **constants, **options)
            found.append((one, call))

    launched: Callable[..., None] = backend._run
    driver.set_active(_Driver(TARGETS[target]))  # type: ignore[arg-type]
    backend._run = find_instead
    try:
        run_operators(loss, dtype, classes)
    finally:
        backend._run = launched
    yield from found


def compile_for(*configuration: Any) -> list[Compiled]:
    return [Compiled(**asdict(one), **_resources(one, compiled())) for one, compiled in launches(*configuration)]


def _resources(one: Launch, binary: Any) -> dict[str, Any]:
    if "cubin" not in binary.asm:
        return _amd_resources(binary)
    warps = binary.metadata.num_warps
    code = _code_resources(binary.asm["cubin"])
    # Elsewhere other things than logits are loaded by 16 bytes, too.
    only_logits = not re.search("product|weighted|over_rows", one.loss)
    loops = sass.count(disassembled(binary.asm["cubin"]), ITEMSIZES[one.dtype]) if only_logits else []
    of_program = -(-code["registers"] // 8) * 8 * 32 * warps
    programs = min(REGISTERS // of_program, WARPS // warps)
    return code | {"shared": binary.metadata.shared, "scalars": 0, "programs": programs, "loops": loops}


@cache
def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output([str(CUOBJDUMP), "-res-usage", "-sass", file.name])


@cache
def _code_resources(cubin: bytes) -> dict[str, int]:
    code = disassembled(cubin)
    return {
        "registers": int(re.findall(r"\bREG:(\d+)", code)[-1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E[\w.]*\.128\b", code)),
        "loads": len(re.findall(r"\bLDG\.E", code)),
        "wide_stores": len(re.findall(r"\bSTG\.E[\w.]*\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\.E", code)),
        "products": len(re.findall(r"\b(?:H|HG|D|UTC[HQ]?)MMA\b", code)),
    }


def _amd_resources(binary: Any) -> dict[str, Any]:
    code = binary.asm["amdgcn"]
    spills, scalars = (int(re.findall(rf"\.{kind}gpr_spill_count:\s*(\d+)", code)[-1]) for kind in "vs")
    return {
        "registers": int(re.findall(r"\.vgpr_count:\s*(\d+)", code)[-1]),
        "shared": binary.metadata.shared,
        "spills": spills,
        "scalars": scalars,
        "programs": None,
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "loads": len(re.findall(r"\b(?:global|buffer)_load_", code)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
        "stores": len(re.findall(r"\b(?:global|buffer)_store_", code)),
        "products": len(re.findall(r"\bv_mfma_", code)),
        "loops": [],
    }


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def quick() -> Iterator[tuple[Any, ...]]:
    """What `launches` takes, for the tests: one way through each pass, and of each family that has spilled its worst
    kernel, by a family being a pass, its kind of tile, its bytes of an element and its architecture."""
    halves, full, wide = torch.bfloat16, torch.float32, torch.float64
    yield from (("sm_90", "cross_entropy", dtype, CLASSES) for dtype in (halves, full))
    for loss in ("mixed_cross_entropy", "dsc_one_vs_rest", "focal, few rows", "statistics, weighted"):
        yield "sm_90", loss, halves, CLASSES
    for loss in ("cross_entropy, in one", "dsc_one_vs_rest, product", "mixed_cross_entropy, product"):
        yield "sm_90", loss, halves, CLASSES
    for loss in ("focal", "cross_entropy, whole product"):
        yield from ((target, loss, halves, CLASSES) for target in ("sm_80", "sm_100", "gfx942"))
    yield "sm_90", "dsc_one_vs_rest", halves, ODD_CLASSES, "statistics_pass"
    yield "sm_90", "dsc_over_rows", full, ODD_CLASSES, "class_terms_pass"
    yield "sm_90", "dsc_over_rows", wide, 16, "class_terms_pass"
    yield "sm_80", "dsc_one_vs_rest", wide, ODD_CLASSES, "statistics_pass"
    yield "sm_90", "cross_entropy, in one", wide, CLASSES
    yield "sm_90", "dsc_one_vs_rest, product", full, CLASSES, "statistics_pass, split"
    yield "sm_80", "cross_entropy, whole product", full, CLASSES, "gradient_pass"
    yield "sm_80", "dsc_one_vs_rest, whole product", halves, CLASSES, "class_terms_pass, split"
    yield "sm_80", "cross_entropy", halves, ODD_CLASSES, "statistics_pass"
    yield "sm_80", "cross_entropy", torch.float16, CLASSES, "statistics_pass"
    yield "sm_80", "dsc_one_vs_rest", full, 256, "statistics_pass"
    yield "sm_100", "cross_entropy", full, 16, "statistics_pass"
    yield "sm_100", "dsc_one_vs_rest", halves, CLASSES, "class_terms_pass"
    yield "gfx942", "dsc_over_rows", halves, CLASSES, "class_sums_pass"


def counted() -> Iterator[tuple[Any, ...]]:
    """What `launches` takes, of the kernels whose instructions are held to a bound."""
    for dtype in (torch.bfloat16, torch.float32):
        for loss in ("cross_entropy", "mixed_cross_entropy"):
            yield "sm_90", f"{loss}, plain", dtype, CLASSES
        yield "sm_90", "cross_entropy, plain in one", dtype, CLASSES
        for loss in ("dsc_one_vs_rest", "tversky_one_vs_rest"):
            yield "sm_90", loss, dtype, CLASSES


def print_counts(losses: list[str], listings: Path | None) -> None:
    """The instructions of a thread for each logit in the main loops; into a folder their listings, the way marked."""
    print(f"triton {triton.__version__}, sm_90, {CLASSES} classes. {sass.__doc__}")
    for configuration in counted():
        if losses and configuration[1].partition(", ")[0] not in losses:
            continue
        for one, compiled in launches(*configuration):
            binary = compiled()
            found = _resources(one, binary)
            print(f"{one.kernel}, {one.loss}, {one.dtype}, {one.tile}: ", end="")
            print(f"{found['registers']} registers, {found['spills']} spills, {found['programs']} programs")
            for loop in found["loops"]:
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
                text = sass.marked(disassembled(binary.asm["cubin"]))
                (listings / f"{name}.sass").write_text(text, encoding="utf-8")


def everything() -> Iterator[tuple[Any, ...]]:
    """What `launches` takes. For sm_90 every tile, and with the largest every loss and variant; for the others every
    tile of 16 and 32 bits too, of the variants those that need the most registers, and every loss of 16 bits."""
    halves, full, wide = torch.bfloat16, torch.float32, torch.float64
    by_tile = ("cross_entropy", "dsc_one_vs_rest", "dsc_over_rows")
    others = [loss for loss in LOSSES if loss not in by_tile]
    tiles = [*sorted({*launch.TILES, *launch.CLASS_TILES} - {2**31}), CLASSES, ODD_CLASSES]
    hard = (
        "dsc_one_vs_rest, few rows",
        "statistics, weighted",
        "cross_entropy, in one",
        *(f"{loss}, whole product" for loss in ("cross_entropy", "mixed_cross_entropy", "dsc_one_vs_rest")),
    )
    variants = (
        *hard,
        "focal, few rows",
        *(f"{loss}, weighted" for loss in ("cross_entropy", "dsc_one_vs_rest")),
        "mixed_cross_entropy, candidates",
        *(f"{loss}, product" for loss in LOSSES if not loss.endswith("over_rows")),
    )
    for target in TARGETS:
        first = target == "sm_90"
        for dtype in (halves, full, wide):
            sizes = tiles if first or dtype != wide else (CLASSES, ODD_CLASSES)
            yield from ((target, loss, dtype, classes) for classes in sizes for loss in by_tile)
            if first or dtype == halves:
                yield from ((target, loss, dtype, CLASSES) for loss in others)
            yield from ((target, loss, dtype, CLASSES) for loss in (variants if first else hard))
            yield target, "cross_entropy, in one", dtype, MANY_CLASSES
        for loss in (*by_tile, "mixed_cross_entropy, product", "dsc_one_vs_rest, product"):
            yield target, loss, torch.float16, CLASSES


def markdown(rows: list[Compiled]) -> str:
    lines = ["# What the compiler makes of the Triton kernels", "", NOTES.format(version=triton.__version__)]
    for target in dict.fromkeys(row.target for row in rows):
        lines += [f"## {target}", "", _line(HEAD), _line(["---"] * 3 + ["---:"] * (len(HEAD) - 3))]
        lines += [_line(_cells(row)) for row in rows if row.target == target]
        lines.append("")
    return "\n".join(lines)


def _cells(row: Compiled) -> list[str]:
    spills = f"{row.spills}, {row.scalars} scalars" if row.scalars else row.spills
    numbers = (row.registers, row.shared, spills, "-" if row.programs is None else row.programs)
    access = (f"{row.wide_loads} of {row.loads}", f"{row.wide_stores} of {row.stores}")
    return [row.kernel, row.loss, row.dtype, str(row.classes), row.tile, *map(str, numbers), *access, str(row.products)]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def faults(table: str) -> list[str]:
    """What is wrong with a table: other kernels than are launched now, or one that spills."""
    listed: dict[tuple[str, ...], str] = {}
    for section in table.split("\n## ")[1:]:
        target, *lines = section.split("\n# ")[0].splitlines()
        rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| "))
        listed |= {(target, *row[:IDENTITY]): row[SPILLS] for row in rows if row[0] not in ("kernel", "---")}
    launched = {
        tuple(map(str, asdict(one).values())) for configuration in everything() for one, _ in launches(*configuration)
    }
    return [
        *(f"not in the table: {', '.join(one)}" for one in sorted(launched - listed.keys())),
        *(f"launched no more: {', '.join(one)}" for one in sorted(listed.keys() - launched)),
        *(f"spills: {', '.join(one)}" for one, spills in sorted(listed.items()) if not re.match(r"0\b", spills)),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("triton", "cuda"), help="leave the other part of the table as it is")
    parser.add_argument("--count", nargs="*", metavar="LOSS", help="print the instructions for each logit")
    parser.add_argument("--listings", type=Path, help="with --count: a folder for the listings, what counts is marked")
    parser.add_argument("--quick", action="store_true", help="print the figures of a few kernels as JSON")
    parser.add_argument("--check", action="store_true", help="compile nothing; say what is wrong with the Triton table")
    options = parser.parse_args(arguments)
    if backend.INTERPRETED and options.only != "cuda":
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled")
    if options.count is not None:
        print_counts(options.count, options.listings)
        return 0
    if options.quick:
        print(json.dumps([asdict(row) for configuration in quick() for row in compile_for(*configuration)]))
        return 0
    parts = OUTPUT.read_text(encoding="utf-8").split("\n# ") if OUTPUT.exists() else []
    kept = {("cuda" if "nvcc" in part.splitlines()[0] else "triton"): part for part in parts}
    if options.check:
        return _complain(faults(kept.get("triton", "")))
    cuda = kept.get("cuda")
    if options.only != "triton":
        if compile_cuda.unavailable() is None:
            cuda = "\n".join(compile_cuda.markdown(compile_cuda.compile_all()))
        else:
            print(f"the CUDA kernels are left as they are: {compile_cuda.unavailable()}", file=sys.stderr)
    if options.only == "cuda":
        _write(kept.get("triton"), cuda)
        return 0
    rows: dict[Compiled, None] = {}
    configured = list(everything())
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for configuration, found in zip(configured, pool.map(compile_for, *zip(*configured, strict=True)), strict=True):
            print(*configuration, file=sys.stderr)
            rows |= dict.fromkeys(found)
    table = markdown(list(rows))
    _write(table, cuda)
    return _complain(faults(table))


def _complain(about: list[str]) -> int:
    for line in about:
        print(line, file=sys.stderr)
    return 1 if about else 0


def _write(*parts: str | None) -> None:
    OUTPUT.parent.mkdir(exist_ok=True)
    text = "\n\n".join(f"# {part.removeprefix('# ').strip()}" for part in parts if part)
    OUTPUT.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {os.path.relpath(OUTPUT)}")


if __name__ == "__main__":
    sys.exit(main())
