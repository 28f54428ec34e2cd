"""What needs tools beside PyTorch: compute-sanitizer, Nsight Compute, pytest."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from .bundle import ROOT
from .part import Part

#: The exit status of a check that has found something, and how its report names a kernel of this package.
FOUND = 9
OUR_KERNEL = re.compile(r"\bat .*_pass\b")

WORKLOAD = [sys.executable, str(Path(__file__).with_name("workload.py"))]


def sanitizer(part: Part) -> None:
    """Races and accesses out of bounds in a small run of every kernel; "cuda" first, whose code is our own."""
    tool = shutil.which("compute-sanitizer")
    device = str(part.device)
    if tool is None or part.rehearse:
        reason = "it is a rehearsal" if part.rehearse else "no compute-sanitizer on PATH"
        part.left_out("racecheck and memcheck", reason)
        return _try_alone(part, "small")
    from fusedloss import backends

    for impl in ("cuda", "triton"):
        if backends.unavailable(impl, part.device) is not None:
            part.left_out(f"memcheck and racecheck {impl}", str(backends.unavailable(impl, part.device)))
            continue
        # Memory of its own for each tensor, so that what lies beyond one belongs to none.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [tool, "--error-exitcode", str(FOUND), "--tool"]
        running = {
            check: subprocess.Popen(
                [*command, check, *WORKLOAD, impl, device, "small"],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for check in ("memcheck", "racecheck")
        }  # fmt: skip
        for check, process in running.items():
            what = f"{check} {impl}"
            try:
                said = process.communicate(timeout=max(1, part.left))[0]
            except subprocess.TimeoutExpired:
                process.kill()
                part.left_out(what, "it did not end in time")
                continue
            print(said, flush=True)
            report_check(part, what, process.returncode, said)


def report_check(part: Part, what: str, status: int, said: str) -> None:
    """Record what compute-sanitizer said: a failure only if it names a kernel of ours, and not one of cuBLAS's."""
    lines = said.strip().splitlines() or ["nothing"]
    summary = next((x for x in reversed(lines) if "SUMMARY" in x), lines[-1]).strip("= ")
    part.row(check=what, said=summary)
    ours = [x.strip("= ") for x in lines if OUR_KERNEL.search(x)]
    if status == FOUND and ours:
        part.failed(what, f"{summary}: {ours[0]}"[:300])
    elif status:
        part.left_out(what, f"exit status {status}{', which names no kernel of ours' * (not ours)}: {summary}")


def _try_alone(part: Part, size: str) -> None:
    """What the tool would have looked at."""
    with part.attempt(f"workload, {size}"):
        subprocess.run([*WORKLOAD, "triton", str(part.device), size], check=True, timeout=max(1, part.left))
        part.row(run=f"workload, {size}, alone", found="it ran")


#: Columns by the counters of Nsight Compute.
COUNTERS = {
    "gpu__time_duration.sum": "ns",
    "launch__registers_per_thread": "registers",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
}


def counters(part: Part) -> None:
    """Statistics and gradient in Triton, one read in CUDA, sums over the rows in both."""
    tool = shutil.which("ncu")
    if tool is None or part.rehearse:
        part.left_out("the counters", "it is a rehearsal" if part.rehearse else "no ncu on PATH")
        return _try_alone(part, "large")
    command = [tool, "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--metrics", ",".join(COUNTERS), "-k", "regex:statistics|gradient|row|sums|rest"]
    for impl in ("triton", "cuda"):
        with part.attempt(f"counters of {impl}", ours=False):
            whole = [*command, *WORKLOAD, impl, "cuda", "large"]
            done = subprocess.run(whole, capture_output=True, text=True, timeout=max(1, part.left))
            print(done.stdout, done.stderr, flush=True)
            found = counted(done.stdout)
            for cells in found:
                part.row(impl=impl, **cells)
            if not found:
                part.left_out(f"counters of {impl}", (done.stdout + done.stderr).strip().splitlines()[-1])


def counted(text: str) -> list[dict[str, str | float]]:
    """A row for each kernel of ncu's table, which has one for each counter."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, str | float]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[head:]))):
        cells = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"][:60]})
        with suppress(ValueError):
            cells[COUNTERS.get(line["Metric Name"], line["Metric Name"])] = float(line["Metric Value"].replace(",", ""))
    return list(kernels.values())


def tests(part: Part) -> None:
    """tests/test_gpu.py, CUDA first; what time does not allow for is cut, and what failed by then is known."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default"]
    command += ["--maxfail", "20", "--tb", "short"]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal"]
    if part.rehearse:
        runs = {"rehearsed": ["tests/test_cross_entropy.py", "-k", "not TestRowLoss"]}
    else:
        runs = {"cuda": ["tests/test_gpu.py", "-k", "cuda"]}
        runs["others"] = ["tests/test_gpu.py", "-k", "not cuda and not reference"]
    for name, chosen in runs.items():
        if part.late(f"tests: {name}"):
            continue
        log = part.output / f"tests-{name}.txt"
        with log.open("w") as said:
            process = subprocess.Popen([*command, *chosen], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
            try:
                status: int | None = process.wait(max(1, part.left))
            except subprocess.TimeoutExpired:
                process.kill()  # its workers leave with it, or with this process
                status = None
        report_tests(part, name, status, log.read_text(encoding="utf-8", errors="replace"))


def report_tests(part: Part, name: str, status: int | None, text: str) -> None:
    """From what `pytest -v` said, to its end or not (status None)."""
    # "tests/x.py::test PASSED [ 5%]", or with xdist "[gw0] [  5%] PASSED tests/x.py::test".
    found = re.findall(
        r"^(?:\[gw\d+\] \[ *\d+%\] (\w+) (\S+::.*)|(\S+::.*?) ([A-Z]+)(?: \(.*\))? +\[ *\d+%\])", text, re.M
    )
    outcomes = {test or other: verdict or word for verdict, test, other, word in found}
    counts = {word: list(outcomes.values()).count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    part.row(tests=name, **{word.lower(): count for word, count in counts.items()})
    for test, word in outcomes.items():
        if word in ("FAILED", "ERROR"):
            part.failed(test, word.lower())
    last = (text.strip().splitlines() or ["nothing"])[-1].strip("= ")
    if status is None:
        percent = max((int(x) for x in re.findall(r"\[ *(\d+)%\]", text)), default=0)
        part.left_out(f"tests: {name}", f"all but {percent} % of them, for time")
    elif status == 5:
        part.left_out(f"tests: {name}", f"none were there to run: {last}")
    elif status and not counts["FAILED"] + counts["ERROR"]:
        part.failed(f"tests: {name}", f"exit status {status}: {last}")
