"""Across ranks: real processes over gloo, against one process that has the whole batch."""

import contextlib
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from oracle import supervised_contrastive
from torch import Tensor, nn

import fusedloss as fl
from fusedloss.losses import supcon

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import memory

FEATURES = 6

#: Rows of each rank, for every number of ranks.
BATCHES = {2: ([11, 5], [9, 0]), 3: ([1, 6, 1], [7, 0, 6])}

KINDS: dict[str, dict[str, Any]] = {
    "out": {},
    "in": {"positives": "in"},
    "as they are": {"normalize": False},
    "reference": {"impl": "reference"},
    "in, reference": {"positives": "in", "impl": "reference"},
}


# --- what every rank runs ---


def _batch(sizes: list[int]) -> tuple[Tensor, Tensor, list[slice]]:
    """The whole of it, and where each rank's rows are. Labels that lie on one rank, on several, on one row."""
    generator = torch.Generator().manual_seed(sum(sizes))
    x = torch.randn(sum(sizes), FEATURES, generator=generator, dtype=torch.float64) / 2
    y = torch.randint(4, (len(x),), generator=generator)
    y[::5] = 100 + torch.arange(len(y[::5]))
    y[0] = 7
    y[1:3] = 8
    parts = [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(len(sizes))]
    return x, y, parts


def _equals_one_process(rank: int, world: int) -> None:
    """Loss and gradients, for any upstream gradients: of a loss that all have their mean, as all are one backward."""
    for sizes in BATCHES[world]:
        x, y, parts = _batch(sizes)
        for kind, options in KINDS.items():
            for reduction in supcon.REDUCTIONS:
                case = f"{sizes}, {kind}, {reduction}"
                mine = x[parts[rank]].clone().requires_grad_()
                temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
                labels = y[parts[rank]].int() if rank else y[parts[rank]]
                got = fl.supcon_loss(
                    mine, labels, temperature=temperature, reduction=reduction, group=dist.group.WORLD, **options
                )

                leaves = [x.clone().requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)]
                exact = {name: value for name, value in options.items() if name != "impl"}
                rows = supervised_contrastive(leaves[0], y, leaves[1], **exact)
                divisor = {"none": 1, "sum": 1, "mean": int((rows != 0).sum()), "mean_all": len(rows)}[reduction]
                generator = torch.Generator().manual_seed(1)
                if reduction == "none":
                    upstream = torch.randn(len(y), generator=generator, dtype=torch.float64)
                    expected, all_of_it = rows[parts[rank]], (rows * upstream).sum()
                    upstream = upstream[parts[rank]]
                else:
                    upstreams = torch.randn(world, generator=generator, dtype=torch.float64)
                    expected = rows.sum() / divisor
                    all_of_it, upstream = expected * upstreams.mean(), upstreams[rank]
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
                by_x, by_temperature = torch.autograd.grad(all_of_it, leaves)
                wanted = (by_x[parts[rank]], by_temperature)
                for value, right in zip(torch.autograd.grad(got, (mine, temperature), upstream), wanted, strict=True):
                    torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-11, msg=lambda m, c=case: f"{c}: {m}")


def _every_dtype(rank: int, world: int) -> None:
    """And the same bits when it runs again."""
    x, y, parts = _batch([9, 4, 5][:world])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        alone = x.to(dtype).requires_grad_()
        expected = fl.supcon_loss(alone, y, temperature=0.1)
        (wanted,) = torch.autograd.grad(expected, alone)
        mine = x[parts[rank]].to(dtype).requires_grad_()
        results = []
        for _ in range(2):
            got = fl.supcon_loss(mine, y[parts[rank]], temperature=0.1, group=dist.group.WORLD)
            results.append((got.detach(), torch.autograd.grad(got, mine)[0]))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        (got, gradient), _ = results
        assert gradient.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, wanted[parts[rank]], rtol=tolerance, atol=tolerance)


def _under_ddp(rank: int, world: int) -> None:
    """The parameters' gradients are those of one process, the loss as it stands; also of a temperature beside it."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    for sizes in ([6] * world, [10, 2, 7][:world]):
        x, y, parts = _batch(sizes)
        y = y % 4
        even = len(set(sizes)) == 1
        for joint in [False, True] if even else [False]:  # a mean of means is the mean where parts are even
            kind = fl.nn.CrossEntropySupConLoss if joint else fl.nn.SupConLoss
            alone = copy.deepcopy(encoder)
            criterion = kind(temperature=nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))
            expected = criterion(*[alone(x)] * (1 + joint), y)
            expected.backward()
            right = [p.grad for p in (*alone.parameters(), *criterion.parameters())]

            model, criterion = copy.deepcopy(encoder), copy.deepcopy(criterion)
            criterion.zero_grad()
            ddp = nn.parallel.DistributedDataParallel(model)
            features = ddp(x[parts[rank]])
            averaged = {} if joint else {"averaged": True}  # which is what the joint objective is for
            got = criterion(*[features] * (1 + joint), y[parts[rank]], group=dist.group.WORLD, **averaged)
            got.backward()
            if not joint:
                torch.testing.assert_close(got, expected)
            for p, wanted in zip((*model.parameters(), *criterion.parameters()), right, strict=True):
                torch.testing.assert_close(p.grad, wanted, rtol=1e-10, atol=1e-12)


def _targets(world: int) -> tuple[list[list[Tensor]], list[list[Tensor]], Tensor]:
    """Two micro-batches on each rank, one of them without targets, another without any that counts; and weights."""
    generator = torch.Generator().manual_seed(3)
    sizes = [[5, 2], [0, 9], [3, 3]][:world]
    targets = [[torch.randint(FEATURES, (size,), generator=generator) for size in both] for both in sizes]
    targets[0][0][1:4] = -100
    targets[0][1][:] = -100
    token_weights = [[torch.rand(len(t), generator=generator, dtype=torch.float64) for t in both] for both in targets]
    return targets, token_weights, torch.rand(FEATURES, generator=generator, dtype=torch.float64)


def _a_normalizer_of_all_ranks(rank: int, world: int) -> None:
    """Shares of the mean over all targets: their gradients add up, or average under DDP, to those of one process."""
    targets, token_weights, weight = _targets(world)
    counted = sum(int((t != -100).sum()) for both in targets for t in both)
    assert fl.normalizer(targets[rank], group=dist.group.WORLD).tolist() == counted
    one = fl.normalizer(targets[rank][0].int(), group=dist.group.WORLD, averaged=True)
    assert one.dtype == torch.float64 and one == sum(int((both[0] != -100).sum()) for both in targets) / world

    torch.manual_seed(0)
    alone = nn.Linear(4, FEATURES).double()
    inputs = [[torch.randn(len(t), 4, dtype=torch.float64) for t in both] for both in targets]
    kinds: list[tuple[Callable[..., Tensor], dict[str, Any], bool]] = [
        (fl.focal_loss, {}, False),
        (fl.cross_entropy, {"weight": weight}, False),
        (fl.cross_entropy, {"normalizer": "token_weight"}, True),
    ]
    for loss, options, weighted in kinds:
        alone.zero_grad()
        every = [torch.cat([x for both in each for x in both]) for each in (inputs, targets, token_weights)]
        tokens = {"token_weight": every[2]} if weighted else {}
        expected = loss(alone(every[0]), every[1], **options, **tokens)
        expected.backward()
        counts = {name: value for name, value in options.items() if name == "weight"}
        counts |= {"token_weight": token_weights[rank]} if weighted else {}
        for averaged in (False, True):
            n = fl.normalizer(targets[rank], group=dist.group.WORLD, averaged=averaged, **counts)
            model = copy.deepcopy(alone)
            model.zero_grad()
            ddp = nn.parallel.DistributedDataParallel(model) if averaged else model
            total = torch.zeros((), dtype=torch.float64)
            for i, (x, t, w) in enumerate(zip(inputs[rank], targets[rank], token_weights[rank], strict=True)):
                tokens = {"token_weight": w} if weighted else {}
                with ddp.no_sync() if averaged and i == 0 else contextlib.nullcontext():
                    share = loss(ddp(x), t, **{**options, "normalizer": n}, **tokens)
                    share.backward()
                total += share.detach()
            dist.all_reduce(total)
            torch.testing.assert_close(total / world if averaged else total, expected.detach())
            for p, right in zip(model.parameters(), alone.parameters(), strict=True):
                if not averaged:
                    dist.all_reduce(p.grad)
                torch.testing.assert_close(p.grad, right.grad, rtol=1e-10, atol=1e-12)


def _a_normalizer_of_other_things_raises(rank: int, world: int) -> None:
    target, ones = torch.arange(3), torch.ones(3)
    for options in ({"ignore_index": 0}, {"averaged": True}, {"weight": ones}, {"token_weight": ones.double()}):
        mine = options if rank == world - 1 else {}
        with pytest.raises(ValueError, match=f"do not agree on what counts: rank {rank} has ignore_index="):
            fl.normalizer(target, group=dist.group.WORLD, **mine)
    # Of one kind, whatever their dtype.
    weights = torch.full((3,), 0.25, dtype=torch.float64 if rank else torch.float16)
    got = fl.normalizer(target, token_weight=weights, group=dist.group.WORLD)
    assert got == 0.75 * world


def _other_groups(rank: int, world: int) -> None:
    """Some of the ranks, which those outside cannot name; and where gradients of the temperature alone are needed."""
    members = [0, world - 1]
    group = dist.new_group(members)
    x, y, parts = _batch([5, 4])
    if rank not in members:
        with pytest.raises(TypeError, match="a process group that this rank is in"):
            fl.supcon_loss(x, y, group=group)
        return
    part = parts[members.index(rank)]
    results = []
    for rows, own in ((part, group), (slice(None), None)):
        mine, t = x[rows].clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = fl.supcon_loss(mine, y[rows], group=own)
        frozen = fl.supcon_loss(x[rows], y[rows], temperature=t, group=own)
        with torch.no_grad():
            without = fl.supcon_loss(mine, y[rows], group=own)
        assert not without.requires_grad
        gradient = torch.autograd.grad(loss, mine)[0]
        results.append((loss, without, gradient if own else gradient[part], *torch.autograd.grad(frozen, t)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def _no_rows_and_no_positives(rank: int, world: int) -> None:
    """The loss is 0, attached; the warning is for the whole batch and not for a part of it."""
    for rows, warns in ((0, False), (2, True)):
        x = torch.randn(rows, FEATURES, requires_grad=True)
        labels = torch.arange(rows) + 10 * rank
        with pytest.warns(UserWarning, match="no anchor has a positive") if warns else contextlib.nullcontext():
            loss = fl.supcon_loss(x, labels, group=dist.group.WORLD)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))
    # None on this rank alone, but on all of them: no warning.
    fl.supcon_loss(torch.randn(1, FEATURES), torch.tensor([3]), group=dist.group.WORLD)


def _a_second_derivative_raises(rank: int, world: int) -> None:
    x, y, parts = _batch([4] * world)
    mine = x[parts[rank]].clone().requires_grad_()
    loss = fl.supcon_loss(mine, y[parts[rank]], group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad(loss, mine, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def _disagreements_raise_on_every_rank(rank: int, world: int) -> None:
    x, y = torch.randn(4, FEATURES), torch.arange(4) // 2
    last = rank == world - 1
    changes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "the number of features must be the same on every rank": (x[:, :3], y, {}),
        "the features' dtype .* torch.float": (x.double(), y, {}),
        "reduction": (x, y, {"reduction": "sum"}),
        "positives": (x, y, {"positives": "in"}),
        "normalize": (x, y, {"normalize": False}),
        "temperature .* 0.": (x, y, {"temperature": 0.1}),
        "temperature .* a tensor|temperature .* 0.3": (x, y, {"temperature": torch.tensor(0.3)}),
        r"temperature .*\('a tensor', 0.[2-9]": (x, y, {"temperature": torch.tensor(0.2, requires_grad=True)}),
        "averaged": (x, y, {"averaged": True}),
        "features.requires_grad": (x.clone().requires_grad_(), y, {}),
    }
    for message, (features, labels, options) in changes.items():
        usual = {"temperature": torch.tensor(0.9, requires_grad=True)} if "a tensor'" in message else {}
        arguments = (features, labels, options) if last else (x, y, usual)
        with pytest.raises(ValueError, match=message) as raised:
            fl.supcon_loss(*arguments[:2], group=dist.group.WORLD, **arguments[2])
        others = list(range(world - 1)) if last else [world - 1]
        assert f"on rank {rank}, not on {others}" in str(raised.value)


def _an_error_on_one_rank_raises_on_every_rank(rank: int, world: int) -> None:
    """And the next call is as any other."""
    x, y, last = torch.ones(3, FEATURES), torch.zeros(3).long(), rank == world - 1
    zero = x.masked_fill((torch.arange(3) == 2)[:, None] & last, 0)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any], type[Exception], str]] = [
        (fl.supcon_loss, (zero, y), {}, ValueError, "row 2 of features is zero"),
        (fl.supcon_loss, (x, y[last:]), {}, ValueError, r"labels must be \(3,\)"),
        (fl.supcon_loss, (x, y), {"temperature": 0.3 - last}, ValueError, "temperature must be between"),
        (fl.normalizer, (y + 5 * last,), {"weight": torch.ones(4)}, IndexError, "target 5 is out of range"),
    ]
    for call, arguments, options, kind, message in calls:
        elsewhere = (ValueError, f"(ranks \\[{world - 1}\\]|another rank) of the group raised an error in this call")
        own, match = (kind, message) if last else elsewhere
        with pytest.raises(own, match=match):
            call(*arguments, group=dist.group.WORLD, **options)
    assert fl.supcon_loss(x, y, group=dist.group.WORLD) > 0
    assert fl.normalizer(y, group=dist.group.WORLD) == 3 * world


def _similarities_are_not_stored(rank: int, world: int) -> None:
    """A rank's would take 72 MB and more, several times in eager PyTorch."""
    x, y = torch.randn(6144 // world, 64, requires_grad=True), torch.randint(50, (6144 // world,))
    peak = memory.peak_memory(lambda: torch.autograd.grad(fl.supcon_loss(x, y, group=dist.group.WORLD), x))
    assert peak is None or peak < 48 * 2**20


test_scene = ranks.tests_of({
    _equals_one_process: (2, 3),
    _every_dtype: (2,),
    _under_ddp: (3,),
    _a_normalizer_of_all_ranks: (3,),
    _a_normalizer_of_other_things_raises: (2,),
    _other_groups: (3,),
    _no_rows_and_no_positives: (2,),
    _a_second_derivative_raises: (2,),
    _disagreements_raise_on_every_rank: (3,),
    _an_error_on_one_rank_raises_on_every_rank: (2,),
    _similarities_are_not_stored: (2,),
})  # fmt: skip


def test_a_group_that_cannot_be_used_is_refused(monkeypatch):
    x, y = torch.eye(3), torch.tensor([0, 0, 1])
    for call in (fl.supcon_loss, fl.nn.SupConLoss()):
        with pytest.raises(ValueError, match=r"group was given, 'all', but torch\.distributed is not initialised"):
            call(x, y, group="all")
    with pytest.raises(ValueError, match="averaged=True is for a loss that all ranks share, but reduction is 'none'"):
        fl.supcon_loss(x, y, averaged=True, reduction="none")
    with pytest.raises(TypeError, match="averaged must be a bool, got 1"):
        fl.supcon_loss(x, y, averaged=1)
    with pytest.raises(ValueError, match="contrast and group both say what to compare with"):
        fl.supcon_loss(x, y, contrast=x, contrast_labels=y, group="all")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(TypeError, match=r"group must be a process group that this rank is in.* got 'all'"):
        fl.supcon_loss(x, y, group="all")
