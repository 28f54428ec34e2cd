"""What Triton makes of its kernels, as they are launched, for GPUs that need not be here.

The passes run on CPU tensors, whose logits are never read, with a launch that compiles instead; so the kernels get
just the constants, types and alignments that they get on a GPU. Registers, shared memory and instructions are read from
the binary with the cuobjdump of the triton wheel (for AMD from the assembler text).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import sass
import torch
import triton
import tritons
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedloss.backends import BACKENDS
from fusedloss.backends import triton as backend
from fusedloss.definition.projection import Form
from fusedloss.definition.rows import Job, Rows, Spec
from fusedloss.definition.statistics import ALL_MOMENTS
from fusedloss.triton_kernels import epilogues, launch

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Epilogues with the number of their parameters and of the top classes that they look at.
LOSSES = {
    **{name: (x.params, 2 if name == "mixed_cross_entropy" else 0) for name, x in epilogues.ROW_EPILOGUES.items()},
    **{name: (x.params, 1) for name, x in epilogues.CLASS_TERMS.items()},
}
PAIRS = epilogues.PAIR_TERMS
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ROWS, CLASSES, DEPTH = 4096, 32000, 1024
ODD_CLASSES = 50257  # whose rows begin anywhere
MANY_CLASSES = 128256  # with the widest tile where loss and gradient are made in one
FEW_ROWS = 8  # which are split over programs
REGISTERS, WARPS = 65536, 64  # of a multiprocessor, sm_80 to sm_100

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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
    per_logit: float | None = None  # and the next: of the main loops together, see sass.Count
    barriers: int = 0
    shuffles: int = 0
    apart: int = 0
    around: int = 0
    once: int = 0
    tails: int = 0
    error: str = ""  # why the compiler made nothing


FIGURES = [
    field.name for field in fields(Compiled) if field.default is MISSING and field.name not in Launch.__annotations__
]


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


def run_passes(loss: str, dtype: torch.dtype, classes: int) -> None:
    """A loss and its gradient, or "statistics": all that there are. After a comma "plain": without label smoothing,
    "few rows", "weighted" by class, "in one": a chunk's loss and gradient, which is scaled, "candidates", "product": of
    hidden states, or "whole product": with bias, softcap and masked targets too; "moments" and "moments product": with
    these, and a temperature."""
    loss, _, variant = loss.partition(", ")
    if loss in PAIRS:
        return _run_pair(loss, variant, dtype, classes)
    count = FEW_ROWS if variant == "few rows" else ROWS
    is_term, over_rows, is_loss = loss in epilogues.CLASS_TERMS, loss.endswith("over_rows"), loss in LOSSES
    parameters, top_k = LOSSES.get(loss, (0, 2))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    logits, target = torch.empty(count, classes, dtype=dtype), torch.zeros(count, dtype=torch.int64)
    scalar, of_rows, of_classes, scalars = (torch.empty(size, dtype=compute) for size in ((), count, classes, 4))
    candidates = torch.zeros(count, 3, dtype=torch.int64) if variant == "candidates" or not is_loss else None
    moments = ALL_MOMENTS if variant.startswith("moments") else 0
    mean = not (is_term or moments or variant.startswith("plain"))
    rows = Rows.of(
        logits,
        target,
        of_classes if variant == "weighted" or over_rows else None,
        candidates,
        [*[scalar] * (parameters - over_rows), *[of_rows] * over_rows],
        scalars if moments or (mean and is_loss) else None,
    )
    spec = Spec("triton", loss, 0 if variant == "candidates" else top_k, mean=mean, moments=moments)
    spec = spec._replace(form=Form(tempered=moments > 0))
    if variant.endswith("product"):
        whole = variant.startswith("whole")
        hidden, weight = (torch.empty(n, DEPTH, dtype=dtype) for n in (count, classes))
        rows = rows._replace(hidden=[hidden], weight=[weight], bias=logits[0] if whole else None)
        spec = spec._replace(
            impl="triton_fused", form=spec.form._replace(softcap=30.0, mask_target=True) if whole else spec.form
        )
    run = BACKENDS[spec.impl]
    job = Job.new(rows, spec if is_loss else spec._replace(epilogue="", below=True))
    upstream, saved = scalar.expand(count) if is_loss else None, (job.statistics, job.index)
    if variant.endswith("in one"):
        job.grad, job.upstream = logits, upstream
        run.with_gradient(job)
        if variant == "in one":
            run.scale_(logits, scalar)
        return
    if over_rows:
        run.forward(Job(rows._replace(class_weight=None, params=[]), spec._replace(epilogue=""), *saved))
        summed = rows._replace(params=rows.params[:-1])
        run.sums(Job(summed, spec._replace(over_rows=True), *saved, upstream=upstream))
        run.terms(job)
    else:
        run.forward(job)
    if is_term and variant != "few rows" and not rows.is_linear:  # few rows are split in any case
        run.sums(Job(rows, spec, *saved))
    if not is_loss:
        job.coefficients = torch.empty(9 + job.spec.more_coefficients, count, dtype=compute)
    job.grad, job.upstream = torch.empty_like(logits), upstream
    if dtype == torch.float16:
        run.units_(job, scalar, scalars, scalars)
    run.backward(job)


def _run_pair(loss: str, variant: str, dtype: torch.dtype, classes: int) -> None:
    """Of two rows; "tempered": over a temperature, and with the sums for another rank."""
    tempered, count = variant == "tempered", ROWS
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scalar, scalars = torch.empty((), dtype=compute), torch.empty(4, dtype=compute)
    logits, target = torch.empty(count, classes, dtype=dtype), torch.zeros(count, dtype=torch.int64)
    second = torch.empty_like(logits, dtype=dtype if PAIRS[loss].of_logits else compute)
    rows = Rows.of(logits, target, None, None, [scalar] * PAIRS[loss].params, scalars if tempered else None)
    job = Job.new(rows._replace(teacher=[second]), Spec("triton", loss, form=Form(tempered=tempered)))
    run = BACKENDS["triton"]
    run.forward(job)
    if tempered:
        run.sums(Job(job.rows, job.spec, job.statistics, job.index))
    job.grad, job.upstream = torch.empty_like(logits), scalar.expand(count)
    run.backward(job)


def launches(
    target: str, loss: str, dtype: torch.dtype, classes: int, only: str = ""
) -> Iterator[tuple[Launch, Callable[[], Any]]]:
    """The kernels of `run_passes` for that GPU, or one of them, or those named "pair_...", each with a function that
    returns its binary."""
    found: list[tuple[Launch, Callable[[], Any]]] = []

    def find_instead(kernel: Any, grid: tuple[int, ...], device: Any, *arguments: Any, **constants: Any) -> None:
        depth, registers = getattr(constants.get("SOURCE"), "depth", 0), constants.get("maxnreg")
        role = next((f", {role.lower()}" for role in ("SPLIT", "MERGE") if constants.get(role)), "")
        shown = f"{constants.get('ROWS', 1)} × {constants['BLOCK']}{f' × {depth}' * bool(depth)}"
        shown += f", {constants['num_warps']} warps{f', at most {registers}' * bool(registers)}"
        one = Launch(target, f"{kernel.fn.__name__}{role}", loss, str(dtype)[6:], classes, shown)
        if only in ("", one.kernel, one.kernel.partition("_")[0]):
            call = partial(kernel.warmup, *arguments, grid=grid, **constants)
            found.append((one, call))

    launched: Callable[..., None] = backend._launch
    driver.set_active(_Driver(TARGETS[target]))  # type: ignore[arg-type]
    backend._launch = find_instead
    try:
        run_passes(loss, dtype, classes)
    finally:
        backend._launch = launched
    yield from found


def compile_for(*configuration: Any) -> list[Compiled]:
    return [_compiled(one, compiled) for one, compiled in launches(*configuration)]


def _compiled(one: Launch, compiled: Callable[[], Any]) -> Compiled:
    try:
        binary = compiled()
    except RuntimeError as error:  # a pass of the compiler's that failed: the report goes on, and names it
        return Compiled(**asdict(one), **dict.fromkeys(FIGURES, 0), error=str(error).splitlines()[0])
    return Compiled(**asdict(one), **resources(one, binary))


def resources(one: Launch, binary: Any) -> dict[str, Any]:
    if "cubin" not in binary.asm:
        return _amd_resources(binary)
    warps, code = binary.metadata.num_warps, _code_resources(binary.asm["cubin"])
    of_program = -(-code["registers"] // 8) * 8 * 32 * warps
    programs = min(REGISTERS // of_program, WARPS // warps)
    loops = main_loops(one, binary)
    counts: dict[str, Any] = {"per_logit": round(sum(loop.per_logit for loop in loops), 2)} if loops else {}
    for name in ("barriers", "shuffles", "apart", "around"):
        counts[name] = sum(getattr(loop, name) for loop in loops)
    for name in ("once", "tails"):  # of the whole program
        counts[name] = max((getattr(loop, name) for loop in loops), default=0)
    return code | {"shared": binary.metadata.shared, "scalars": 0, "programs": programs} | counts


def main_loops(one: Launch, binary: Any) -> list[sass.Count]:
    """Nothing where other things than logits are loaded 16 bytes at a time too."""
    if re.search("product|weighted|over_rows", one.loss):
        return []
    return sass.count(disassembled(binary.asm["cubin"]), ITEMSIZES[one.dtype])


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
    }


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def quick() -> Iterator[tuple[Any, ...]]:
    """What `launches` takes, for the tests: what is held to a bound and, unless with the oldest Triton, one way through
    each pass, and some of each target and dtype. `make compile-report` takes every kernel."""
    halves, full, wide = torch.bfloat16, torch.float32, torch.float64
    yield from (("sm_90", "cross_entropy, plain", dtype, CLASSES) for dtype in (halves, full))
    yield from (("sm_90", "mixed_cross_entropy, plain", dtype, CLASSES, "statistics_pass") for dtype in (halves, full))
    yield "sm_90", "dsc_one_vs_rest", halves, CLASSES
    yield "sm_90", "forward_kl", halves, CLASSES, "pair"
    yield "sm_90", "mixture_kl", halves, CLASSES, "pair"
    if triton.__version__ == tritons.OLDEST:
        return
    for role in ("split", "merge"):
        yield "sm_90", "focal, few rows", halves, CLASSES, f"statistics_pass, {role}"
    yield "sm_90", "cross_entropy, in one", halves, CLASSES
    yield "sm_90", "cross_entropy, in one", halves, CLASSES, "scale_pass"
    yield "sm_90", "cross_entropy", torch.float16, CLASSES, "units_pass"
    yield "sm_90", "dsc_one_vs_rest, product", halves, CLASSES
    yield "sm_90", "dsc_over_rows", halves, ODD_CLASSES, "class_sums_pass"
    yield "sm_90", "dsc_over_rows", halves, 64, "top_rest_pass"
    yield "sm_90", "dsc_over_rows", wide, 16, "class_terms_pass"
    yield "sm_90", "statistics, moments", halves, ODD_CLASSES, "statistics_pass"
    yield "sm_90", "statistics, moments", halves, CLASSES, "gradient_pass"
    for target in ("sm_80", "sm_100", "gfx942"):
        yield target, "cross_entropy, whole product", halves, CLASSES, "statistics_pass, split"
        yield target, "focal", halves, CLASSES, "statistics_pass"
    yield "sm_80", "dsc_over_rows", halves, CLASSES, "class_terms_pass"
    yield "gfx942", "focal", halves, CLASSES, "gradient_pass"


def counted() -> Iterator[tuple[Any, ...]]:
    """What `launches` takes, of the main kernels, whose instructions are shown for each logit."""
    for dtype in (torch.bfloat16, torch.float32):
        for loss in ("cross_entropy", "mixed_cross_entropy"):
            yield "sm_90", f"{loss}, plain", dtype, CLASSES
        yield "sm_90", "cross_entropy, plain in one", dtype, CLASSES
        for loss in ("dsc_one_vs_rest", "statistics, moments"):
            yield "sm_90", loss, dtype, CLASSES
        for loss in ("forward_kl", "mixture_kl"):
            yield "sm_90", loss, dtype, CLASSES, "pair"


def everything() -> Iterator[tuple[Any, ...]]:
    """What `launches` takes. For sm_90 every tile, and with the largest every loss and variant; for the others every
    tile of 16 and 32 bits too, of the variants those that need the most registers, and every loss of 16 bits. With the
    oldest Triton only 16 bits and the largest tile of these others."""
    yield from counted()
    halves, full, wide = torch.bfloat16, torch.float32, torch.float64
    by_tile = ("cross_entropy", "dsc_one_vs_rest", "dsc_over_rows", "statistics, moments")
    others = [loss for loss in LOSSES if loss not in by_tile]
    tiles = [*sorted({*launch.TILES, *launch.CLASS_TILES} - {2**31}), CLASSES, ODD_CLASSES]
    hard = (
        "dsc_one_vs_rest, few rows",
        "statistics, weighted",
        "cross_entropy, in one",
        *(f"{loss}, whole product" for loss in ("cross_entropy", "mixed_cross_entropy", "dsc_one_vs_rest")),
        "cross_entropy, moments product",
    )
    variants = (
        *hard,
        "focal, few rows",
        *(f"{loss}, weighted" for loss in ("cross_entropy", "dsc_one_vs_rest")),
        "mixed_cross_entropy, candidates",
        *(f"{loss}, product" for loss in LOSSES if not loss.endswith("over_rows")),
    )
    yield "sm_90", "mixture_kl", wide, CLASSES, "pair"
    yield "sm_90", "mixture_kl, tempered", halves, CLASSES, "pair"
    yield "sm_90", "reverse_kl", full, CLASSES, "pair"
    yield "sm_90", "soft_targets", halves, CLASSES, "pair"
    oldest = triton.__version__ == tritons.OLDEST
    for target in TARGETS:
        yield target, "mixture_kl", halves, CLASSES, "pair"
        first = target == "sm_90"
        if oldest and not first:
            yield from ((target, loss, halves, CLASSES) for loss in (*by_tile, *hard))
            continue
        for dtype in (halves, full, wide):
            sizes = tiles if first or dtype != wide else (CLASSES, ODD_CLASSES)
            yield from ((target, loss, dtype, classes) for classes in sizes for loss in by_tile)
            if first or dtype == halves:
                yield from ((target, loss, dtype, CLASSES) for loss in others)
            yield from ((target, loss, dtype, CLASSES) for loss in (variants if first else hard))
            yield target, "cross_entropy, in one", dtype, MANY_CLASSES
        for loss in (*by_tile, "mixed_cross_entropy, product", "dsc_one_vs_rest, product"):
            yield target, loss, torch.float16, CLASSES
