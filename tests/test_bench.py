"""The benchmarks' own parts: turns and medians, the refusal of wrong results, the memory mark, the report."""

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
import linear_suite
import memory
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


@pytest.mark.parametrize("example", linear_suite.BESIDE, ids=str)
def test_what_is_timed_beside_cross_entropy(example: Any) -> None:
    """It computes its own formula, and the report has a column for the yardstick."""
    hidden, weight, target = linear_suite.data(linear_suite.Case(8, 4, 50, torch.float32, rounds=1, seconds=1))
    ways = linear_suite.candidates(example, target)
    assert linear_suite.YARDSTICK in ways and {*ways} - {"fused"} <= {*reporter.LINEAR.peers}
    expected = linear_suite.expected(example, hidden, weight, target)
    for name in ("fused", "eager"):
        timing.require(name, linear_suite.step(ways[name], hidden, weight), expected)


def test_peak_memory_sees_what_was_freed() -> None:
    size = 96 * 2**20
    peak = memory.peak_memory(lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("this kernel does not tell the peak of the memory")
    assert size * 0.95 < peak < size * 1.5
    assert memory.peak_memory(lambda: None) < size * 0.1


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
        pictures = set(re.findall(r"^!\[.*\]\((.*)\)$", text, re.M))
        assert pictures == {picture.name for picture in path.parent.glob(f"{stem}*.png")}


def test_what_a_peer_does_better_is_told() -> None:
    def run(loss: str, seconds: dict[str, float], memory: dict[str, float], **sizes: int) -> dict[str, Any]:
        return {"loss": loss, "dtype": "float32", "floor": 1.0, "seconds": seconds, "memory": memory, **sizes}

    focal = run(
        "focal_loss(gamma=2.0)",
        {"fused": 1.0, "eager": 8.0, "compiled": 4.0, "F.cross_entropy": 0.5},
        {"fused": 0.0, "eager": 2.0, "compiled": 1.0},
        rows=1024,
        classes=32768,
    )
    linear = run(
        "linear_cross_entropy()",
        {"fused": 3.0, "eager": 6.0, "compiled": 4.5, "torch chunked": 2.0},
        {"fused": 2e8, "eager": 8e8, "torch chunked": 1e8},
        rows=2048,
        features=512,
        classes=32000,
    )
    report = {"machine": "M, 2 threads", "measured": "2026-01-01 (x)", "compared": None, "runs": [focal, linear]}
    text = " ".join(reporter.first_screen(report, "m").split())
    assert "is 8 × as fast as eager PyTorch and 4 × as fast as `torch.compile`. It needs 128 MiB beyond" in text
    assert "it is 2 × as fast as eager PyTorch and 1.5 × as fast as `torch.compile`" in text
    assert reporter.losses_of(report) == [
        "`linear_cross_entropy()` (2,048 rows, 512 features, 32,000 classes, float32) is 0.67 × as fast as "
        "`F.linear_cross_entropy` in chunks.",
        "`F.linear_cross_entropy` in chunks needs less memory than `linear_cross_entropy()` (95 MiB, not "
        "191), and 0.67 × its time.",
    ]
    linear["seconds"]["torch chunked"], linear["memory"]["torch chunked"] = 9.0, 9e8
    assert reporter.losses_of(report) == ["Nowhere that was measured."]


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
