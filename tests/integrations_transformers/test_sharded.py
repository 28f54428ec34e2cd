"""Fused models and teachers that FSDP2 has sharded, on two ranks."""

import copy
import functools
from typing import Any

import pytest
import ranks
import torch
from fused_models import LENGTH, VOCABULARY, assert_close, bert, gradients_of, granite, llama, marian, wide
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from fusedloss.integrations.transformers import fuse

_tied = functools.partial(llama, tie_word_embeddings=True)


def _biased() -> Any:
    model = marian()
    bias = torch.randn_like(model.final_logits_bias)
    del model.final_logits_bias
    model.final_logits_bias = nn.Parameter(bias)
    return model


#: The model, the modules that are a unit below the model, and whether that is resharded after its forward.
UNITS = {
    "the head": (llama, ["lm_head"], True),
    "the head and what is before it": (llama, ["model.norm", "lm_head"], True),
    "kept until the backward": (llama, ["model.norm", "lm_head"], False),
    "the model alone": (llama, [], True),
    "tied, with the embedding": (_tied, ["model.embed_tokens", "model.norm", "lm_head"], True),
    "tied, in the model": (_tied, ["model.norm"], True),
    "a bias, within a larger unit": (functools.partial(bert, False), ["cls"], True),
    "scaled": (granite, ["lm_head"], True),
    "a bias beside the head": (_biased, [], True),
}


def _micro_batches(rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(2, VOCABULARY, (2, 1, LENGTH), generator=generator)
    return [{"input_ids": x, "labels": x.masked_fill(torch.arange(LENGTH) < 2 + rank, -100)} for x in tokens]


def _train_sharded(model: Any, world: int, rank: int | None) -> list[float]:
    """Two steps of SGD over the micro-batches of one rank, or in one process over those of all; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    values = []
    for _ in range(2):
        # Losses of which the weight is gathered anew for each backward, since there are two of them.
        for of in range(world) if rank is None else [rank]:
            losses = [model(**batch).loss for batch in _micro_batches(of)]
            for last, loss in enumerate(losses):
                if rank is not None:
                    model.set_requires_gradient_sync(bool(last))
                (loss / (world if rank is None else 1)).backward()
            values += [loss.item() for loss in losses]
        optimizer.step()
        optimizer.zero_grad()
    return values


def _trained_alone(model: Any, world: int, rank: int) -> list[float]:
    """The losses of this rank's part, of a model that one process trains."""
    values = torch.tensor(_train_sharded(model, world, None), dtype=torch.float64).view(2, world, 2)
    return values[:, rank].flatten().tolist()


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _assert_close(got: Any, expected: Any, *where: Any) -> None:
    """In float64, but for the logits that models cast to float32."""
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, msg=lambda m: f"{where}: {m}")


def _shard(model: Any, unit: list[str], reshard: bool, reshard_root: bool | None = None) -> None:
    if unit:
        fully_shard([model.get_submodule(part) for part in unit], reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard_root)


def _sharded_models_train_as_in_one_process(rank: int, world: int) -> None:
    # The second makes the logits once more in the backward, and reads the weight there.
    ways: list[tuple[str, dict[str, Any]]] = [("cross_entropy", {}), ("flex_loss", {"loss_fn": lambda s: s.ce})]
    for i, (name, (make, unit, reshard)) in enumerate(UNITS.items()):
        torch.manual_seed(0)
        untrained = make().double().train()
        alone = copy.deepcopy(untrained)
        expected = _trained_alone(alone, world, rank)
        for loss, arguments in ways if unit == ["lm_head"] else ways[i % 2 :][:1]:
            model = fuse(copy.deepcopy(untrained), loss, **arguments)
            _shard(model, unit, reshard)
            with pytest.raises(ValueError, match=r"is sharded by fully_shard, .*; fuse before fully_shard"):
                fuse(model, "focal_loss")
            _assert_close(_train_sharded(model, world, rank), expected, name, loss)
            _assert_close([*map(_whole, model.parameters())], [*alone.parameters()], name, loss)


def _in_mixed_precision(rank: int, world: int) -> None:
    """The loss stays in float32, whatever the dtype of the logits would be."""
    torch.manual_seed(0)
    alone = llama().train()
    model = fuse(copy.deepcopy(alone))
    fully_shard(model.lm_head, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16))
    fully_shard(model)
    loss = model(**_micro_batches(rank)[0]).loss
    loss.backward()
    expected = [alone(**_micro_batches(of)[0]).loss for of in range(world)]
    (sum(expected) / world).backward()
    assert loss.dtype == torch.float32 and loss != loss.bfloat16()
    torch.testing.assert_close(loss, expected[rank], rtol=1e-2, atol=0.0)
    for parameter, right in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        error = (_whole(parameter.grad) - right.grad).abs().max()
        assert error < 0.03 * right.grad.abs().max()


def _a_weight_that_others_have_freed_raises(rank: int, world: int) -> None:
    torch.manual_seed(0)
    batch = _micro_batches(rank)[0]
    for original in (True, False):
        wrap = functools.partial(FullyShardedDataParallel, use_orig_params=original, device_id=torch.device("cpu"))
        model = fuse(llama().train())
        expected = model(**batch).loss
        torch.testing.assert_close(wrap(copy.deepcopy(model))(**batch).loss, expected)
        model.lm_head = wrap(model.lm_head)
        with pytest.raises(ValueError, match=r"with shape \(1031, 16\) and no elements in memory: FSDP1"):
            wrap(model)(**batch)
        for part in ("lm_head", ""):
            teacher = llama()
            model = fuse(llama().double().train(), "distillation", teacher=teacher)
            if part:
                teacher.lm_head = wrap(teacher.lm_head)
            wrapped = wrap(teacher)
            with pytest.raises(ValueError, match=r"weight of the teacher, a Llama.*, is what is left .*Shard the"):
                model(**batch)
            del wrapped

    # As DeepSpeed ZeRO-3 does: the parameter has its elements within the forward alone.
    model = fuse(llama().train())
    whole, weight = model.lm_head.weight.detach().clone(), model.lm_head.weight
    weight.data = torch.empty(0)
    model.lm_head.register_forward_pre_hook(lambda *_: setattr(weight, "data", whole))
    model.lm_head.register_forward_hook(lambda *_: setattr(weight, "data", torch.empty(0)))
    with pytest.raises(ValueError, match=r"with shape \(0,\) and no rows: FSDP1 and DeepSpeed ZeRO-3"):
        model(**batch)


def _sharded_teachers_teach_as_whole_ones(rank: int, world: int) -> None:
    for i, (name, (make, unit, reshard)) in enumerate(UNITS.items()):
        # The teacher's weights stay whole after its forward, or not.
        for root in (None, True) if "model.norm" in unit else ((None, True)[i % 2],):
            torch.manual_seed(0)
            alone, whole = make().double().train(), make().double()
            for parameter in whole.parameters():
                parameter.data.mul_(5)
            model, teacher = copy.deepcopy(alone), copy.deepcopy(whole)
            for student, its_teacher in ((alone, whole), (model, teacher)):
                fuse(student, "distillation", teacher=its_teacher, temperature=2.0, eval_logits=root is None)
            for module, reshard_root in ((model, None), (teacher, root)):
                _shard(module, unit, reshard, reshard_root)
            expected = _trained_alone(alone, world, rank)
            _assert_close(_train_sharded(model, world, rank), expected, name, root)
            _assert_close([*map(_whole, model.parameters())], [*alone.parameters()], name, root)
            batch, head = _micro_batches(rank)[0], teacher.get_output_embeddings()
            [lesson] = model._fusedloss.loss.teacher.lessons(model.get_output_embeddings(), batch)
            in_root = unit in ([], ["model.norm"])  # and copied only where it is resharded
            assert (lesson.logits.weight[0] is head.weight) == ((in_root and root is None) or not reshard)
            with torch.no_grad():
                _assert_close(model.eval()(**batch).loss, alone.eval()(**batch).loss, name, root)
            teacher.reshard()
            for parameter, right in zip(teacher.parameters(), whole.parameters(), strict=True):
                assert parameter.grad is None and torch.equal(_whole(parameter), right)
            with pytest.raises(ValueError, match=r"the teacher, a FSDP.*, is sharded by .*; fuse before fully_shard"):
                fuse(make(), "distillation", teacher=teacher)


def _a_teacher_in_mixed_precision(rank: int, world: int) -> None:
    """Which makes it one of that dtype, whose products are the student's."""
    torch.manual_seed(0)
    model, teacher = llama().train(), wide()
    for parameter in teacher.parameters():
        parameter.data.mul_(5)
    half, batch = copy.deepcopy(teacher), _micro_batches(rank)[0]
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = fuse(model, "distillation", teacher=half)(**batch).loss
    gradients = gradients_of(expected, model)
    fuse(model, "distillation", teacher=teacher)
    for module in (teacher.lm_head, teacher):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    assert_close(gradients_of(loss, model), gradients, 1e-5)


test_scene = ranks.tests_of({
    _sharded_models_train_as_in_one_process: (2,),
    _sharded_teachers_teach_as_whole_ones: (2,),
    _in_mixed_precision: (2,),
    _a_teacher_in_mixed_precision: (2,),
    _a_weight_that_others_have_freed_raises: (2,),
})  # fmt: skip
