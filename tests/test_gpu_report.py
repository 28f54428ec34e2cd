"""The report of a GPU: that nothing which a part does takes the results of another along, and what it makes of them."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from gpu import part, tables, timing, tools

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench/gpu_report.py"

#: A report of parts that harm themselves. Without torch they start at once.
HARMFUL = f"""
import os, pathlib, signal, sys, time
from argparse import Namespace
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu_report

def fine(part):
    part.row(case="first", ms=1.5)
def raises(part):
    part.row(case="before it raised", ms=2.0)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def hangs(part):
    part.row(case="before it hung", ms=3.0)
    time.sleep(600)
def dies(part):
    part.row(case="before it died", ms=4.0)
    os.kill(os.getpid(), signal.SIGSEGV)
def fails(part):
    part.failed("a case", "wrong")
    part.row(case="after a failure", ms=5.0)

limits = {{"fine": 60, "raises": 60, "hangs": 3, "dies": 60, "fails": 60, "also fine": 60}}
parts = [gpu_report.Entry(name, seconds, "__main__:" + name.split()[-1]) for name, seconds in limits.items()]
if "--run-part" in sys.argv:
    sys.exit(gpu_report.main(parts=parts, script=__file__))
options = Namespace(rehearse=False, seconds=480.0)
chosen = [entry for entry in parts if entry.name in sys.argv[2:]]
sys.exit(0 if gpu_report.run(chosen, pathlib.Path(sys.argv[1]), "Benchmarks: Made-up GPU", options, __file__) else 1)
"""


def _report(folder: Path, *parts: str) -> "subprocess.CompletedProcess[str]":
    """Run some of these parts; what they leave is in the folder."""
    script = folder.with_suffix(".py")
    script.write_text(HARMFUL)
    folder.mkdir()
    return subprocess.run([sys.executable, script, folder, *parts], capture_output=True, text=True, timeout=120)


def test_a_part_that_raises_hangs_or_dies_takes_no_other_along(tmp_path):
    verdicts = {
        "fine": "ok",
        "raises": "FAILED: exit status 1: RuntimeError: CUDA error: an illegal memory access was encountered",
        "hangs": "FAILED: it was stopped after 3 s",
        "dies": "FAILED: it died of SIGSEGV",
        "fails": "FAILED: 1 case",
        "also fine": "ok",
    }
    done = _report(tmp_path / "out", *verdicts)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "gpu_report: FAILED: raises, hangs, dies, fails"
    found = part.read(tmp_path / "out")
    assert {name: part.verdict(records) for name, records in found.items()} == verdicts
    rows = [[record["row"]["case"] for record in records if "row" in record] for records in found.values()]
    assert rows == [
        ["first"], ["before it raised"], ["before it hung"], ["before it died"], ["after a failure"], ["first"]
    ]  # fmt: skip
    text = (tmp_path / "out/report.md").read_text()
    for name, verdict in verdicts.items():
        assert [line for line in text.splitlines() if line.startswith(f"| {name} ") and verdict in line], name
    assert "- FAILED: a case: wrong" in text
    passed = _report(tmp_path / "green", "fine", "also fine")
    assert passed.returncode == 0 and passed.stdout.splitlines()[-1] == "gpu_report: all that ran passed"


@pytest.mark.parametrize(("status", "kind"), [(1, "failed"), (4, "failed"), (5, "left_out"), (None, "left_out")])
def test_tests_that_failed_or_did_not_run_are_no_success(status, kind, tmp_path):
    tools.report_tests(part.Part("tests", tmp_path, 60), "cuda", status, "[gw0] FAILED tests/test_gpu.py::test_b[x y]")
    assert any(kind in record for record in part.read(tmp_path)["tests"])


def test_a_wrong_or_failing_loss_is_not_timed_and_does_not_end_the_table(tmp_path):
    right = (torch.tensor(2.0), torch.ones(5))

    def raises():
        raise RuntimeError("no")

    candidates = {
        "wrong": tables.Candidate(lambda: lambda: (right[0], -right[1]), lambda: right),
        "raises": tables.Candidate(lambda: raises, lambda: right),
        "a peer that raises": tables.Candidate(lambda: raises, lambda: right, ours=False),
        "right": tables.Candidate(lambda: lambda: right, lambda: right),
    }
    here = part.Part("rows", tmp_path, 60, rehearse=True)
    timed = dict(tables.contest(here, timing.Clock(here.device), "case", candidates, lambda: None, 1e-3))
    assert list(timed) == ["right"]
    records = part.read(tmp_path)["rows"]
    assert [r["failed"] for r in records if "failed" in r] == ["wrong, case", "raises, case"]
    assert [r["left_out"] for r in records if "left_out" in r] == ["a peer that raises, case"]


RACE = "========= Error: Race reported between Write access at void fusedloss::cuda::row_pass<float>(Launch)+0x90"
OTHERS = "========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) on CUDA API call to cuGetProcAddress_v2.\n"
OTHERS += "========= Error: Race reported between Write access at void cutlass::Kernel2<gemm>(Params)+0x10"


@pytest.mark.parametrize(
    ("status", "said", "kind"), [(9, RACE, "failed"), (9, OTHERS, "left_out"), (1, "", "left_out")]
)
def test_only_what_our_kernels_do_is_a_failed_check(status, said, kind, tmp_path):
    tools.report_check(part.Part("sanitizer", tmp_path, 60), "racecheck cuda", status, f"{said}\n== ERROR SUMMARY: 1")
    records = part.read(tmp_path)["sanitizer"]
    assert [key for record in records for key in ("failed", "left_out") if key in record] == [kind]


def test_a_capture_that_fails_is_the_last(monkeypatch):
    """And the allocator, which would fail in turn, is left alone."""

    class Graph:
        def capture_begin(self):
            pass

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    calls = []
    clock = timing.Clock(torch.device("cpu"))
    clock.captures = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("Stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    clock.empty_memory()
    with pytest.raises(RuntimeError, match="capture"):
        clock.replayed([lambda: None])
    assert clock.replayed([lambda: None]) is None
    clock.empty_memory()
    assert calls == ["empty_cache", "Stream", "synchronize"]
