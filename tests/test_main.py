"""python -m fusedloss: info, check, bench and memory, what they print and how they exit."""

import inspect
import io
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


def test_info_tells_why_an_implementation_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {"reference": None, "triton": None, "cuda": None, "cpu": "the C++ extension did not load (no such file)"}
    monkeypatch.setattr(backends, "unavailable", lambda impl, device=None: reasons[impl])
    assert command.main(["info"]) == 0
    assert "not ready: the C++ extension did not load (no such file)" in capsys.readouterr().out


def test_info_survives_a_default_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEDLOSS_IMPL", "abacus")
    assert command.main(["info"]) == 0
    assert "'abacus'" in capsys.readouterr().out


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
    verdicts = {
        tuple(line.split()[1:3]): line.split()[-1]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("wrong()")
    }
    assert verdicts[compiled_impl, "float32"] == "FAIL"
    assert verdicts["reference", "float32"] == "PASS"


def test_bench() -> None:
    done = _run("bench", "--shape", "16x50", "--rounds", "2", "--loss", "focal", "--no-compile")
    assert done.returncode == 0, done.stderr
    assert "16 x 50 float32" in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("focal_loss"))
    assert float(row.split()[2]) > 0


@pytest.mark.compile
def test_bench_against_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench", "--shape", "16x50", "--rounds", "2", "--loss", "focal", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("focal_loss"))
    assert float(row.split()[-1]) > 0, out


def test_bench_refuses_wrong_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Example(fl.focal_loss, lambda input, target, gamma: _ce(input, target), {"gamma": 2.0})
    monkeypatch.setattr(command, "EXAMPLES", [wrong])
    assert command.main(["bench", "--shape", "16x50", "--no-compile"]) == 1
    assert "focal_loss(gamma=2.0), fused, is wrong by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "info | check | bench | memory"),
        (["bench", "--shape", "1024"], "expected rows x classes such as 1024x32768, got '1024'"),
        (["bench", "--shape", "0x9"], "at least 1 row and 2 classes, got '0x9'"),
        (["bench", "--rounds", "0"], "at least 1, got '0'"),
        (["bench", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["bench", "--loss", "hinge"], "no loss has 'hinge' in its name; there are cross_entropy, dsc_loss,"),
        (["bench", "--shape", "99999999x9999999"], "no logits of 99999999 x 9999999"),
        (["memory", "--rows", "8", "--features", "8"], "--classes"),
        (["memory", "--rows", "0", "--features", "8", "--classes", "8"], "at least 1, got '0'"),
        (["memory", "--rows", "8", "--features", "8", "--classes", "8", "--budget", "9"], "too small for one row"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "4096", "--features", "512", "--classes", "131072", "--dtype", "bfloat16"]
    assert command.main(["memory", *sizes, "--budget", str(64 * 2**20)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4096 rows, 512 features, 131072 classes, bfloat16"
    (logits,) = (line.split() for line in lines if line.startswith("logits"))
    (chunk,) = (line.split() for line in lines if line.startswith("a chunk"))
    (linear,) = (line.split() for line in lines if line.startswith("linear form  "))
    assert logits[-2:] == [str(4096 * 131072 * 2), "1024.0"]
    assert "16" in chunk and chunk[-2:] == [str(64 * 2**20), "64.0"]
    assert linear[-2:] == [str((4 + 256 + 128) * 2**20), "388.0"]


def test_bench_with_a_default_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEDLOSS_IMPL", "abacus")
    with pytest.raises(SystemExit):
        command.main(["bench"])
    assert "FUSEDLOSS_IMPL must be one of" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((_Terminal(), "[" + "#" * 20 + "." * 20 + "] 1/2"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = command._Progress(2)
        bar.advance()
        assert stream.getvalue().strip() == shown
