"""Vocabulary-parallel losses: real processes over gloo, against one process that has all the classes."""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import assert_as_accurate_as, assert_rows_as_accurate_as
from row_losses import LEVELED, computed, is_over_classes, takes
from row_losses import LOSSES as ROW_LOSSES
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fusedloss as fl

ROWS, FEATURES, IGNORED = 13, 5, 3  # the ignored index is a class, as a padding index is

#: Classes of each rank: all, uneven, none in the middle, none on the last and most on one.
SIZES = {1: [11], 2: [1, 10], 3: [4, 0, 6], 4: [1, 2, 8, 0]}


def _all_of(s: fl.Statistics) -> Tensor:
    top = s.ce + 0.5 * s.q + 0.1 * s.top_ce + 0.01 * s.mean_ce + 0.1 * s.lse.square()
    picked = 0.1 * s.second_logit - 0.2 * s.target_logit * s.top_logit + s.mean_logit
    return top + picked + s.entropy * s.q - 0.3 * s.power


ALL = ("top", "second", "mean", "entropy", "power")

#: By the public names, with arguments of their own.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (loss.func.__name__ if hasattr(loss, "func") else "cross_entropy", getattr(loss, "keywords", {}))
       for name, loss in ROW_LOSSES.items() if name != "flex_loss classes"},  # refused, see _what_is_refused
    "flex_loss of all statistics": ("flex_loss", {"loss_fn": _all_of, "statistics": ALL, "per_chunk": True}),
}  # fmt: skip
OVER_CLASSES = [name for name, loss in ROW_LOSSES.items() if is_over_classes(loss)]


class Division:
    """The classes of this rank, and data of all of them: ties, certain rows, a wrong one, targets on every rank."""

    def __init__(self, rank: int, world: int, sizes: Sequence[int] = ()) -> None:
        self.sizes = list(sizes or SIZES[world])
        self.classes, self.world, self.rank = sum(self.sizes), world, rank
        self.part = slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))
        self.shards = fl.VocabularyShards(dist.group.WORLD, self.sizes)
        self.generator = torch.Generator().manual_seed(world)
        z, target = self.normal(ROWS, self.classes) * 2, self.integers(self.classes, ROWS)
        z[1] = z[1].round()
        target[: self.classes] = torch.arange(self.classes)[:ROWS]
        z[torch.arange(2, ROWS, 4), target[2::4]] += 30
        z[5, target[5] - 1] += 30
        z[4, 0] = -torch.inf
        self.z, self.target = z, target

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator)

    def options(self, name: str) -> dict[str, Any]:
        """Every shared option that the loss takes."""
        smooths = takes(getattr(fl, LOSSES[name][0]), "label_smoothing")
        own: dict[str, Any] = {"label_smoothing": 0.125} if smooths else {}
        weight, token_weight = self.uniform(self.classes) + 0.5, self.uniform(ROWS) + 0.5
        own |= {"weight": weight, "ignore_index": IGNORED, "z_loss": 0.01, "token_weight": token_weight}
        return own | {"temperature": 0.8}

    def check(
        self,
        case: str,
        loss: Callable[..., Any],
        sources: Sequence[Tensor],
        parts: Sequence[Any],
        of_result: Any = slice(None),
        **tolerance: float,
    ) -> Tensor:
        """The loss of parts of some tensors, its statistics and gradients are those of the whole in one process."""
        case = f"{case}, {self.sizes} on rank {self.rank}"
        results = []
        for group, inputs in ((None, sources), (self.shards, [x[p] for x, p in zip(sources, parts, strict=True)])):
            leaves = [x.clone().requires_grad_() for x in inputs]
            value = loss(*leaves, group=group)
            value, stats = value if isinstance(value, tuple) else (value, ())
            if group is None:
                upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
            here = of_result if value.dim() and group is None else ...
            gradients = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
            results.append((value[here], stats, gradients))
            upstream = upstream[here]
        (expected, expected_stats, gradients), (got, stats, own) = results

        def close(x: Tensor, y: Tensor) -> None:
            assert_close(x, y, equal_nan=True, msg=lambda text: f"{case}: {text}", **tolerance)

        close(got, expected)
        for x, y in zip(stats, expected_stats, strict=True):
            close(x, y)
        for x, y, part in zip(own, gradients, parts, strict=True):
            assert (x is None) == (y is None), case
            if x is not None:
                close(x, y[part])
        return got

    def same_bits(self, x: Tensor) -> None:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        for part in parts:
            assert_close(part, x.detach(), rtol=0, atol=0, equal_nan=True)


# --- what every rank runs ---


def _row_form(rank: int, world: int) -> None:
    d = Division(rank, world)
    columns = [(slice(None), d.part)]
    for name, (function, own) in LOSSES.items():
        everything = d.options(name)
        others = {"smoothing_over": "others", "label_smoothing": 0.1} if "label_smoothing" in everything else {}
        for options, reduction in ((others, "sum"), (everything, "mean"), (everything, "none")):
            more = {**own, **options, "reduction": reduction, "return_stats": True, "stats": ("entropy",)}
            got = d.check(
                f"{name}, {options.keys()}, {reduction}",
                lambda x, group, f=function, more=more: getattr(fl, f)(x, d.target, group=group, **more),
                [d.z], columns,
            )  # fmt: skip
            d.same_bits(got)


def _levels(rank: int, world: int) -> None:
    d = Division(rank, world)
    options = d.options("dsc_loss one_vs_rest")
    del options["z_loss"]
    for loss in LEVELED:
        for level, reduction in (("set", "mean"), ("class", "mean"), ("class", "sum"), ("class", "none")):
            more = {**options, "level": level, "reduction": reduction}
            if level == "set":
                del more["weight"]
            got = d.check(
                f"{loss}, {level}, {reduction}",
                lambda x, group, loss=loss, more=more: loss(x, d.target, group=group, **more),
                [d.z], [(slice(None), d.part)], of_result=d.part,
            )  # fmt: skip
            if reduction != "none":
                d.same_bits(got)


def _linear_form(rank: int, world: int) -> None:
    """In one chunk, and in chunks of two rows of soft-capped logits."""
    d = Division(rank, world)
    sources = [d.normal(ROWS, FEATURES), d.normal(d.classes, FEATURES), d.normal(d.classes)]
    for name, (function, own) in LOSSES.items():
        if name == "dice_loss":
            continue  # it has no linear form: linear_dsc_loss(alpha=0)
        options = own | d.options(name)
        for softcap, budget in ((None, None), (3.0, 4 * d.classes * 8 * 2)):

            def loss(hidden: Tensor, weight: Tensor, bias: Tensor, group: Any) -> Tensor:
                if group is not None:
                    form = {"linear_bias": bias, "softcap": softcap, "budget": budget, "group": group}  # noqa: B023
                    return getattr(fl, f"linear_{function}")(hidden, weight, d.target, **form, **options)  # noqa: B023
                logits = F.linear(hidden, weight, bias)
                logits = logits if softcap is None else (logits / softcap).tanh() * softcap  # noqa: B023
                return getattr(fl, function)(logits, d.target, **options)  # noqa: B023

            d.same_bits(d.check(f"{name}, softcap {softcap}", loss, sources, [slice(None), d.part, d.part]))


def _log_probs(rank: int, world: int) -> None:
    """With entropies, of logits and of hidden states; the temperature is learnt, there and by losses of every kind."""
    d, temperature = Division(rank, world), torch.tensor(0.8, dtype=torch.float64)
    hidden, weight, bias = d.normal(ROWS, FEATURES), d.normal(d.classes, FEATURES), d.normal(d.classes)

    def mixed(result: fl.LogProbs) -> Tensor:
        return result.log_prob.masked_fill(result.log_prob.isinf(), 0) + 0.5 * result.entropy

    def of_logits(z: Tensor, temperature: Tensor, group: Any) -> Tensor:
        options = {"temperature": temperature, "ignore_index": IGNORED, "group": group}
        return mixed(fl.log_probs(z, d.target, entropy=True, **options))

    def of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor, temperature: Tensor, group: Any) -> Tensor:
        if group is None:
            return of_logits(F.linear(hidden, weight, bias), temperature, None)
        options = {"temperature": temperature, "ignore_index": IGNORED, "group": group, "budget": 4 * d.classes * 16}
        return mixed(fl.linear_log_probs(hidden, weight, d.target, linear_bias=bias, entropy=True, **options))

    z = d.z.clone()
    z[4, 0] = -3
    d.same_bits(d.check("logits", of_logits, [z, temperature], [(slice(None), d.part), ...]))
    d.same_bits(d.check("hidden", of_hidden, [hidden, weight, bias, temperature], [slice(None), d.part, d.part, ...]))
    for name in ("cross_entropy", "dsc_loss one_vs_rest"):
        function, own = LOSSES[name]

        def loss(z: Tensor, temperature: Tensor, group: Any) -> Tensor:
            return getattr(fl, function)(z, d.target, temperature=temperature, group=group, **own)  # noqa: B023

        d.check(name, loss, [z, temperature], [(slice(None), d.part), ...])
    level = {"level": "class", "alpha": 0.5}
    d.check(
        "level", lambda z, temperature, group: fl.dsc_loss(z, d.target, temperature=temperature, group=group, **level),
        [z, temperature], [(slice(None), d.part), ...],
    )  # fmt: skip

    # The largest logit is on each rank in turn, and in float64 the entropy of a gap of 60 is below 1e-24.
    gap = torch.tensor([1.0, 20.0, 40.0, 60.0]).double().repeat_interleave(d.classes)
    sure = gap[:, None] * torch.eye(d.classes, dtype=torch.float64).repeat(4, 1)
    entropies = [
        fl.log_probs(x, torch.zeros(len(gap)).long(), entropy=True, group=group).entropy
        for x, group in ((sure, None), (sure[:, d.part], d.shards))
    ]
    assert_close(*entropies, rtol=1e-13, atol=0)

    expected = (F.linear(hidden, weight, bias) / 0.8).log_softmax(-1).topk(min(4, d.classes))
    k = expected.indices.shape[1]
    index, log_prob = fl.linear_topk_log_probs(
        hidden, weight[d.part], k, linear_bias=bias[d.part], temperature=0.8, group=d.shards, budget=4 * d.classes * 8
    )
    assert index.equal(expected.indices)
    assert_close(log_prob, expected.values)
    d.same_bits(log_prob)


def _second_rows(rank: int, world: int) -> None:
    """A teacher's divergences, of logits and of hidden states, and targets for all the classes."""
    d = Division(rank, world)
    teacher, y = d.normal(ROWS, d.classes) * 2, d.normal(ROWS, d.classes).abs()
    teacher_input, teacher_weight = d.normal(ROWS, 3), d.normal(d.classes, 3)
    hidden, weight = d.normal(ROWS, FEATURES), d.normal(d.classes, FEATURES)
    columns = [(slice(None), d.part)]
    for divergence in ("forward_kl", "reverse_kl", "tv", "jsd"):
        options: dict[str, Any] = {"divergence": divergence, "target": d.target, "ignore_index": IGNORED}
        for more in ({}, {"temperature": 0.8, "hard_weight": 0.3, "scale_by_temperature_squared": True}):
            own = options | more

            def row(z: Tensor, group: Any, own: Any = own, **rest: Any) -> Any:
                second = teacher if group is None else teacher[:, d.part]
                return fl.distillation_loss(z, second, group=group, **own, **rest)

            def linear(h: Tensor, w: Tensor, group: Any, own: Any = own) -> Tensor:
                if group is None:
                    logits = 2 * torch.tanh(teacher_input @ teacher_weight.T / 2)
                    return fl.distillation_loss(h @ w.T, logits, **own)
                own = own | {"teacher_softcap": 2.0, "budget": 4 * d.classes * 16, "group": group}
                return fl.linear_distillation_loss(h, w, teacher_input, teacher_weight[d.part], **own)

            case = f"{divergence}, {more.keys()}"
            d.check(case, lambda z, group, f=row: f(z, group, return_stats=True, stats=("entropy",)), [d.z], columns)
            d.check(case, lambda z, group, f=row: f(z, group, reduction="none"), [d.z], columns)
            d.same_bits(d.check(f"linear {case}", linear, [hidden, weight], [slice(None), d.part]))
    weights = d.normal(d.classes).abs()

    def soft(z: Tensor, group: Any) -> Tensor:
        second = y if group is None else y[:, d.part]
        return fl.cross_entropy(z, second, weight=weights, label_smoothing=0.1, z_loss=0.1, group=group)

    d.check("targets for all the classes", soft, [d.z], columns)


def _every_dtype(rank: int, world: int) -> None:
    """As accurate as the formula in PyTorch: the loss is PyTorch between the passes."""
    d = Division(rank, world, [100 + 37 * r for r in range(world)])
    upstream = d.uniform(ROWS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (function, own) in LOSSES.items():

            def run(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
                x = x.clone().requires_grad_()
                rows = getattr(fl, function)(x, d.target, reduction="none", **own, **options)  # noqa: B023
                return rows.detach(), torch.autograd.grad(rows, x, upstream.to(rows.dtype))[0]

            rounded = d.z.to(dtype)
            truth, alone = run(rounded.double()), run(rounded, impl="reference")
            got = run(rounded[:, d.part], group=d.shards)
            finite = truth[0].isfinite()
            assert got[0].isfinite().equal(finite), name
            for x, one, true in ((got[0], alone[0], truth[0]), (got[1], alone[1][:, d.part], truth[1][:, d.part])):
                scale = true[finite].abs().max().expand_as(true[finite])
                assert_as_accurate_as(x[finite], one[finite], true[finite], 8, scale)


def _small_factors_in_float16(rank: int, world: int) -> None:
    """Every row and every class, with factors from 2^-20 to 1 in each chunk."""
    d = Division(rank, world, [5 + 3 * r for r in range(world)])
    rows = 6 * world
    hidden, weight = d.integers(5, rows, FEATURES) / 2 - 1, d.integers(9, d.classes, FEATURES) / 4 - 1
    target = d.integers(d.classes, rows)
    options = {"token_weight": torch.exp2(-20 * d.uniform(rows)).float(), "reduction": "sum"}
    scale = 2.0**11
    for name in ("cross_entropy", "dsc_loss"):
        theirs, exact = ([x.to(t).requires_grad_() for x in (hidden, weight)] for t in (torch.half, torch.double))
        row, truth = (
            torch.autograd.grad(getattr(fl, name)(x[0] @ x[1].t(), target, impl="reference", **options) * scale, x)
            for x in (theirs, exact)
        )
        for own, parallel in ((slice(None), False), (slice(6 * rank, 6 * (rank + 1)), True)):
            mine = [x.half().requires_grad_() for x in (hidden[own], weight[d.part])]
            more = {"sequence_parallel": parallel, "budget": 5 * max(d.sizes) * 2, **options}
            loss = getattr(fl, f"linear_{name}")(*mine, target, group=d.shards, **more)
            got = torch.autograd.grad(loss * scale, mine)
            assert_rows_as_accurate_as(got[0], row[0][own], truth[0][own])
            assert_rows_as_accurate_as(got[1], row[1][d.part], truth[1][d.part])


@contextlib.contextmanager
def _counted() -> Iterator[list[str]]:
    """The collectives that are called meanwhile."""
    called: list[str] = []

    def counted(name: str, own: Any) -> Any:
        return lambda *arguments, **options: called.append(name) or own(*arguments, **options)

    with contextlib.ExitStack() as stack:
        for name in ("all_gather", "all_reduce", "broadcast", "reduce"):
            stack.enter_context(patch.object(dist, name, counted(name, getattr(dist, name))))
        yield called


def _collectives(rank: int, world: int) -> None:
    """In the forward one, of a loss over the classes two; in the backward none of a row form, one of a linear form."""
    shards = fl.VocabularyShards(dist.group.WORLD, [4] * world)
    target = torch.arange(ROWS) % (4 * world)
    z, hidden, weight = (torch.randn(shape, requires_grad=True) for shape in ((ROWS, 4), (ROWS, 5), (4, 5)))

    def check(loss: Callable[[], Tensor], forward: list[str], backward: list[str]) -> None:
        with _counted() as before:
            value = loss()
        with _counted() as after:
            value.backward()
        assert (before, after) == (forward, backward)

    for name, (function, own) in LOSSES.items():
        gathers = ["all_gather"] * (2 if name in OVER_CLASSES else 1)
        options = {"group": shards, **own}
        check(lambda f=function, o=options: getattr(fl, f)(z, target, **o), gathers, [])
        if name != "dice_loss":
            options |= {"return_stats": True, "budget": 200}
            linear = getattr(fl, f"linear_{function}")
            check(lambda f=linear, o=options: f(hidden, weight, target, **o)[0], gathers, ["all_reduce"])
    for level, reduction, before, after in (("set", "mean", 2, 0), ("class", "sum", 2, 0), ("class", "none", 1, 1)):
        options = {"level": level, "reduction": reduction, "group": shards}
        check(lambda o=options: fl.dsc_loss(z, target, **o).sum(), ["all_gather"] * before, ["all_gather"] * after)
    frozen = hidden.detach()
    check(lambda: fl.linear_cross_entropy(frozen, weight, target, group=shards), ["all_gather"], [])
    check(lambda: fl.cross_entropy(z, target, group=dist.group.WORLD), ["all_gather"] * 2, [])


def _checkpointed(rank: int, world: int) -> None:
    """The gradients are the same, and the forward runs no more than twice."""
    d = Division(rank, world)
    z, second = (torch.randn(ROWS, d.classes)[:, d.part] for _ in range(2))
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda x, f=function, own=own: getattr(fl, f)(x, d.target, group=d.shards, **own)
        for name, (function, own) in LOSSES.items()
    }
    for level, reduction in (("set", "mean"), ("class", "none")):
        options = {"level": level, "reduction": reduction, "group": d.shards}
        losses[level] = lambda x, o=options: fl.dsc_loss(x, d.target, **o).sum()
    losses["second row"] = lambda x: fl.distillation_loss(x, second, divergence="jsd", group=d.shards)
    losses["log_probs"] = lambda x: fl.log_probs(x, d.target, entropy=True, group=d.shards).entropy.sum()
    for name, loss in losses.items():
        leaves, calls = [z.clone().requires_grad_() for _ in range(2)], []

        def counted(x: Tensor) -> Tensor:
            calls.append(name)  # noqa: B023
            return loss(x)  # noqa: B023

        loss(leaves[0]).backward()
        checkpoint(counted, leaves[1], use_reentrant=False).backward()
        assert len(calls) == 2, name
        assert_close(leaves[1].grad, leaves[0].grad, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def _what_is_refused(rank: int, world: int) -> None:
    shards = fl.VocabularyShards.gather(dist.group.WORLD, 3)
    assert shards.sizes == (3,) * world
    z, target = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 0])
    alpha, outside = torch.ones((), requires_grad=True), torch.tensor([0, 3 * world])
    cases: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
        (f"target {3 * world} is out of range for {3 * world} classes", fl.cross_entropy, (z, outside), {}),
        (rf"rank {rank} has a part of .* but input has 2", fl.cross_entropy, (z[:, :2], target), {}),
        (
            "needs an implementation with kernels",
            fl.cross_entropy,
            (z, target),
            {"impl": "reference"},
        ),
        ("weight must be", fl.cross_entropy, (z, target), {"weight": torch.ones(3 * world + 1)}),
        ("statistics 'below'", fl.flex_loss, (z, target, lambda s: s.below_ce), {"statistics": ["below"]}),
        ("over the classes needs a compiled", fl.flex_loss, (z, target, lambda p, q, y: p * q), {"over": "classes"}),
    ]
    for options in ({}, {"level": "class"}):
        more = {"alpha": alpha, "inplace_backward": True, **options}
        cases.append(("inplace_backward needs a compiled epilogue", fl.dsc_loss, (computed(z), target), more))
    for options in ({}, {"level": "class"}, {"level": "set"}):
        cases.append(
            ("parameters of the loss that require grad", fl.dsc_loss, (z, target), {"alpha": alpha, **options})
        )
    for message, loss, arguments, options in cases:
        with pytest.raises((ValueError, IndexError), match=message):
            loss(*arguments, group=shards, **options)
    for sizes, message in (([3] * (world + 1), "sizes must be of the"), ([-1] * world, "at least 0, got -1")):
        with pytest.raises(ValueError, match=message):
            fl.VocabularyShards(dist.group.WORLD, sizes)
    for loss, options in ((fl.cross_entropy, {}), (fl.dsc_loss, {}), (fl.dsc_loss, {"level": "class"})):
        with pytest.raises(RuntimeError, match="is differentiated once"):
            torch.autograd.grad(loss(z, target, group=shards, **options), z, create_graph=True)


def _out_of_range(rank: int, world: int) -> None:
    """As on a GPU, where nobody looks at the targets beforehand: their rows are NaN, and no index is out of range."""
    d = Division(rank, world)
    z = d.z.masked_fill(d.z.isinf(), 0)[:, d.part]
    target, valid = d.target.clone(), torch.ones(ROWS, dtype=torch.bool)
    target[2], target[5] = d.classes, -1
    valid[[2, 5]] = False
    with patch.object(fl.checks, "check_indices", lambda *_: None):
        for name, (function, own) in LOSSES.items():
            mine = z.clone().requires_grad_()
            options = {"weight": d.uniform(d.classes), "reduction": "none", **own}
            loss = getattr(fl, function)(mine, target, group=d.shards, **options)
            assert torch.equal(loss.isnan(), ~valid), name
            loss[valid].sum().backward()
            assert mine.grad[valid].isfinite().all(), name
        report = {"return_stats": True, "stats": ("entropy",)}
        assert torch.equal(fl.cross_entropy(z, target, group=d.shards, **report)[1].entropy.isnan(), ~valid)
        for level in ("class", "set"):
            mine = z.clone().requires_grad_()
            loss = fl.dsc_loss(mine, target, group=d.shards, level=level)
            loss.backward()
            assert loss.isnan()


def _disagreements(rank: int, world: int) -> None:
    """Asked for by one line, they raise on every rank; without it the next collective would hang or be wrong."""
    shards = fl.VocabularyShards(dist.group.WORLD, [3] * world)
    z, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    odd = rank == world - 1
    os.environ["FUSEDLOSS_CHECK_RANKS"] = "1"
    ce, linear, candidate = fl.cross_entropy, fl.linear_cross_entropy, lambda s: s.candidate_ce
    others, whole, many = fl.VocabularyShards(dist.group.WORLD, [3, 3, 4]), torch.randn(6, 3), torch.zeros(6).long()
    form, kind = "how the logits are made", "the kind of the loss"
    for what, loss, arguments, options in (
        ("the shape of the targets", ce, (z[odd:], target[odd:]), {}),
        ("the dtype of the logits", ce, (z.double() if odd else z, target), {}),
        ("label_smoothing", ce, (z, target), {"label_smoothing": 0.1 * odd}),
        ("reduction", ce, (z, target), {"reduction": "sum" if odd else "mean"}),
        ("the loss", fl.focal_loss if odd else fl.dsc_loss, (z, target), {}),
        ("the parameters of the loss", fl.focal_loss, (z, target), {"gamma": 1.0 + odd}),
        ("the parameters of the loss", fl.focal_loss, (z, target), {"gamma": torch.full((4,), 1.0 + odd)}),
        ("the targets", ce, (z, target + odd), {}),
        ("return_stats", ce, (z, target), {"return_stats": odd}),
        ("stats", ce, (z, target), {"return_stats": True, "stats": ["entropy"] * odd}),
        ("weight", ce, (z, target), {"weight": torch.ones(9) + odd}),
        ("token_weight", ce, (z, target), {"token_weight": torch.ones(4 - odd)}),
        ("temperature", ce, (z, target), {"temperature": torch.tensor(1.0 + odd)}),
        ("candidates", fl.flex_loss, (z, target, candidate), {"candidates": target + odd}),
        ("the sizes of the shards", ce, (z, target), {"group": others if odd else shards}),
        (kind, fl.linear_topk_log_probs, (z, z[:3], 2 + odd), {}),
        (kind, fl.dice_loss, (z, target), {"level": "set" if odd else "class"}),
        (kind, fl.log_probs, (z, target), {"entropy": odd}),
        (form, linear, (z, z[:3], target), {"softcap": 2.0 + odd}),
        (form, linear, (z, z[:3], target), {"budget": 10**4 + odd}),
        (form, linear, (whole if odd else whole[:2], z[:3], many), {"sequence_parallel": not odd}),
    ):
        with pytest.raises(ValueError, match=f"^{what} must be the same on every rank"):
            loss(*arguments, **{"group": shards, **options})
    fl.cross_entropy(z, target, group=shards)
    os.environ["FUSEDLOSS_CHECK_RANKS"] = "yes"
    with pytest.raises(ValueError, match="FUSEDLOSS_CHECK_RANKS must be 0 or 1, got 'yes'"):
        fl.cross_entropy(z, target, group=shards)


def _own_arguments(rank: int, world: int) -> None:
    """Candidates, parameters of rows, learnt ones, learnt token weights, leading dimensions, in place."""
    d = Division(rank, world)
    target, candidates = d.target, d.integers(d.classes, ROWS, 2)

    def flex(x: Tensor, g: Tensor, w: Tensor, group: Any) -> Tensor:
        options = {"candidates": candidates, "reduction": "none", "group": group}
        return (fl.flex_loss(x, target, lambda s: g * s.q + s.candidate_ce.sum(-1), **options) * w).sum()

    def own(loss: Any, *, place: bool = False, learnt: str = "", frozen: str = "", **options: Any) -> Any:
        def call(x: Tensor, g: Tensor, w: Tensor, group: Any) -> Tensor:
            params = {learnt: g} if learnt else {frozen: g.detach()} if frozen else {}
            x = x * 1 if place else x
            return loss(x, target, token_weight=w, inplace_backward=place, group=group, **params, **options)

        return call

    losses = {
        "flex": flex,
        "leading": lambda x, g, w, group: fl.cross_entropy(x[None], target[None], token_weight=w[None], group=group),
        "candidates": own(fl.mixed_cross_entropy, alpha=0.25, candidates=candidates),
        "of rows": own(fl.focal_loss, learnt="gamma"),
        "of rows in place": own(fl.focal_loss, place=True, frozen="gamma"),
        "of classes": own(fl.dsc_loss, frozen="alpha", z_loss=0.01),
        "of classes in place": own(fl.dsc_loss, place=True, frozen="alpha"),
        "level": own(fl.dsc_loss, frozen="alpha", level="class"),
        "level in place": own(fl.dsc_loss, place=True, frozen="alpha", level="class"),
    }
    gamma, token_weight = d.uniform(2, ROWS).unbind()
    token_weight[7] = 0
    for case, loss in losses.items():
        d.check(case, loss, (d.z, gamma, token_weight), [(slice(None), d.part), slice(None), slice(None)])


def _what_a_function_sees(rank: int, world: int) -> None:
    """All that it sees in one process, of ignored rows and of rows with one finite logit and with none too."""
    d, seen = Division(rank, world), []
    d.z[6] = d.z[7, 1:] = -torch.inf
    for z, group in ((d.z, None), (d.z[:, d.part], d.shards)):
        options = {"statistics": ALL, "candidates": d.target, "ignore_index": IGNORED, "group": group}
        fl.flex_loss(z, d.target, lambda s: seen.append(s) or s.ce, **options)
    for name in seen[0]._names:
        # Without a finite logit the mean is inf or NaN.
        expected, own = (getattr(s, name)[torch.arange(ROWS) != 6 if "mean" in name else ...] for s in seen)
        assert_close(own, expected, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def _by_the_passes(rank: int, world: int) -> None:
    """Of class terms the kernels for GPUs give what the engine does."""
    d = Division(rank, world, [200 * r + 3 for r in range(world)])
    hidden, weight = d.normal(ROWS, FEATURES).float(), d.normal(d.classes, FEATURES).float()
    rows, linear = (d.z.float()[:, d.part],), (hidden, weight[d.part])
    losses: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any]]] = {
        **{loss.func.__name__: (loss, rows, {"z_loss": 0.01}) for loss in LEVELED},
        "linear_dsc_loss": (fl.linear_dsc_loss, linear, {"budget": 5 * 4 * max(d.sizes)}),
        "class": (fl.dsc_loss, rows, {"level": "class", "reduction": "none"}),
        "set": (LEVELED[-1], rows, {"level": "set"}),
    }
    for name, (loss, tensors, own) in losses.items():
        expected = None
        for impl in ("cpu", "triton", *(["triton_fused"] if len(tensors) == 2 else [])):
            inputs = [x.clone().requires_grad_() for x in tensors]
            value = loss(*inputs, d.target, ignore_index=IGNORED, group=d.shards, impl=impl, **own)
            found = (value, *torch.autograd.grad(value.sum(), inputs))
            expected = expected or found
            assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name, i=impl: f"{n}, {i}: {m}")


def _sequence_parallel(rank: int, world: int) -> None:
    """In chunks within a rank's rows, across them, and of all rows."""
    d, steps = Division(rank, world, [3 + r for r in range(world)]), 2
    hidden, weight = d.normal(steps * world, 3, FEATURES), d.normal(d.classes, FEATURES)
    target = d.integers(d.classes, steps * world, 3)
    target[0, 1], temperature = IGNORED, torch.tensor(0.8, dtype=torch.float64)
    for loss in (fl.linear_cross_entropy, fl.linear_dsc_loss, fl.linear_focal_loss):
        for rows in (1, 4, 100):

            def call(x: Tensor, w: Tensor, temperature: Tensor, group: Any) -> Tensor:
                form = {"sequence_parallel": True, "budget": rows * max(d.sizes) * 8} if group else {}  # noqa: B023
                options = {"temperature": temperature, "ignore_index": IGNORED, "reduction": "sum", "group": group}
                return loss(x, w, target, **options, **form)  # noqa: B023

            own = [slice(steps * rank, steps * (rank + 1)), d.part, ...]
            d.check(f"{loss.__name__}, chunks of {rows}", call, (hidden, weight, temperature), own)
    for x, group, message in ((hidden[:1], d.shards, "have the input's shape"), (hidden, None, "but group is None")):
        with pytest.raises(ValueError, match=message):
            fl.linear_cross_entropy(x, weight[d.part], target, group=group, sequence_parallel=True)


def _check_placed(loss: Any, plain: tuple[Tensor, ...], *placed: list[Tensor]) -> None:
    """Of DTensors a loss and its gradients are those of plain tensors, which are placed as the DTensors are."""
    inputs = [x.clone().requires_grad_() for x in plain]
    expected = loss(*inputs)
    gradients = torch.autograd.grad(expected, inputs)
    for mine in placed:
        got = loss(*mine)
        assert_close(got, expected)
        for x, own, true in zip(mine, torch.autograd.grad(got, mine), gradients, strict=True):
            assert own.placements == x.placements
            assert_close(own.full_tensor(), true)


def _distributed_tensors(rank: int, world: int) -> None:
    """Sharded on the classes, they say what group would; replicated, they are as they are."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    other = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    d = Division(rank, world, [3] * (world - 1) + [2])  # DTensor's parts: all alike but the last
    z, target, hidden, weight = d.z, d.target, d.normal(4 * world, FEATURES), d.normal(d.classes, FEATURES)
    token = torch.arange(len(hidden)) % d.classes

    def given(x: Tensor, *placements: Placement, over: DeviceMesh = mesh) -> Tensor:
        return distribute_tensor(x, over, placements, src_data_rank=None).requires_grad_()

    def check(loss: Any, plain: tuple[Tensor, ...], labels: Tensor, *placed: list[Tensor]) -> None:
        _check_placed(lambda *x: loss(*x, labels), plain, *placed)

    rows = [given(z, Shard(1)), given(z, Replicate()), given(z, Replicate(), Shard(1), over=other)]
    check(fl.focal_loss, (z,), target, *([x] for x in rows))
    assert_close(fl.focal_loss(rows[0], distribute_tensor(target, mesh, [Replicate()])), fl.focal_loss(z, target))
    placements = ((Replicate(), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Replicate()))
    linear = [[given(x, p) for x, p in zip((hidden, weight), pair, strict=True)] for pair in placements]
    check(fl.linear_cross_entropy, (hidden, weight), token, *linear)
    for message, loss, arguments, options in (
        (r"placements .*one dimension of the mesh shards", fl.focal_loss, (given(z, Shard(0)), target), {}),
        (r"placements .*must be replicated", fl.focal_loss, (z, distribute_tensor(target, mesh, [Shard(0)])), {}),
        ("a DTensor names its own", fl.focal_loss, (rows[0], target), {"group": dist.group.WORLD}),
        ("all be DTensors.* use a Linear", fl.linear_cross_entropy, (hidden, linear[0][1], token), {}),
        (
            "linear_weight is a DTensor with placements",
            fl.linear_cross_entropy,
            (linear[0][0], given(weight, Shard(1)), token),
            {},
        ),
        ("or sharded evenly", fl.linear_cross_entropy, (linear[1][0], linear[2][1], token), {}),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*arguments, **options)


def _distributed_second_rows(rank: int, world: int) -> None:
    """A second row is placed as the first one, or whole on every rank. Other tensors are no DTensors."""
    mesh = init_device_mesh("cpu", (world,))
    d = Division(rank, world, [3] * (world - 1) + [2])
    z, hidden, weight = d.z, d.normal(5, FEATURES), d.normal(d.classes, FEATURES)
    teachers = d.normal(5, 3), d.normal(d.classes, 3)

    def given(x: Tensor, placement: Placement) -> Tensor:
        return distribute_tensor(x, mesh, [placement], src_data_rank=None)

    rows = [given(z, placement).requires_grad_() for placement in (Shard(1), Replicate())]
    for loss, second in ((fl.distillation_loss, d.normal(*z.shape)), (fl.cross_entropy, d.uniform(*z.shape))):
        for alike in (False, True):

            def of(x: Any, loss: Any = loss, second: Tensor = second, alike: bool = alike) -> Tensor:
                placed = alike and isinstance(x, DTensor)
                return loss(x, given(second, x.placements[0]) if placed else second)

            _check_placed(of, (z,), *([x] for x in rows))
        assert_close(loss(z, given(second, Replicate())), loss(z, second))
        for x, message in ((rows[1], "input has placements"), (z, "input is a tensor of this rank")):
            with pytest.raises(ValueError, match=f"is a DTensor with placements .*, but {message}"):
                loss(x, given(second, Shard(1)))

    def linear(h: Tensor, w: Any) -> Tensor:
        own = zip(teachers, (Replicate(), *w.placements), strict=True) if isinstance(w, DTensor) else ()
        return fl.linear_distillation_loss(h, w, *([given(x, p) for x, p in own] or teachers))

    sharded, whole = (
        [given(hidden, Replicate()).requires_grad_(), given(weight, placement).requires_grad_()]
        for placement in (Shard(0), Replicate())
    )
    _check_placed(linear, (hidden, weight), sharded, whole)
    with pytest.raises(ValueError, match="teacher_weight placed as linear_weight is, got placements"):
        fl.linear_distillation_loss(*sharded, *(given(x, Replicate()) for x in teachers))
    with pytest.raises(ValueError, match="teacher_input, teacher_weight and teacher_bias must all be DTensors"):
        fl.linear_distillation_loss(*sharded, teachers[0], given(teachers[1], Shard(0)))
    split = given(d.normal(world, FEATURES), Shard(0))
    with pytest.raises(ValueError, match="gather the rows"):
        fl.linear_topk_log_probs(split, sharded[1], 2)
    module = fl.nn.LinearCrossEntropyLoss(FEATURES, d.classes, bias=False, dtype=torch.float64)
    module.linear.weight = torch.nn.Parameter(sharded[1].detach())
    assert_close(module.logits(sharded[0]).full_tensor(), hidden @ weight.T)
    for name, value in (("weight", d.uniform(d.classes)), ("token_weight", d.uniform(*d.target.shape))):
        with pytest.raises(ValueError, match=f"^{name} is a DTensor"):
            fl.focal_loss(z, d.target, ignore_index=IGNORED, **{name: given(value, Replicate())})


def _shards_that_outlive_their_group(rank: int, world: int) -> None:
    """They do not hold it, which would take the process down at its end. The next one of that name is another."""
    shards, held = fl.VocabularyShards(dist.group.WORLD, [3]), weakref.ref(dist.group.WORLD)
    z, target = torch.randn(2, 3), torch.tensor([0, 2])
    expected = fl.cross_entropy(z, target)
    assert_close(fl.cross_entropy(z, target, group=shards), expected)
    dist.destroy_process_group()
    assert held() is None
    for _ in range(2):
        with pytest.raises(ValueError, match="is a process group that was destroyed"):
            fl.cross_entropy(z, target, group=shards)
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    again = [fl.VocabularyShards(dist.group.WORLD, [3]) for _ in range(2)]
    assert again[0] == again[1] != shards
    assert_close(fl.cross_entropy(z, target, group=again[0]), expected)


test_scene = ranks.tests_of({
    _row_form: (1, 3, 4),
    _levels: (1, 3, 4),
    _linear_form: (1, 3, 4),
    _log_probs: (1, 3, 4),
    _second_rows: (1, 3, 4),
    _every_dtype: (2,),
    _small_factors_in_float16: (2,),
    _collectives: (2,),
    _checkpointed: (2,),
    _what_is_refused: (2,),
    _out_of_range: (2,),
    _disagreements: (3,),
    _own_arguments: (2, 3),
    _what_a_function_sees: (2,),
    _by_the_passes: (2,),
    _sequence_parallel: (2, 3),
    _distributed_tensors: (2, 4),
    _distributed_second_rows: (3,),
    _shards_that_outlive_their_group: (1,),
})  # fmt: skip
