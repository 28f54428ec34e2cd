"""The recipes of docs/recipes.md, run as they stand there, against their formulas over dense logits."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_docs import DOCS, blocks, needs_readme
from torch import Tensor
from torch.testing import assert_close

import fusedloss as fl

pytestmark = needs_readme

B, T, D, V = 4, 6, 8, 11
Recipe = Callable[..., Any]


@cache
def recipes() -> dict[str, Recipe]:
    """The functions that the blocks define, each block run by itself."""
    found: dict[str, Recipe] = {}
    for line, block in blocks(DOCS / "recipes.md", "python"):
        namespace: dict[str, Any] = {"__name__": "recipe"}
        torch.manual_seed(0)
        exec(compile("\n" * line + block, "recipes.md", "exec"), namespace)
        defined = {name: x for name, x in namespace.items() if inspect.isfunction(x) and x.__module__ == "recipe"}
        assert defined and not defined.keys() & found.keys(), block
        found |= defined
    return found


class Data:
    """A batch in float64 with ignored targets, and what makes its logits."""

    def __init__(self, spread: float = 1.0) -> None:
        random = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        self.hidden, self.weight = spread * drawn(B, T, D), drawn(V, D)
        self.frozen = drawn(B, T, D)
        self.target = torch.randint(V, (B, T), generator=random)
        self.target[0, 4:], self.target[2, :2] = -100, -100
        self.kept = self.target != -100
        self.advantage = drawn(B, T)
        self.old = -3 + drawn(B, T)
        self.counts = torch.tensor([1, 5, 20, 100, 3, 7, 0, 2000, 50, 9, 10_000])
        self.leaves = (self.hidden.requires_grad_(), self.weight.requires_grad_())

    def rows(self, hidden: Tensor | None = None, weight: Tensor | None = None, temperature: float = 1.0) -> tuple:
        """Dense logits, probabilities and targets of the rows that count."""
        hidden, weight = self.hidden if hidden is None else hidden, self.weight if weight is None else weight
        z = (hidden @ weight.t())[self.kept] / temperature
        return z, z.softmax(-1), self.target[self.kept]

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Dense log-probabilities of the targets, NaN where there is none: no formula may look there."""
        log_p = (hidden @ self.weight.t()).log_softmax(-1).gather(-1, self.target.clamp(min=0)[..., None])[..., 0]
        return log_p.masked_fill(~self.kept, torch.nan)


def at(x: Tensor, t: Tensor) -> Tensor:
    return x.gather(-1, t[:, None])[:, 0]


def same(ours: Tensor, formula: Tensor, leaves: tuple[Tensor, ...]) -> None:
    assert formula.dim() == 0 and formula.isfinite()
    assert_close(ours, formula, rtol=1e-10, atol=1e-13)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, formula)]
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[1])
    for mine, dense in zip(*gradients, strict=True):
        assert_close(mine, dense, rtol=1e-10, atol=1e-12)


# --- functions of a row's statistics: their own statistics, and the row's loss over its dense probabilities ---


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _dual_skew(p: Tensor, t: Tensor, alpha: float, beta: float) -> Tensor:
    y = F.one_hot(t, V).to(p.dtype)

    def skew(a: Tensor, b: Tensor) -> Tensor:  # Lee's s(a, b)
        return (torch.special.xlogy(b, b) - torch.special.xlogy(b, alpha * a + (1 - alpha) * b)).sum(-1)

    return beta * skew(p, y) + (1 - beta) * skew(y, p)


OF_STATISTICS: dict[str, tuple[tuple[str, ...], dict[str, float], Callable[..., Tensor]]] = {
    "confidence_penalty": (("entropy",), {"beta": 0.3}, lambda p, t, beta: -at(p, t).log() - beta * _entropy(p)),
    "dynamic_fine_tuning": ((), {}, lambda p, t: -at(p, t).detach() * at(p, t).log()),
    "dual_skew": ((), {"alpha": 0.9, "beta": 0.6}, _dual_skew),
    "hard_bootstrap": (
        ("top",),
        {"beta": 0.7},
        lambda p, t, beta: -beta * at(p, t).log() - (1 - beta) * p.amax(-1).log(),
    ),
    "soft_bootstrap": (
        ("entropy",),
        {"beta": 0.7},
        lambda p, t, beta: -beta * at(p, t).log() + (1 - beta) * _entropy(p),
    ),
    "brier": (("power",), {}, lambda p, t: (p - F.one_hot(t, V)).square().sum(-1)),
    "spherical": (("power",), {}, lambda p, t: -at(p, t) / p.norm(dim=-1)),
}


@pytest.mark.parametrize("name", OF_STATISTICS)
def test_of_statistics(name: str) -> None:
    """With the recipe's own numbers and with others, in the row form and the linear one."""
    statistics, numbers, formula = OF_STATISTICS[name]
    recipe, data = recipes()[name], Data(0.7)
    _, p, t = data.rows()
    own = {k: v.default for k, v in inspect.signature(recipe).parameters.items() if k != "s"}
    for given in (own, numbers):
        dense = formula(p, t, **given).mean()
        loss_fn = lambda s, given=given: recipe(s, **given)  # noqa: E731
        logits = data.hidden @ data.weight.t()
        same(fl.flex_loss(logits, data.target, loss_fn, statistics=statistics), dense, data.leaves)
        linear = fl.linear_flex_loss(*data.leaves, data.target, loss_fn, statistics=statistics)
        same(linear, dense, data.leaves)


@pytest.mark.parametrize("name", ["cosface", "arcface"])
@pytest.mark.parametrize(("scale", "margin"), [(64.0, 0.5), (8.0, 1.2)])
def test_margins(name: str, scale: float, margin: float) -> None:
    """Against a softmax whose target logit is another one, with angles in both branches."""
    recipe, data = recipes()[name], Data()
    hidden, weight = F.normalize(data.hidden, dim=-1), F.normalize(data.weight, dim=-1)
    z, _, t = data.rows(hidden, weight)
    cosine = at(z, t)
    lowered = cosine - margin
    if name == "arcface":
        straight, beyond = cosine - margin * math.sin(margin), cosine.acos() + margin > math.pi
        assert beyond.any() == (margin > 1) and not beyond.all()
        lowered = torch.where(beyond, straight, (cosine.acos() + margin).cos())
    dense = F.cross_entropy(scale * z.scatter(-1, t[:, None], lowered[:, None]), t)
    loss_fn = lambda s: recipe(s, scale=scale, margin=margin)  # noqa: E731
    ours = fl.linear_flex_loss(hidden, weight, data.target, loss_fn, temperature=1 / scale)
    same(ours, dense, data.leaves)


@pytest.mark.parametrize("name", ["cosface", "arcface"])
def test_margins_stay_finite_at_the_ends_in_float32(name: str) -> None:
    """A hidden state along its class's weight, and one against it."""
    weight = F.normalize(torch.randn(V, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    hidden = torch.stack([weight[3], -weight[3]]).requires_grad_()
    target = torch.tensor([3, 3])
    losses = fl.linear_flex_loss(hidden, weight, target, recipes()[name], temperature=1 / 64, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses.isfinite().all() and gradient.isfinite().all() and losses[1] > 64


# --- of log-probabilities ---


def test_policy_gradient() -> None:
    recipe, data = recipes()["policy_gradient"], Data()
    _, p, t = data.rows()
    dense = -(data.advantage[data.kept] * at(p, t).log() + 0.3 * _entropy(p)).mean()
    ours = fl.linear_log_probs(*data.leaves, data.target, entropy=True)
    same(recipe(*ours, data.advantage, data.kept, beta=0.3), dense, data.leaves)


@pytest.mark.parametrize("first_use", [True, False])
def test_grpo(first_use: bool) -> None:
    """With a ratio of 1, and with ratios on both sides of the clip."""
    recipe, data = recipes()["grpo"], Data(0.5)
    advantage = data.advantage[:, :1]
    log_p, reference = data.log_probs(data.hidden), data.log_probs(data.frozen)
    old = log_p.detach() if first_use else data.old
    answers = []
    for i in range(B):
        terms = []
        for j in data.kept[i].nonzero()[:, 0].tolist():
            ratio = (log_p[i, j] - old[i, j]).exp()
            clipped = ratio.clamp(0.9, 1.1)
            r = reference[i, j].exp() / log_p[i, j].exp()
            gain = torch.minimum(ratio * advantage[i, 0], clipped * advantage[i, 0])
            terms.append(-gain + 0.3 * (r - r.log() - 1))
        answers.append(torch.stack(terms).mean())
    ratios = (log_p - old).exp()[data.kept]
    assert first_use or ((ratios < 0.9).any() and (ratios > 1.1).any())
    ours = fl.linear_log_probs(*data.leaves, data.target)
    before = ours.detach() if first_use else data.old
    apart = fl.linear_log_probs(data.frozen, data.weight, data.target)
    loss = recipe(ours, before, apart, advantage, data.kept, clip=0.1, beta=0.3)
    same(loss, torch.stack(answers).mean(), data.leaves)


def test_dpo() -> None:
    recipe, data = recipes()["dpo"], Data()
    policy, reference = data.log_probs(data.hidden).nansum(-1), data.log_probs(data.frozen).nansum(-1).detach()
    half = B // 2
    margin = (policy[:half] - policy[half:]) - (reference[:half] - reference[half:])
    dense = (1 + (-0.3 * margin).exp()).log().mean()
    frozen = fl.linear_log_probs(data.frozen, data.weight, data.target).detach()
    same(recipe(fl.linear_log_probs(*data.leaves, data.target), frozen, beta=0.3), dense, data.leaves)


# --- of arguments ---


def test_class_balanced() -> None:
    recipe, data = recipes()["class_balanced"], Data()
    counts = data.counts.double()  # float64 out of it
    _, p, t = data.rows()
    weight = torch.tensor([0.1 / (1 - 0.9 ** max(int(n), 1)) for n in counts], dtype=torch.float64)
    weight = weight * V / weight.sum()
    dense = -(weight[t] * at(p, t).log()).mean()
    options = {"weight": recipe(counts, beta=0.9), "normalizer": data.kept.sum()}
    same(fl.linear_cross_entropy(*data.leaves, data.target, **options), dense, data.leaves)
    assert recipe(data.counts).isfinite().all()  # with a class that does not occur


def test_prior() -> None:
    recipe, data = recipes()["prior"], Data()
    z, _, t = data.rows()
    share = data.counts.clamp(min=1).double() / data.counts.clamp(min=1).sum()
    weighted = share**0.7 * z.exp()
    dense = -(at(weighted, t) / weighted.sum(-1)).log().mean()
    bias = recipe(data.counts.double(), tau=0.7)
    same(fl.linear_cross_entropy(*data.leaves, data.target, linear_bias=bias), dense, data.leaves)
    same(fl.cross_entropy(data.hidden @ data.weight.t() + bias, data.target), dense, data.leaves)


def test_info_nce() -> None:
    """With negatives beyond the pairs, and a temperature that is learnt."""
    data, tau = Data(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    one = data.hidden.flatten(0, 1)[: V - 2]
    similar = (F.cosine_similarity(one[:, None], data.weight[None], dim=-1) / tau).exp()
    dense = -(similar.diagonal() / similar.sum(-1)).log().mean()
    same(recipes()["info_nce"](one, data.weight, temperature=tau), dense, (*data.leaves, tau))


def test_next_token() -> None:
    recipe, data = recipes()["next_token"], Data()
    tokens = data.target
    shifted = recipe(tokens)
    assert shifted.tolist() == [[*row[1:], -100] for row in tokens.tolist()]
    logits, kept = data.hidden[:, :-1] @ data.weight.t(), tokens[:, 1:] != -100
    dense = -at(logits[kept].log_softmax(-1), tokens[:, 1:][kept]).mean()
    same(fl.linear_cross_entropy(*data.leaves, shifted, drop_ignored=False), dense, data.leaves)


def test_every_recipe_is_compared() -> None:
    own = {"cosface", "arcface", "policy_gradient", "grpo", "dpo", "class_balanced", "prior", "info_nce", "next_token"}
    assert recipes().keys() == own | OF_STATISTICS.keys()
