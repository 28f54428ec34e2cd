"""The benchmarks' own parts: turns and medians, the refusal of wrong results, the memory mark, the report."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss as fl
from fusedloss.losses._registry import EXAMPLES, Example
from fusedloss.tools import timing

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_loss_has_its_benchmark() -> None:
    stems = {path.stem for path in (ROOT / "fusedloss" / "losses").glob("[!_]*.py")}
    assert {path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")} == stems | {"linear", "supcon"}


def test_every_linear_form_has_its_benchmark() -> None:
    forms = {name for name in fl.__all__ if name.startswith("linear_")}
    text = (BENCH / "bench_linear.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^def test_(\w+)", text, re.M)) == forms


class _Clock:
    """Stands still but when told; a loss's forward takes 1 s and more from turn to turn, its backward 10 s."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, clock: _Clock, seconds: float) -> Tensor:
        clock.now += seconds
        ctx.clock = clock
        ctx.shape = logits.shape
        return logits.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.now += 10
        return grad.expand(ctx.shape), None, None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    return clock


def test_turns_are_interleaved_and_medians_of_the_timed_ones(clock: _Clock) -> None:
    turns: list[str] = []

    def loss(name: str, first: float) -> Any:
        def call(logits: Tensor) -> Tensor:
            turns.append(name)
            return _Slow.apply(logits, clock, first + turns.count(name))

        return call

    contest = timing.Contest(torch.zeros(2, 3), {"a": loss("a", 0), "b": loss("b", 100)})
    for _ in range(3):
        contest.round()
    # twice each: the first is not timed
    assert turns == ["a", "a", "b", "b"] * 3
    assert [step.forward for step in contest.steps["a"]] == [2, 4, 6]
    assert [step.backward for step in contest.steps["b"]] == [10, 10, 10]
    assert contest.median("a") == 14 and contest.median("b") == 114
    assert len(contest.copies) == 3

    contest.round(leave_out="b")
    assert turns[12:] == ["a", "a"]


def test_floor_is_one_and_a_half_copies() -> None:
    contest = timing.Contest(torch.zeros(2, 3), {})
    contest.copies = [5.0, 1.0, 2.0]
    assert contest.floor == 3
    assert contest.noise > 1


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
    peak_memory = _module("memory").peak_memory
    size = 96 * 2**20
    peak = peak_memory(lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("this kernel does not tell the peak of the memory")
    assert size * 0.95 < peak < size * 1.5
    assert peak_memory(lambda: None) < size * 0.1


def test_peak_memory_counts_what_was_kept(compiled_impl: str) -> None:
    peak_memory = _module("memory").peak_memory
    logits, target = torch.randn(512, 32768, requires_grad=True), torch.randint(32768, (512,))

    def step() -> None:
        torch.autograd.grad(fl.cross_entropy(logits, target, impl=compiled_impl), logits)

    step()
    if (peak := peak_memory(step)) is None:
        pytest.skip("this kernel does not tell the peak of the memory")
    assert logits.nbytes * 0.95 < peak < logits.nbytes * 1.5


def _run(loss: str, dtype: str, **more: Any) -> dict[str, Any]:
    seconds = {"fused": 0.02, "in place": 0.012, "eager": 0.2, "compiled": 0.15, "F.cross_entropy": 0.1}
    return {
        "loss": loss,
        "same_as_cross_entropy": False,
        "rows": 1024,
        "classes": 32768,
        "dtype": dtype,
        "floor": 0.01,
        "noise": 1.1,
        "seconds": seconds,
        "forward": {name: s / 4 for name, s in seconds.items()},
        "backward": {name: s * 3 / 4 for name, s in seconds.items()},
        "memory": {},
        **more,
    }


@pytest.fixture
def benchmark_json(tmp_path: Path) -> Path:
    runs = [
        _run("cross_entropy()", "float32", same_as_cross_entropy=True),
        _run("focal_loss(gamma=2.0)", "float32", memory={"fused": 0.0, "eager": 2.0}),
        _run("focal_loss(gamma=2.0)", "bfloat16"),
    ]
    del runs[2]["seconds"]["in place"]
    own = {"threads": 2, "torch": "2.13.0", "version": "0.1.0", "impl": "cpu"}
    machine = {
        "node": "secret",
        "machine": "x86_64",
        "python_version": "3.12.1",
        "cpu": {"brand_raw": "Abacus 9000"},
        "fusedloss": own,
    }
    commit = {"id": "0123456789", "time": "2026-01-02T03:04:05", "dirty": True}
    data = {"machine_info": machine, "commit_info": commit, "datetime": "2026-01-03T00:00:00"}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data | {"benchmarks": [{"extra_info": r} for r in runs]}))
    return path


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With folder and README of its own."""
    pytest.importorskip("matplotlib")
    report = _module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("Nothing of this machine.")
    return report


def _change(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """The runs of a JSON of pytest-benchmark."""
    data = json.loads(path.read_text())
    runs = [b["extra_info"] for b in data["benchmarks"]]
    change(runs)
    data["benchmarks"] = [{"extra_info": run} for run in runs]
    path.write_text(json.dumps(data))


def test_report(report: ModuleType, benchmark_json: Path, tmp_path: Path) -> None:
    assert report.main([str(benchmark_json)]) == 0
    files = {path.name.removeprefix("abacus-9000-2-threads"): path for path in (tmp_path / "results").iterdir()}
    assert set(files) == {".md", ".json", ".png", "-memory.png"}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    table = files[".md"].read_text(encoding="utf-8")
    assert "secret" not in table + files[".json"].read_text(encoding="utf-8")
    assert "2026-01-03 (fusedloss 0.1.0 (cpu), torch 2.13.0, Python 3.12.1; 0123456, changed)" in table
    assert "There are no earlier figures of this machine." in table
    assert report.README.read_text() == "Nothing of this machine."
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 1
    assert rows[2] == [
        "`cross_entropy()`", "1024 × 32768", "float32", "10", "20 (5 + 15)", "2.00", "12", "1.20",
        "10", "7.5", "5", "-",
    ]  # fmt: skip
    assert rows[3][-2:] == ["(5)", "0.00 - 2.00 -"]
    assert rows[4][6:8] == ["-", "-"]


def test_what_is_worse_than_before_is_named(
    report: ModuleType, benchmark_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def before(runs: list[dict[str, Any]]) -> None:
        runs += [_run("dice_loss()", "float32"), _run("mixed_cross_entropy(alpha=0.25)", "float32")]

    def now(runs: list[dict[str, Any]]) -> None:
        slower, more, slightly, _, as_fast = runs
        slower["seconds"] |= {"fused": 0.025, "eager": 0.21}
        more["memory"] |= {"fused": 0.2, "eager": 2.0}
        slightly["seconds"]["fused"] *= 1.09
        slightly["memory"] = {"fused": 0.0}  # which was not measured before
        as_fast["floor"] = 0.005
        runs[3] = _run("tversky_loss()", "float32", floor=0.001)

    _change(benchmark_json, before)
    assert report.main([str(benchmark_json)]) == 0
    written = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    _change(benchmark_json, now)
    assert report.main([str(benchmark_json), "--output", str(tmp_path / "trial")]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "results").iterdir()} == written
    assert "× 1.25" in capsys.readouterr().out
    assert report.main([str(benchmark_json)]) == 0
    text = (tmp_path / "results/abacus-9000-2-threads.md").read_text(encoding="utf-8")
    part = text.split("## Compared with before")[1].split("## ")[0]
    assert "2026-01-03 (fusedloss 0.1.0" in part and "Cases in both: 4." in part
    assert "over its floor: × 1.17. Worse by more than 10%: 2. " in part
    assert "Over a floor that was faster, and no worse than eager PyTorch: 2 more." in part
    assert [line for line in part.splitlines() if line[:3] == "| `"] == [
        "| `cross_entropy()` 1024 × 32768 float32 | fused | time / floor | 2 | 2.5 | × 1.25 | × 1.05 |",
        "| `focal_loss(gamma=2.0)` 1024 × 32768 float32 | fused | MiB | 128 | 154 | × 1.20 | × 1.00 |",
    ]
    assert "Not measured this time, and left out, with the number of cases: `dice_loss()` (1)." in part
    assert "dice_loss" not in text.split("## Row losses")[1]

    # Written anew of its own JSON, the report is what it was; a new one is compared with it.
    assert report.main([str(tmp_path / "results/abacus-9000-2-threads.json")]) == 0
    assert (tmp_path / "results/abacus-9000-2-threads.md").read_text(encoding="utf-8") == text
    assert report.main([str(benchmark_json)]) == 0
    assert "× 1.00. Worse by more than 10%: none." in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["{", "[]", *(f'{{"machine": "", "measured": "", "runs": {runs}}}' for runs in ("5", '[{"loss": ""}]', "[]"))],
)
def test_earlier_figures_that_are_none(
    text: str, report: ModuleType, benchmark_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "results/abacus-9000-2-threads.json"
    earlier.parent.mkdir()
    earlier.write_text(text)
    with pytest.raises(SystemExit):
        report.main([str(benchmark_json)])
    error = capsys.readouterr().err
    assert str(earlier) in error and ("cannot read" in error or "holds no benchmark" in error)
    assert [path.read_text() for path in earlier.parent.iterdir()] == [text]


def test_readme_gets_the_figures_of_its_machine(report: ModuleType, benchmark_json: Path) -> None:
    begin = "<!-- bench/results/abacus-9000-2-threads.json, by make report -->\n"
    report.README.write_text(f"before\n{begin}stale\n<!-- end -->\nafter\n")
    for _ in range(2):  # the second time it replaces what the first wrote
        assert report.main([str(benchmark_json)]) == 0
        text = report.README.read_text(encoding="utf-8")
        assert text.startswith(
            f"before\n{begin}[Abacus 9000, 2 threads](bench/results/abacus-9000-2-threads.md), float32"
        )
        assert text.endswith(
            "![Time of the row losses over the floor](bench/results/abacus-9000-2-threads.png)\n<!-- end -->\nafter\n"
        )
        assert "stale" not in text and "bfloat16" not in text
        assert "| `focal_loss(gamma=2.0)` | 1024 × 32768 | 10 | 20 | 2.00 | 1.20 | 10 | 7.5 | 128 | 384 |" in text


def test_readme_has_the_figures_of_a_report() -> None:
    report = _module("report")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((name, figures),) = re.findall(r"<!-- bench/results/(.*)\.json, by make report -->\n(.*?)<!-- end -->", text, re.S)
    data = json.loads((BENCH / f"results/{name}.json").read_text(encoding="utf-8"))
    assert figures == report.readme(data, name) and figures.count("\n| `") > 10
    assert report.slug(data["machine"]) == name


@pytest.mark.parametrize("path", sorted(path for path in BENCH.glob("results/*.json")), ids=lambda path: path.stem)
def test_reports_are_what_their_figures_make(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    if "runs" not in data:
        pytest.skip("the report of a GPU")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == _module("report").markdown(data, path.stem)
    pictures = set(re.findall(r"^!\[.*\]\((.*)\)$", text, re.M))
    assert pictures == {picture.name for picture in path.parent.glob(f"{path.stem}*.png")}


def test_growth_is_measured_at_three_sizes(linear_suite: ModuleType, supcon_suite: ModuleType) -> None:
    report, suite = _module("report"), importlib.import_module("suite")
    extent = suite.DEFAULT
    assert suite.growth_cases(suite.QUICK) == []
    for kind, cases, sizes in (
        (report.ROWS, suite.cases(extent) + suite.growth_cases(extent), ["rows", "classes"]),
        (report.LINEAR, linear_suite.cases(linear_suite.DEFAULT), ["rows", "classes"]),
        (report.SUPCON, supcon_suite.DEFAULT, ["rows"]),
    ):
        runs = [
            {"loss": "", **{size: getattr(case, size) for size in kind.sizes}, "dtype": case.dtype} for case in cases
        ]
        assert [size for size in kind.sizes if len(report.one_size_varies(kind, runs, size)) == 3] == sizes


def test_growth_is_drawn(report: ModuleType, benchmark_json: Path, tmp_path: Path) -> None:
    def now(runs: list[dict[str, Any]]) -> None:
        runs[:] = [_run("cross_entropy()", "float32", rows=n, memory={"fused": 0.0}) for n in (1024, 256, 4096)]
        runs += [_run("focal_loss()", "float32", rows=n) for n in (256, 1024)]
        runs[0]["seconds"] = {"fused": 0.02} | dict.fromkeys(("eager", "compiled", "F.cross_entropy"), 1.0)

    _change(benchmark_json, now)
    assert report.main([str(benchmark_json), "--output", str(tmp_path / "n")]) == 0
    assert (tmp_path / "n-growth.png").read_bytes().startswith(b"\x89PNG")
    assert "![Growth of time and memory with the sizes](n-growth.png)" in (tmp_path / "n.md").read_text(
        encoding="utf-8"
    )
    runs = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))["runs"]
    grown = report.one_size_varies(report.ROWS, runs, "rows")
    assert [run["rows"] for run in grown] == [256, 1024, 4096]
    assert [report.held(run, "fused") for run in grown] == [32, 128, 512]
    assert report.one_size_varies(report.ROWS, runs, "classes") == []


def test_report_on_a_chosen_path(benchmark_json: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "v0.1"
    done = subprocess.run(
        [sys.executable, BENCH / "report.py", benchmark_json, "--output", output], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(f"{output}.md").exists() and Path(f"{output}.png").exists()


# linear forms


@pytest.fixture
def linear_suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("linear_suite")


PLAIN = next(e for e in EXAMPLES if e.loss is fl.cross_entropy and not e.arguments)


def test_slow_candidates_get_fewer_turns(
    clock: _Clock, linear_suite: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_suite, "perf_counter", clock)
    ran: list[str] = []

    def taking(name: str, seconds: float) -> Any:
        def run() -> tuple[Tensor, ...]:
            clock.now += seconds
            ran.append(name)
            return ()

        return run

    case = linear_suite.Case(1, 1, 1, torch.float32, rounds=3, seconds=5)
    lengths = {"products": 1, "fused": 1, "slow": 2, "absurd": 50}
    contest = linear_suite.Contest(case, {name: taking(name, seconds) for name, seconds in lengths.items()})
    for name in ("fused", "slow", "absurd"):
        contest.first(name)
    for _ in range(3):
        contest.others(but="fused")
        contest.turn("fused")
    assert contest.seconds == {"products": [1, 1, 1], "fused": [1, 1, 1], "slow": [2, 2], "absurd": [50]}
    assert contest.medians() == lengths
    once = ["products"] * 2 + ["slow"] * 2 + ["fused"] * 2  # the first of two is not timed
    assert ran == ["fused", "slow", "absurd", *once, *once, "products", "products", "fused", "fused"]


def test_formula_a_few_rows_at_a_time(linear_suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_suite, "FORMULA_ROWS", 3)
    hidden, weight, target = linear_suite.data(linear_suite.Case(7, 5, 11, torch.float32, rounds=1, seconds=1))
    got = linear_suite.expected(PLAIN, hidden, weight, target)
    right = linear_suite.step(
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.t(), target), hidden, weight
    )  # fmt: skip
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_linear_candidates_agree(example: Example, linear_suite: ModuleType) -> None:
    no_linear_form = example.arguments.get("over") == "classes" or not hasattr(fl, f"linear_{example.loss.__name__}")
    if no_linear_form or example.over_rows:
        assert example.over_rows or example.loss in (fl.flex_loss, fl.dice_loss)
        return
    hidden, weight, target = linear_suite.data(linear_suite.Case(9, 5, 31, torch.float32, rounds=1, seconds=1))
    right = linear_suite.expected(example, hidden, weight, target)
    ways = linear_suite.candidates(example, target)
    assert {"fused", "eager", "compiled"} <= set(ways)
    assert ("torch chunked" in ways) == ("cut-cross-entropy" in ways) == (example is PLAIN)
    for name in ("fused", "eager", "torch", "torch chunked"):
        if name in ways and (not name.startswith("torch") or hasattr(torch.nn.functional, "linear_cross_entropy")):
            timing.require(name, linear_suite.step(ways[name], hidden, weight), right)
    by_hidden, by_weight = linear_suite.products(hidden, weight)
    assert by_hidden.shape == hidden.shape and by_weight.shape == weight.shape


class _Benchmark:
    """What a measurement uses of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Any, args: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            function(*args)


@pytest.mark.slow
def test_linear_measurement(linear_suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = linear_suite.candidates

    def some(example: Example, target: Tensor) -> dict[str, Any]:
        ways = candidates(example, target)
        # A process of its own knows no candidate of the last name, and fails.
        return {name: ways[name] for name in ("fused", "eager")} | {"unheard of": ways["eager"]}

    monkeypatch.setattr(linear_suite, "candidates", some)
    benchmark = _Benchmark()
    case = linear_suite.Case(64, 32, 5000, torch.bfloat16, rounds=2, seconds=60)
    linear_suite.measure(benchmark, case, PLAIN)
    info = benchmark.extra_info
    assert info["loss"] == "linear_cross_entropy()" and info["dtype"] == "bfloat16"
    assert info["turns"] == {"fused": 2, "eager": 2} and info["floor"] > 0 and all(info["seconds"].values())
    assert set(info["memory"]) == {"fused", "eager"}
    assert info["failed"] == {"unheard of": "KeyError: 'unheard of'"}
    assert json.loads(json.dumps(info)) == info


def test_memory_of_a_process_of_its_own(linear_suite: ModuleType) -> None:
    case = linear_suite.Case(256, 64, 20_000, torch.float32, rounds=1, seconds=1)
    peak = linear_suite.memory_in_process(PLAIN, "eager", case)
    if peak is None:
        pytest.skip("this kernel does not tell the peak of the memory")
    logits = 256 * 20_000 * 4
    assert logits < peak < 6 * logits


def _linear_run(rows: int, features: int, classes: int, **more: Any) -> dict[str, Any]:
    seconds = {"fused": 1e-9 * rows * classes, "eager": 1e-9 * rows**1.5 * classes, "torch chunked": 9.0}
    return {
        "loss": "linear_cross_entropy()",
        "rows": rows,
        "features": features,
        "classes": classes,
        "dtype": "float32",
        "floor": 0.5e-9 * rows * classes,
        "seconds": seconds,
        "turns": {"fused": 3, "eager": 3, "torch chunked": 1},
        "memory": {"fused": 4 * 2**20 * classes // 1024, "eager": None},
        "failed": {"cut-cross-entropy": "ImportError: no '/home/me/lib/this.so' here"},
        **more,
    }


@pytest.mark.parametrize("with_rows", [True, False])
def test_report_on_linear_forms(
    with_rows: bool, benchmark_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    data = json.loads(benchmark_json.read_text())
    runs = [_linear_run(*shape) for shape in ((512, 64, 1024), (2048, 64, 1024), (512, 64, 4096))]
    runs.append(_linear_run(512, 64, 1024, dtype="bfloat16", failed={}))
    data["benchmarks"] = [*data["benchmarks"] * with_rows, *({"extra_info": run} for run in runs)]
    benchmark_json.write_text(json.dumps(data))
    assert _module("report").main([str(benchmark_json), "--output", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both.md").read_text(encoding="utf-8")
    assert (tmp_path / "both-linear.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "both.png").exists() == ("cross_entropy()` | 1024" in text) == with_rows
    tables = [part for part in text.split("## Linear forms")[1].split("\n\n") if part[:1] == "|"]
    rows = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in tables]
    assert all(len({len(row) for row in table}) == 1 for table in rows)
    assert rows[0][2] == [
        "`linear_cross_entropy()`", "512 × 64 → 1024", "float32", "0.262", "0.524", "2.00",
        "22.6", "-", "-", "1.72e+04 @1", "failed", "0", "4", "-", "-", "-", "-", "-",
    ]  # fmt: skip
    assert rows[0][5][2] == "bfloat16" and rows[0][5][10] == "-"
    assert [row[2:] for row in rows[1][2:]] == [
        ["floor", "1.00", "-", "1.00", "-", "-", "-"],
        ["fused", "1.00", "-", "1.00", "0.00", "-", "1.00"],
        ["eager", "1.50", "-", "1.00", "-", "-", "-"],
        ["torch chunked", "0.00", "-", "0.00", "-", "-", "-"],
    ]
    where = ", ".join(f"{shape} float32" for shape in ("512 × 64 → 1024", "2048 × 64 → 1024", "512 × 64 → 4096"))
    assert f"- *cut-cross-entropy* did not run ({where}): ImportError: no 'this.so' here" in text


# the supervised contrastive loss


@pytest.fixture
def supcon_suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("supcon_suite")


def test_supcon_candidates_agree(supcon_suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supcon_suite, "FORMULA_ROWS", 5)
    features, labels = torch.randn(23, 7), torch.randint(6, (23,))
    labels[4] = 9  # without a positive
    right = supcon_suite.expected(features, labels)
    ways = supcon_suite.candidates(labels)
    assert list(ways) == ["fused", "eager", "compiled", "pytorch-metric-learning"]
    for name in ("fused", "eager"):
        timing.require(name, supcon_suite.step(ways[name], features), right)
    by_rows, by_columns = supcon_suite.products(features)()
    torch.testing.assert_close(by_rows, features @ features.t() @ features)
    assert by_columns.shape == features.shape


@pytest.mark.slow
def test_supcon_measurement(supcon_suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = supcon_suite.candidates
    monkeypatch.setattr(
        supcon_suite, "candidates", lambda labels: {name: candidates(labels)[name] for name in ("fused", "eager")}
    )
    benchmark = _Benchmark()
    supcon_suite.measure(benchmark, supcon_suite.Case(1500, 16, rounds=2, seconds=60))
    info = benchmark.extra_info
    assert info["loss"] == "supcon_loss(temperature=0.3)" and info["dtype"] == "float32" and not info["failed"]
    assert (info["rows"], info["features"]) == (1500, 16) and "classes" not in info
    assert info["turns"] == {"fused": 2, "eager": 2} and info["floor"] > 0 and all(info["seconds"].values())
    if info["memory"]["eager"] is None:
        pytest.skip("this kernel does not tell the peak of the memory")
    assert info["memory"]["eager"] > 1500 * 1500 * 4


def _supcon_run(rows: int, features: int) -> dict[str, Any]:
    run = _linear_run(rows, features, 1, loss="supcon_loss(temperature=0.3)")
    return {name: value for name, value in run.items() if name != "classes"} | {"failed": {}}


def test_report_on_the_contrastive_loss(benchmark_json: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = json.loads(benchmark_json.read_text())
    runs = [_supcon_run(512, 256), _supcon_run(2048, 256), _supcon_run(512, 768)]
    data["benchmarks"] = [{"extra_info": run} for run in [*runs, _linear_run(512, 64, 1024)]]
    benchmark_json.write_text(json.dumps(data))
    assert _module("report").main([str(benchmark_json), "--output", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both.md").read_text(encoding="utf-8")
    assert (tmp_path / "both-supcon.png").read_bytes().startswith(b"\x89PNG")
    parts = [part.strip() for part in text.split("## Supervised contrastive loss")[1].split("\n\n")]
    table, slopes = [part for part in parts if part[:1] == "|"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][1] == "N × D" and rows[0][8] == "× pytorch-metric-learning"
    assert len({len(row) for row in rows}) == 1
    assert rows[2][1:3] == ["512 × 256", "float32"] and rows[2][9] == "0"  # MiB of gradients, 0.5 of them
    assert [abs(float(cell)) for cell in slopes.splitlines()[3].split("|")[4:6]] == [1, 0]
    assert "512 × 64 → 1024" in text.split("## Supervised")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read benchmarks"),
        ("{", "cannot read benchmarks"),
        ('{"benchmarks": []}', "cannot read benchmarks"),
        ('{"machine": "", "measured": "", "runs": []}', "holds no benchmark of a loss"),
        ("[]", "cannot read benchmarks"),
    ],
)
def test_report_on_what_is_no_benchmark(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        _module("report").main([str(path)])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


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
    assert _module("report").main([str(path), "--output", str(tmp_path / "report")]) == 0
    assert "focal_loss" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert fl.__version__ in (tmp_path / "report.md").read_text(encoding="utf-8")
