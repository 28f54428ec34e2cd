"""The report of a GPU: that nothing which a part does takes the results of another along, and what it makes of them."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import gpu_report
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
output, seconds, *only = sys.argv[1:]
chosen = [entry for entry in parts if not only or entry.name in only]
options = Namespace(rehearse=False, seconds=float(seconds))
sys.exit(0 if gpu_report.run(chosen, pathlib.Path(output), "Benchmarks: Made-up GPU", options, __file__) else 1)
"""


@pytest.fixture
def harmful(tmp_path):
    """Starts such a report."""
    script, output = tmp_path / "harmful.py", tmp_path / "out"
    script.write_text(HARMFUL)
    output.mkdir()

    def start(seconds: float, *only: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(script), str(output), str(seconds), *only]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    start.output = output
    return start


def test_a_part_that_raises_hangs_or_dies_takes_no_other_along(harmful):
    process = harmful(480)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    found = part.read(harmful.output)
    assert list(found) == ["fine", "raises", "hangs", "dies", "fails", "also fine"]
    rows = {name: [record["row"]["case"] for record in records if "row" in record] for name, records in found.items()}
    assert rows == {
        "fine": ["first"], "raises": ["before it raised"], "hangs": ["before it hung"], "dies": ["before it died"],
        "fails": ["after a failure"], "also fine": ["first"],
    }  # fmt: skip
    verdicts = {
        "fine": "ok",
        "raises": "FAILED: exit status 1: RuntimeError: CUDA error: an illegal memory access was encountered",
        "hangs": "FAILED: it was stopped after 6 s",
        "dies": "FAILED: it died of SIGSEGV",
        "fails": "FAILED: 1 case",
        "also fine": "ok",
    }
    assert {name: part.verdict(records) for name, records in found.items()} == verdicts
    text = (harmful.output / "report.md").read_text()
    for name, verdict in verdicts.items():
        assert f"\n== {name}: {verdict}\n" in said
        assert [line for line in text.splitlines() if line.startswith(f"| {name} ") and verdict in line], name
    assert "- FAILED: a case: wrong" in text
    assert said.splitlines()[-1] == "gpu_report: FAILED: raises, hangs, dies, fails"
    log = (harmful.output / "log.txt").read_text()
    assert "in raises" in log  # where it was


def test_what_passed_is_green(harmful):
    process = harmful(480, "fine", "also fine")
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "gpu_report: all that ran passed"
    assert process.returncode == 0


def test_limits_shrink_to_the_budget_and_a_later_run_of_a_part_replaces_it(harmful):
    harmful(480, "fine", "fails").communicate(timeout=60)
    begin = time.monotonic()
    process = harmful(8, "fine", "hangs", "also fine")  # a sixtieth of the limits
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    found = part.read(harmful.output)
    assert part.verdict(found["hangs"]) == "FAILED: it was stopped after 0 s"
    assert part.verdict(found["fails"]) == "FAILED: 1 case"  # of the run before
    assert len(found["fine"]) in (2, 3)  # start, perhaps a row, end: of the later run alone
    harmful(0, "fine").communicate(timeout=60)
    assert part.verdict(part.read(harmful.output)["fine"]) == "left out: no time was left"


def test_a_report_that_is_stopped_keeps_what_it_has(harmful):
    process = harmful(480, "fine", "hangs", "also fine")
    results = harmful.output / "results.jsonl"
    deadline = time.monotonic() + 60
    while "before it hung" not in (results.read_text() if results.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    found = part.read(harmful.output)
    assert [part.verdict(records) for records in found.values()] == ["ok", "FAILED: it did not end"]
    text = (harmful.output / "report.md").read_text()
    assert "before it hung" in text and "first" in text


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


PLAIN = """\
tests/test_gpu.py::test_a[cuda] PASSED                     [ 25%]
tests/test_gpu.py::test_b[cuda x y] FAILED                 [ 50%]
tests/test_gpu.py::test_c SKIPPED (no reason)              [ 75%]
"""
SHARED = """\
[gw1] [  1%] PASSED tests/test_gpu.py::test_a[cuda]
[gw0] [ 57%] FAILED tests/test_gpu.py::test_b[cuda x y]
[gw0] [ 58%] SKIPPED tests/test_gpu.py::test_c
"""


@pytest.mark.parametrize("text", [PLAIN, SHARED])
@pytest.mark.parametrize("status", [None, 1])
def test_what_pytest_said_counts_even_where_it_was_cut(tmp_path, text, status):
    tools.report_tests(part.Part("tests", tmp_path, 60), "cuda", status, text)
    records = part.read(tmp_path)["tests"]
    assert records[0]["row"] == {"tests": "cuda", "passed": 1, "failed": 1, "error": 0, "skipped": 1}
    assert [r["failed"] for r in records if "failed" in r] == ["tests/test_gpu.py::test_b[cuda x y]"]
    cut = [r["why"] for r in records if "left_out" in r]
    percent = 75 if text is PLAIN else 58
    assert cut == ([f"all but {percent} % of them, for time"] if status is None else [])


@pytest.mark.parametrize(("status", "kind"), [(5, "left_out"), (4, "failed")])
def test_tests_that_did_not_run_are_no_success(tmp_path, status, kind):
    tools.report_tests(part.Part("tests", tmp_path, 60), "cuda", status, "ERROR: no such thing")
    assert [r for r in part.read(tmp_path)["tests"] if kind in r]


def test_counters_are_a_row_for_each_kernel():
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        '"0","statistics_pass","gpu__time_duration.sum","ns","250,112"',
        '"0","statistics_pass","lts__t_sector_hit_rate.pct","%","1.5"',
        '"1","gradient_pass","gpu__time_duration.sum","ns","400"',
    ]
    text = "\n".join(["==PROF== Connected", head, *lines])
    assert tools.counted(text) == [
        {"kernel": "statistics_pass", "ns": 250112.0, "L2 hits %": 1.5},
        {"kernel": "gradient_pass", "ns": 400.0},
    ]


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
    command = [
        sys.executable,
        str(SCRIPT),
        "--rehearse",
        "--output",
        str(tmp_path),
        "--only",
        "traps",
        "--only",
        "tiles",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = part.read(tmp_path)
    assert {name: part.verdict(records) for name, records in found.items()} == {"traps": "ok", "tiles": "ok"}
    assert {r["row"]["found"] for r in found["traps"] if "row" in r} == {"ok"}
    tried = {(r["row"]["table"], r["row"]["kernel"]) for r in found["tiles"] if "row" in r}
    assert len(tried) == 6
    assert [r for r in found["tiles"] if "text" in r and r["text"][0].startswith("TILES = {")]
    assert {file.name for file in tmp_path.iterdir()} == {"results.jsonl", "report.md", "log.txt"}


def test_what_is_brought_along_is_taken_into_use(tmp_path, monkeypatch, capsys):
    """In a checkout that nobody installed: a wheel, compiled kernels, and the metadata that the package asks for."""
    folder, scratch = tmp_path / ".gpu", tmp_path / "scratch"
    (folder / "whl").mkdir(parents=True)
    with zipfile.ZipFile(folder / "whl/peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_a_test.py", "")
    (folder / "whl/broken-1-py3-none-any.whl").write_text("no archive")
    stale = folder / f"lib/_made_up{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.parent.mkdir()
    stale.write_text("an extension")
    (stale.parent / "made.txt").write_text("the key of other sources")
    (tmp_path / "made.json").write_text("{}")
    with tarfile.open(folder / "triton.tgz", "w:gz") as archive:
        archive.add(tmp_path / "made.json", "made.json")
    for name, value in {"FOLDER": folder, "ARCHIVE": folder / "triton.tgz", "SITE": scratch / "site"}.items():
        monkeypatch.setattr(bundle, name, value)
    monkeypatch.setattr(bundle, "CACHE", scratch / "triton")
    monkeypatch.setattr(bundle.importlib.util, "find_spec", lambda name: None)
    environment = bundle.unpacked()
    said = capsys.readouterr().err
    assert "broken-1-py3-none-any.whl is left aside: BadZipFile" in said
    assert f"{stale.name} is left aside: ValueError: it was built from other sources" in said
    assert not (ROOT / "fusedloss" / stale.name).exists()
    assert environment["TRITON_CACHE_DIR"] == str(scratch / "triton") and (scratch / "triton/made.json").exists()
    assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(scratch / "site")]
    ask = "import importlib.metadata as m, peer_of_a_test; print(m.distribution('fusedloss').locate_file(''))"
    command = [sys.executable, "-c", ask]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert Path(done.stdout.strip()) == scratch / "site"


def test_kernels_of_other_sources_are_not_taken_for_these(tmp_path, monkeypatch):
    """They are compiled on all cores, rather than missed one by one."""
    pytest.importorskip("triton")
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(bundle, "CACHE", tmp_path / "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(precompile, "compile_all", lambda *_: {"hits": 1, "compiled": 2, "failures": []})
    rows = []
    for key in (precompile.cache_key(), "another"):
        (tmp_path / "triton/made.json").write_text(json.dumps({"key": key, "kernels": 7}))
        precompile.kernels(part.Part("kernels", tmp_path, 60))
        rows.append([(r["row"]["kernels"], r["row"]["made"]) for r in part.read(tmp_path)["kernels"]][-1])
    assert rows == [(7, "beforehand"), (3, "now, 1 hits")]


@pytest.mark.compile
def test_kernels_that_were_compiled_beforehand_are_found(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    first, second = (precompile.compile_all(sys.executable, 90, environment, tiny=True) for _ in range(2))
    assert first["failures"] == second["failures"] == []
    assert first["hits"] == second["compiled"] == 0 and first["compiled"] == second["hits"] == 2


def test_the_file_is_named_after_the_device():
    assert gpu_report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_results_are_json_lines(tmp_path):
    part.Part("one", tmp_path, 60).row(case="a", ms=float("nan"))
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["part"] == "one"
