"""The benchmarks' own parts: turns and medians, the refusal of wrong results, the report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss as fl
from fusedloss.losses._registry import EXAMPLES
from fusedloss.tools import timing

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import report as reporter

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


class _Slow(torch.autograd.Function):
    """A loss whose forward takes some seconds of a clock that stands still but when told, and its backward 10."""

    now = 0.0

    @staticmethod
    def forward(ctx: Any, logits: Tensor, seconds: float) -> Tensor:
        _Slow.now += seconds
        return logits.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _Slow.now += 10
        return grad.expand(2, 3), None


def test_turns_are_interleaved_and_medians_of_the_timed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "perf_counter", lambda: _Slow.now)
    turns: list[str] = []

    def loss(name: str, first: float) -> Any:
        return lambda logits: turns.append(name) or _Slow.apply(logits, first + turns.count(name))

    contest = timing.Contest(torch.zeros(2, 3), {"a": loss("a", 0), "b": loss("b", 100)})
    for _ in range(3):
        contest.round()
    # twice each: the first is not timed
    assert turns == ["a", "a", "b", "b"] * 3
    assert [step.forward for step in contest.steps["a"]] == [2, 4, 6]
    assert contest.median("a") == 14 and contest.median("b") == 114
    assert len(contest.copies) == 3
    contest.copies = [5.0, 1.0, 2.0]
    assert contest.floor == 3  # one and a half copies


def test_wrong_results_are_refused() -> None:
    """The many small elements of a gradient count as much as the target's."""
    logits, target = torch.randn(4, 5000), torch.arange(4)
    loss, gradient = right = timing.expected(EXAMPLES[0], logits, target)
    timing.require("right", right, right)
    only_target = torch.zeros_like(gradient).scatter(1, target[:, None], gradient.gather(1, target[:, None]))
    for wrong in ((loss, only_target), *((loss * x, gradient) for x in (0, 1.01, torch.nan)), (loss, gradient * 1.01)):
        with pytest.raises(timing.WrongResult, match="wrong is wrong by"):
            timing.require("wrong", wrong, right)


def test_gradients_of_float16_are_scaled_and_have_digits() -> None:
    """Without a scale those of this mean are one or two units in the last place of the smallest number."""
    logits, target = torch.randn(64, 65536).half(), torch.arange(64)
    contest = timing.Contest(logits, timing.candidates(EXAMPLES[0], target, compiled=False))
    right = timing.expected(EXAMPLES[0], logits, target)
    for name in contest.losses:
        timing.require(name, contest.result(name), right)


def test_reports_and_pages_are_what_their_figures_make() -> None:
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in BENCH.glob("results/*.json")}
    reports = {path.stem: (path, data) for path, data in read.items() if "runs" in data}  # others are of a GPU
    pages = {"README.md": reporter.first_screen, reporter.GUIDE: reporter.guide_table}
    for page, make in pages.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        ((name, figures),) = re.findall(
            r"<!-- bench/results/(.*)\.json, by make report -->\n(.*?)<!-- end -->", text, re.S
        )
        data = reports[name][1]
        assert figures == make(data, name)
        assert reporter.slug(data["machine"]) == name
    assert figures.count("\n| `") > 10
    for stem, (path, data) in reports.items():
        text = path.with_suffix(".md").read_text(encoding="utf-8")
        assert text == reporter.markdown(data, stem)
        assert len(reporter.by_case(data)) == len(data["runs"])  # no two of a name
        pictures = set(re.findall(r"^!\[.*\]\((.*)\)$", text, re.M))
        assert pictures == {picture.name for picture in path.parent.glob(f"{stem}*.png")}


@pytest.mark.slow
def test_a_benchmark_from_measurement_to_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "bench", "--quick", "-k", "focal and 4096x9", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it believes to be one of several workers.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    alone["TORCH_COMPILE_DISABLE"] = "1"
    done = subprocess.run([*command, f"--benchmark-json={path}"], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    info = run["extra_info"]
    assert info["loss"] == "focal_loss(gamma=2.0)" and info["floor"] > 0
    peers = {"fused", "eager", "compiled", "F.cross_entropy"}
    assert peers <= set(info["seconds"]) <= peers | {"in place"}
    assert run["stats"]["rounds"] >= 3
    assert reporter.main([str(path), "--output", str(tmp_path / "report")]) == 0
    assert "focal_loss" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert fl.__version__ in (tmp_path / "report.md").read_text(encoding="utf-8")
