"""On a machine with a GPU: runs the tests marked `gpu`, then times the losses beside their floors and their peers, and
lets compute-sanitizer look at a small run where it is installed.

Row losses are held against 1.5 times copy_() of the logits, linear ones against their three matrix products alone. All
candidates of a case have their turn in each round, with the L2 cache overwritten before and then once more without;
medians are reported, forward and backward together. A peer that is not installed, or fails, is named with its reason.
What the time does not allow for is left out, and named too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss as fl
from fusedloss import backends, ops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
PACKAGES = ("fusedloss", "torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy")
ROUNDS = 9
FLUSH_BYTES = 256 * 2**20  # beyond any L2 cache

#: (rows, classes, dtype) and (rows, features, classes), the most telling first.
ROW_CASES = [
    (rows, classes, dtype)
    for rows in (8192, 512)
    for classes in (32000, 128256, 262144)
    for dtype in (torch.bfloat16, torch.float32)
]
LINEAR_CASES = [
    (rows, features, classes)
    for rows in (4096, 1024, 16384)
    for features in (512, 4096, 1024)
    for classes in (32000, 128256)
]
QUICK_ROW_CASES, QUICK_LINEAR_CASES = ROW_CASES[:3], LINEAR_CASES[:2]

NOTES = """\
Medians of {rounds} rounds at most in which all have their turn, forward and backward, on one stream.

- *ms*: with a cold L2 cache; *hot*: right after another turn of the same.
- *floor*: of a row loss 1.5 × `copy_()` of its logits; of a linear one the three matrix products of its shapes, cold.
- *GB/s*: of the 3 bytes per byte of logits that a forward and a separate backward have to move.
- *triton*, *cuda*: that `impl`. "cuda" makes loss and gradient of one read, and so has 2 bytes per byte to move; *one
  read* is its kernel alone.
- *memory*: the most that is allocated beyond the inputs, in MiB.
"""

Step = Callable[[], object]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cases: two minutes")
    parser.add_argument("--no-tests", action="store_true", help="only the benchmarks")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_report: there is no GPU that torch can use; nothing was tested or timed", file=sys.stderr)
        return 1
    deadline = time.monotonic() + (100 if options.quick else 440)
    tests = None if options.no_tests else run_tests()
    report = measure(deadline, options.quick) | {"tests": tests}
    report["sanitizer"] = None if options.no_tests else run_sanitizer()
    output = RESULTS / slug(report["device"])
    RESULTS.mkdir(exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(f"wrote {output}.json and {output}.md")
    if tests is not None and not tests["passed"]:
        print(f"gpu_report: tests FAILED: {tests['summary']}", file=sys.stderr)
        return 1
    return 0


def run_tests() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-m", "gpu", "-x", str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout[-4000:])
    return {"passed": done.returncode == 0, "summary": (done.stdout.strip().splitlines() or [done.stderr])[-1]}


#: Every kernel on small logits, forward and backward, for compute-sanitizer.
SMALL_RUN = """
import torch, fusedloss as fl
from fusedloss import backends
device = torch.device("cuda")
for impl in backends.LINEAR_IMPLS:
    if impl == "reference" or backends.unavailable(impl, device):
        continue
    for rows, classes in ((9, 33), (3, 5001)):
        hidden, weight = (torch.randn(n, 24, device=device, requires_grad=True) for n in (rows, classes))
        target = torch.randint(classes, (rows,), device=device)
        fl.linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, impl=impl).backward()
        fl.linear_dsc_loss(hidden, weight, target, impl=impl).backward()
        if impl in backends.IMPLS:
            logits = (hidden @ weight.t()).detach().requires_grad_()
            (fl.mixed_cross_entropy(logits, target, alpha=0.3, top_k=2, impl=impl) / 2).backward()
            fl.dsc_loss(logits, target, level="class", impl=impl).backward()
torch.cuda.synchronize()
"""


def run_sanitizer() -> dict[str, str] | None:
    """What each of its tools says of a small run; None where there is no compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return None
    # Memory of its own for each tensor, so that what lies beyond one belongs to none.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    verdicts = {}
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_RUN]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        except subprocess.TimeoutExpired:
            verdicts[tool] = "not finished after two minutes"
            continue
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line] or done.stderr.strip().splitlines()
        verdicts[tool] = lines[-1].strip("= ") if lines else f"exit status {done.returncode}"
    return verdicts


def measure(deadline: float, quick: bool) -> dict[str, Any]:
    rows, linears = (QUICK_ROW_CASES, QUICK_LINEAR_CASES) if quick else (ROW_CASES, LINEAR_CASES)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "versions": {name: version(name) for name in PACKAGES},
        "row": [],
        "linear": [],
        "left_out": [],
    }
    # In turn, so that a short time still sees both.
    cases: list[tuple[str, tuple[Any, ...]]] = []
    for i in range(max(len(rows), len(linears))):
        cases += [("row", rows[i])] if i < len(rows) else []
        cases += [("linear", linears[i])] if i < len(linears) else []
    for kind, case in cases:
        if time.monotonic() > deadline:
            report["left_out"].append(f"{kind} {' × '.join(str(x).removeprefix('torch.') for x in case)}")
            continue
        report[kind].append((row_case if kind == "row" else linear_case)(*case, deadline))
        torch.cuda.empty_cache()
    return report


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def row_case(rows: int, classes: int, dtype: torch.dtype, deadline: float) -> dict[str, Any]:
    original = torch.randn(rows, classes, device="cuda", dtype=dtype)
    # Computed logits: a leaf's memory is not for gradients to take.
    logits = torch.zeros_like(original).add_(original.new_zeros((), requires_grad=True))
    other = torch.empty_like(original)
    target = torch.randint(classes, (rows,), device="cuda")

    def reset() -> None:
        with torch.no_grad():
            logits.copy_(original)

    def of(loss: Callable[..., Tensor], **options: Any) -> Step:
        return lambda: torch.autograd.grad(loss(logits, target, **options), logits)

    candidates: dict[str, Callable[[], Step]] = {
        "copy": lambda: lambda: other.copy_(original),
        "cross_entropy": lambda: of(fl.cross_entropy),
        "cross_entropy in place": lambda: of(fl.cross_entropy, inplace_backward=True),
        "focal_loss": lambda: of(fl.focal_loss),
        "cross_entropy triton": lambda: of(fl.cross_entropy, impl="triton"),
        "cross_entropy cuda": lambda: of(fl.cross_entropy, impl="cuda"),
        "focal_loss cuda": lambda: of(fl.focal_loss, impl="cuda"),
        "one read cuda": lambda: lambda: one_read(logits.detach(), target),
        "mixed_cross_entropy": lambda: of(fl.mixed_cross_entropy, alpha=0.25),
        "dsc_loss": lambda: of(fl.dsc_loss),
        "F.cross_entropy": lambda: of(F.cross_entropy),
        "torch.compile": lambda: of(torch.compile(F.cross_entropy)),
        "liger-kernel": lambda: of(_peer("liger_kernel.transformers", "LigerCrossEntropyLoss")()),
        "quack-kernels": lambda: of(_peer("quack.cross_entropy", "cross_entropy"), reduction="mean"),
    }
    result = contest(candidates, reset, deadline)
    floor = 1.5 * result["seconds"]["copy"]
    moved = 3 * original.nbytes
    return {"rows": rows, "classes": classes, "dtype": str(dtype)[6:], "floor": floor, "bytes": moved, **result}


def one_read(logits: Tensor, target: Tensor) -> object:
    """Losses, and the gradient in the logits' place."""
    backends.resolve("cuda", logits.device)
    names = ("cross_entropy", False, 0, "cuda")
    return ops.row_loss_gradient_(logits, target, None, None, [], None, None, *names)


def linear_case(rows: int, features: int, classes: int, deadline: float) -> dict[str, Any]:
    dtype = torch.bfloat16
    hidden = torch.randn(rows, features, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(classes, features, device="cuda", dtype=dtype) / features**0.5).requires_grad_()
    target = torch.randint(classes, (rows,), device="cuda")
    h, w = hidden.detach(), weight.detach()

    def products() -> None:
        logits = h @ w.t()
        logits @ w
        logits.t() @ h

    def reset() -> None:
        hidden.grad = weight.grad = None

    def of(loss: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Step:
        return lambda: loss(*inputs, **options).backward()

    def eager(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, y).float(), t)

    inputs = (hidden, weight, target)

    def evaluation(impl: str | None) -> Step:
        def step() -> None:
            with torch.no_grad():
                fl.linear_cross_entropy(*inputs, impl=impl)

        return step

    candidates: dict[str, Callable[[], Step]] = {
        "products": lambda: products,
        "linear_cross_entropy": lambda: of(fl.linear_cross_entropy, *inputs),
        "linear_cross_entropy cuda": lambda: of(fl.linear_cross_entropy, *inputs, impl="cuda"),
        "linear_focal_loss": lambda: of(fl.linear_focal_loss, *inputs),
        "linear_cross_entropy fused": lambda: of(fl.linear_cross_entropy, *inputs, impl="triton_fused"),
        "linear_cross_entropy evaluated": lambda: evaluation(None),
        "linear_cross_entropy evaluated fused": lambda: evaluation("triton_fused"),
        "eager": lambda: of(eager, *inputs),
        "torch.compile": lambda: of(torch.compile(eager), *inputs),
        "F.linear_cross_entropy": lambda: of(_peer("torch.nn.functional", "linear_cross_entropy"), *inputs),
        "liger-kernel": lambda: of(
            _peer("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(), weight, hidden, target
        ),
        "cut-cross-entropy": lambda: of(_peer("cut_cross_entropy", "linear_cross_entropy"), *inputs),
        "quack-kernels": lambda: of(_peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy"), *inputs),
    }
    result = contest(candidates, reset, deadline)
    floor = result["seconds"]["products"]
    return {"rows": rows, "features": features, "classes": classes, "dtype": str(dtype)[6:], "floor": floor, **result}


def _peer(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def contest(candidates: dict[str, Callable[[], Step]], reset: Callable[[], None], deadline: float) -> dict[str, Any]:
    """Median seconds with a cold cache and a hot one and peak MiB of each, and the reasons of those that cannot run."""
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    memory: dict[str, float] = {}
    for name, make in candidates.items():
        try:
            step = make()
            for _ in range(2):  # compiles; the second is the one that counts
                reset()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                torch.cuda.synchronize()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            steps[name] = step
        except Exception as error:  # a peer's failure is its own
            failed[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
            if name in ("copy", "products") or module_is_ours(name):
                raise
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    cold: dict[str, list[float]] = {name: [] for name in steps}
    hot: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        if turn >= 3 and time.monotonic() > deadline:
            break
        for name, step in steps.items():
            reset()
            flush.zero_()
            cold[name].append(_timed(step))
            reset()
            hot[name].append(_timed(step))
    medians = ({name: median(times) for name, times in turns.items()} for turns in (cold, hot))
    return {**dict(zip(("seconds", "hot"), medians, strict=True)), "memory": memory, "failed": failed}


def _timed(step: Step) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def module_is_ours(name: str) -> bool:
    """Whether the candidate is a loss of this package, whose failure must not be a footnote.

    Kernels that nobody built are no failure.
    """
    loss, *how = name.split(" ")
    return hasattr(fl, loss) and not any(impl in how and backends.unavailable(impl) for impl in ("triton", "cuda"))


def slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


def markdown(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items() if found)
    missing = ", ".join(name for name, found in report["versions"].items() if not found)
    lines = [f"# Benchmarks: {report['device']}", "", f"Python {report['python']}, CUDA {report['cuda']}, {versions}."]
    if missing:
        lines.append(f"Not installed: {missing}.")
    tests = report["tests"]
    lines += [
        "",
        "Tests on this GPU: " + ("not run." if tests is None else f"{_verdict(tests)}: {tests['summary']}"),
        "",
    ]
    if report["sanitizer"] is None:
        lines += ["compute-sanitizer: not run.", ""]
    else:
        lines += [*(f"- compute-sanitizer, {tool}: {found}" for tool, found in report["sanitizer"].items()), ""]
    lines += [NOTES.format(rounds=ROUNDS)]
    for kind, title in (("row", "Row losses"), ("linear", "Linear forms")):
        if report[kind]:
            lines += [f"## {title}", "", *_table(kind, report[kind]), ""]
    lines += _timings(report)
    failures = {f"{name}: {why}" for case in report["row"] + report["linear"] for name, why in case["failed"].items()}
    if failures:
        lines += ["Could not run:", "", *(f"- {failure}" for failure in sorted(failures)), ""]
    if report["left_out"]:
        lines += ["Left out for time:", "", *(f"- {case}" for case in report["left_out"]), ""]
    return "\n".join(lines)


def _timings(report: dict[str, Any]) -> list[str]:
    """What this report says for `TIMINGS` in fusedloss/backends."""
    found: dict[str, list[str]] = {}
    for case in report["row"]:
        seconds = [case["seconds"].get(f"cross_entropy {impl}") for impl in ("triton", "cuda")]
        if case["rows"] == 8192 and None not in seconds:
            times = ", ".join(f"{1e3 * s:.3g}" for s in seconds)
            found.setdefault(case["dtype"], []).append(f"Timing({case['classes']}, {times})")
    if not found:
        return []
    major, minor = report["capability"]
    entries = (f"({major}, {minor}, torch.{dtype}): ({', '.join(timings)},)," for dtype, timings in found.items())
    about = "The default on such a GPU follows from these lines in `TIMINGS` of fusedloss/backends/__init__.py:"
    return ["## Timings", "", about, "", "```python", f"# {report['device']}", *entries, "```", ""]


def _verdict(tests: dict[str, Any]) -> str:
    return "passed" if tests["passed"] else "FAILED"


def _table(kind: str, cases: list[dict[str, Any]]) -> list[str]:
    last = "GB/s" if kind == "row" else "memory, MiB"
    head = ("shape", "dtype", "candidate", "ms", "/ floor", "hot", last)
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * 4)]
    for case in cases:
        shape = " × ".join(str(case[name]) for name in ("rows", "features", "classes") if name in case)
        for name, seconds in case["seconds"].items():
            figure = case["bytes"] / seconds / 1e9 if kind == "row" else case["memory"][name]
            if name == "copy":
                figure *= 2 / 3  # which reads and writes once
            cells = (
                shape,
                case["dtype"],
                name,
                f"{seconds * 1e3:.3g}",
                f"{seconds / case['floor']:.2f}",
                f"{case['hot'][name] * 1e3:.3g}",
                f"{figure:.0f}",
            )
            lines.append(_line(cells))
    return lines


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
