"""python -m fusedloss: info, check, bench and memory, what they print and how they exit."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fusedloss as fl
from fusedloss import __main__ as command
from fusedloss import backends
from fusedloss.backends import cuda
from fusedloss.losses._registry import EXAMPLES, Example
from fusedloss.tools import selfcheck


def _ce(input: Tensor, target: Tensor) -> Tensor:
    return -input.log_softmax(-1).gather(-1, target[:, None])[:, 0]


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


def test_info_check_and_bench(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "fusedloss", "info"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert fl.__version__ in done.stdout and torch.__version__ in done.stdout
    assert all(f"impl {impl}" in done.stdout for impl in backends.IMPLS)
    (built,) = (line for line in done.stdout.splitlines() if line.startswith("cuda kernels "))
    assert built.endswith(f" {cuda.TARGETS or 'none'}")
    assert command.main(["check", "--quick"]) == 0
    out = capsys.readouterr().out
    assert all(str(example) in out for example in EXAMPLES)
    assert out.count("PASS") == len(EXAMPLES) * 4 * len(selfcheck.ready())
    assert command.main(["bench", "--shape", "16x50", "--rounds", "2", "--loss", "focal", "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert "16 x 50 float32" in out
    (row,) = (line for line in out.splitlines() if line.startswith("focal_loss"))
    assert float(row.split()[2]) > 0


@pytest.mark.parametrize("factor", [1 - 1e-5, float("nan")])
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


def test_a_reference_that_is_not_the_formula_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Example(fl.focal_loss, lambda input, target, gamma: _ce(input, target), {"gamma": 2.0})
    for module, words in ((selfcheck, ["check", "--quick"]), (command, ["bench", "--shape", "16x50", "--no-compile"])):
        monkeypatch.setattr(module, "EXAMPLES", [wrong])
        assert command.main(words) == 1
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert any("reference" in line and "float64" in line and line.endswith("FAIL") for line in lines)
    assert any("FAILED" in line for line in lines) and "focal_loss(gamma=2.0), fused, is wrong by" in error
