"""On a machine with a GPU: whether the losses are right there, and how fast they are beside floors and peers.

The report has parts. Each is a process with a time limit of its own, so that a hang, a crash or a lost GPU ends one
part alone. What a part finds is on disk at once, as lines of JSON in results.jsonl; after each part its table is
printed and report.md is written anew, so that nothing is lost when the report is stopped. A later run of some parts
(`--only`) into the same folder replaces those alone.

`--rehearse` runs all of it on a CPU, with Triton's interpreter and tiny sizes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import faulthandler
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from gpu import bundle, part

ROOT = Path(__file__).parents[1]
SECONDS = 480


class Entry(NamedTuple):
    name: str
    seconds: int  # at most, of SECONDS
    function: str


#: In the order in which they run: what the rest is judged by, what must be right, speeds, and what takes long.
PARTS = (
    Entry("machine", 20, "gpu.machine:machine"),
    Entry("build", 100, "gpu.machine:build"),
    Entry("kernels", 60, "gpu.precompile:kernels"),
    Entry("ceilings", 30, "gpu.machine:ceilings"),
    Entry("correctness-triton", 60, "gpu.correctness:triton"),
    Entry("correctness-cuda", 40, "gpu.correctness:cuda"),
    Entry("correctness-fused", 40, "gpu.correctness:fused"),
    Entry("traps", 40, "gpu.correctness:traps"),
    Entry("sanitizer", 60, "gpu.tools:sanitizer"),
    Entry("tiles", 60, "gpu.tiles:tiles"),
    Entry("rows", 80, "gpu.tables:rows"),
    Entry("linear", 90, "gpu.tables:linear"),
    Entry("compiled", 45, "gpu.tables:compiled"),
    Entry("counters", 45, "gpu.tools:counters"),
    Entry("tests", 300, "gpu.tools:tests"),
)


def main(arguments: Sequence[str] | None = None, parts: Sequence[Entry] = PARTS, script: str = __file__) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [entry.name for entry in parts]
    parser.add_argument("--only", action="append", choices=names, metavar="PART", help=f"one of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, help=f"for all of it; default {SECONDS}, of a rehearsal as needed")
    parser.add_argument("--output", type=Path, help="a folder; default bench/results/<GPU>")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with an interpreter, tiny: three minutes")
    parser.add_argument("--run-part", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = SECONDS * (4 if options.rehearse else 1)  # a rehearsal may have a busy machine
    if options.run_part:
        run_part(next(entry for entry in parts if entry.name == options.run_part), options)
        return 0
    gpu = None if options.rehearse else gpu_name()
    if gpu is None and not options.rehearse:
        print("gpu_report: there is no GPU that torch can use; nothing was tested or timed", file=sys.stderr)
        return 1
    default = ROOT / ("build/gpu-rehearsal" if gpu is None else f"bench/results/{slug(gpu)}")
    output = (options.output or default).absolute()
    output.mkdir(parents=True, exist_ok=True)
    title = f"Benchmarks: {gpu or 'a rehearsal on a CPU, whose times say nothing'}"
    chosen = [entry for entry in parts if not options.only or entry.name in options.only]
    return 0 if run(chosen, output, title, options, script) else 1


def run(chosen: Sequence[Entry], output: Path, title: str, options: argparse.Namespace, script: str) -> bool:
    """Run the parts one after the other; tell whether all of them passed."""
    begin = time.monotonic()
    scale = options.seconds / SECONDS if options.rehearse else min(1.0, options.seconds / SECONDS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = bundle.unpacked() | {"PYTHONUNBUFFERED": "1"}
    if options.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"}
    with (output / "log.txt").open("ab") as log:
        for entry in chosen:
            left = begin + options.seconds - time.monotonic()
            this = part.Part(entry.name, output, min(entry.seconds * scale, left), options.rehearse)
            this.write(start=datetime.datetime.now().isoformat(timespec="seconds"))
            command = [sys.executable, script, "--run-part", entry.name, "--output", str(output)]
            command += ["--seconds", str(this.seconds), *["--rehearse"] * options.rehearse]
            try:
                if left < 0.01 * options.seconds:
                    this.left_out("all of it", "no time was left")
                    end = "ok"
                else:
                    end = run_process(command, this.seconds, environment, log, entry.name)
                this.write(end=end, seconds=round(time.monotonic() - this.started, 1))
            finally:
                found = part.read(output)
                (output / "report.md").write_text(part.markdown(found, title), encoding="utf-8")
            records = found[entry.name]
            print(f"\n== {entry.name}: {part.verdict(records)}", *part.section(records), sep="\n", flush=True)
    red = [entry.name for entry in chosen if part.verdict(found[entry.name]).startswith("FAILED")]
    print(f"\n{time.monotonic() - begin:.0f} s; wrote {output}/report.md, results.jsonl and log.txt")
    print(f"gpu_report: FAILED: {', '.join(red)}" if red else "gpu_report: all that ran passed", flush=True)
    return not red


def run_process(command: list[str], seconds: float, environment: dict[str, str], log: IO[bytes], name: str) -> str:
    """Return "ok", or how the process ended. Nothing of its group is left running."""
    log.write(f"\n== {name}\n".encode())
    log.flush()
    begin = log.tell()
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=os.setpgrp
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"it was stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status == 0:
        return "ok"
    if status < 0:
        return f"it died of {signal.Signals(-status).name}"
    with Path(log.name).open("rb") as written:
        written.seek(begin)
        last = written.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"exit status {status}: {''.join(last)[:300]}"


def run_part(entry: Entry, options: argparse.Namespace) -> None:
    """What the process of a part does."""
    this = part.Part(entry.name, options.output, options.seconds, options.rehearse)
    faulthandler.enable()
    faulthandler.dump_traceback_later(0.9 * options.seconds)  # where it hangs, for the log
    with suppress(OSError, AttributeError):  # Linux: the part dies with the report
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if options.rehearse and importlib.util.find_spec("triton"):
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("interpreted").prepare()
    counts = {"found in the cache": 0, "compiled": 0}
    if "TRITON_CACHE_DIR" in os.environ and not options.rehearse and importlib.util.find_spec("triton"):

        def count(cache_hit: bool, **_: object) -> None:
            counts["found in the cache" if cache_hit else "compiled"] += 1

        importlib.import_module("triton").knobs.compilation.listener = count
    module, function = entry.function.split(":")
    try:
        getattr(importlib.import_module(module), function)(this)
    finally:
        if any(counts.values()):
            this.text("Triton kernels: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    faulthandler.cancel_dump_traceback_later()


def gpu_name() -> str | None:
    """In a process of its own, since the parent must outlive whatever becomes of the GPU."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or [""])[-1] or None


def slug(text: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))


if __name__ == "__main__":
    sys.exit(main())
