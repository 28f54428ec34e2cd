"""Log-probabilities, entropies and the most likely classes, and the temperature that they share with the losses."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from row_losses import LEVELED, computed, each_loss, takes
from row_suite import logits_and_targets
from torch import Tensor, nn

import fusedloss as fl
from fusedloss import backends

IGNORED = 5
EXACT: dict[str, float] = {"rtol": 1e-11, "atol": 1e-14}
SOFTCAP = 3.0

#: What makes the logits of the hidden states, and chunks of two rows.
LINEAR = {"plain": {}, "softcap, chunks": {"softcap": SOFTCAP, "budget": 2 * 2 * 8 * 37}}


def dense(z: Tensor, target: Tensor, temperature: Any = 1.0) -> fl.LogProbs:
    log_p = (z.double() / temperature).log_softmax(-1)
    ignored = target == IGNORED
    at_target = log_p.gather(-1, target.masked_fill(ignored, 0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    return fl.LogProbs(at_target.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0))


def problem(generator: torch.Generator, classes: int = 37, rows: int = 6) -> tuple[Tensor, Tensor]:
    z, target = logits_and_targets(rows, classes, generator)
    target[target == IGNORED] = 1
    target[2] = IGNORED
    return z, target


def gradients(result: fl.LogProbs, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, 2 * result.entropy.numel()).double().view(2, *result.entropy.shape)
    return torch.autograd.grad((weights[0] * result.log_prob + weights[1] * result.entropy).sum(), inputs)


@pytest.mark.parametrize("temperature", [1, 0.6, torch.tensor(1.7)], ids=repr)
def test_of_logits(temperature, impl, generator):
    z, target = problem(generator)
    z[2] = math.nan  # an ignored row is not looked at
    z[4, ::2] = -math.inf
    target[4] = 1
    z, target = z.view(2, 3, -1).requires_grad_(), target.view(2, 3)
    options = {"temperature": temperature, "ignore_index": IGNORED, "impl": impl}
    result = fl.log_probs(z, target, entropy=True, **options)
    clean = z.detach().masked_fill(z.isnan(), 0).requires_grad_()
    expected = dense(clean, target, temperature)
    torch.testing.assert_close(result, expected, **EXACT)
    torch.testing.assert_close(fl.log_probs(z, target, **options), expected.log_prob, **EXACT)
    assert not math.copysign(1, result.log_prob.view(-1)[2].item()) < 0
    clean_gradient = gradients(expected, [clean])[0].nan_to_num(0)  # that of 0 log 0 in the formula
    got = gradients(result, [z])[0]
    where = clean > -math.inf
    torch.testing.assert_close(got[where], clean_gradient[where], **EXACT)
    assert not got.view(6, -1)[2].any() and not got[~where].any()


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize("learnt", [False, True], ids=["a number", "learnt"])
def test_of_hidden_states(options, learnt, impl, generator):
    if learnt and "softcap" in options:
        pytest.skip("a temperature behind a softcap is not learnt")
    _, target = problem(generator)
    shapes = (6, 4), (37, 4), (37,)
    hidden, weight, bias = (torch.randn(s, generator=generator).double().requires_grad_() for s in shapes)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True) if learnt else 0.7
    leaves = [hidden, weight, bias, *([temperature] if learnt else [])]
    made = {"linear_bias": bias, "temperature": temperature, "ignore_index": IGNORED, "impl": impl, **options}
    result = fl.linear_log_probs(hidden, weight, target, entropy=True, **made)
    z = F.linear(hidden, weight, bias)
    if "softcap" in options:
        z = SOFTCAP * torch.tanh(z / SOFTCAP)
    expected = dense(z, target, temperature)
    torch.testing.assert_close(result, expected, **EXACT)
    torch.testing.assert_close(fl.linear_log_probs(hidden, weight, target, **made), expected.log_prob, **EXACT)
    torch.testing.assert_close(gradients(result, leaves), gradients(expected, leaves), **EXACT)

    made.pop("ignore_index")
    index, log_prob = fl.linear_topk_log_probs(hidden, weight, 5, **made)
    top = (z / temperature).log_softmax(-1).topk(5)
    assert index.equal(top.indices) and not log_prob.requires_grad
    torch.testing.assert_close(log_prob, top.values.detach(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, impl, generator):
    z, target = problem(generator, 300)
    z = z.to(dtype).requires_grad_()
    result = fl.log_probs(z, target, entropy=True, temperature=0.5, ignore_index=IGNORED, impl=impl)
    assert {x.dtype for x in result} == {torch.float32}
    expected = dense(z, target, 0.5)
    torch.testing.assert_close([x.double() for x in result], list(expected), rtol=1e-6, atol=1e-6)
    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(*(gradients(x, [z])[0] for x in (result, expected)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
def test_derivatives(linear, impl, generator):
    z, target = problem(generator, 7, 4)
    temperature = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    options = {"ignore_index": IGNORED, "impl": impl, "entropy": True}
    if linear:
        weight = torch.randn(9, 7, generator=generator).double().requires_grad_()

        def function(z: Tensor, temperature: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return tuple(fl.linear_log_probs(z, weight, target, temperature=temperature, **options))

        leaves = (z.requires_grad_(), temperature, weight)
    else:

        def function(z: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:  # type: ignore[misc]
            return tuple(fl.log_probs(z, target, temperature=temperature, **options))

        leaves = (z.requires_grad_(), temperature)  # type: ignore[assignment]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# The temperature of losses


@each_loss
@pytest.mark.parametrize("classes", [9, 300])
def test_a_small_temperature_costs_no_digits(classes, loss, impl, generator):
    """The gradient is that of the rounded quotients: fused with a difference, they would be none in one place."""
    drawn, target = logits_and_targets(8, classes, generator)
    for temperature in (1e-2, 1e-4, 1e-7):
        z, quotients = drawn.float().requires_grad_(), (drawn.float() * (1 / temperature)).requires_grad_()
        loss(quotients, target, impl=impl).backward()
        loss(z, target, temperature=temperature, impl=impl).backward()
        torch.testing.assert_close(z.grad * temperature, quotients.grad, rtol=1e-5, atol=1e-7)


@each_loss
@pytest.mark.parametrize("form", ["a number", "learnt", "over the rows"])
def test_temperature_of_losses(loss, form, impl, generator):
    """z / temperature before all else, in losses, statistics and gradients; of the temperature too."""
    if form == "over the rows":
        if loss not in LEVELED:
            pytest.skip("it has no such level")
        loss = partial(loss, level="class")
    z, target = problem(generator)
    leaves = [z.requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=form != "a number")]
    of_temperature = 2 if form != "a number" else 1
    options: dict[str, Any] = {"ignore_index": IGNORED, "weight": torch.linspace(0.5, 1, 37).double()}
    if takes(loss, "label_smoothing"):
        options["label_smoothing"] = 0.1
    if form != "over the rows":
        options["z_loss"] = 0.01
    temperature = leaves[1] if form != "a number" else 0.7
    report = {"return_stats": True, "stats": ("entropy",)}
    results = []
    for value, stats in (
        loss(z, target, temperature=temperature, impl=impl, **options, **report),
        loss(z / leaves[1], target, impl="reference", **options, **report),
    ):
        found = torch.autograd.grad(value, leaves[:of_temperature], retain_graph=True)
        results.append((value, stats, found))
    torch.testing.assert_close(*results, equal_nan=True, **EXACT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_learnt_temperature_does_not_look_at_ignored_rows(bad, impl, generator):
    """Nor at masked classes."""
    z, target = problem(generator)
    weight, bias = torch.randn(37, 37, generator=generator).double(), torch.zeros(37).double()
    bias[6], target[target == 6] = -math.inf, 7
    found = []
    for value in (bad, 0.0):
        z[2] = value
        temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        options = {"ignore_index": IGNORED, "temperature": temperature, "impl": impl}
        row = fl.cross_entropy(z, target, **options)
        linear = fl.linear_cross_entropy(z, weight, target, linear_bias=bias, **options)
        both = fl.log_probs(z + bias, target, entropy=True, **options)
        found.append([torch.autograd.grad(x.sum(), temperature)[0] for x in (row, linear, both.entropy)])
    assert all(x.isfinite() for x in found[0])
    torch.testing.assert_close(*found, **EXACT)


def test_a_learnt_temperature_of_more_than_one_block(impl, generator, monkeypatch):
    monkeypatch.setattr("fusedloss.engine.temperature._BLOCK_BYTES", 5 * 8)
    z, target = problem(generator)
    leaf = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    losses = [
        fl.cross_entropy(z.requires_grad_(), target, temperature=leaf, ignore_index=IGNORED, impl=impl),
        F.cross_entropy(z / leaf, target, ignore_index=IGNORED),
    ]
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf) for x in losses), **EXACT)


def test_the_sum_for_a_learnt_temperature_is_beyond_float16(impl):
    z, leaf = torch.tensor([[100.0, 0.0]] * 1000, dtype=torch.float16), torch.tensor(1.0, requires_grad=True)
    loss = fl.cross_entropy(z, torch.ones(1000).long(), temperature=leaf, reduction="sum", impl=impl)
    assert torch.autograd.grad(loss, leaf)[0] == -1e5


def test_the_most_likely_of_certain_rows_and_of_none(compiled_impl):
    """The first keeps the digits of 1 - p; without a finite logit there is no probability."""
    hidden, weight = torch.tensor([[40.0], [300.0]]).double(), torch.tensor([[0.0], [1.0], [-1.0], [-1.0]]).double()
    index, log_prob = fl.linear_topk_log_probs(hidden, weight, 2, impl=compiled_impl)
    assert index.tolist() == [[1, 0], [1, 0]]
    lag = -hidden[:, 0]
    expected = torch.stack([-lag.exp().add(2 * (2 * lag).exp()).log1p(), lag], 1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-14, atol=0)
    bias = torch.full((4,), -math.inf, dtype=torch.float64)
    assert fl.linear_topk_log_probs(hidden, weight, 2, linear_bias=bias, impl=compiled_impl)[1].isnan().all()
    assert [x.shape for x in fl.linear_topk_log_probs(hidden[:0], weight, 2, impl=compiled_impl)] == [(0, 2)] * 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "all else frozen"])
def test_a_learnt_temperature_of_a_linear_loss(reduction, frozen, impl, generator):
    _, target = problem(generator)
    hidden, weight = (torch.randn(n, 4, generator=generator).double().requires_grad_(not frozen) for n in (6, 37))
    bias = torch.randn(37, generator=generator).double()
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = [temperature] if frozen else [temperature, hidden, weight]
    options = {"gamma": 2.0, "ignore_index": IGNORED, "reduction": reduction}
    ours = fl.linear_focal_loss(
        hidden, weight, target, linear_bias=bias, temperature=temperature, impl=impl, budget=37 * 16, **options
    )
    theirs = fl.focal_loss(F.linear(hidden, weight, bias) / temperature, target, impl="reference", **options)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaves) for x in (ours, theirs)), **EXACT)


@pytest.mark.parametrize("loss", [
    lambda z, t, x: fl.focal_loss(z, t, temperature=x),
    lambda z, t, x: fl.dsc_loss(z, t, temperature=x, level="class"),
    lambda z, t, x: fl.flex_loss(z, t, lambda s: s.ce + s.q, temperature=x),
    lambda z, t, x: fl.linear_cross_entropy(z, torch.eye(7).double(), t, temperature=x),
], ids=["row", "class", "flex", "linear"])  # fmt: skip
def test_higher_derivatives_by_a_temperature_beside_frozen_logits(loss, generator):
    z, t = torch.randn(5, 7, generator=generator).double(), torch.tensor([0, 3, -100, 6, 2])
    tau = torch.tensor(1.3).double().requires_grad_()

    def of_tau(x: Tensor) -> Tensor:
        return loss(z, t, x)

    assert torch.autograd.gradgradcheck(of_tau, tau)
    again = torch.autograd.functional.jacobian(of_tau, tau.detach(), vectorize=True)
    torch.testing.assert_close(again, torch.autograd.grad(of_tau(tau), tau)[0])


def test_a_module_learns_its_temperature(impl, generator):
    z, target = problem(generator)
    module = fl.nn.CrossEntropyLoss(temperature=nn.Parameter(torch.tensor(2.0)), ignore_index=IGNORED, impl=impl)
    module(z, target).backward()
    (parameter,) = module.parameters()
    leaf = torch.tensor(2.0, requires_grad=True)
    F.cross_entropy(z / leaf, target, ignore_index=IGNORED).backward()
    torch.testing.assert_close(parameter.grad, leaf.grad)


WRONG = {
    "temperature": [(0, ValueError, "between 1e-30 and 1e\\+30, got 0"), (math.inf, ValueError, "got inf"),
                    (-1.0, ValueError, "-1.0"), (math.nan, ValueError, "got nan"),
                    ("1", TypeError, "'1'"), (True, TypeError, "True"),
                    (1e-39, ValueError, "1e-39"), (10**400, ValueError, "10000"),
                    (torch.ones(2), ValueError, r"shape \(2,\)"), (torch.tensor(1), TypeError, "int64"),
                    (torch.tensor(-2.0), ValueError, "got -2.0")],
    "entropy": [(1, TypeError, "got 1"), (None, TypeError, "None")],
    "ignore_index": [(0.5, TypeError, "0.5")],
    "reduction": [("mean", TypeError, "reduction")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
    ids=lambda x: repr(x) if not isinstance(x, type) else "",
)
def test_wrong_arguments(name, value, error, message, generator):
    z, target = problem(generator)
    with pytest.raises(error, match=message):
        fl.log_probs(z, target, **{name: value})
    with pytest.raises(error, match=message):
        fl.linear_log_probs(z, torch.ones(9, 37).double(), target, **{name: value})


def test_what_does_not_go_together(generator):
    z, target = problem(generator)
    weight, learnt = torch.ones(9, 37).double(), torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="which softcap="):
        fl.linear_log_probs(z, weight, target, softcap=3.0, temperature=learnt)
    with pytest.raises(ValueError, match="which inplace_backward overwrites"):
        fl.cross_entropy(computed(z), target.clamp(max=30), temperature=learnt, inplace_backward=True, impl="cpu")
    with pytest.raises(ValueError, match=r"return_stats is off, got \('entropy',\)"):
        fl.cross_entropy(z, target, stats=("entropy",))
    with pytest.raises(ValueError, match="one of 'entropy', got 'variance'"):
        fl.cross_entropy(z, target, return_stats=True, stats=("variance",))
    with pytest.raises(TypeError, match="sequence of names, got 'entropy'"):
        fl.cross_entropy(z, target, return_stats=True, stats="entropy")
    for k, error in ((0, "at least 1, got 0"), (10, "number of classes, 9, got 10")):
        with pytest.raises(ValueError, match=error):
            fl.linear_topk_log_probs(z, weight, k)


def test_statistics_of_batches(generator):
    z, target = problem(generator)
    whole, *parts = (
        fl.cross_entropy(z[rows], target[rows], return_stats=True, stats=("entropy",))[1]
        for rows in (slice(None), slice(0, 4), slice(4, None))
    )
    torch.testing.assert_close(fl.RowStats.cat(parts), whole, rtol=0, atol=0)
    assert fl.RowStats.cat([parts[0], parts[1]._replace(entropy=None)]).entropy is None
    texts = [fl.RowStats._make([x[:n].reshape(2, -1) for x in whole]) for n in (4, 6)]  # of lengths that differ
    expected = fl.RowStats._make([torch.cat([x[:4], x]) for x in whole])
    torch.testing.assert_close(fl.RowStats.cat(texts), expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        fl.RowStats.cat([])
    rows, targets = torch.eye(3), torch.arange(3)
    singles = [fl.cross_entropy(rows[i], targets[i], return_stats=True)[1] for i in range(3)]
    torch.testing.assert_close(fl.RowStats.cat(singles), fl.cross_entropy(rows, targets, return_stats=True)[1])


def test_no_entropy_costs_no_sums(kernel_calls, generator):
    """Without it the loss's own pass runs, and no statistics for PyTorch."""
    if backends.unavailable("cpu") is not None:
        pytest.skip(str(backends.unavailable("cpu")))
    z, target = problem(generator)
    fl.log_probs(z.requires_grad_(), target, impl="cpu").sum().backward()
    assert kernel_calls == {("forward", "cpu"): 1, ("backward", "cpu"): 1}
