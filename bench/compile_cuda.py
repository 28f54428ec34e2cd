"""What nvcc makes of the CUDA kernels, for GPUs that need not be here."""

from __future__ import annotations

import json
import operator
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from fusedloss.backends import BACKENDS, cuda

KERNELS = Path(__file__).parents[1] / "csrc/cuda"
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
TARGETS = ("sm_90a", "sm_80", "sm_100")
#: Shared memory of a block and of a multiprocessor of sm_90, in bytes.
BLOCK, MULTIPROCESSOR = 227 * 1024, 228 * 1024
_KERNEL = re.compile(r"(row|pair|class_sums|top_rest|scale)_pass")
#: The row kernel of losses that look at other classes than the target, or at the mean.
WITH_PICKS = "picks or mean"
#: That of entropy and power, too.
WITH_MOMENTS = "moments"
CLASSES = (1000, 32000, 128256, 262144)


@dataclass(frozen=True)
class Compiled:
    """A kernel as a machine would run it."""

    target: str
    kernel: str
    loss: str
    dtype: str
    registers: int
    stack: int  # bytes
    spills: int  # instructions that move registers to local memory and back
    wide_copies: int  # of 16 bytes into shared memory
    wide_stores: int
    #: Instructions for each logit of the loops that the plain row kernel runs through: the scan, and the gradient.
    scan: float | None = None
    gradient: float | None = None


def compile_all(pairs: Iterable[tuple[str, str]] | None = None) -> list[Compiled]:
    """For all pairs of target and dtype, or these, as the build does it, with -O3."""
    pairs = product(TARGETS, DTYPES) if pairs is None else pairs
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_compile, dtype, target, Path(folder)) for target, dtype in pairs]
        return [kernel for job in jobs for kernel in job.result()]


def _compile(dtype: str, target: str, folder: Path) -> list[Compiled]:
    cubin = folder / f"{dtype}.{target}.cubin"
    options = ["-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch={target}", "-o", str(cubin)]
    log = _run("nvcc", *options, str(KERNELS / f"{dtype}.cu"))
    listing = _run(_cuobjdump() or "", "-sass", str(cubin))
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", listing, re.S))
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        log,
        re.S,
    )
    assert len(report) == len(code) > 0, log
    return [
        Compiled(
            target,
            _KERNEL.findall(name)[0],
            _loss(name),
            dtype,
            int(registers),
            int(stack),
            len(re.findall(r"\b(?:LDL|STL)\b", code[name])) + int(spilled),
            len(re.findall(r"\bLDGSTS\.E\.[\w.]*128\b", code[name])),
            len(re.findall(r"\bSTG\.E[\w.]*\.128\b", code[name])),
            *(_per_logit(code[name], cuda.ITEM_BYTES // DTYPES[dtype]) if "vLi0E" in name else ()),
        )
        for name, stack, spilled, registers in report
    ]


_EPILOGUES = BACKENDS["cpu"].epilogues
#: Those over the classes and those of two rows, by the names of their functors.
TERMS = {name.title().replace("_", ""): name for name in (*_EPILOGUES.classes, *_EPILOGUES.pairs)}


def _loss(name: str) -> str:
    term = re.search(rf"\d({'|'.join(TERMS)})E", name)
    if term is None:
        return (
            {"0": "", "7": WITH_PICKS, "15": WITH_MOMENTS}[asked[1]] if (asked := re.search(r"vLi(\d+)E", name)) else ""
        )
    return TERMS[term[1]]


#: What a thread does with a tile: packs into shared memory, packs out of it, packs to the gradient, exponentials.
_WORK = [
    re.compile(x) for x in (r"\bLDGSTS\.E[\w.]*\.128\b", r"\bLDS\.128\b", r"\bSTG\.E[\w.]*\.128\b", r"\bMUFU\.EX2\b")
]
_JUMP = re.compile(r"\bBRA(?:\.U|\.CONV|\.INC\w*)*\s.*?0x([0-9a-f]+)")


def _per_logit(code: str, items: int) -> list[float | None]:
    """Instructions of the scan and of the gradient, for each of the `items` logits of a thread and tile."""
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    number = {at: i for i, (at, _) in enumerate(lines)}
    jumps = [number[int(to[1], 16)] if (to := _JUMP.search(line)) else None for _, line in lines]
    loops = [(head, end) for end, head in enumerate(jumps) if head is not None and head < end < head + 1000]
    found = []
    for work in ((2, 2, 0, items + 1), (0, 2, 2, items)):  # the scan has one more, by which it scales what it had
        counts = [count for head, end in loops if (count := _shortest(lines, jumps, head, end, work))]
        found.append(min(counts) / items if counts else None)
    return found


def _shortest(
    lines: Sequence[tuple[int, str]], jumps: Sequence[int | None], head: int, end: int, work: tuple[int, ...]
) -> int | None:
    """The shortest way through a loop that does that work: that of a whole tile of aligned rows.

    Of the loops within it none is run.
    """
    ways: dict[int, dict[tuple[int, ...], int]] = {head: {(0,) * len(work): 0}}
    for i in range(head, end + 1):
        line, to = lines[i][1], jumps[i]
        following = {i + 1} if to is None or line.startswith("@") else set()
        if to is not None and to > i:
            following.add(to)
        for done, count in ways.pop(i, {}).items():
            now = tuple(k + bool(pattern.search(line)) for k, pattern in zip(done, _WORK, strict=True))
            if i == end and now == work:
                return count + 1
            for k in following if all(map(operator.le, now, work)) else ():
                known = ways.setdefault(k, {})
                known[now] = min(known.get(now, count + 1), count + 1)
    return None


def _run(command: str, *arguments: str) -> str:
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr}")
    return done.stdout + done.stderr


def version() -> str:
    found = re.search(r"V([\d.]+)", _run("nvcc", "--version"))
    assert found is not None
    return found[1]


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    return None if _cuobjdump() else "there is no cuobjdump on PATH, nor triton, which brings one"


def _cuobjdump() -> str | None:
    triton = find_spec("triton")
    folders = triton.submodule_search_locations if triton and triton.submodule_search_locations else []
    return shutil.which("cuobjdump") or next((f"{f}/backends/nvidia/bin/cuobjdump" for f in folders), None)


def rows_of(kernels: Iterable[Compiled]) -> list[dict[str, object]]:
    found = version()
    return [{"nvcc": found} | asdict(kernel) for kernel in kernels]


def markdown(rows: Sequence[dict[str, str]]) -> list[str]:
    """Of a .csv file's lines: the kernel of all row losses on sm_90a, and how `plan` cuts a row."""
    head = ["dtype", "registers", "spills", "scan", "gradient", *(f"{classes} classes" for classes in CLASSES)]
    lines = [
        f"CUDA C++, the kernel of row losses without picks or a mean, by nvcc {rows[0]['nvcc']} for sm_90a. *scan* and",
        "*gradient*: instructions for each logit of an aligned row in the loop that copies and scans its tiles, and in",
        "the loop that writes its gradient. Under a number of classes: the parts of a row, each the work of a block,",
        "and how many blocks a multiprocessor holds.",
        "",
        f"| {' | '.join(head)} |",
        f"| --- {'| ---: ' * (len(head) - 1)}|",
    ]
    for row in rows:
        if (row["target"], row["kernel"], row["loss"]) == ("sm_90a", "row", ""):
            cuts = [_cut(row["dtype"], classes, int(row["registers"])) for classes in CLASSES]
            counts = [f"{float(row[name]):.1f}" if row.get(name) else "" for name in ("scan", "gradient")]
            lines.append(f"| {' | '.join([row['dtype'], row['registers'], row['spills'], *counts, *cuts])} |")
    return lines


def _cut(dtype: str, classes: int, registers: int) -> str:
    threads, parts, slots = cuda.plan(classes, DTYPES[dtype], BLOCK, True)
    size = slots * (threads * cuda.ITEM_BYTES + threads // 2) + cuda.OVERHEAD
    of_block = -(-registers // 8) * 8 * threads
    blocks = min(65536 // of_block, MULTIPROCESSOR // (size + 1024), 2048 // threads, 32)
    twice = slots * threads * cuda.ITEM_BYTES * parts < classes * DTYPES[dtype]
    return f"{parts}, {blocks}{', read twice' if twice else ''}"


if __name__ == "__main__":
    print(json.dumps([asdict(kernel) for kernel in compile_all()]))
    sys.exit()
