"""The benchmarks' own parts: turns and medians, the refusal of wrong results, the memory mark, the report."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
PLAIN = next(e for e in EXAMPLES if e.loss is fl.cross_entropy and not e.arguments)


def test_every_loss_has_its_benchmark() -> None:
    stems = {path.stem for path in (ROOT / "fusedloss" / "losses").glob("[!_]*.py")}
    assert {path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")} == stems | {"linear", "supcon"}


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


def test_each_turn_finds_fresh_logits(compiled_impl: str) -> None:
    """A gradient in place destroys the logits of its turn alone."""
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    contest = timing.Contest(logits, timing.candidates(EXAMPLES[0], target, compiled=False))
    expected = timing.expected(EXAMPLES[0], logits, target)
    for _ in range(2):
        for name in ("in place", "fused", "eager"):
            timing.require(name, contest.result(name), expected)
    contest.round()
    assert set(contest.steps) == {"fused", "in place", "eager"}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("wrong", [0.0, 1.01, float("nan")])
def test_wrong_results_are_refused(part: int, wrong: float) -> None:
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    right = timing.expected(EXAMPLES[0], logits, target)
    timing.require("right", right, right)
    result = list(right)
    result[part] = result[part] * wrong
    with pytest.raises(timing.WrongResult, match="wrong is wrong by"):
        timing.require("wrong", (result[0], result[1]), right)


def test_zeros_beside_the_target_are_refused() -> None:
    """The many small elements count as much as the target's."""
    logits, target = torch.randn(4, 5000), torch.arange(4)
    loss, gradient = timing.expected(EXAMPLES[0], logits, target)
    only_target = torch.zeros_like(gradient).scatter(1, target[:, None], gradient.gather(1, target[:, None]))
    assert timing.distance((loss, only_target), (loss, gradient)) == pytest.approx(0.5, abs=0.01)


def test_peak_memory_sees_what_was_freed() -> None:
    size = 96 * 2**20
    peak = memory.peak_memory(lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("this kernel does not tell the peak of the memory")
    assert size * 0.95 < peak < size * 1.5
    assert memory.peak_memory(lambda: None) < size * 0.1


def _run(loss: str, dtype: str, **more: Any) -> dict[str, Any]:
    seconds = {"fused": 0.02, "in place": 0.012, "eager": 0.2, "compiled": 0.15, "F.cross_entropy": 0.1}
    run = {"loss": loss, "same_as_cross_entropy": False, "rows": 1024, "classes": 32768, "dtype": dtype, "memory": {}}
    parts = {"forward": dict(seconds), "backward": dict(seconds)}
    return {**run, **parts, "floor": 0.01, "noise": 1.1, "seconds": seconds, **more}


def _benchmark_json(path: Path, runs: list[dict[str, Any]]) -> str:
    """Write what pytest-benchmark would have written of these runs."""
    own = {"threads": 2, "torch": "2.13.0", "version": "0.1.0", "impl": "cpu"}
    cpu = {"brand_raw": "Abacus 9000"}
    machine = {"node": "secret", "machine": "x86_64", "python_version": "3.12.1", "cpu": cpu, "fusedloss": own}
    commit = {"id": "0123456789", "time": "2026-01-02T03:04:05", "dirty": True}
    data = {"machine_info": machine, "commit_info": commit, "datetime": "2026-01-03T00:00:00"}
    path.write_text(json.dumps(data | {"benchmarks": [{"extra_info": run} for run in runs]}))
    return str(path)


def test_what_is_worse_than_before_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(reporter, "RESULTS", tmp_path)
    monkeypatch.setattr(reporter, "README", tmp_path / "README.md")
    begin = "<!-- bench/results/abacus-9000-2-threads.json, by make report -->\n"
    reporter.README.write_text(f"before\n{begin}stale\n<!-- end -->\nafter\n")
    slower, slightly = _run("cross_entropy()", "float32"), _run("focal_loss(gamma=2.0)", "bfloat16")
    more = _run("focal_loss(gamma=2.0)", "float32", memory={"fused": 0.0, "eager": 2.0})
    as_fast, gone = _run("mixed_cross_entropy(alpha=0.25)", "float32"), _run("dice_loss()", "float32")
    both = [slower, more, slightly, as_fast]
    assert reporter.main([_benchmark_json(tmp_path / "a.json", [*both, gone])]) == 0
    slower["seconds"] |= {"fused": 0.025, "eager": 0.21}
    more["memory"] |= {"fused": 0.2, "eager": 2.0}
    slightly["seconds"]["fused"] *= 1.09
    slightly["memory"] = {"fused": 0.0}  # which was not measured before
    as_fast["floor"] = 0.005
    now = [*both, _run("flex_loss()", "float32", floor=0.001)]
    assert reporter.main([_benchmark_json(tmp_path / "b.json", now)]) == 0
    path = tmp_path / "abacus-9000-2-threads.md"
    text = path.read_text(encoding="utf-8")
    part = text.split("## Compared with before")[1].split("## ")[0]
    assert "2026-01-03 (fusedloss 0.1.0" in part and "Cases in both: 4." in part
    assert "over its floor: × 1.17. Worse by more than 10%: 2. " in part
    assert "Over a floor that was faster, and no worse than eager PyTorch: 2 more." in part
    assert [line for line in part.splitlines() if line[:3] == "| `"] == [
        "| `cross_entropy()` 1024 × 32768 float32 | fused | time / floor | 2 | 2.5 | × 1.25 | × 1.05 |",
        "| `focal_loss(gamma=2.0)` 1024 × 32768 float32 | fused | MiB | 128 | 154 | × 1.20 | × 1.00 |",
    ]
    assert "Not measured this time, and left out, with the number of cases: `dice_loss()` (1)." in part
    assert "secret" not in text + path.with_suffix(".json").read_text(encoding="utf-8")
    shown = reporter.README.read_text(encoding="utf-8")
    assert shown.startswith(f"before\n{begin}[Abacus 9000, 2 threads]") and shown.endswith("<!-- end -->\nafter\n")
    assert "stale" not in shown and "bfloat16" not in shown
    # Written anew of its own JSON, the report is what it was.
    assert reporter.main([str(path.with_suffix(".json"))]) == 0 and path.read_text(encoding="utf-8") == text


def test_readme_has_the_figures_of_a_report() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((name, figures),) = re.findall(r"<!-- bench/results/(.*)\.json, by make report -->\n(.*?)<!-- end -->", text, re.S)
    data = json.loads((BENCH / f"results/{name}.json").read_text(encoding="utf-8"))
    assert figures == reporter.readme(data, name) and figures.count("\n| `") > 10
    assert reporter.slug(data["machine"]) == name


@pytest.mark.parametrize("path", sorted(path for path in BENCH.glob("results/*.json")), ids=lambda path: path.stem)
def test_reports_are_what_their_figures_make(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    if "runs" not in data:
        pytest.skip("the report of a GPU")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == reporter.markdown(data, path.stem)
    pictures = set(re.findall(r"^!\[.*\]\((.*)\)$", text, re.M))
    assert pictures == {picture.name for picture in path.parent.glob(f"{path.stem}*.png")}


def test_a_wrong_linear_form_is_refused() -> None:
    """And a right one is measured: the driver is that of the contrastive loss, too."""
    case = linear_suite.Case(9, 5, 31, torch.float32, rounds=2, seconds=1)
    hidden, weight, target = linear_suite.data(case)
    ways = {name: linear_suite.candidates(PLAIN, target)[name] for name in ("fused", "eager")}

    def measured(**more: Any) -> dict[str, Any]:
        info: dict[str, Any] = {}
        benchmark = SimpleNamespace(
            extra_info=info, pedantic=lambda f, args, setup, rounds: [(setup(), f(*args)) for _ in range(rounds)]
        )
        products = partial(linear_suite.products, hidden, weight)
        expected = partial(linear_suite.expected, PLAIN, hidden, weight, target)
        linear_suite.compare(
            benchmark, case, "linear", (hidden, weight), ways | more, products, expected, lambda _: None
        )
        return info

    assert set(measured()["seconds"]) == {"fused", "eager"}
    with pytest.raises(timing.WrongResult, match="wrong"):
        measured(wrong=lambda *sources: 1.01 * ways["eager"](*sources))


@pytest.mark.compile
@pytest.mark.slow
def test_a_benchmark_from_measurement_to_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "bench", "--quick", "-k", "focal and 4096x9", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it believes to be one of several workers.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
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
