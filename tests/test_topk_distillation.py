"""Distillation from k stored classes of a teacher, against dense formulas in float64."""

import math
import re
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import BETAS
from torch import Tensor
from torch.testing import assert_close

import fusedloss as fl
from fusedloss.engine import chunks

ROWS, CLASSES, FEATURES, K = 7, 19, 5, 4
IGNORED = 3  # the number of a class, as a padding index is


RESTS = ("bucket", "renormalize", "ignore")

each_divergence = pytest.mark.parametrize("divergence", BETAS)
each_rest = pytest.mark.parametrize("rest", RESTS)


def dense(
    z: Tensor, index: Tensor, log_prob: Tensor, rest: str, divergence: str, temperature: float = 1.0,
    hard: tuple[Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Losses of the rows, of all the logits, those of the target by plain cross-entropy."""
    y, p = log_prob.exp(), (z / temperature).softmax(-1).gather(-1, index)
    if rest == "bucket":
        y, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (y, p))
    if rest == "renormalize":
        y, p = (x / x.sum(-1, keepdim=True) for x in (y, p))
    loss = oracle.divergence(y.log(), p.log(), divergence, BETAS[divergence])
    return loss if hard is None else loss * temperature**2 + hard[1] * F.cross_entropy(z, hard[0], reduction="none")


def problem(generator: torch.Generator, temperature: float = 1.0, dtype: torch.dtype = torch.float64) -> Any:
    """Hidden states, weight, bias and a teacher's classes, whose log-probabilities are in falling order."""
    shapes = (ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    sources = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    teacher = 2 * torch.randn(ROWS, CLASSES, generator=generator).to(dtype)
    log_prob, index = (teacher / temperature).log_softmax(-1).topk(K)
    return sources, index, log_prob


@pytest.mark.covering(2)
@pytest.mark.parametrize("temperature", [1, 2.5])
@each_rest
@each_divergence
def test_formula(divergence, rest, temperature, impl, generator):
    """Rows and hidden states in chunks, each loss and the mean, with all that else there may be."""
    sources, index, log_prob = problem(generator, temperature)
    target = torch.randint(4, CLASSES, (ROWS,), generator=generator)
    target[1], target[2] = index[1, 0], index[2, 2]
    kept = torch.ones(ROWS, dtype=torch.bool)
    kept[[3, 5]] = False
    target[3] = IGNORED
    token_weight = torch.rand(ROWS, generator=generator).double()
    token_weight[5] = 0
    what = {"rest": rest, "divergence": divergence, "beta": BETAS[divergence], "temperature": temperature, "impl": impl}
    batch = {"target": target, "ignore_index": IGNORED, "token_weight": token_weight}
    hard = {"hard_weight": 0.3, "scale_by_temperature_squared": True}

    leaves = [x.clone().requires_grad_() for x in sources]
    z = F.linear(*leaves)
    plain = dense(z, index, log_prob, rest, divergence, temperature)
    every = dense(z, index, log_prob, rest, divergence, temperature, (target, 0.3))
    of_batch = (every * token_weight).masked_fill(~kept, 0)
    # Rows that are left out hold what nobody may look at.
    wrong_index = index.clone()
    wrong_index[~kept] = torch.tensor([CLASSES, -7, 1, 1])
    wrong = (wrong_index, log_prob.masked_fill(~kept[:, None], math.nan))
    cases = [
        (plain, (index, log_prob), {"reduction": "none"}, kept | True),
        (of_batch, wrong, {**batch, **hard, "reduction": "none"}, kept),
        (of_batch.sum() / 6, wrong, {**batch, **hard}, kept),
        (
            (plain * token_weight).sum() / 4,
            (index, log_prob),
            {"token_weight": token_weight, "normalizer": 4},
            token_weight > 0,
        ),
    ]
    for expected, teacher, options, looked_at in cases:
        upstream = torch.linspace(1, 2, expected.numel()).double().view(expected.shape)
        right = torch.autograd.grad(expected, [z, *leaves], upstream, retain_graph=True)
        logits = z.detach().masked_fill(~looked_at[:, None], math.nan).requires_grad_()
        loss = fl.topk_distillation_loss(logits, *teacher, **what, **options)
        assert_close(loss, expected.detach())
        assert_close(torch.autograd.grad(loss, logits, upstream), right[:1])

        own = [x.clone().requires_grad_() for x in sources]
        made = {"linear_bias": own[2], "budget": 3 * CLASSES * 8}
        loss = fl.linear_topk_distillation_loss(*own[:2], *teacher, **made, **what, **options)
        assert_close(loss, expected.detach())
        assert_close(torch.autograd.grad(loss, own, upstream), right[1:])


@each_divergence
def test_all_the_classes_are_the_whole_divergence(divergence, impl, generator):
    teacher, z = (torch.randn(2, 3, CLASSES, generator=generator).double() for _ in range(2))
    teacher[0, 0, 4] = z[0, 0, 4] = z[0, 1, 5] = -math.inf  # a class that neither row has, one of the teacher alone
    teacher[1, 0, 3] = -math.inf  # one of the student alone
    log_prob, index = teacher.log_softmax(-1).sort(-1, descending=True)
    options = {"divergence": divergence, "reduction": "none"}
    z.requires_grad_()
    expected = fl.distillation_loss(z, teacher, impl="reference", **options)
    finite = torch.ones(2, 3, dtype=torch.bool)
    if divergence in ("forward_kl", "reverse_kl"):
        finite[(0, 1) if divergence == "forward_kl" else (1, 0)] = False
    right = torch.autograd.grad(expected[finite].sum(), z)[0][finite]
    for rest in RESTS:
        loss = fl.topk_distillation_loss(z, index, log_prob, rest=rest, impl=impl, **options)
        assert_close(loss[finite], expected[finite])
        assert loss[~finite].eq(math.inf).all()
        assert_close(torch.autograd.grad(loss[finite].sum(), z)[0][finite], right)


@pytest.mark.covering(1)
@each_rest
@each_divergence
def test_derivatives(divergence, rest, generator):
    (hidden, weight, bias), index, log_prob = problem(generator)
    options = {"rest": rest, "divergence": divergence, "target": index[:, 1], "hard_weight": 0.5}

    def of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fl.linear_topk_distillation_loss(hidden, weight, index, log_prob, linear_bias=bias, **options)

    def of_logits(z: Tensor) -> Tensor:
        return fl.topk_distillation_loss(z, index, log_prob, temperature=0.7, **options)

    z = F.linear(hidden, weight, bias)[:3].requires_grad_()
    index, log_prob, options["target"] = index[:3], log_prob[:3], index[:3, 1]
    leaves = [hidden[:3].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(of_logits, (z,), fast_mode=True)
    assert torch.autograd.gradcheck(of_hidden, leaves, fast_mode=True)
    if divergence != "tv":
        assert torch.autograd.gradgradcheck(of_logits, (z,), fast_mode=True)


@each_rest
def test_a_student_that_is_its_teacher_has_no_loss(rest, impl, generator):
    hidden, weight = (torch.randn(s, generator=generator) for s in ((6, 8), (300, 8)))
    made = {"temperature": 1.5, "softcap": 5.0, "budget": 4 * 300 * 8, "impl": impl}
    index, log_prob = fl.linear_topk_log_probs(hidden, weight, 10, **made)
    hidden.requires_grad_()
    eps = torch.finfo(torch.float32).eps
    for divergence in BETAS:
        options = {"rest": rest, "divergence": divergence, **made}
        loss = fl.linear_topk_distillation_loss(hidden, weight, index.int(), log_prob, **options)
        assert 0 <= loss < (4 * eps if divergence == "tv" else 300 * eps**2)
        if divergence != "tv":
            assert torch.autograd.grad(loss, hidden)[0].abs().max() < 4 * eps * weight.norm()


def test_a_sure_student_keeps_its_digits(impl):
    """Of 1 - sum_k p, which is 2e-7 and less here; and beyond all digits nothing is infinite."""
    z = torch.zeros(6, 40)
    z[:, 7] = torch.tensor([18.0, 22, 30, 18, 18, 120])
    index = torch.tensor([[7, 8, 9]]).repeat(6, 1)
    teacher = z.double() * 0.9
    log_prob = teacher.log_softmax(-1).gather(-1, index).float()
    for divergence in BETAS:
        x, exact = z.clone().requires_grad_(), z.double().requires_grad_()
        options = {"divergence": divergence, "beta": BETAS[divergence], "reduction": "none", "impl": impl}
        loss = fl.topk_distillation_loss(x, index, log_prob, **options)
        p, y = (-fl.cross_entropy(exact[:, None].repeat(1, 3, 1), index, reduction="none", impl=impl)).exp(), log_prob
        rest_p = exact.softmax(-1).index_fill(-1, torch.tensor([7, 8, 9]), 0).sum(-1, keepdim=True)
        rest_y = -y[:, :1].double().expm1() - y[:, 1:].double().exp().sum(-1, keepdim=True)
        both = torch.cat([y.double().exp(), rest_y.clamp(min=1e-38)], -1), torch.cat([p, rest_p], -1)
        right = oracle.divergence(*(x.log() for x in both), divergence, BETAS[divergence])
        gradients = torch.autograd.grad(loss.sum(), x)[0], torch.autograd.grad(right.sum(), exact)[0]
        assert_close(loss[:5].double(), right[:5], rtol=2e-5, atol=1e-12)
        assert_close(gradients[0][:5].double(), gradients[1][:5], rtol=2e-5, atol=1e-12)
        assert loss.isfinite().all() and gradients[0].isfinite().all()
    log_prob = torch.tensor([[0.0, -4.0, -5.0]])  # rounded: a sum above 1
    loss = fl.topk_distillation_loss(x[:1], index[:1], log_prob, divergence="reverse_kl", impl=impl)
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_classes_of_tiny_probability_are_renormalized(impl):
    """Their probabilities are 0 in float32; only a row of -inf alone has nothing to renormalize."""
    z, index = torch.zeros(1, 5), torch.tensor([[1, 3]])
    tiny, right = (
        fl.topk_distillation_loss(z, index, torch.tensor([[x, x - 1]]), rest="renormalize", impl=impl)
        for x in (-200.0, -0.4)
    )
    assert_close(tiny, right, rtol=1e-4, atol=1e-6)


def test_renormalized_classes_leave_the_others_alone(impl, generator):
    z = torch.randn(ROWS, CLASSES, generator=generator).requires_grad_()
    _, index, log_prob = problem(generator)
    loss = fl.topk_distillation_loss(z, index, log_prob, rest="renormalize", impl=impl)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.gather(-1, index).all() and not gradient.scatter(-1, index, 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, impl, generator):
    (hidden, weight, _), index, log_prob = problem(generator)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    options = {"divergence": "jsd", "impl": impl}
    z = F.linear(hidden, weight).detach().requires_grad_()
    exact = z.detach().double().requires_grad_()
    loss = fl.topk_distillation_loss(z, index.to(torch.int32), log_prob.float(), **options)
    right = fl.topk_distillation_loss(exact, index, log_prob, **options)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), right, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(x, y)[0].double() for x, y in ((loss, z), (right, exact))]
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    assert_close(*gradients, rtol=tolerance, atol=tolerance / 10)
    made = fl.linear_topk_distillation_loss(hidden, weight, index, log_prob.to(dtype), **options)
    assert [x.dtype for x in torch.autograd.grad(made, [hidden, weight])] == [dtype] * 2


@pytest.mark.parametrize("given", [False, True], ids=["no target", "target"])
def test_statistics(given, impl, generator):
    (hidden, weight, bias), index, log_prob = problem(generator)
    z = F.linear(hidden, weight, bias).view(ROWS, 1, -1)
    target = index[:, 2:3]
    options: dict[str, Any] = {"temperature": 2.0, "return_stats": True, "stats": ("entropy",), "impl": impl}
    options |= {"target": target, "hard_weight": 0.5} if given else {}
    teacher = index[:, None], log_prob[:, None]
    loss, stats = fl.topk_distillation_loss(z, *teacher, **options)
    shared = {name: options[name] for name in ("temperature", "return_stats", "stats", "impl")}
    expected = fl.cross_entropy(z, target, **shared)[1]
    if not given:
        expected = expected._replace(target_log_prob=torch.full((ROWS, 1), math.nan).double())
    assert_close(stats, expected, equal_nan=True)
    assert bool(stats.target_log_prob.isnan().all()) != given and stats.lse.shape == (ROWS, 1)
    assert_close(loss, fl.topk_distillation_loss(z, *teacher, **{**options, "return_stats": False, "stats": ()}))
    linear = fl.linear_topk_distillation_loss(hidden[:, None], weight, *teacher, linear_bias=bias, **options)
    assert_close(linear, (loss, stats), equal_nan=True)


@pytest.mark.parametrize(("reduction", "backwards"), [("mean", 0), ("sum", 0), ("none", 1)])
def test_gradients_are_made_with_a_reduced_loss(reduction, backwards, monkeypatch, compiled_impl, generator):
    (hidden, weight, _), index, log_prob = problem(generator)
    sources, calls, backward = (hidden.requires_grad_(), weight.requires_grad_()), [], chunks.backward
    monkeypatch.setattr(chunks, "backward", lambda *x: calls.append(1) or backward(*x))
    options = {"reduction": reduction, "target": index[:, 0], "hard_weight": 0.1, "impl": compiled_impl}
    loss = fl.linear_topk_distillation_loss(*sources, index, log_prob, **options)
    torch.autograd.grad(loss.sum(), sources)
    assert len(calls) == backwards


def test_token_weights_may_be_learnt(compiled_impl, generator):
    (hidden, weight, bias), index, log_prob = problem(generator)
    token_weight = torch.rand(ROWS, generator=generator).double().requires_grad_()
    z = F.linear(hidden, weight, bias)
    options = {"temperature": 2.0, "target": index[:, 1], "hard_weight": 0.5, "impl": compiled_impl}
    loss = fl.topk_distillation_loss(z, index, log_prob, token_weight=token_weight, reduction="sum", **options)
    rows = fl.topk_distillation_loss(z, index, log_prob, reduction="none", **options)
    assert_close(torch.autograd.grad(loss, token_weight), (rows,))


@pytest.mark.parametrize("rows", [(), (0,), (2, 0, 3), (1, 1)], ids=str)
def test_shapes(rows, impl):
    z = torch.linspace(-1, 1, math.prod(rows) * 5).view(*rows, 5).requires_grad_()
    index, log_prob = torch.tensor([2]).expand(*rows, 1), torch.tensor([-0.5]).expand(*rows, 1)
    loss = fl.topk_distillation_loss(z, index, log_prob, reduction="none", impl=impl)
    assert loss.shape == rows
    if loss.numel():
        right = dense(z, index, log_prob, "bucket", "forward_kl")
        assert_close(loss, right)
        assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(right, z))


def _over_ranks(rank: int, world: int) -> None:
    """Each rank has some of the classes, none in the middle; the teacher's are of all of them."""
    generator = torch.Generator().manual_seed(0)
    sizes = [4, 0, CLASSES - 4] if world == 3 else [4, CLASSES - 4]
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    sources, index, log_prob = problem(generator)
    index[0, 0] = index[0, 1] - 1 if index[0, 1] else index[0, 1] + 1  # no target is on every rank in each row
    log_prob[0] -= 1
    index[0, 2:] = torch.tensor([x for x in range(4) if x not in index[0, :2]][:2])
    for rest in RESTS:
        options = {"rest": rest, "divergence": "jsd", "target": index[:, 1], "hard_weight": 0.3, "temperature": 2.0}
        results = []
        for own, group in ((slice(None), None), (part, dist.group.WORLD)):
            hidden, weight, bias = (x.clone().requires_grad_() for x in (sources[0], sources[1][own], sources[2][own]))
            made = {"linear_bias": bias, "group": group, **options}
            linear = fl.linear_topk_distillation_loss(hidden, weight, index, log_prob, **made)
            logits = F.linear(sources[0], sources[1], sources[2])[:, own].requires_grad_()
            loss = fl.topk_distillation_loss(logits, index, log_prob, group=group, **options)
            gradients = torch.autograd.grad(linear, [hidden, weight, bias])
            of_logits = torch.autograd.grad(loss, logits)[0]
            results.append((linear, loss, gradients, of_logits))
        (linear, loss, gradients, of_logits), got = results
        right = (linear, loss, (gradients[0], gradients[1][part], gradients[2][part]), of_logits[:, part])
        assert_close(got, right)
    with pytest.raises(ValueError, match="at most 19 different classes"):
        fl.topk_distillation_loss(logits, *(x[:, :1].expand(ROWS, 20) for x in (index, log_prob)), group=group)


test_scene = ranks.tests_of({_over_ranks: [2]})


def _call(**changes: Any) -> Any:
    arguments = {
        "input": torch.zeros(2, 5),
        "index": torch.tensor([[0, 4], [2, 1]]),
        "log_prob": torch.full((2, 2), -1.0),
    }
    return lambda: fl.topk_distillation_loss(**(arguments | changes))


BAD = {
    "logits are a list": (_call(input=[0.0]), TypeError, "input must be a tensor of logits, got list"),
    "logits beside a whole teacher": (
        lambda: fl.distillation_loss([0.0], torch.zeros(2, 5)), TypeError, "input must be a tensor of logits, got list"
    ),
    "index is a list": (_call(index=[[0]]), TypeError, "index must be a tensor, got list"),
    "index of floats": (_call(index=torch.zeros(2, 2)), TypeError, "index must hold indices .* got torch.float32"),
    "index of other rows": (
        _call(index=torch.zeros(3, 2).long()), ValueError, r"index must be \(2, 'k'\) with k >= 1 .* got \(3, 2\)"
    ),
    "index without k": (_call(index=torch.zeros(2).long()), ValueError, r"index must be .* got \(2,\)"),
    "k of 0": (_call(index=torch.zeros(2, 0).long(), log_prob=torch.zeros(2, 0)), ValueError, r"got \(2, 0\)"),
    "k above V": (
        _call(index=torch.arange(6).expand(2, 6), log_prob=torch.zeros(2, 6)), ValueError,
        "index must be of at most 5 different classes, as many as input has, got 6",
    ),
    "index elsewhere": (
        _call(index=torch.zeros(2, 2, device="meta").long()), ValueError, "index is on meta, but input on cpu"
    ),
    "class out of range": (_call(index=torch.tensor([[0, 4], [5, 1]])), IndexError, "index 5 is out of range for 5"),
    "class below range": (_call(index=torch.tensor([[-100, 4], [2, 1]])), IndexError, "index -100 is out of range"),
    "class twice": (_call(index=torch.tensor([[0, 4], [2, 2]])), ValueError, "different classes .* got class 2 twice"),
    "log_prob is a number": (_call(log_prob=0.0), TypeError, "log_prob must be a tensor, got float"),
    "log_prob of integers": (
        _call(log_prob=torch.zeros(2, 2).long()), TypeError, "log_prob must be float64, .* got torch.int64"
    ),
    "log_prob of another shape": (
        _call(log_prob=torch.zeros(2, 1)), ValueError, r"log_prob must be of the index's shape \(2, 2\), got \(2, 1\)"
    ),
    "log_prob elsewhere": (
        _call(log_prob=torch.zeros(2, 2, device="meta")), ValueError, "log_prob is on meta, but input on cpu"
    ),
    "log_prob requires grad": (
        _call(log_prob=torch.zeros(2, 2, requires_grad=True)), ValueError, r"requires grad, .* log_prob.detach\(\)"
    ),
    "log_prob above 0": (_call(log_prob=torch.full((2, 2), 0.25)), ValueError, "at most 0, got 0.25; take log_softmax"),
    "probabilities above 1": (
        _call(log_prob=torch.tensor([[-0.5, -0.7]]).repeat(2, 1)), ValueError, "sum to at most 1 in a row, got 1.10"
    ),
    "nothing to renormalize": (
        _call(log_prob=torch.full((2, 2), -math.inf), rest="renormalize"), ValueError, "a row of -inf alone"
    ),
    "log_prob is NaN": (_call(log_prob=torch.full((2, 2), math.nan)), ValueError, "at most 0, got nan"),
    "rest": (_call(rest="drop"), ValueError, "rest must be one of 'renormalize', 'ignore', 'bucket', got 'drop'"),
    "divergence": (_call(divergence="kl"), ValueError, "divergence must be one of 'forward_kl', .* got 'kl'"),
    "beta": (_call(divergence="jsd", beta=1.0), ValueError, "beta must be between 0 and 1, .* got 1.0"),
    "hard_weight": (_call(hard_weight=0.5), ValueError, "target is None, got 0.5"),
    "temperature": (_call(temperature=0.0, scale_by_temperature_squared=True), ValueError, "temperature.* got 0.0"),
    "learnt temperature": (
        _call(temperature=torch.ones((), requires_grad=True)), ValueError, r"pass temperature.detach\(\)"
    ),
    "target": (_call(target=torch.tensor([0, 5])), IndexError, "target 5 is out of range for 5 classes"),
    "shape of target": (_call(target=torch.zeros(3).long()), ValueError, r"target must have .* \(2,\), got \(3,\)"),
    "token_weight": (_call(token_weight=torch.ones(3)), ValueError, r"token_weight must be .* \(2,\), got \(3,\)"),
    "ignore_index": (_call(ignore_index=1.5), TypeError, "ignore_index must be an int, got 1.5"),
    "weight": (_call(weight=torch.ones(5)), TypeError, "unexpected keyword argument 'weight'"),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [np.int8(12), np.float16(300), torch.tensor(300.0).half()], ids=repr)
def test_a_temperature_is_not_squared_in_its_own_dtype(temperature, generator):
    z, (log_prob, index) = torch.randn(5, 7, generator=generator), torch.randn(5, 7).log_softmax(-1).topk(3)
    loss = partial(fl.topk_distillation_loss, z, index, log_prob, scale_by_temperature_squared=True)
    assert_close(loss(temperature=temperature), loss(temperature=float(temperature)))


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_too_many_classes_for_the_cuda_kernels():
    from fusedloss.backends import cuda
    from fusedloss.definition.rows import Job, Rows, Spec

    rows = Rows.of(torch.zeros(1, 99), torch.zeros(1).long(), candidates=torch.arange(65)[None])
    expected = "at most 64 candidates for each target, got 65, of which the k classes of a top-k teacher are some; use"
    with pytest.raises(ValueError, match=re.escape(expected)):
        cuda.Cuda().forward(Job.new(rows, Spec("cuda")))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_indices_of_small_dtypes(dtype, impl, generator):
    """They have no room for the number of classes or for an ignore_index: -100 is class 156 of uint8."""
    z, teacher = (torch.randn(4, 300, generator=generator) for _ in range(2))
    log_prob, index = teacher[:, :120].log_softmax(-1).topk(5)
    target = torch.tensor([119, 3, 100, 7 if dtype == torch.int8 else 156])
    own: dict[str, Any] = {"hard_weight": 0.5, "reduction": "none", "impl": impl}
    for ignored in (-100, 3, 356, -253):
        ours, right = (
            fl.topk_distillation_loss(z, index.to(kind), log_prob, target=target.to(kind), ignore_index=ignored, **own)
            for kind in (dtype, torch.int64)
        )
        assert_close(ours, right)
    assert_close(fl.topk_distillation_loss(z, index.to(dtype), log_prob, impl=impl),
                 fl.topk_distillation_loss(z, index, log_prob, impl=impl))  # fmt: skip


def test_a_class_that_stands_for_the_target_is_none(impl):
    """Not even where its number is that of ignore_index, or where the student's logit is -inf."""
    z, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    z[:, 0] = teacher[:, 0] = -math.inf
    index, log_prob = torch.arange(6).expand(4, 6), teacher.log_softmax(-1)
    right = oracle.divergence(*(x[:, 1:].log_softmax(-1) for x in (teacher, z))).mean()
    z.requires_grad_()
    for loss in (
        fl.distillation_loss(z, teacher, ignore_index=0, impl=impl),
        fl.topk_distillation_loss(z, index, log_prob, ignore_index=0, impl=impl),
    ):
        assert_close(loss, right)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()
