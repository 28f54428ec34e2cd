"""The linear modules behind DistributedDataParallel and fully_shard: real processes over gloo, against one process."""

import copy
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fusedloss as fl

FEATURES, CLASSES = 6, 11  # no multiple of the ranks

#: Targets of each rank; the first two of them do not count.
SIZES = [5, 9]

KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "cross_entropy": (fl.nn.LinearCrossEntropyLoss, {"weight": torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)}),
    "dsc": (fl.nn.LinearDSCLoss, {"alpha": 0.01}),
    "flex": (fl.nn.LinearFlexLoss, {"loss_fn": lambda s: s.ce + s.q}),
    "focal": (fl.nn.LinearFocalLoss, {"gamma": 2.0}),
    "mixed_cross_entropy": (fl.nn.LinearMixedCrossEntropyLoss, {"alpha": 0.25, "label_smoothing": 0.1}),
}
#: Those that need no arguments here.
KINDS |= {
    name: (kind, {})
    for name, kind in vars(fl.nn).items()
    if name.startswith("Linear") and name.endswith("Loss") and kind not in {known for known, _ in KINDS.values()}
}


def _teacher(tokens: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, 3 * CLASSES, dtype=torch.float64).view(CLASSES, 3)
    return {"teacher_input": nn.functional.one_hot(tokens % 3, 3).double(), "teacher_weight": weight}


def _two_classes(tokens: Tensor) -> dict[str, Tensor]:
    index = (tokens[..., None] + torch.arange(2)) % CLASSES
    return {"index": index, "log_prob": torch.tensor([0.5, 0.3]).double().log().expand(index.shape)}


#: What a teacher gives in place of targets.
OF_TEACHERS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "LinearDistillationLoss": _teacher,
    "LinearTopkDistillationLoss": _two_classes,
}


class _Model(nn.Module):
    """Embedding, a layer and the loss, whose output layer is its own or the embedding."""

    def __init__(self, kind: str, tied: bool, bias: bool = False) -> None:
        super().__init__()
        loss, options = KINDS[kind]
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, FEATURES)
        self.body = nn.Linear(FEATURES, FEATURES)
        self.criterion = loss.tied(self.embedding, **options) if tied else loss(FEATURES, CLASSES, bias=bias, **options)
        self.double()

    def forward(self, tokens: Tensor, target: Tensor, **tensors: Tensor) -> Tensor:
        return self.criterion(self.body(self.embedding(tokens)).tanh(), target=target, **tensors)


def _batch(rank: int | None) -> tuple[Tensor, Tensor]:
    """Of one rank, or the whole."""
    generator = torch.Generator().manual_seed(1)
    tokens, target = (torch.randint(CLASSES, (sum(SIZES),), generator=generator) for _ in range(2))
    target[:2] = -100
    own = slice(None) if rank is None else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    return tokens[own], target[own]


def _alone(kind: str, tied: bool, bias: bool = False) -> _Model:
    """A model of one process, with its gradients."""
    model = _Model(kind, tied, bias)
    tokens, target = _batch(None)
    model(tokens, target, normalizer=_count(model, target), **_of_teacher(kind, tokens)).backward()
    return model


def _of_teacher(kind: str, tokens: Tensor) -> dict[str, Tensor]:
    return OF_TEACHERS[kind](tokens) if kind in OF_TEACHERS else {}


def _count(model: _Model, target: Tensor, **across: Any) -> Tensor:
    return fl.normalizer(target, weight=getattr(model.criterion, "weight", None), **across)


def _equals(model: nn.Module, alone: nn.Module, **tolerance: float) -> None:
    for (name, p), right in zip(model.named_parameters(), alone.parameters(), strict=True):
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(
            gradient, right.grad, **(tolerance or {"rtol": 1e-10, "atol": 1e-12}), msg=lambda m, n=name: f"{n}: {m}"
        )


# --- what every rank runs ---


def _ddp(model: _Model) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _whole_model_sharded(model: _Model) -> nn.Module:
    return fully_shard(model)


def _each_part_sharded(model: _Model) -> nn.Module:
    for part in (model.embedding, model.body, model.criterion):
        fully_shard(part)
    return fully_shard(model)


def _layer_sharded(model: _Model) -> nn.Module:
    """As where each nn.Linear and nn.Embedding is a unit, with the output layer of a loss among them."""
    for part in (model.embedding, model.body, model.criterion.linear):
        if not isinstance(part, FSDPModule):  # a tied layer is there twice
            fully_shard(part)
    return fully_shard(model)


def _layer_sharded_with_the_one_before(model: _Model) -> nn.Module:
    fully_shard([model.body, model.criterion.linear])
    return fully_shard(model)


def _loss_sharded_apart(model: _Model) -> Callable[..., Tensor]:
    """Called after the model's forward, as where the loss is no part of it."""
    body = fully_shard(nn.Sequential(model.embedding, model.body, nn.Tanh()))
    fully_shard(model.criterion)
    return lambda tokens, target, **tensors: model.criterion(body(tokens), target=target, **tensors)


def _gradients_are_those_of_one_process(rank: int, world: int) -> None:
    ways: list[tuple[Callable[[_Model], Any], bool]] = [
        (_ddp, False), (_ddp, True),
        (_whole_model_sharded, False), (_whole_model_sharded, True),
        (_each_part_sharded, False),
        (_layer_sharded, False), (_layer_sharded, True),
        (_loss_sharded_apart, False), (_layer_sharded_with_the_one_before, False),
    ]  # fmt: skip
    tokens, target = _batch(rank)
    for kind in KINDS:
        # Whether the backward reads the weight is what the ways differ in.
        for way, tied in ways if kind in ("cross_entropy", "flex") else ways[-2:]:
            alone = _alone(kind, tied, bias=not tied)
            model = _Model(kind, tied, bias=not tied)
            wrapped = way(model)
            n = _count(model, target, group=dist.group.WORLD, averaged=True)
            wrapped(tokens, target, normalizer=n, **_of_teacher(kind, tokens)).backward()
            try:
                _equals(model, alone)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {way.__name__}, tied={tied}: {error}") from None


def _training_goes_on_as_in_one_process(rank: int, world: int) -> None:
    """Over updates of two batches, both of whose losses there are before the first backward."""
    # One loss reads the weight in the backward, one does not.
    for kind, way in itertools.product(("flex", "focal"), (_each_part_sharded, _layer_sharded)):
        alone, model = _Model(kind, False), _Model(kind, False)
        wrapped = way(model)
        tokens, target = _batch(rank)
        n = fl.normalizer(target, group=dist.group.WORLD, averaged=True)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (alone, model)]
        for _ in range(3):
            whole = _batch(None)
            alone(*whole, normalizer=fl.normalizer(whole[1])).backward()
            losses = [wrapped(tokens[part], target[part], normalizer=n) for part in (slice(3), slice(3, None))]
            for last, loss in enumerate(losses):
                wrapped.set_requires_gradient_sync(bool(last))
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for p, right in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), right, rtol=1e-9, atol=1e-10)


def _in_mixed_precision(rank: int, world: int) -> None:
    """The parameters in bfloat16 for the products, their gradients summed in float32."""
    # A layer that is a unit gets hidden states from outside of it, and casts them.
    for part, hidden in (("", torch.bfloat16), ("criterion.linear", torch.float32)):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=bool(part))
        alone = _alone("focal", False).float()
        model = _Model("focal", False).float()
        seen: list[torch.dtype] = []
        model.criterion.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0].dtype))
        for unit in dict.fromkeys((part, "")):
            fully_shard(model.get_submodule(unit), mp_policy=policy if unit == part else MixedPrecisionPolicy())
        tokens, target = _batch(rank)
        n = fl.normalizer(target, group=dist.group.WORLD, averaged=True)
        model(tokens, target, normalizer=n).backward()
        assert n.dtype == torch.float64 and seen == [hidden]
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        _equals(model, alone, rtol=0.03, atol=0.003)


def _logits_of_a_sharded_layer(rank: int, world: int) -> None:
    """`logits` is no forward: it raises where the loss is sharded, unless fully_shard is told of it."""
    alone = _Model("focal", False)
    hidden = torch.randn(2, FEATURES, dtype=torch.float64)
    for part in ("criterion", "criterion.linear"):
        model = _Model("focal", False)
        fully_shard(model.get_submodule(part))
        if part == "criterion":
            with pytest.raises(ValueError, match=r"must all be DTensors or .* use a Linear. module"):
                model.criterion.logits(hidden)
            register_fsdp_forward_method(model.criterion, "logits")
        torch.testing.assert_close(model.criterion.logits(hidden), alone.criterion.logits(hidden))


def _a_layer_that_is_a_unit_of_fsdp1_raises(rank: int, world: int) -> None:
    for original in (True, False):
        model = _Model("focal", False)
        options = {"use_orig_params": original, "device_id": torch.device("cpu")}
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), **options)
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel|FSDP1"):
            wrapped(*_batch(rank))


def _a_layer_sharded_on_the_classes(rank: int, world: int) -> None:
    """The hooks of ColwiseParallel change where hidden states and logits are, not what they are."""
    mesh = init_device_mesh("cpu", (world,))
    for tied in (False, True):
        head = nn.Linear(FEATURES, CLASSES)
        loss = fl.nn.LinearFocalLoss.tied(head) if tied else fl.nn.LinearFocalLoss(FEATURES, CLASSES)
        model = nn.ModuleDict({"head": head, "loss": loss})
        torch.manual_seed(0)
        nn.init.normal_(loss.linear.weight)
        alone = copy.deepcopy(model)
        parallelize_module(model, mesh, {"head" if tied else "loss.linear": ColwiseParallel()})
        assert loss.linear._forward_pre_hooks and isinstance(loss.linear.weight, DTensor)
        hidden, target = torch.randn(4, FEATURES), torch.arange(4)
        expected = alone["loss"](hidden, target)
        got = loss(distribute_tensor(hidden, mesh, [Replicate()]), target)
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
        torch.testing.assert_close(loss.linear.weight.grad.full_tensor(), alone["loss"].linear.weight.grad)


class _Adapted(nn.Module):
    """A layer, and an output layer with LoRA to which the loss was tied before or after."""

    def __init__(self, first: str, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, classes)
        loss = fl.nn.LinearFocalLoss.tied(self.head) if first == "tie" else None
        import peft  # which takes seconds

        config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
        peft.get_peft_model(self, config)
        self.loss = loss or fl.nn.LinearFocalLoss.tied(self.head)
        self.requires_grad_(True).double()

    def forward(self, hidden: Tensor, target: Tensor, **tensors: Any) -> Tensor:
        return self.loss(self.body(hidden).tanh(), target, **tensors)


def _adapted_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(sum(SIZES), FEATURES, generator=generator, dtype=torch.float64)
    return hidden, torch.arange(sum(SIZES)) % CLASSES


def _lora_of_a_sharded_layer(rank: int, world: int) -> None:
    hidden, target = _adapted_batch()
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    for first in ("tie", "peft"):
        alone = _Adapted(first)
        alone(hidden, target).backward()
        for parts in ((), ("head",), ("body", "head")):
            model = _Adapted(first)
            for part in parts:
                fully_shard(model.get_submodule(part))
            fully_shard(model)
            n = fl.normalizer(target[own], group=dist.group.WORLD, averaged=True)
            model(hidden[own], target[own], normalizer=n).backward()
            _equals(model, alone)


def _lora_of_a_layer_sharded_on_the_classes(rank: int, world: int) -> None:
    """By a group of plain tensors, whose lora_A every rank has, and by DTensors."""
    hidden, target = _adapted_batch()
    alone = _Adapted("peft")
    expected = alone(hidden, target)
    expected.backward()
    right = {name: p.grad for name, p in alone.named_parameters()}
    on_classes = ("head.base_layer.weight", "head.base_layer.bias", "head.lora_B.default.weight")
    mine = slice(0, 6) if rank == 0 else slice(6, CLASSES)
    for split in (False, True):
        model = _Adapted("peft", mine.stop - mine.start)
        state = {name: p[mine] if name in on_classes else p for name, p in alone.state_dict().items()}
        model.load_state_dict(state)
        rows = slice(rank * 7, rank * 7 + 7) if split else slice(None)
        model.loss.sequence_parallel, model.loss.budget = split, 4 * CLASSES * 8
        got = model(hidden[rows], target, group=dist.group.WORLD)
        torch.testing.assert_close(got, expected)
        got.backward()
        for name, p in model.named_parameters():
            if split and name not in on_classes:
                dist.all_reduce(p.grad)  # of the rows that this rank has
            torch.testing.assert_close(p.grad, right[name][mine] if name in on_classes else right[name], msg=name)

    mesh, model = init_device_mesh("cpu", (world,)), _Adapted("peft")
    for name, p in list(model.named_parameters()):
        owner, _, own = name.rpartition(".")
        placement = Shard(0) if name in on_classes else Replicate()
        setattr(model.get_submodule(owner), own, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
    got = model(distribute_tensor(hidden, mesh, [Replicate()]), target)
    torch.testing.assert_close(got, expected)
    got.backward()
    _equals(model, alone)
    up = model.head.lora_B["default"]
    up.weight = nn.Parameter(distribute_tensor(up.weight.detach().full_tensor(), mesh, [Replicate()]))
    with pytest.raises(ValueError, match="of an adapter, lora_B must be placed as linear_weight is"):
        model(distribute_tensor(hidden, mesh, [Replicate()]), target)


def _an_old_state_dict_of_a_tied_loss(rank: int, world: int) -> None:
    """It holds the sharded layer twice."""
    model, other = fully_shard(_Model("focal", True)), fully_shard(_Model("focal", True))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    state = model.state_dict()
    assert "criterion.linear.weight" not in state
    other.load_state_dict(state | {"criterion.linear.weight": state["embedding.weight"].clone()})
    assert torch.equal(other.criterion.linear.weight.full_tensor(), model.embedding.weight.full_tensor())
    with pytest.raises(RuntimeError, match=r"criterion\.linear\.weight is not what the layer holds"):
        other.load_state_dict(state | {"criterion.linear.weight": state["embedding.weight"] + 1})


LORA = [_lora_of_a_sharded_layer, _lora_of_a_layer_sharded_on_the_classes] if importlib.util.find_spec("peft") else []


test_scene = ranks.tests_of({
    _gradients_are_those_of_one_process: (2,),
    _training_goes_on_as_in_one_process: (2,),
    _in_mixed_precision: (2,),
    _logits_of_a_sharded_layer: (2,),
    _a_layer_sharded_on_the_classes: (2,),
    _an_old_state_dict_of_a_tied_loss: (2,),
    _a_layer_that_is_a_unit_of_fsdp1_raises: (2,),
    **dict.fromkeys(LORA, (2,)),
})  # fmt: skip
