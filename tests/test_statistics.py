"""The statistics of rows: their definitions and gradients, and the algebra that every loss over them inherits."""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_suite import DTYPES, HALVES, assert_same_bits, class_weights, each_dtype, logits_and_targets, with_gradient

import fusedloss as fl
from fusedloss import backends
from fusedloss.definition.statistics import OPTIONAL


def test_fresh_memory_is_poisoned():
    """What makes a forgotten output fail in every test."""
    assert torch.empty(3).isnan().all()
    assert torch.randn(2, 3).new_empty((4, 2), dtype=torch.float64).isnan().all()
    assert torch.empty_like(torch.zeros(5, dtype=torch.bfloat16), memory_format=torch.contiguous_format).isnan().all()
    assert (torch.zeros(1, dtype=torch.int64).new_empty(3) == torch.iinfo(torch.int64).max).all()


# --- definitions ---


def _pick(name, index):
    def logit(z, t, w, c):
        chosen = index(z.detach(), t)
        return torch.where(chosen < 0, -torch.inf, oracle.at(z, chosen.clamp(min=0)))

    return {
        f"{name}_logit": logit,
        f"{name}_ce": lambda z, t, w, c: z.logsumexp(-1) - logit(z, t, w, c),
        f"{name}_index": lambda z, t, w, c: index(z, t),
    }


def _below(z, t):
    lower = torch.where(z < oracle.at(z, t)[:, None], z, -torch.inf)
    return torch.where(lower.amax(-1).isneginf(), -1, oracle.largest(lower, 1)[:, 0])


#: Each field of the logits z, targets t, class weights w and candidates c.
DEFINITIONS = {
    "ce": lambda z, t, w, c: -oracle.at(z.log_softmax(-1), t),
    "p": lambda z, t, w, c: oracle.at(z.softmax(-1), t),
    "q": lambda z, t, w, c: 1 - oracle.at(z.softmax(-1), t),
    "lse": lambda z, t, w, c: z.logsumexp(-1),
    "target_logit": lambda z, t, w, c: oracle.at(z, t),
    "target": lambda z, t, w, c: t,
    **_pick("top", lambda z, t: oracle.largest(z, 1)[:, 0]),
    **_pick("second", lambda z, t: oracle.largest(z, 2)[:, 1]),
    **_pick("below", _below),
    "mean_logit": lambda z, t, w, c: (w * z).mean(-1),
    "mean_ce": lambda z, t, w, c: -(w * z.log_softmax(-1)).mean(-1),
    "candidate_logit": lambda z, t, w, c: z.gather(-1, c),
    "candidate_ce": lambda z, t, w, c: -z.log_softmax(-1).gather(-1, c),
}


def capture(z, target, statistics=tuple(OPTIONAL), **options):
    """The statistics as a loss function gets them."""
    seen = []
    fl.flex_loss(z, target, lambda s: seen.append(s) or s.ce, statistics=statistics, **options)
    return seen[0]


def rows_to_pick_from(dtype, classes, generator):
    """Random rows; one of equal logits; one with ties of the largest, of the target, and of the largest below it."""
    z, target = logits_and_targets(6, classes, generator, torch.float64)
    z = (z * 64).round() / 64
    z[2] = 0.25
    if classes > 8:
        z[3, [1, classes - 1]] = 30.0
        z[3, [0, classes // 2]] = 7.5
        z[3, [5, classes - 3]] = 7.25
        z[3][z[3].gt(7.25) & z[3].lt(7.5)] = 0
        target[3] = classes // 2
        z[4] = -torch.inf
        z[4, [2, classes - 2]] = torch.tensor([1.0, 2.0]).double()
        target[4] = 2
    return z.to(dtype), target


@pytest.mark.covering(1)
@each_dtype
@pytest.mark.parametrize("classes", [2, 3, 40, 129, 2049, 8193, 20000])
def test_definitions(classes, dtype, impl, generator):
    z, target = rows_to_pick_from(dtype, classes, generator)
    candidates = torch.randint(classes, (6, 3), generator=generator)
    candidates[4] = torch.tensor([min(2, classes - 1), classes - 2, 2 % classes])
    weight = class_weights(classes, generator)
    s = capture(z, target, weight=weight, candidates=candidates, impl=impl)
    for name, definition in DEFINITIONS.items():
        truth = definition(z.double(), target, weight.to(s.ce.dtype).double(), candidates)
        ours = getattr(s, name)
        if not truth.is_floating_point() or (name.endswith("logit") and name != "mean_logit"):
            assert torch.equal(ours.to(truth.dtype), truth), name
            continue
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        # differences of larger numbers: q as it is defined here, m + log S, and the mean logit, which is of both
        size = {"q": 1e-3, "lse": 1.0, "mean_logit": 10.0}.get(name, 0.0)
        about = {"rtol": tolerance, "atol": tolerance * size, "msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(ours.double(), truth, **about)


@pytest.mark.parametrize("name", [name for name in DEFINITIONS if not name.endswith("index") and name != "target"])
def test_gradients(name, impl, generator):
    """Of the first order and of the second."""
    z, target = logits_and_targets(6, 131, generator)
    candidates = torch.randint(131, (6, 3), generator=generator)
    candidates[1, 0] = target[1]
    weight, direction = class_weights(131, generator), torch.randn(6, 131, generator=generator).double()
    upstream = torch.randn(6, 3, generator=generator).double()
    options = {"statistics": tuple(OPTIONAL), "candidates": candidates, "impl": impl}
    z.requires_grad_()

    def of(value):
        return (value * upstream).sum(-1) if value.dim() == 2 else value * upstream[:, 0]

    def derivatives(losses):
        (first,) = torch.autograd.grad((weight[target] * losses).sum(), z, create_graph=True)
        return losses, first, *torch.autograd.grad((first * direction).sum(), z)

    ours = derivatives(fl.flex_loss(z, target, lambda s: of(getattr(s, name)) ** 2, reduction="none", **options))
    truth = derivatives(of(DEFINITIONS[name](z, target, 1.0, candidates)) ** 2)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)
    (plain,) = torch.autograd.grad(
        fl.flex_loss(z, target, lambda s: of(getattr(s, name)) ** 2, weight=weight, reduction="sum", **options), z
    )
    value = of(DEFINITIONS[name](z, target, weight, candidates)) ** 2
    torch.testing.assert_close(plain, derivatives(value)[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("names", [("below",), ("mean", "below"), ("second",), ("below", "second", "top")], ids=str)
def test_any_choice_of_statistics(names, impl, generator):
    """The picks keep their names in whatever number and order they are asked for."""
    z, target = logits_and_targets(6, 40, generator)
    candidates = torch.randint(40, (6, 2), generator=generator)
    s = capture(z, target, names, candidates=candidates, impl=impl)
    for field in ("ce", "candidate_ce", *(field for name in names for field in OPTIONAL[name])):
        truth = DEFINITIONS[field](z, target, 1.0, candidates)
        torch.testing.assert_close(getattr(s, field), truth, rtol=1e-12, atol=1e-14)


def test_a_single_class(impl):
    z, target = torch.tensor([[3.0], [-2.0]]), torch.tensor([0, 0])
    s = capture(z, target, ("top", "below", "mean"), candidates=target, impl=impl)
    for name in ("ce", "q", "top_ce", "mean_ce", "candidate_ce", "top_index"):
        assert not getattr(s, name).any(), name
    for name in ("lse", "target_logit", "top_logit", "mean_logit", "candidate_logit"):
        assert torch.equal(getattr(s, name).reshape(-1), z[:, 0]), name
    assert s.p.eq(1).all() and s.below_index.eq(-1).all()
    assert s.below_logit.isneginf().all() and s.below_ce.isposinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_p_and_q_keep_their_digits(dtype, impl):
    """At both ends: p is no less accurate near 0 than q is near 0, and both than ce is."""
    gaps = torch.tensor([0, 1, 5, 10, 14, 17, 20, 25, 30, 40, 60, 85])
    z = torch.zeros(24, 2, dtype=dtype)
    z[:12, 0] = gaps
    z[12:, 1] = gaps
    s = capture(z, torch.zeros(24, dtype=torch.int64), impl=impl)
    odds = torch.cat([gaps, -gaps]).double()
    truth = (odds.sigmoid(), (-odds).sigmoid(), torch.nn.functional.softplus(-odds, threshold=100))
    torch.testing.assert_close((s.p.double(), s.q.double(), s.ce.double()), truth, rtol=1e-6, atol=0)


# --- algebra ---

LOSSES = {
    "cross-entropy": lambda z, t, **o: fl.cross_entropy(z, t, label_smoothing=0.1, z_loss=0.01, **o),
    "mixed": lambda z, t, **o: fl.mixed_cross_entropy(z, t, alpha=0.25, top_k=2, **o),
    "DSC": lambda z, t, **o: fl.dsc_loss(z, t, alpha=0.5, **o),
    "dual focal": lambda z, t, **o: fl.flex_loss(
        z, t, lambda s: (s.q + (-s.below_ce).exp()) ** 2 * s.ce, statistics=("below",), **o
    ),
}
READY = [name for name in backends.IMPLS if backends.unavailable(name, torch.device("cpu")) is None]

losses = st.sampled_from(sorted(LOSSES))
impls = st.sampled_from(READY)
compiled_impls = st.sampled_from([name for name in READY if name != "reference"] or [None])
seeds = st.integers(0, 2**32)
row_counts = st.integers(1, 4)
# less than a vector; about a block; about a chunk
class_counts = st.one_of(st.integers(2, 70), st.integers(2000, 2100), st.integers(8100, 8300))
properties = settings(
    max_examples=9, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def fit(classes, impl):
    """Some blocks of the interpreted Triton kernels, which take seconds for long rows."""
    return 2 + classes % 600 if impl == "triton" else classes


def draw(rows, classes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z, target = logits_and_targets(rows, classes, generator, dtype)
    return z, target, torch.randn(rows, generator=generator)


def run(loss, impl, z, target, upstream, **options):
    return with_gradient(lambda x: LOSSES[loss](x, target, reduction="none", impl=impl, **options), z, upstream)


@properties
@given(losses, impls, row_counts, class_counts, seeds)
def test_permuting_classes_permutes_gradients(loss, impl, rows, classes, seed):
    classes = fit(classes, impl)
    z, target, upstream = draw(rows, classes, seed)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    weight = class_weights(classes, torch.Generator().manual_seed(seed))
    before = run(loss, impl, z, target, upstream, weight=weight)
    after = run(loss, impl, z[:, order], order.argsort()[target], upstream, weight=weight[order])
    torch.testing.assert_close(after, (before[0], before[1][:, order]), rtol=1e-11, atol=1e-15)


@properties
@given(losses, compiled_impls, st.integers(2, 6), class_counts, seeds, st.sampled_from(DTYPES))
def test_rows_are_independent(loss, impl, rows, classes, seed, dtype):
    """A row gives the same bits alone, among others and in another place."""
    z, target, upstream = draw(rows, fit(classes, impl), seed, dtype)
    some = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[: 1 + seed % rows]
    loss_of_all, gradient_of_all = run(loss, impl, z, target, upstream)
    ours = run(loss, impl, z[some], target[some], upstream[some])
    assert_same_bits(ours, (loss_of_all[some], gradient_of_all[some]))
