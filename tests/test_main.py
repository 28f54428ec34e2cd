"""python -m fusedloss: info, check, bench and memory, what they print and how they exit."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss as fl
from fusedloss import __main__ as command
from fusedloss import backends
from fusedloss.backends import cuda
from fusedloss.losses._registry import EXAMPLES, LOSSES, Example
from fusedloss.tools import peers, selfcheck, timing


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


def test_info_and_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run([sys.executable, "-m", "fusedloss", "info"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert fl.__version__ in done.stdout and torch.__version__ in done.stdout
    assert all(f"impl {impl}" in done.stdout for impl in backends.IMPLS)
    (built,) = (line for line in done.stdout.splitlines() if line.startswith("cuda kernels "))
    assert built.endswith(f" {cuda.TARGETS or 'none'}")
    some = EXAMPLES[::3]  # CI checks all of them, where it installs the package
    monkeypatch.setattr(selfcheck, "EXAMPLES", some)
    assert command.main(["check", "--quick"]) == 0
    out = capsys.readouterr().out
    assert all(str(example) in out for example in some)
    linear = [f"linear_{example}" for example in some if example.linear is not None]
    assert out.count("PASS") == (len(some) + len(linear)) * 4 * len(selfcheck.ready())
    assert all(name in out for name in linear) and len(linear) > 1
    left_out = [line for line in out.splitlines() if line.startswith("not checked: ")]
    for impl in set(backends.LINEAR_IMPLS) - set(selfcheck.ready()):
        assert any(f": {impl}" in line and selfcheck.unchecked(impl) in line for line in left_out)
    assert any("the fused linear form on a GPU (" in line for line in left_out) and "supcon_loss and " in left_out[-1]


BENCH = ["bench", "--shape", "32x500", "--features", "16", "--rounds", "2", "--no-compile"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bench_times_every_form_among_its_peers(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*BENCH, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    lines = {line.split("(")[0]: line for line in out.splitlines()}
    assert f"32 x 500 {dtype}, 16 features" in out
    linear = {f"linear_{name}" for name, loss in LOSSES.items() if loss.linear is not None}
    assert linear | set(LOSSES) | {"supcon_loss"} <= set(lines) and len(linear) > 4
    assert any(line.startswith("cross_entropy()") and "F.cross_entropy " in line for line in out.splitlines())
    assert ("F.linear_cross_entropy" in lines["linear_cross_entropy"]) == hasattr(F, "linear_cross_entropy")
    times = lines["supcon_loss"].split(")")[1].split()
    assert float(times[1]) > 0 and times[2] == times[5] == "-"


@pytest.mark.parametrize("shape", [("1x5", "3"), ("2x5", "3"), ("3x5", "1"), ("3x5", "2")])
def test_bench_leaves_out_contrasts_without_a_gradient(
    shape: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to compare for one row, two, or those that can only point both ways."""
    rows, features = shape
    words = ["bench", "--shape", rows, "--features", features, "--rounds", "1", "--no-compile", "--loss"]
    assert command.main([*words, "p"]) == 0
    assert ("supcon_loss(" in capsys.readouterr().out) == (shape == ("3x5", "2"))


def test_every_ratio_is_the_others_time_over_that_of_fused() -> None:
    contest = timing.Contest(torch.zeros(1), dict.fromkeys(("fused", "eager", "torch")))
    for name, seconds in (("fused", 2.0), ("eager", 3.0), ("torch", 1.0)):
        contest.steps[name].append(timing.Step(seconds, 0.0))
    contest.copies.append(4.0)
    row = command._bench_row("a loss", contest)
    assert row == ("a loss", "6000.00", "2000.00", "-", "3", "1.5", "-", "F.linear_cross_entropy 0.5")


def test_a_peer_that_fails_is_a_note_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(hidden: Tensor, weight: Tensor, *, target: Tensor, chunked: bool) -> Tensor:
        if chunked:
            raise NotImplementedError("no such kernel\nsecond line")
        return (hidden @ weight.t()).logsumexp(-1).mean()

    monkeypatch.setattr(peers, "_torch", fail)
    assert command.main([*BENCH, "--loss", "linear_cross"]) == 0
    out = capsys.readouterr().out
    assert "note: F.linear_cross_entropy in chunks did not work here: no such kernel\n" in out
    assert "note: linear_cross_entropy(), torch, is wrong by" in out
    (row,) = (line for line in out.splitlines() if line.startswith("linear_cross"))
    assert float(row.split()[5]) > 0 and row.split()[-1] == "-"


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for word, text in (("--version", f"fusedloss {fl.__version__}\n"), ("-h", "usage: python -m fusedloss ")):
        with pytest.raises(SystemExit) as end:
            command.main([word])
        out = capsys.readouterr().out
        assert end.value.code == 0 and out.startswith(text)
    assert command.main([]) == 2
    (usage,) = capsys.readouterr().err.splitlines()
    assert usage == out.splitlines()[0] and all(word in usage for word in ("info", "check", "bench", "memory"))
    with pytest.raises(SystemExit):
        command.main(["bench", "--loss", "nothing"])
    assert "there are cross_entropy, " in capsys.readouterr().err


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
    for module, words in ((selfcheck, ["check", "--quick"]), (peers, ["bench", "--shape", "16x50", "--no-compile"])):
        monkeypatch.setattr(module, "EXAMPLES", [wrong])
        assert command.main(words) == 1
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert any("reference" in line and "float64" in line and line.endswith("FAIL") for line in lines)
    assert any("FAILED" in line for line in lines) and "focal_loss(gamma=2.0), fused, is wrong by" in error


@pytest.mark.parametrize("part", ["loss", "gradient of a sum"])
def test_check_fails_for_a_linear_form_that_is_not_the_formula(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*tensors: Tensor, reduction: str, **options: object) -> Tensor:
        loss = fl.linear_cross_entropy(*tensors, reduction=reduction, **options)
        return loss * (0.99 if (reduction == "sum") == (part != "loss") else 1)

    monkeypatch.setattr(LOSSES["cross_entropy"], "linear", wrong)
    monkeypatch.setattr(selfcheck, "EXAMPLES", LOSSES["cross_entropy"].examples[:1])
    assert command.main(["check", "--quick"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "cross_entropy() " in line]
    assert {(line[0], line[-1]) for line in lines if line[2] == "float32"} == {
        ("cross_entropy()", "PASS"), ("linear_cross_entropy()", "FAIL"),
    }  # fmt: skip
