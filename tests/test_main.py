"""python -m fusedloss: info, check, bench and memory, what they print and how they exit."""

import inspect
import subprocess
import sys
from types import FunctionType

import pytest
import torch
from torch import Tensor

import fusedloss as fl
from fusedloss import __main__ as command
from fusedloss import backends
from fusedloss.backends import cuda
from fusedloss.losses._registry import EXAMPLES, Example
from fusedloss.tools import selfcheck


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fusedloss", *arguments], capture_output=True, text=True, timeout=300)


def _ce(input: Tensor, target: Tensor) -> Tensor:
    return -input.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def test_every_loss_declares_an_example() -> None:
    public = [getattr(fl, name) for name in fl.__all__]
    functions = {f for f in public if isinstance(f, FunctionType) and "input" in inspect.signature(f).parameters}
    losses = {f for f in functions if not f.__name__.startswith("linear_")}
    assert {e.loss for e in EXAMPLES} == losses


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_formulas_are_the_losses(example: Example) -> None:
    logits = torch.randn(6, 11, dtype=torch.float64)
    target = torch.arange(6)
    expected = example.formula(logits, target, **example.arguments)
    if example.over_rows:
        torch.testing.assert_close(expected.mean(), example.loss(logits, target, **example.arguments))
        return
    rows = example.loss(logits, target, **example.arguments, reduction="none")
    torch.testing.assert_close(expected, rows)


def test_info() -> None:
    done = _run("info")
    assert done.returncode == 0, done.stderr
    assert fl.__version__ in done.stdout and torch.__version__ in done.stdout
    for impl in backends.IMPLS:
        assert f"impl {impl}" in done.stdout
    (built,) = (line for line in done.stdout.splitlines() if line.startswith("cuda kernels "))
    assert built.endswith(f" {cuda.TARGETS or 'none'}")


def test_check_passes() -> None:
    done = _run("check", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for example in EXAMPLES:
        assert str(example) in done.stdout
    assert done.stdout.count("PASS") == len(EXAMPLES) * 4 * len(selfcheck.ready())


def test_check_fails_for_a_reference_that_is_not_the_formula(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Example(fl.focal_loss, lambda input, target, gamma: _ce(input, target), {"gamma": 2.0})
    monkeypatch.setattr(selfcheck, "EXAMPLES", [wrong])
    assert command.main(["check", "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("reference" in line and "float64" in line and line.endswith("FAIL") for line in lines)
    assert "FAILED" in lines[-1]


@pytest.mark.parametrize("factor", [1 + 1e-5, 1 - 1e-5, float("nan")])
def test_check_fails_for_an_implementation_that_is_not_the_reference(
    compiled_impl: str, factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(input: Tensor, target: Tensor, impl: str, **options: object) -> Tensor:
        loss = fl.cross_entropy(input, target, impl=impl, **options)
        return loss * (factor if impl == compiled_impl else 1)

    monkeypatch.setattr(selfcheck, "EXAMPLES", [Example(wrong, _ce)])
    assert command.main(["check", "--quick"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("wrong()")]
    verdicts = {tuple(line[1:3]): line[-1] for line in lines}
    assert verdicts[compiled_impl, "float32"] == "FAIL"
    assert verdicts["reference", "float32"] == "PASS"


def test_bench() -> None:
    done = _run("bench", "--shape", "16x50", "--rounds", "2", "--loss", "focal", "--no-compile")
    assert done.returncode == 0, done.stderr
    assert "16 x 50 float32" in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("focal_loss"))
    assert float(row.split()[2]) > 0


def test_bench_refuses_wrong_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Example(fl.focal_loss, lambda input, target, gamma: _ce(input, target), {"gamma": 2.0})
    monkeypatch.setattr(command, "EXAMPLES", [wrong])
    assert command.main(["bench", "--shape", "16x50", "--no-compile"]) == 1
    assert "focal_loss(gamma=2.0), fused, is wrong by" in capsys.readouterr().err
