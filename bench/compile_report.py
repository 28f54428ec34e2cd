"""Compiles the Triton kernels as they are launched, for GPUs that need not be there, and says what came of it.

The operators run on CPU tensors, whose logits are never read, with a launch that compiles instead; so the kernels get
just the constants, types and alignments that they get on a GPU. Registers, shared memory and instructions are read from
the binary with the cuobjdump of the triton wheel (for AMD from the assembler text).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compile_cuda
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
}
ROWS, CLASSES, DEPTH = 4096, 32000, 1024
FEW_ROWS = 8  # which are split over programs
REGISTERS, WARPS = 65536, 64  # of a multiprocessor, sm_80 to sm_100

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OUTPUT = Path(__file__).parent / "results/compile.md"

NOTES = """\
`make compile-report` with triton {version}; no GPU took part.

- *registers* of a thread, *shared* memory of a program in bytes, *spills*: instructions that move registers to local
  memory and back. *programs*: how many of them the registers and warps of a multiprocessor allow at a time.
- *16-byte* loads and stores among all of them, in the code of a program; the others are of what a row has but one.
  What goes to shared memory on the way is not counted.
- *products*: instructions of the tensor cores.
"""


@dataclass(frozen=True)
class Compiled:
    """A kernel as a machine would run it."""

    target: str
    kernel: str
    loss: str
    dtype: str
    classes: int
    tile: str
    registers: int
    shared: int
    spills: int
    programs: int | None
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    products: int


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
    """A loss and its gradient, or "class_sums": the sums over rows of DSC, or "statistics": all that there are. After a
    comma "few rows", "weighted" by class, "in one": a chunk's loss and gradient, or "product": of hidden states."""
    row_statistics, row_loss, row_loss_gradient_, row_gradient, class_sums = (
        ops.kernel(name, "CUDA", "triton")
        for name in ("row_statistics", "row_loss", "row_loss_gradient_", "row_gradient", "class_sums")
    )
    loss, _, variant = loss.partition(", ")
    rows = FEW_ROWS if variant == "few rows" else ROWS
    params_count, top_k = LOSSES.get(loss, LOSSES["dsc_one_vs_rest"])
    logits = torch.empty(rows, classes, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scalar = torch.empty((), dtype=compute)
    params: list[Tensor] = [scalar] * params_count
    weight = torch.ones(classes, dtype=compute) if variant == "weighted" else None
    if loss == "class_sums":
        statistics, index = row_statistics(logits, target, None, None, -100, 1, False, False)
        row_weight = torch.empty(rows, dtype=compute)
        class_sums(logits, target, row_weight, statistics, index, params[:3], "dsc_over_rows", -100)
        return
    if loss == "statistics":
        candidates = torch.zeros(rows, 3, dtype=torch.int64)
        statistics, index = row_statistics(logits, target, weight, candidates, -100, 2, True, True)
        coefficients = torch.empty(9, rows, dtype=compute)
        row_gradient(logits, target, weight, statistics, index, coefficients, None, [], "", -100)
        return
    smoothing = 0.0 if loss in epilogues.CLASS_TERMS else 0.1
    names = (loss, smoothing, "all", 0.0, -100, top_k)
    upstream = scalar.expand(rows)
    if variant == "in one":
        row_loss_gradient_(logits, target, weight, None, params, upstream, *names)
        return
    if variant == "product":
        product = (torch.empty(rows, DEPTH, dtype=dtype), torch.empty(classes, DEPTH, dtype=dtype), None, 0.0, False)
        kernels = (ops.kernel(f"product_{name}", "CUDA", "triton_fused") for name in ("row_loss", "row_gradient_"))
        loss_of, gradient_of = kernels
        saved = loss_of(*product, target, weight, None, params, *names)[1:]
        gradient_of(logits, *product, target, weight, *saved, upstream, params, loss, -100)
        return
    saved = row_loss(logits, target, weight, None, params, *names)[1:]
    row_gradient(logits, target, weight, *saved, upstream, params, loss, -100)


def compile_for(target: str, loss: str, dtype: torch.dtype, classes: int) -> list[Compiled]:
    """The kernels of `run_operators` for that GPU."""
    found: list[Compiled] = []

    def compile_instead(
        kernel: Any, grid: tuple[int, ...], tile: launch.Tile, *arguments: Any, **constants: Any
    ) -> None:
        binary = kernel.warmup(*arguments, grid=grid, **constants, **backend.launch_options(tile))
        shown = f"{tile.rows} × {tile.block}{f' × {tile.depth}' * bool(tile.depth)}, {tile.warps} warps"
        role = next((f", {role.lower()}" for role in ("SPLIT", "MERGE") if constants.get(role)), "")
        name = f"{kernel.fn.__name__}{role}"
        found.append(
            Compiled(target, name, loss, str(dtype)[6:], classes, shown, **_resources(binary, tile.warps))
        )  # fmt: skip

    launched: Callable[..., None] = backend._run
    driver.set_active(_Driver(TARGETS[target]))  # type: ignore[arg-type]
    backend._run = compile_instead
    try:
        run_operators(loss, dtype, classes)
    finally:
        backend._run = launched
    return found


def _resources(binary: Any, warps: int) -> dict[str, Any]:
    if "cubin" not in binary.asm:
        return _amd_resources(binary)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (_output([str(CUOBJDUMP), option, file.name]) for option in ("-res-usage", "-sass"))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    of_program = -(-registers // 8) * 8 * 32 * warps
    return {
        "registers": registers,
        "shared": binary.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "programs": min(REGISTERS // of_program, WARPS // warps),
        "wide_loads": len(re.findall(r"\bLDG\.E[\w.]*\.128\b", code)),
        "loads": len(re.findall(r"\bLDG\.E", code)),
        "wide_stores": len(re.findall(r"\bSTG\.E[\w.]*\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\.E", code)),
        "products": len(re.findall(r"\b(?:H|HG|D|UTC[HQ]?)MMA\b", code)),
    }


def _amd_resources(binary: Any) -> dict[str, Any]:
    code = binary.asm["amdgcn"]
    spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code))
    return {
        "registers": int(re.findall(r"\.vgpr_count:\s*(\d+)", code)[-1]),
        "shared": binary.metadata.shared,
        "spills": spills,
        "programs": None,
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "loads": len(re.findall(r"\b(?:global|buffer)_load_", code)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
        "stores": len(re.findall(r"\b(?:global|buffer)_store_", code)),
        "products": len(re.findall(r"\bv_mfma_", code)),
    }


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def configurations(quick: bool) -> Iterator[tuple[str, str, torch.dtype, int]]:
    """(target, loss, dtype, classes). Quick: one way through each pass. Else every tile and every loss for one target,
    and every loss for the others."""
    halves, full = torch.bfloat16, torch.float32
    if quick:
        yield from (("sm_90", "cross_entropy", dtype, CLASSES) for dtype in (halves, full))
        for loss in ("mixed_cross_entropy", "dsc_one_vs_rest", "focal, few rows", "statistics, weighted"):
            yield "sm_90", loss, halves, CLASSES
        for loss in ("focal, in one", "dsc_one_vs_rest, product", "mixed_cross_entropy, product"):
            yield "sm_90", loss, halves, CLASSES
        for loss in ("focal", "focal, product"):
            yield from ((target, loss, halves, CLASSES) for target in ("sm_80", "sm_100", "gfx942"))
        return
    tiles = [*sorted({*launch.TILES, *launch.CLASS_TILES} - {2**31}), CLASSES]
    for dtype in (halves, full, torch.float64):
        for classes in tiles:
            for loss in ("cross_entropy", "dsc_one_vs_rest", "class_sums"):
                yield "sm_90", loss, dtype, classes
    for loss in ("focal, few rows", "statistics, weighted", "cross_entropy, weighted", "dsc_one_vs_rest, weighted"):
        yield from (("sm_90", loss, dtype, CLASSES) for dtype in (halves, full))
    for loss in ("cross_entropy, in one", *(f"{loss}, product" for loss in LOSSES)):
        yield from (("sm_90", loss, dtype, CLASSES) for dtype in (halves, full))
    for loss in LOSSES:
        if loss not in ("cross_entropy", "dsc_one_vs_rest"):
            yield from (("sm_90", loss, dtype, CLASSES) for dtype in (halves, full))
    for target in ("sm_80", "sm_100", "gfx942"):
        for loss in (*LOSSES, "class_sums", "cross_entropy, in one", "cross_entropy, product"):
            yield target, loss, halves, CLASSES


def markdown(rows: list[Compiled]) -> str:
    lines = ["# What the compiler makes of the Triton kernels", "", NOTES.format(version=triton.__version__)]
    for target in dict.fromkeys(row.target for row in rows):
        head = ("kernel", "loss", "dtype", "classes", "rows × columns", "registers", "shared", "spills", "programs",
                "16-byte loads", "stores", "products")  # fmt: skip
        lines += [f"## {target}", "", _line(head), _line(["---"] * 3 + ["---:"] * (len(head) - 3))]
        lines += [_line(_cells(row)) for row in rows if row.target == target]
        lines.append("")
    return "\n".join(lines)


def _cells(row: Compiled) -> list[str]:
    numbers = (row.registers, row.shared, row.spills, "-" if row.programs is None else row.programs)
    access = (f"{row.wide_loads} of {row.loads}", f"{row.wide_stores} of {row.stores}")
    return [row.kernel, row.loss, row.dtype, str(row.classes), row.tile, *map(str, numbers), *access, str(row.products)]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one way through each pass: half a minute")
    parser.add_argument("--only", choices=("triton", "cuda"), help="leave the other part of the table as it is")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON and write nothing")
    options = parser.parse_args(arguments)
    parts = OUTPUT.read_text(encoding="utf-8").split("\n# ") if OUTPUT.exists() else []
    kept = {("cuda" if "nvcc" in part.splitlines()[0] else "triton"): part for part in parts}
    cuda = kept.get("cuda")
    if options.only != "triton" and not options.json:
        if compile_cuda.unavailable() is None:
            cuda = "\n".join(compile_cuda.markdown(compile_cuda.compile_all()))
        else:
            print(f"the CUDA kernels are left as they are: {compile_cuda.unavailable()}", file=sys.stderr)
    if options.only == "cuda":
        _write(kept.get("triton"), cuda)
        return 0
    if backend.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled")
    rows: dict[Compiled, None] = {}
    for configuration in configurations(options.quick):
        if not options.json:
            print(*configuration, file=sys.stderr)
        rows |= dict.fromkeys(compile_for(*configuration))
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    _write(markdown(list(rows)), cuda)
    return 0


def _write(*parts: str | None) -> None:
    OUTPUT.parent.mkdir(exist_ok=True)
    text = "\n\n".join(f"# {part.removeprefix('# ').strip()}" for part in parts if part)
    OUTPUT.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {os.path.relpath(OUTPUT)}")


if __name__ == "__main__":
    sys.exit(main())
