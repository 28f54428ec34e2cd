"""Vocabulary-parallel losses: real processes over gloo, against one process that has all the classes."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import assert_rows_as_accurate_as
from row_losses import LEVELED, computed, is_over_classes, takes
from row_losses import LOSSES as ROW_LOSSES
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

import fusedloss as fl

ROWS, FEATURES, IGNORED = 13, 5, 3  # the ignored index is a class, as a padding index is

#: Classes of each rank, for every number of ranks.
SIZES = {
    1: {"all": [11]},
    2: {"uneven": [1, 10], "nothing on the first": [0, 9]},
    3: {"uneven": [5, 1, 7], "nothing in the middle": [4, 0, 6]},
    4: {"one class each": [1, 1, 1, 1], "most on one, nothing on the last": [1, 2, 8, 0]},
}


def _all_of(s: fl.Statistics) -> Tensor:
    top = s.ce + 0.5 * s.q + 0.1 * s.top_ce + 0.01 * s.mean_ce + 0.1 * s.lse.square()
    return top + 0.1 * s.second_logit - 0.2 * s.target_logit * s.top_logit + s.mean_logit


#: By the public names, with arguments of their own.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (loss.func.__name__ if hasattr(loss, "func") else "cross_entropy", getattr(loss, "keywords", {}))
       for name, loss in ROW_LOSSES.items() if name != "flex_loss classes"},  # refused, see _what_is_refused
    "flex_loss of all statistics": ("flex_loss", {"loss_fn": _all_of, "statistics": ("top", "second", "mean")}),
}  # fmt: skip
OVER_CLASSES = [name for name, loss in ROW_LOSSES.items() if is_over_classes(loss)]


def _options(name: str, classes: int, generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """Shared options by name."""
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
    token_weight = torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.5
    smooths = takes(getattr(fl, LOSSES.get(name, (name,))[0]), "label_smoothing")
    smoothing: dict[str, Any] = {"label_smoothing": 0.125} if smooths else {}
    return {
        "plain": {},
        "everything": {
            "weight": weight, "ignore_index": IGNORED, "z_loss": 0.01, "token_weight": token_weight, **smoothing,
        },
        "others": {"label_smoothing": 0.125, "smoothing_over": "others"} if smooths else {},
    }  # fmt: skip


def _data(classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits with ties, certain rows, one of them wrong, and targets on every rank, some ignored."""
    z = torch.randn(ROWS, classes, generator=generator, dtype=torch.float64) * 2
    z[1] = z[1].round()
    target = torch.randint(classes, (ROWS,), generator=generator)
    target[:classes] = torch.arange(classes)[:ROWS]
    z[torch.arange(2, ROWS, 4), target[2::4]] += 30
    z[5, target[5] - 1] += 30
    z[4, 0] = -torch.inf if classes > 2 else 0
    return z.to(dtype), target


def _part(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def _same_bits(x: Tensor, world: int) -> None:
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    for part in parts:
        assert_close(part, x.detach(), rtol=0, atol=0, equal_nan=True)


def _each(world: int) -> Iterator[tuple[str, list[int], fl.VocabularyShards]]:
    for name, sizes in SIZES[world].items():
        yield name, sizes, fl.VocabularyShards(dist.group.WORLD, sizes)


# --- what every rank runs ---


def _row_form(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    for sized, sizes, shards in _each(world):
        z, target = _data(sum(sizes), generator)
        part = _part(sizes, rank)
        for name, (function, own) in LOSSES.items():
            loss = getattr(fl, function)
            for optioned, options in _options(name, sum(sizes), generator).items():
                for reduction in ("mean", "none") if optioned == "everything" else ("sum",):
                    case = f"{name}, {optioned}, {reduction}, {sized} of {world}"
                    more = {**own, **options, "reduction": reduction, "return_stats": True}
                    whole = z.clone().requires_grad_()
                    expected, expected_stats = loss(whole, target, **more)
                    upstream = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
                    (gradient,) = torch.autograd.grad(expected, whole, upstream)
                    mine = z[:, part].clone().requires_grad_()
                    got, stats = loss(mine, target, group=shards, **more)
                    (mine_gradient,) = torch.autograd.grad(got, mine, upstream)
                    _close(got, expected, case)
                    for a, b in zip(stats, expected_stats, strict=True):
                        _close(a, b, case)
                    _close(mine_gradient, gradient[:, part], case)
                    _same_bits(got, world)


def _close(got: Tensor, expected: Tensor, case: str, **tolerance: float) -> None:
    assert_close(got, expected, equal_nan=True, msg=lambda text: f"{case}: {text}", **tolerance)


def _levels(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    for sized, sizes, shards in _each(world):
        z, target = _data(sum(sizes), generator)
        part = _part(sizes, rank)
        options = _options("dsc_loss", sum(sizes), generator)["everything"]
        del options["z_loss"]
        for loss in LEVELED:
            for level, reduction in (("set", "mean"), ("class", "mean"), ("class", "sum"), ("class", "none")):
                case = f"{level}, {reduction}, {sized} of {world}"
                more = {**options, "level": level, "reduction": reduction}
                if level == "set":
                    del more["weight"]
                whole, mine = z.clone().requires_grad_(), z[:, part].clone().requires_grad_()
                expected, got = loss(whole, target, **more), loss(mine, target, group=shards, **more)
                upstream = torch.rand(expected.shape, generator=generator, dtype=torch.float64)
                (gradient,) = torch.autograd.grad(expected, whole, upstream)
                if reduction == "none":
                    expected, upstream = expected[part], upstream[part]
                (mine_gradient,) = torch.autograd.grad(got, mine, upstream)
                _close(got, expected, case)
                _close(mine_gradient, gradient[:, part], case)
                if reduction != "none":
                    _same_bits(got, world)


def _linear_form(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    for sized, sizes, shards in _each(world):
        classes, part = sum(sizes), _part(sizes, rank)
        _, target = _data(classes, generator)
        hidden = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
        weight = torch.randn(classes, FEATURES, generator=generator, dtype=torch.float64)
        bias = torch.randn(classes, generator=generator, dtype=torch.float64)
        for name, (function, own) in LOSSES.items():
            if name == "dice_loss":
                continue  # it has no linear form: linear_dsc_loss(alpha=0)
            for softcap, budget in ((None, None), (3.0, 4 * classes * 8 * 2)):
                options = _options(name, classes, generator)["everything"]
                case = f"{name}, softcap {softcap}, {sized} of {world}"
                sources = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
                logits = F.linear(*sources)
                logits = logits if softcap is None else (logits / softcap).tanh() * softcap
                expected = getattr(fl, function)(logits, target, **own, **options)
                gradients = torch.autograd.grad(expected, sources, torch.tensor(0.7, dtype=torch.float64))
                mine = [x.clone().requires_grad_() for x in (hidden, weight[part], bias[part])]
                got = getattr(fl, f"linear_{function}")(
                    *mine[:2], target, linear_bias=mine[2], softcap=softcap, budget=budget, group=shards,
                    **own, **options,
                )  # fmt: skip
                mine_gradients = torch.autograd.grad(got, mine, torch.tensor(0.7, dtype=torch.float64))
                _close(got, expected, case)
                for a, b in zip(mine_gradients, (gradients[0], gradients[1][part], gradients[2][part]), strict=True):
                    _close(a, b, case)
                _same_bits(got, world)
                _same_bits(mine_gradients[0], world)


def _every_dtype(rank: int, world: int) -> None:
    """As accurate as the formula in PyTorch: the loss is PyTorch between the passes."""
    generator = torch.Generator().manual_seed(world)
    sizes = [100 + 37 * r for r in range(world)]
    part, shards = _part(sizes, rank), fl.VocabularyShards(dist.group.WORLD, sizes)
    z, target = _data(sum(sizes), generator)
    upstream = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (function, own) in LOSSES.items():
            loss = getattr(fl, function)

            def run(x: Tensor, loss: Any = loss, own: Any = own, **options: Any) -> tuple[Tensor, Tensor]:
                x = x.clone().requires_grad_()
                rows = loss(x, target, reduction="none", **own, **options)
                (gradient,) = torch.autograd.grad(rows, x, upstream.to(rows.dtype))
                return rows.double(), gradient.double()

            rounded = z.to(dtype)
            truth, alone = run(rounded.double()), run(rounded, impl="reference")
            got = run(rounded[:, part], group=shards)
            assert got[0].isfinite().equal(truth[0].isfinite()), name
            for true, one, mine, unit, whole in (
                (truth[0], alone[0], got[0], torch.float32, truth[0]),
                (truth[1][:, part], alone[1][:, part], got[1], dtype, truth[1]),
            ):
                finite = true.isfinite()
                scale = whole[whole.isfinite()].abs().max()
                allowed = 2 * (one - true)[finite].abs().max() + 8 * torch.finfo(unit).eps * scale
                error = (mine - true)[finite].abs().max()
                assert error <= allowed, f"{name}, {dtype}, rank {rank} of {world}: {error} over {allowed}"


def _small_factors_in_float16(rank: int, world: int) -> None:
    """Every row and every class, with factors from 2^-20 to 1 in each chunk."""
    generator = torch.Generator().manual_seed(world)
    sizes, rows = [5 + 3 * r for r in range(world)], 6 * world
    part, shards = _part(sizes, rank), fl.VocabularyShards(dist.group.WORLD, sizes)
    hidden = torch.randint(-2, 3, (rows, FEATURES), generator=generator) / 2
    weight = torch.randint(-4, 5, (sum(sizes), FEATURES), generator=generator) / 4
    target = torch.randint(sum(sizes), (rows,), generator=generator)
    options = {"token_weight": torch.exp2(-20 * torch.rand(rows, generator=generator)), "reduction": "sum"}
    scale = 2.0**11
    for name in ("cross_entropy", "dsc_loss"):
        theirs, exact = ([x.to(d).requires_grad_() for x in (hidden, weight)] for d in (torch.half, torch.double))
        row, truth = (
            torch.autograd.grad(getattr(fl, name)(x[0] @ x[1].t(), target, impl="reference", **options) * scale, x)
            for x in (theirs, exact)
        )
        for own, parallel in ((slice(None), False), (slice(6 * rank, 6 * (rank + 1)), True)):
            mine = [x.half().requires_grad_() for x in (hidden[own], weight[part])]
            loss = getattr(fl, f"linear_{name}")(
                *mine, target, group=shards, sequence_parallel=parallel, budget=5 * max(sizes) * 2, **options
            )
            got = torch.autograd.grad(loss * scale, mine)
            assert_rows_as_accurate_as(got[0], row[0][own], truth[0][own])
            assert_rows_as_accurate_as(got[1], row[1][part], truth[1][part])


@contextlib.contextmanager
def _counted() -> Iterator[list[str]]:
    """The collectives that are called meanwhile."""
    names, called = ("all_gather", "all_reduce", "broadcast", "reduce"), []
    own = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return own[name](*arguments, **options)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield called
    finally:
        for name in names:
            setattr(dist, name, own[name])


def _collectives(rank: int, world: int) -> None:
    """In the forward one, of a loss over the classes two; in the backward none of a row form, one of a linear form."""
    sizes = [4] * world
    shards = fl.VocabularyShards(dist.group.WORLD, sizes)
    z, target = torch.randn(ROWS, 4, requires_grad=True), torch.arange(ROWS) % (4 * world)
    hidden, weight = torch.randn(ROWS, FEATURES, requires_grad=True), torch.randn(4, FEATURES, requires_grad=True)
    for name, (function, own) in LOSSES.items():
        for sources, form in (((z,), function), ((hidden, weight), f"linear_{function}")):
            linear = len(sources) == 2
            if linear and name == "dice_loss":
                continue
            options = {"group": shards, "return_stats": True, "budget": 200} if linear else {"group": shards}
            with _counted() as forward:
                loss = getattr(fl, form)(*sources, target, **own, **options)
                loss = loss[0] if linear else loss
            with _counted() as backward:
                loss.backward()
            assert forward == ["all_gather"] * (2 if name in OVER_CLASSES else 1), name
            assert backward == (["all_reduce"] if linear else []), name
    for level, reduction, before, after in (("set", "mean", 2, 0), ("class", "sum", 2, 0), ("class", "none", 1, 1)):
        with _counted() as forward:
            loss = fl.dsc_loss(z, target, alpha=0.5, level=level, reduction=reduction, group=shards).sum()
        with _counted() as backward:
            loss.backward()
        assert (forward, backward) == (["all_gather"] * before, ["all_gather"] * after), (level, reduction)
    with _counted() as backward:
        fl.linear_cross_entropy(hidden.detach(), weight, target, group=shards).backward()
    assert backward == ["all_gather"]
    with _counted() as forward:
        fl.cross_entropy(z, target, group=dist.group.WORLD)
    assert forward == ["all_gather"] * 2


def _what_is_refused(rank: int, world: int) -> None:
    sizes = [3] * world
    shards = fl.VocabularyShards.gather(dist.group.WORLD, 3)
    assert shards.sizes == tuple(sizes)
    z, target = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 3 * world])
    with pytest.raises(IndexError, match=f"target {3 * world} is out of range for {3 * world} classes"):
        fl.cross_entropy(z, target, group=shards)
    target[1] = 0
    with pytest.raises(ValueError, match=rf"rank {rank} has a part of .* but input has 2"):
        fl.cross_entropy(z[:, :2], target, group=shards)
    with pytest.raises(ValueError, match="group needs an implementation with kernels, but impl is 'reference'"):
        fl.cross_entropy(z, target, group=shards, impl="reference")
    with pytest.raises(ValueError, match="weight must be"):
        fl.cross_entropy(z, target, group=shards, weight=torch.ones(3 * world + 1))
    with pytest.raises(ValueError, match="statistics 'below'"):
        fl.flex_loss(z, target, lambda s: s.below_ce, statistics=["below"], group=shards)
    alpha = torch.ones((), requires_grad=True)
    for options in ({}, {"level": "class"}):
        with pytest.raises(ValueError, match="inplace_backward needs a compiled epilogue"):
            fl.dsc_loss(computed(z), target, alpha=alpha, group=shards, inplace_backward=True, **options)
    with pytest.raises(ValueError, match="sizes must be of the"):
        fl.VocabularyShards(dist.group.WORLD, [3] * (world + 1))
    with pytest.raises(ValueError, match="each of sizes must be at least 0, got -1"):
        fl.VocabularyShards(dist.group.WORLD, [-1] * world)
    for options in ({}, {"level": "class"}, {"level": "set"}):
        with pytest.raises(ValueError, match="parameters that require grad"):
            fl.dsc_loss(z, target, alpha=alpha, group=shards, **options)
    with pytest.raises(ValueError, match="with a group, a loss over the classes needs a compiled epilogue"):
        fl.flex_loss(z, target, lambda p, q, y: p * q, over="classes", group=shards)
    for loss, options in ((fl.cross_entropy, {}), (fl.dsc_loss, {}), (fl.dsc_loss, {"level": "class"})):
        with pytest.raises(RuntimeError, match="is differentiated once"):
            torch.autograd.grad(loss(z, target, group=shards, **options), z, create_graph=True)


def _out_of_range(rank: int, world: int) -> None:
    """As on a GPU, where nobody looks at the targets beforehand: their rows are NaN, and no index is out of range."""
    generator = torch.Generator().manual_seed(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fl.checks, "check_indices", lambda *_: None)
        for _, sizes, shards in _each(world):
            z, target = _data(sum(sizes), generator)
            z[z.isinf()] = 0
            weight = torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
            target[2], target[5] = sum(sizes), -1
            valid = (target >= 0) & (target < sum(sizes))
            for name, (function, own) in LOSSES.items():
                mine = z[:, _part(sizes, rank)].clone().requires_grad_()
                loss = getattr(fl, function)(mine, target, group=shards, weight=weight, reduction="none", **own)
                assert torch.equal(loss.isnan(), ~valid), name
                loss[valid].sum().backward()
                assert mine.grad[valid].isfinite().all(), name
            for level in ("class", "set"):
                mine = z[:, _part(sizes, rank)].clone().requires_grad_()
                loss = fl.dsc_loss(mine, target, group=shards, level=level)
                loss.backward()
                assert loss.isnan()


def _disagreements(rank: int, world: int) -> None:
    """Asked for by one line, they raise on every rank; without it the next collective would hang or be wrong."""
    if world == 1:
        return
    shards = fl.VocabularyShards(dist.group.WORLD, [3] * world)
    z, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    odd = rank == world - 1
    os.environ["FUSEDLOSS_CHECK_RANKS"] = "1"
    try:
        for what, call in {
            "the shape of the targets": lambda: fl.cross_entropy(z[odd:], target[odd:], group=shards),
            "the dtype of the logits": lambda: fl.cross_entropy(z.double() if odd else z, target, group=shards),
            "label_smoothing": lambda: fl.cross_entropy(z, target, label_smoothing=0.1 * odd, group=shards),
            "reduction": lambda: fl.cross_entropy(z, target, reduction="sum" if odd else "mean", group=shards),
            "the loss": lambda: (fl.focal_loss if odd else fl.dsc_loss)(z, target, group=shards),
            "the parameters of the loss": lambda: fl.focal_loss(z, target, gamma=1.0 + odd, group=shards),
            "the checksum of the targets": lambda: fl.cross_entropy(z, target + odd, group=shards),
        }.items():
            with pytest.raises(ValueError, match=f"{what} must be the same on every rank"):
                call()
        fl.cross_entropy(z, target, group=shards)
    finally:
        os.environ["FUSEDLOSS_CHECK_RANKS"] = "yes"
        with pytest.raises(ValueError, match="FUSEDLOSS_CHECK_RANKS must be 0 or 1, got 'yes'"):
            fl.cross_entropy(z, target, group=shards)
        del os.environ["FUSEDLOSS_CHECK_RANKS"]


def _losses_of_own(target: Tensor, candidates: Tensor) -> dict[str, Any]:
    """Of logits, a parameter of each row, token weights and a group."""

    def flex(x: Tensor, g: Tensor, w: Tensor, group: Any) -> Tensor:
        def loss(s: fl.Statistics) -> Tensor:
            return g * s.q + s.candidate_ce.sum(-1)

        return (fl.flex_loss(x, target, loss, candidates=candidates, reduction="none", group=group) * w).sum()

    return {
        "candidates": lambda x, g, w, **o: fl.mixed_cross_entropy(
            x, target, alpha=0.25, candidates=candidates, token_weight=w, **o
        ),
        "of rows": lambda x, g, w, **o: fl.focal_loss(x, target, gamma=g, token_weight=w, **o),
        "of classes": lambda x, g, w, **o: fl.dsc_loss(x, target, alpha=g.detach(), token_weight=w, **o),
        "level": lambda x, g, w, **o: fl.dsc_loss(x, target, alpha=g.detach(), token_weight=w, level="class", **o),
        "flex": flex,
        "leading": lambda x, g, w, **o: fl.cross_entropy(x[None], target[None], token_weight=w[None], **o),
        **{
            f"{name} in place": lambda x, g, w, loss=loss, own=own, **o: loss(
                x * 1, target, token_weight=w, inplace_backward=True, **own(g.detach()), **o
            )
            for name, loss, own in (
                ("of rows", fl.focal_loss, lambda g: {"gamma": g}),
                ("of classes", fl.dsc_loss, lambda g: {"alpha": g}),
                ("level", fl.dsc_loss, lambda g: {"alpha": g, "level": "class"}),
            )
        },
    }


def _own_arguments(rank: int, world: int) -> None:
    """Candidates, parameters of rows, learnt ones, learnt token weights, leading dimensions, in place."""
    generator = torch.Generator().manual_seed(world)
    for sized, sizes, shards in _each(world):
        part = _part(sizes, rank)
        z, target = _data(sum(sizes), generator)
        candidates = torch.randint(sum(sizes), (ROWS, 2), generator=generator)
        gamma, token_weight = torch.rand(2, ROWS, generator=generator, dtype=torch.float64).unbind()
        for case, loss in _losses_of_own(target, candidates).items():
            results = []
            for columns, group in ((slice(None), None), (part, shards)):
                inputs = [x.clone().requires_grad_() for x in (z[:, columns], gamma, token_weight)]
                value = loss(*inputs, group=group)
                gradients = torch.autograd.grad(value, inputs, allow_unused=True)
                results.append((value, gradients))
            (expected, gradients), (got, own) = results
            _close(got, expected, f"{case}, {sized} of {world}")
            assert_close(own[0], gradients[0][:, part])
            for a, b in zip(own[1:], gradients[1:], strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    _close(a, b, f"{case}, {sized} of {world}")


def _by_the_passes(rank: int, world: int) -> None:
    """Of class terms the kernels for GPUs give what the engine does."""
    if world != 2:
        return  # they are interpreted, which takes its time
    generator = torch.Generator().manual_seed(world)
    sizes = [200 * r + 3 for r in range(world)]
    part, shards = _part(sizes, rank), fl.VocabularyShards(dist.group.WORLD, sizes)
    z, target = _data(sum(sizes), generator, torch.float32)
    hidden = torch.randn(ROWS, FEATURES, generator=generator)
    weight = torch.randn(sum(sizes), FEATURES, generator=generator)
    rows, linear = (z[:, part],), (hidden, weight[part])
    losses: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any]]] = {
        **{loss.func.__name__: (loss, rows, {"z_loss": 0.01}) for loss in LEVELED},
        "linear_dsc_loss": (fl.linear_dsc_loss, linear, {"budget": 5 * 4 * max(sizes)}),
        "class": (fl.dsc_loss, rows, {"level": "class", "reduction": "none"}),
        "set": (LEVELED[-1], rows, {"level": "set"}),
    }

    for name, (loss, tensors, own) in losses.items():
        results = {}
        for impl in ("cpu", "triton", *(["triton_fused"] if len(tensors) == 2 else [])):
            inputs = [x.clone().requires_grad_() for x in tensors]
            value = loss(*inputs, target, ignore_index=IGNORED, group=shards, impl=impl, **own)
            results[impl] = (value, *torch.autograd.grad(value.sum(), inputs))
        for impl, result in results.items():
            for got, expected in zip(result, results["cpu"], strict=True):
                _close(got, expected, f"{name}, {impl}", rtol=1e-5, atol=1e-7)


def _compiled(rank: int, world: int) -> None:
    if world != 2:
        return  # the graph is the same, and takes its time
    shards = fl.VocabularyShards(dist.group.WORLD, [6] * world)
    generator = torch.Generator().manual_seed(0)
    z, target = torch.randn(ROWS, 6 * world, generator=generator), torch.arange(ROWS) % (6 * world)
    hidden, weight = torch.randn(ROWS, 6, generator=generator), torch.randn(6 * world, 6, generator=generator)
    part = _part([6] * world, rank)

    rows, linear = (z[:, part],), (hidden, weight[part])
    for loss, tensors in {
        lambda x: fl.focal_loss(x, target, label_smoothing=0.1, group=shards): rows,
        lambda x: fl.dsc_loss(x, target, group=shards): rows,
        lambda x: fl.dsc_loss(x, target, level="class", group=shards): rows,
        lambda h, w: fl.linear_mixed_cross_entropy(h, w, target, alpha=0.25, group=shards): linear,
        lambda h, w: fl.linear_dsc_loss(h, w, target, group=shards): linear,
    }.items():
        results = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            inputs = [x.clone().requires_grad_() for x in tensors]
            value = function(*inputs)
            results.append((value, *torch.autograd.grad(value, inputs)))
        assert_close(results[1], results[0])
    with pytest.raises(Exception, match=r"VocabularyShards\.gather"):
        torch.compile(lambda x: fl.cross_entropy(x, target, group=dist.group.WORLD), backend="eager", fullgraph=True)(z)


def _sequence_parallel(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    sizes, steps = [3 + r for r in range(world)], 2
    part, shards = _part(sizes, rank), fl.VocabularyShards(dist.group.WORLD, sizes)
    hidden = torch.randn(steps * world, 3, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(sum(sizes), FEATURES, generator=generator, dtype=torch.float64)
    target = torch.randint(sum(sizes), hidden.shape[:-1], generator=generator)
    target[0, 1] = IGNORED
    for name, loss in {
        "cross-entropy": fl.linear_cross_entropy,
        "one-vs-rest": fl.linear_dsc_loss,
        "focal": fl.linear_focal_loss,
    }.items():
        for rows in (1, 4, 100):
            own = slice(steps * rank, steps * (rank + 1))
            inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
            expected = loss(*inputs, target, ignore_index=IGNORED, reduction="sum")
            gradients = torch.autograd.grad(expected, inputs)
            mine = [x.clone().requires_grad_() for x in (hidden[own], weight[part])]
            got = loss(
                *mine, target, ignore_index=IGNORED, reduction="sum", group=shards, sequence_parallel=True,
                budget=rows * max(sizes) * 8,
            )  # fmt: skip
            mine_gradients = torch.autograd.grad(got, mine)
            case = f"{name}, chunks of {rows}, {world} ranks"
            _close(got, expected, case)
            _close(mine_gradients[0], gradients[0][own], case)
            _close(mine_gradients[1], gradients[1][part], case)
    with pytest.raises(ValueError, match="target must have the input's shape"):
        fl.linear_cross_entropy(hidden[:1], weight[part], target, group=shards, sequence_parallel=True)
    with pytest.raises(ValueError, match="but group is None"):
        fl.linear_cross_entropy(hidden, weight, target, sequence_parallel=True)


def _distributed_tensors(rank: int, world: int) -> None:
    """Sharded on the classes, they say what group would; replicated, they are as they are."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    other = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    generator = torch.Generator().manual_seed(world)
    classes = 3 * world - 1  # DTensor's parts: all alike but the last
    z, target = _data(classes, generator)
    hidden = torch.randn(4 * world, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, FEATURES, generator=generator, dtype=torch.float64)
    token = torch.arange(len(hidden)) % classes

    def given(x: Tensor, *placements: Placement, over: DeviceMesh = mesh) -> Tensor:
        return distribute_tensor(x, over, placements, src_data_rank=None).requires_grad_()

    whole = z.clone().requires_grad_()
    expected = fl.focal_loss(whole, target)
    (gradient,) = torch.autograd.grad(expected, whole)
    for x in (given(z, Shard(1)), given(z, Replicate()), given(z, Replicate(), Shard(1), over=other)):
        got = fl.focal_loss(x, target)
        assert_close(got, expected)
        (own,) = torch.autograd.grad(got, x)
        assert own.placements == x.placements
        assert_close(own.full_tensor(), gradient)
    assert_close(fl.focal_loss(given(z, Shard(1)), distribute_tensor(target, mesh, [Replicate()])), expected)

    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = fl.linear_cross_entropy(*inputs, token)
    gradients = torch.autograd.grad(expected, inputs)
    for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Replicate())):
        mine = [given(x, placement) for x, placement in zip((hidden, weight), placements, strict=True)]
        got = fl.linear_cross_entropy(*mine, token)
        assert_close(got, expected)
        for x, own, true in zip(mine, torch.autograd.grad(got, mine), gradients, strict=True):
            assert own.placements == x.placements
            assert_close(own.full_tensor(), true)

    with pytest.raises(ValueError, match=r"input is a DTensor with placements .*one dimension of the mesh shards"):
        fl.focal_loss(given(z, Shard(0)), target)
    with pytest.raises(ValueError, match=r"target is a DTensor with placements .*must be replicated"):
        fl.focal_loss(z, distribute_tensor(target, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="a DTensor names its own"):
        fl.focal_loss(given(z, Shard(1)), target, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"must all be DTensors.* use a Linear\* module of fusedloss\.nn"):
        fl.linear_cross_entropy(hidden, given(weight, Shard(0)), token)
    with pytest.raises(ValueError, match=r"linear_weight is a DTensor with placements"):
        fl.linear_cross_entropy(given(hidden, Replicate()), given(weight, Shard(1)), token)
    with pytest.raises(ValueError, match=r"it must be replicated, or sharded evenly"):
        fl.linear_cross_entropy(given(hidden, Shard(0)), given(weight, Replicate()), token)


SCENES = [
    _row_form,
    _levels,
    _linear_form,
    _every_dtype,
    _small_factors_in_float16,
    _collectives,
    _what_is_refused,
    _out_of_range,
    _disagreements,
    _own_arguments,
    _by_the_passes,
    _compiled,
    _sequence_parallel,
    _distributed_tensors,
]


@pytest.mark.slow
@pytest.mark.parametrize("world", SIZES)
def test_ranks(world: int, tmp_path: Path) -> None:
    ranks.run(SCENES, world, tmp_path)


def test_shards_may_outlive_their_group() -> None:
    """A process group that did would take the process down at its end. The next one of that name is another."""
    script = """
import torch, torch.distributed as dist, fusedloss as fl
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
shards = fl.VocabularyShards(dist.group.WORLD, [3])
z, target = torch.randn(2, 3), torch.tensor([0, 2])
torch.testing.assert_close(fl.cross_entropy(z, target, group=shards), fl.cross_entropy(z, target))
dist.destroy_process_group()

def check_destroyed():
    try:
        fl.cross_entropy(z, target, group=shards)
    except ValueError as error:
        assert "is a process group that was destroyed" in str(error), error
    else:
        raise AssertionError("nothing raised")

check_destroyed()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
again = [fl.VocabularyShards(dist.group.WORLD, [3]) for _ in range(2)]
assert again[0] == again[1] != shards
torch.testing.assert_close(fl.cross_entropy(z, target, group=again[0]), fl.cross_entropy(z, target))
check_destroyed()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
