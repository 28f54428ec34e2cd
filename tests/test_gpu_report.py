"""The report of a GPU: that nothing which a part does takes the results of another along, and what it makes of them."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import gpu_prebuild
from gpu import bundle, part, precompile, tables, timing, tools

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

limits = {{"fine": 60, "raises": 60, "hangs": 6, "dies": 60, "fails": 60, "also fine": 60}}
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
        "hangs": "FAILED: it was stopped after 6 s",
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


def test_lines_that_were_cut_are_left_aside(tmp_path):
    one = part.Part("one", tmp_path, 60)
    one.row(case="a × b", ms=1234.5, rate=None)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"part": "one", "row": {"ca\n')
    one.row(case="c", ms=0.012345, rate=7.0)
    one.left_out("x", "no time was left")
    one.left_out("y", "no time was left")
    lines = part.section(part.read(tmp_path)["one"])
    assert [line for line in lines if line] == [
        "- left out: x; y: no time was left",
        "| case  |     ms | rate |",
        "|-------|-------:|-----:|",
        "| a × b |   1234 |    - |",
        "| c     | 0.0123 |    7 |",
    ]


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (1, "[gw0] [ 57%] FAILED tests/test_gpu.py::test_b[cuda x y]", "failed"),
        (4, "ERROR: no such thing", "failed"),
        (5, "ERROR: no such thing", "left_out"),
        (None, "tests/test_gpu.py::test_a[cuda] PASSED [ 50%]", "left_out"),
    ],
)
def test_tests_that_failed_or_did_not_run_are_no_success(tmp_path, status, text, kind):
    tools.report_tests(part.Part("tests", tmp_path, 60), "cuda", status, text)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_fails_and_writes_nothing(tmp_path):
    before = set((ROOT / "bench/results").iterdir())
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "gpu_report: there is no GPU that torch can use; nothing was tested or timed\n"
    assert set((ROOT / "bench/results").iterdir()) == before and not (tmp_path / "out").exists()


def test_two_parts_rehearsed(tmp_path):
    """The others in .ci/run."""
    pytest.importorskip("triton")
    command = [sys.executable, SCRIPT, "--rehearse", "--output", tmp_path, "--only", "traps", "--only", "tiles"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = part.read(tmp_path)
    assert {name: part.verdict(records) for name, records in found.items()} == {"traps": "ok", "tiles": "ok"}
    assert {r["row"]["found"] for r in found["traps"] if "row" in r} == {"ok"}
    assert [r for r in found["tiles"] if "text" in r and r["text"][0].startswith("TILES = {")]


def test_an_extension_of_other_sources_is_left_aside(tmp_path, monkeypatch, capsys):
    stale = tmp_path / f"lib/_made_up{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.parent.mkdir()
    stale.write_text("an extension")
    (stale.parent / "made.txt").write_text("the key of other sources")
    for name in ("FOLDER", "ARCHIVE", "SITE"):
        monkeypatch.setattr(bundle, name, tmp_path / ("" if name == "FOLDER" else name))
    bundle.unpacked()
    assert f"{stale.name} is left aside: ValueError: it was built from other sources" in capsys.readouterr().err
    assert not (ROOT / "fusedloss" / stale.name).exists()


def test_half_a_cache_is_not_packed(tmp_path, monkeypatch):
    """Where a process that compiles was killed: the machine with the GPU would be told that all is there."""
    for name in ("CACHE", "SCRATCH", "ARCHIVE"):
        monkeypatch.setattr(bundle, name, tmp_path / name)
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]
    popen = subprocess.Popen
    monkeypatch.setattr(precompile.subprocess, "Popen", lambda _, **options: popen(command, **options))
    monkeypatch.setattr(gpu_prebuild.subprocess, "run", lambda *_, **__: None)  # the C compiler
    with pytest.raises(SystemExit, match="processes that compile did not end; nothing was packed"):
        gpu_prebuild.triton(sys.executable)
    assert not bundle.ARCHIVE.exists()
