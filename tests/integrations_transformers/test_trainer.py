"""A Trainer with fused models, or with a row loss."""

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from fused_models import LENGTH, VOCABULARY, llama, marian, mixtral, t5, transformers
from torch import Tensor

import fusedloss as fl
from fusedloss.integrations.transformers import UnbuiltLogits, fuse, trainer_loss, unfuse


def _rows(count: int, decoder: bool) -> list[dict[str, Tensor]]:
    """Micro-batches with differing numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (count, LENGTH), generator=generator)
    labels = [row.masked_fill(torch.arange(LENGTH) < index % 7, -100) for index, row in enumerate(tokens)]
    rows = [{"input_ids": row, "labels": of_row} for row, of_row in zip(tokens, labels, strict=True)]
    return [{**row, "decoder_input_ids": tokens[-1 - i]} for i, row in enumerate(rows)] if decoder else rows


def _trainer(
    model: Any, folder: Path, loss: Any = None, metrics: Any = None, kind: Any = transformers.Trainer, **arguments: Any
) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.1,
        "optim": "sgd", "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "max_grad_norm": 0.0, **arguments,
    }  # fmt: skip
    of_both_kinds = transformers.Seq2SeqTrainingArguments(str(folder), **settings)
    train, evaluation = (_rows(count, model.config.is_encoder_decoder) for count in (12, 4))
    data = {"train_dataset": train, "eval_dataset": evaluation}
    return kind(model, of_both_kinds, compute_loss_func=loss, compute_metrics=metrics, **data)


def _train(*args: Any, **kwargs: Any) -> Any:
    trainer = _trainer(*args, **kwargs)
    trainer.train()
    return trainer


def _alike(model: Any) -> list[Any]:
    return [model, copy.deepcopy(model), copy.deepcopy(model)]


def _assert_trained_alike(models: list[Any], tolerance: float = 1e-5) -> None:
    """The first two, which have moved away from the third."""

    def difference(model: Any, other: Any) -> float:
        return max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters(), strict=True))

    moved = difference(models[0], models[2])
    assert moved > 1e-4 and difference(models[0], models[1]) <= tolerance * moved


def test_a_trainer_with_accumulation_goes_the_unfused_way(tmp_path: Path) -> None:
    models = _alike(llama())
    smoothed = fuse(models[1], label_smoothing=0.25)
    trainers = [_train(models[0], tmp_path, label_smoothing_factor=0.25), _train(smoothed, tmp_path)]
    _assert_trained_alike(models)
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", [llama, t5, marian])
@pytest.mark.parametrize("how", ["fuse", "trainer_loss"])
def test_accumulated_gradients_are_those_of_the_whole_batch(make: Any, how: str, tmp_path: Path) -> None:
    models = _alike(make().double())
    for model, parts in zip(models, (1, 4), strict=False):
        compute = trainer_loss(fl.focal_loss, shift=make is llama, gamma=1.5) if how == "trainer_loss" else None
        if how == "fuse":
            fuse(model, "focal_loss", gamma=1.5)
        sizes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 1}
        _train(model, tmp_path, compute, **sizes)
    _assert_trained_alike(models, 1e-6)


def test_a_trainer_in_bf16_and_back(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    """Its accelerator wraps the forward; what is fused within can still be unfused."""
    model = fuse(llama(), "focal_loss")
    trainer = _train(model, tmp_path, bf16=True)
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert trainer.evaluate()["eval_loss"] > 0
    model.train()
    assert isinstance(model(**batch).logits, UnbuiltLogits)
    whole = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert isinstance(whole(**batch).logits, UnbuiltLogits)
    unfuse(model)
    assert isinstance(model(**batch).logits, Tensor) and "forward" not in model.lm_head.__dict__


@pytest.mark.compile
@pytest.mark.parametrize("compiled", [False, True])
def test_a_trainer_that_smooths_by_itself_is_refused(compiled: bool, tmp_path: Path) -> None:
    """It takes the labels away, and computes a cross-entropy of the logits whatever the model is fused with."""
    torch._dynamo.reset()
    arguments = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    model = fuse(llama(), "focal_loss")
    message = r"label_smoothing_factor=0\.25 makes the Trainer .*pass label_smoothing=0\.25 to fuse"
    trainer = _trainer(model, tmp_path, label_smoothing_factor=0.25, **arguments)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=message):
            run()
    assert model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2).shape == (1, 4)
    unfuse(model)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_compute_loss_func_takes_the_logits_of_a_fused_model(tmp_path: Path) -> None:
    """The caller's loss is asked for by name, so that a warning does; label_smoothing_factor is not for it."""
    models = _alike(llama())
    compute = trainer_loss(fl.focal_loss, shift=True, label_smoothing=0.1)
    _train(models[0], tmp_path, compute)
    with pytest.warns(UserWarning, match="is fused, but in training without labels"):
        _train(fuse(models[1]), tmp_path, compute, label_smoothing_factor=0.1)
    _assert_trained_alike(models, 0.0)


def test_a_trainer_that_collects_logits_needs_them(tmp_path: Path) -> None:
    """And one that generates does not."""
    model, settings = fuse(llama(), eval_logits=False), {"metrics": lambda x: {"predictions": len(x.predictions)}}
    trainer = _trainer(model, tmp_path, **settings)
    for collect in (trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(ValueError, match=r"eval_logits=False, but the Trainer collects logits.*eval_logits=True"):
            collect()
    expected = _trainer(model, tmp_path).evaluate()["eval_loss"]
    fuse(model)
    metrics = trainer.evaluate()
    assert metrics["eval_predictions"] == 4 and metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)

    settings |= {"kind": transformers.Seq2SeqTrainer, "predict_with_generate": True, "generation_max_length": 6}
    metrics = _trainer(fuse(t5(), "focal_loss", eval_logits=False), tmp_path, **settings).evaluate()
    assert metrics["eval_predictions"] == 4 and metrics["eval_loss"] > 0


@pytest.mark.parametrize(("shift", "items"), [(True, None), (True, 31), (False, torch.tensor(31))])
def test_trainer_loss(shift: bool, items: Any) -> None:
    logits = torch.randn(2, 7, 50, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (2, 7))
    labels[0, 4:] = -100
    compute = trainer_loss(fl.focal_loss, shift=shift, gamma=1.5, label_smoothing=0.1)
    z, t = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    options = {} if items is None else {"normalizer": items}
    expected = oracle.loss(oracle.focal, z, t, gamma=1.5, label_smoothing=0.1, **options)
    for outputs in ({"logits": logits}, (logits, None)):
        loss = compute(outputs, labels, num_items_in_batch=items)
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)]
        torch.testing.assert_close(*gradients)


def test_trainer_loss_shifts_labels_of_any_dtype() -> None:
    logits, labels = torch.randn(2, 7, 50), torch.randint(1, 50, (2, 7))
    labels[0, 4:] = 0
    compute = trainer_loss(fl.focal_loss, shift=True, ignore_index=lambda: 0)
    expected = fl.focal_loss(logits[:, :-1], labels[:, 1:], ignore_index=0)
    for dtype in (torch.uint8, torch.int32):
        torch.testing.assert_close(compute({"logits": logits}, labels.to(dtype)), expected)
    compute = trainer_loss(fl.focal_loss, shift=True)  # where -100 is no number of the labels' dtype
    expected = fl.focal_loss(logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(compute({"logits": logits}, labels.to(torch.uint8)), expected)


def test_trainer_loss_warns_of_a_router() -> None:
    model = mixtral()
    compute = trainer_loss(fl.cross_entropy, shift=True)
    batch = {"input_ids": torch.randint(2, VOCABULARY, (2, LENGTH))}
    with pytest.warns(UserWarning, match="the loss of a router, which is left out here; fuse keeps it"):
        compute(model(**batch, output_router_logits=True), batch["input_ids"])
    compute(model(**batch, output_router_logits=False), batch["input_ids"])


def test_trainer_loss_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="shift must be a bool, got 'yes'"):
        trainer_loss(fl.focal_loss, shift="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gets 'normalizer' from the model and its labels"):
        trainer_loss(fl.focal_loss, shift=True, normalizer=3)
    with pytest.raises(TypeError, match="needs the argument 'alpha'"):
        trainer_loss(fl.mixed_cross_entropy, shift=True)
    with pytest.raises(TypeError, match="loss must be a function, got 'focal_loss'"):
        trainer_loss("focal_loss", shift=True)  # type: ignore[arg-type]
    for function in (fl.linear_focal_loss, fl.distillation_loss, fl.supcon_loss, fl.log_probs):
        with pytest.raises(
            TypeError, match=f"a loss of logits and targets, got {function.__name__}|needs the argument"
        ):
            trainer_loss(function, shift=True)
    for module in (fl.nn.FocalLoss, fl.nn.FocalLoss(), fl.nn.LinearFocalLoss(4, 9)):
        with pytest.raises(TypeError, match=r"a function, a loss of logits and targets, got .*FocalLoss"):
            trainer_loss(module, shift=True)
    logits = torch.zeros(1, 2, 3)
    with pytest.raises(TypeError, match=r"labels must hold indices of one of the dtypes .* got torch\.float32"):
        trainer_loss(fl.cross_entropy, shift=True)({"logits": logits}, logits)
    labels, of_two = torch.zeros(1, 2, dtype=torch.int64), torch.tensor(2).unsqueeze(0).expand(2, -1)  # as a Trainer
    with pytest.raises(ValueError, match=r"a number for each GPU, as under torch\.nn\.DataParallel.* torchrun"):
        trainer_loss(fl.cross_entropy, shift=True)({"logits": logits}, labels, of_two)
    with pytest.raises(TypeError, match="the loss needs labels, got None"):
        trainer_loss(fl.focal_loss, shift=True)({"logits": torch.zeros(1, 2, 3)}, None)
    with pytest.raises(ValueError, match=r"factor=0\.1 does not reach .*label_smoothing=0\.1 to trainer"):
        _train(llama(), tmp_path, trainer_loss(fl.focal_loss, shift=True), label_smoothing_factor=0.1)
