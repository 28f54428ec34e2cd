"""Trainers of TRL on the fused passes: losses, metrics and gradients of TRL's own."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from products import Products
from torch import Tensor, nn

import fusedloss as fl

transformers = pytest.importorskip("transformers", reason="the integration needs the extra [transformers]")
trl = pytest.importorskip("trl", reason="the integration needs TRL, the extra [trl]")
import datasets  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fusedloss.integrations.transformers import fuse  # noqa: E402
from fusedloss.integrations.trl import fuse_trainers, unfuse_trainers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

VOCABULARY = 97
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "scale": ("Granite", {"logits_scaling": 3.0}),
    "router": ("Mixtral", {"num_local_experts": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}),
}
TEXTS = [" ".join(f"w{(7 * i + j) % 60}" for j in range(5 + i)) for i in range(4)]
PROMPTS = ["w1 w2 ", "w3 ", "w4 w5 w6 ", "w7 "]
GOOD, BAD = ["w4 w5 w6", "w7 w8", "w9", "w10 w11"], ["w12", "w13 w14 w15", "w16 w17", "w18"]
ONLINE = {
    "num_generations": 2, "max_completion_length": 5, "beta": 0.1, "temperature": 0.7,
    "reward_funcs": lambda completions, **_: [float(len(c)) for c in completions],
}  # fmt: skip
#: A trainer, its data, and its options.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sft": ("SFT", {"text": TEXTS}, {}),
    "dft": ("SFT", {"prompt": PROMPTS, "completion": GOOD}, {"loss_type": "dft"}),
    "dpo": ("DPO", {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}, {}),
    "wpo": ("DPO", {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}, {"use_weighting": True}),
    "kto": ("KTO", {"prompt": PROMPTS, "completion": GOOD, "label": [True, True, False, False]}, {}),
    "grpo": ("GRPO", {"prompt": PROMPTS}, {**ONLINE, "entropy_coef": 0.1, "num_iterations": 2}),
    "rloo": ("RLOO", {"prompt": PROMPTS}, ONLINE),
}


@pytest.fixture(autouse=True)
def _unfused() -> Iterator[None]:
    yield
    unfuse_trainers()


@functools.cache
def _tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(60)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _model(family: str = "llama") -> Any:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **options))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01 * torch.randn(value.shape))  # no gradient is 0 for reasons of symmetry
    return model


def _trainer(kind: str, tmp_path: Path, model: Any = None, trainer: Any = None, **options: Any) -> Any:
    name, data, own = KINDS[kind]
    options = {**own, **options}
    for_trainer = {key: options.pop(key) for key in ("reward_funcs", "peft_config") if key in options}
    if model is None:  # a reference model is loaded from where the model is from
        _model().save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
        options["model_init_kwargs"] = {"dtype": "float32"}
    # One step of plain descent moves the parameters by their gradients.
    config = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    if kind in ("wpo", "dpo", "kto") and not isinstance(model, str):
        for_trainer["ref_model"] = _model()
    return (trainer or getattr(trl, f"{name}Trainer"))(
        model=model, args=config, train_dataset=datasets.Dataset.from_dict(data), processing_class=_tokenizer(),
        **for_trainer,
    )  # fmt: skip


def _trained(trainer: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What two steps log, and how far they move the parameters: the gradients."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    transformers.set_seed(0)
    trainer.train()
    times = ("_runtime", "_per_second", "step_time", "flos")
    logs = [{k: v for k, v in log.items() if not k.endswith(times)} for log in trainer.state.log_history]
    return logs, {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}


def _assert_same(ours: Any, own: Any, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    logs, moved = own
    assert len(logs) == len(ours[0]) >= 3
    for log, expected in zip(ours[0], logs, strict=True):
        assert log == pytest.approx(expected, rel=rtol, abs=atol, nan_ok=True)
    assert all(value.any() for value in moved.values())
    torch.testing.assert_close(ours[1], moved, rtol=rtol, atol=atol)


def _refuse(*_: Any) -> None:
    raise AssertionError("TRL's own function runs")


def _both(make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    own = _trained(make())
    trainer = make()
    fuse_trainers()
    monkeypatch.setattr(utils._ChunkedLogProbFunction.own, "apply", _refuse)
    return _trained(trainer), own


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_logs_and_learns_what_it_does_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, own = _both(lambda: _trainer(kind, tmp_path), monkeypatch)
    expected = {
        "SFT": ("entropy", "mean_token_accuracy"),
        "DPO": ("entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins"),
        "KTO": ("rewards/margins",),
        "GRPO": ("entropy", "kl", "entropy_coef"),
        "RLOO": ("entropy", "kl"),
    }[KINDS[kind][0]]
    assert {*expected} <= own[0][0].keys()
    _assert_same(ours, own)


# --- the forward that TRL gives a model ---


def _outputs(model: Any, temperature: float = 0.7, **inputs: Any) -> dict[str, Tensor]:
    """What TRL's forward gives of each token, and gradients of log-probabilities, entropy and loss."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    made = model(input_ids=ids, labels=labels, fused_lm_head=True, **inputs)
    shape = made.log_probs.shape
    upstream = [torch.rand(shape, generator=generator) for _ in range(2)]
    total = made.loss + (made.log_probs * upstream[0]).sum() + (made.entropy * upstream[1]).sum()
    sources = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(sources.values()))
    values = {name: value.detach() for name, value in made.items()}
    return values | {f"gradient of {k}": g for k, g in zip(sources, gradients, strict=True)}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in FAMILIES] + [("llama", torch.bfloat16), ("llama", "autocast")],
)
def test_outputs_and_gradients_are_those_of_trl(
    family: str, dtype: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(family)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    if dtype != torch.float32:
        tolerance = {"rtol": 0.05, "atol": 0.05}
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        own = _outputs(model)
        fuse_trainers()
        monkeypatch.setattr(utils._ChunkedLogProbFunction.own, "apply", _refuse)
        ours = _outputs(model)
    assert {*OUTPUTS, "loss"} <= own.keys() == ours.keys() and own["is_top1"].dtype == torch.bool
    assert ("aux_loss" in own) == (family == "router")
    if dtype != torch.float32:  # logits that are rounded have other maxima
        for made in (own, ours):
            made.pop("is_top1")
    torch.testing.assert_close(ours, own, **tolerance, check_dtype=True)


def _apply(rows: int = 4, classes: int = 11, weight: Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(classes, 8, requires_grad=True) if weight is None else weight
    keywords = {"bias": None, "targets": torch.arange(rows), "temperature": 1.0, "chunk_size": 4} | options
    return utils._ChunkedLogProbFunction.apply(hidden, weight, **keywords)


def test_outputs_that_are_not_asked_for_are_none_and_a_batch_without_a_target_stays_connected() -> None:
    fuse_trainers()
    for outputs in ((), ("entropy",), ("is_top1",), ("mean_logits", "log_sum_sq_probs")):
        given = [name for name, value in zip(OUTPUTS, _apply(outputs=outputs), strict=True) if value is not None]
        assert {*given} == {"log_probs", *outputs}
    weight = torch.randn(11, 8, requires_grad=True)
    log_probs, *_ = _apply(rows=0, weight=weight)
    assert log_probs.shape == (0,)
    log_probs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_float64_stays_float64() -> None:
    fuse_trainers()
    hidden, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    log_probs, entropy, *_ = utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(3), 0.5, 4)
    expected = (2 * hidden @ weight.t()).log_softmax(-1)
    torch.testing.assert_close(log_probs, expected[range(3), range(3)], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-12, atol=1e-12)


def test_the_budget_decides_how_many_rows_of_logits_are_made_at_a_time() -> None:
    model, made = _model(), []
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    for rows in (16, 4):  # of 16
        fuse_trainers(budget=rows * VOCABULARY * 4)
        with Products(VOCABULARY) as products:
            model(input_ids=torch.ones(1, 17).long(), labels=torch.ones(1, 17).long(), fused_lm_head=True)
        made.append(products)
    assert made[0].logit_rows == made[1].logit_rows and made[0].calls.total() == made[1].calls.total() - 3


@pytest.mark.compile
def test_the_forward_compiles() -> None:
    fuse_trainers()
    model = _model()
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    ids = torch.arange(3, 21).reshape(2, 9)
    expected = model(input_ids=ids, labels=ids, fused_lm_head=True)
    made = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(dict(made), dict(expected))


# --- what is refused ---


def test_fusing_and_unfusing_leaves_trl_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    own = utils._ChunkedLogProbFunction
    unfuse_trainers()
    assert utils._ChunkedLogProbFunction is own
    fuse_trainers(budget=1000)
    fuse_trainers(impl="reference")
    fused = utils._ChunkedLogProbFunction
    assert fused.own is own and (fused.budget, fused.impl) == (None, "reference")
    with pytest.raises(ValueError, match="budget"):
        fuse_trainers(budget=-1)
    with pytest.raises(ValueError, match=r"impl must be .*'tritn'"):
        fuse_trainers(impl="tritn")  # type: ignore[arg-type]
    assert utils._ChunkedLogProbFunction is fused
    unfuse_trainers()
    assert utils._ChunkedLogProbFunction is own


class _Longer(utils._ChunkedLogProbFunction):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z_loss: float) -> Any:
        raise NotImplementedError


class _Sharper:
    """Scales the entropy, as no check of a signature sees."""

    forward = utils._ChunkedLogProbFunction.forward

    @staticmethod
    def apply(*args: Any) -> Any:
        log_probs, entropy, *rest = _OWN.apply(*args)
        return log_probs, 1.01 * entropy, *rest


_OWN = utils._ChunkedLogProbFunction


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("_ChunkedLogProbFunction", None, "has no _ChunkedLogProbFunction in trl.trainer.utils"),
        ("_ChunkedLogProbFunction", _Longer, r"computes log-probabilities from \(hidden, .*, z_loss\)"),
        ("_ChunkedLogProbFunction", _Sharper, "computes other entropy"),
        ("add_fused_lm_head", lambda model: None, "has no add_fused_lm_head that calls _ChunkedLogProbFunction"),
        ("add_fused_lm_head", None, "has no add_fused_lm_head that calls _ChunkedLogProbFunction"),
    ],
)
def test_another_trl_is_refused_with_its_version(
    name: str, value: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, name, value)
    with pytest.raises(RuntimeError, match=rf"^TRL {trl.__version__} {what}.*tested with TRL 1\."):
        fuse_trainers()
    assert getattr(utils, name) is value


def test_what_the_passes_do_not_know_is_refused() -> None:
    fuse_trainers()
    with pytest.raises(RuntimeError, match="asks for 'variance' of each token"):
        _apply(outputs=("log_probs", "variance"))
    with pytest.raises(ValueError, match=r"scaled by a positive number, but the model's are by 0\.0"):
        _apply(logit_scale=0.0)
    partitioned = nn.Parameter(torch.randn(11, 8))
    partitioned.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"ZeRO-3.*call unfuse_trainers\(\)"):
        _apply(weight=partitioned)
    with torch.no_grad():  # a reference model
        assert _apply(weight=partitioned)[0].isfinite().all()


# --- another loss in SFTTrainer ---


class _OfModel(trl.SFTTrainer):
    compute_loss = transformers.Trainer.compute_loss


def test_sft_trains_on_the_loss_that_the_model_is_fused_with(tmp_path: Path) -> None:
    trainer = _trainer("dft", tmp_path, fuse(_model(), "focal_loss", gamma=2.0), _OfModel, loss_type="nll")
    batch, plain = next(iter(trainer.get_train_dataloader())), _model()
    logs, moved = _trained(trainer)
    logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = fl.focal_loss(logits[:, :-1], batch["labels"][:, 1:], gamma=2.0)
    assert logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert all(value.any() for value in moved.values())


@pytest.mark.parametrize("adapted", [False, True])
def test_sft_does_not_pass_over_the_loss_that_the_model_is_fused_with(adapted: bool, tmp_path: Path) -> None:
    options = {"peft_config": LoraConfig(target_modules=["q_proj"])} if adapted else {}
    trainer = _trainer("sft", tmp_path, fuse(_model(), "focal_loss", gamma=2.0), **options)
    with pytest.raises(ValueError, match="LlamaForCausalLM is fused with focal_loss, but this trainer of TRL computes"):
        trainer.train()


def test_sft_trains_a_model_that_is_fused_with_the_same_loss(tmp_path: Path) -> None:
    own = _trained(_trainer("sft", tmp_path, _model()))
    _assert_same(_trained(_trainer("sft", tmp_path, fuse(_model()))), own)


@pytest.mark.parametrize("saved", [None, "lm_head"])
def test_adapters(saved: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the model, and an output layer that PEFT has copied."""
    modules = {"target_modules": ["q_proj"], "modules_to_save": [saved] if saved else None}

    def make() -> Any:
        return _trainer("sft", tmp_path, _model(), peft_config=LoraConfig(**modules, init_lora_weights=False))

    (logs, moved), own = _both(make, monkeypatch)
    learnt = {name for name, value in moved.items() if value.any()}
    assert any("lora_A" in name for name in learnt) and any("lm_head" in name for name in learnt) == bool(saved)
    _assert_same((logs, {k: moved[k] for k in learnt}), (own[0], {k: own[1][k] for k in learnt}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0, 1, 0.3])
def test_losses_of_gkd(beta: float) -> None:
    """What docs/migration/language_models.md says of TRL's divergence: its beta, and what it divides by."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    torch.manual_seed(1)
    student, teacher = (torch.randn(3, 5, VOCABULARY, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(VOCABULARY, (3, 5))
    labels[0, :2] = -100
    own: dict[str, Any] = {0: {}, 1: {"divergence": "reverse_kl"}}.get(beta, {"divergence": "jsd", "beta": beta})
    ours = functools.partial(fl.distillation_loss, student, teacher, temperature=2.0, **own)
    theirs = functools.partial(gkd, student, teacher, beta=beta, temperature=2.0)
    torch.testing.assert_close(ours(target=labels), theirs(labels=labels))
    torch.testing.assert_close(ours(normalizer=3), theirs())
    torch.testing.assert_close(ours(target=labels) / VOCABULARY, theirs(labels=labels, reduction="mean"))
    torch.testing.assert_close(ours(target=labels, normalizer=40), theirs(labels=labels, num_items_in_batch=40))
