"""Eole's trainer on the linear forms: statistics, losses and parameters of Eole's own loss."""

import copy
import importlib
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedloss as fl
from fusedloss.losses._registry import LOSSES as registered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of kernels for GPUs that are not there
    pytest.importorskip("eole.trainer", reason="the integration needs Eole, the extra [eole]", exc_type=ImportError)
    import pyonmttok
    from eole.config.run import TrainConfig
    from eole.models.model import get_model_class
    from eole.trainer import build_trainer
    from eole.utils import Statistics
    from eole.utils.loss import LossCompute
    from eole.utils.optimizers import Optimizer

    from fusedloss.integrations import eole as integration
    from fusedloss.integrations.eole import fuse, unfuse

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SPECIALS = {"unk_token": "<unk>", "pad_token": "<blank>", "bos_token": "<s>", "eos_token": "</s>"}
PAD, VOCABULARY, WIDTH, UPDATES = 1, 4 + 60, 16, 3
#: Model and training of Eole.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "translation": ({"architecture": "transformer"}, {}),
    "smoothed": ({"architecture": "transformer", "share_decoder_embeddings": True}, {"label_smoothing": 0.2}),
    "accumulated": ({"architecture": "transformer"}, {"accum_count": [2], "normalization": "tokens"}),
    "no bias": ({"architecture": "transformer", "generator_bias": False}, {}),
    "prompts": ({"architecture": "transformer_lm"}, {"zero_out_prompt_loss": True}),
    "coverage": ({"architecture": "rnn", "decoder": {"coverage_attn": True, "lambda_coverage": 0.5}}, {}),
    "further tokens": (
        {"architecture": "transformer_lm", "decoder": {"num_mtp_heads": 2, "mtp_lambda": 0.3}},
        {"label_smoothing": 0.1},
    ),
}


class _Report:
    """Keeps what a trainer reports."""

    start_time = 0.0

    def __init__(self) -> None:
        self.training: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []

    def report_training(self, step: int, steps: int, rate: float, patience: Any, stats: Any, multigpu: bool) -> Any:
        self.training.append(vars(stats))
        return Statistics()

    def report_step(self, rate: float, patience: Any, step: int, valid_stats: Any, train_stats: Any) -> None:
        self.validation.append(vars(valid_stats))


def _trainer(kind: str = "translation", **training: Any) -> Any:
    model, own = KINDS[kind]
    sizes = {"layers": 1, "hidden_size": WIDTH, "embeddings": {"word_vec_size": WIDTH}}
    if model["architecture"] != "rnn":
        sizes |= {"heads": 2, "transformer_ff": 24}
    if "decoder" in model:
        of_layers = {"decoder_type": "rnn" if model["architecture"] == "rnn" else "transformer", **sizes}
        of_layers.pop("embeddings")
        sizes["decoder"] = {**of_layers, **model["decoder"]}
    config = TrainConfig(
        data={}, src_vocab="none", tgt_vocab="none", model={**model, **sizes},
        training={
            "optim": "sgd", "learning_rate": 0.5, "dropout": [0.1], "attention_dropout": [0.0], "param_init": 0.3,
            "max_grad_norm": 0.0, "train_steps": UPDATES, **own, **training,
        },
    )  # fmt: skip
    words = pyonmttok.build_vocab_from_tokens([*SPECIALS.values(), *[f"w{i}" for i in range(VOCABULARY - 4)]])
    vocabs = {"src": words, "tgt": words, "specials": SPECIALS, "decoder_start_token": "<s>"}
    torch.manual_seed(0)
    model = get_model_class(config.model).for_training(config.model, vocabs, config.training, device_id=-1)
    trainer = build_trainer(config, -1, model, vocabs, Optimizer.from_config(model, config))
    trainer.report_manager = _Report()
    return trainer


def _batches(kind: str = "translation") -> list[tuple[dict[str, Any], int]]:
    generator = torch.Generator().manual_seed(1)
    batches: list[tuple[dict[str, Any], int]] = []
    for number in range(2 * UPDATES):
        src, tgt = (torch.randint(4, VOCABULARY, (3, n), generator=generator) for n in (6, 5 + number % 2))
        tgt[0, -2:] = PAD
        if KINDS[kind][0]["architecture"] == "transformer_lm":
            src, tgt = src[:, :-1].clone(), src[:, 1:].clone()
            if kind == "prompts":
                src[:, 2] = PAD  # where they end
            else:
                src[0, :2] = tgt[0, :1] = PAD  # on the left, as Eole does
        own = {"cid": ["a", "a", "b"], "cid_line_number": [1, 2, 3], "images": None, "prefix_len": None}
        batches.append(({"src": src, "srclen": torch.full((3,), src.shape[1]), "tgt": tgt, **own}, 0))
    return batches


def _trained(trainer: Any, kind: str = "translation") -> tuple[_Report, dict[str, Tensor]]:
    torch.manual_seed(0)  # of the dropout
    trainer.train(iter(_batches(kind)), UPDATES, 0, valid_iter=_batches(kind)[:1], valid_steps=UPDATES)
    return trainer.report_manager, dict(trainer.model.named_parameters())


def _refuse(*_: Any) -> None:
    raise AssertionError("Eole's own loss runs")


def _assert_same(ours: tuple[_Report, dict[str, Tensor]], own: tuple[_Report, dict[str, Tensor]]) -> None:
    assert len(own[0].training) == UPDATES and all(stats["n_tokens"] > 0 for stats in own[0].training)
    for name in ("training", "validation"):
        for stats, expected in zip(getattr(ours[0], name), getattr(own[0], name), strict=True):
            assert {*stats} == {*expected} and stats["data_stats"] == expected["data_stats"]
            numbers = {k: v for k, v in stats.items() if isinstance(v, int | float) and k != "start_time"}
            assert {"loss", "n_correct", "n_tokens", "n_sents", "mtp_loss", "mtp_ntokens"} <= {*numbers}
            assert numbers == pytest.approx({k: expected[k] for k in numbers}, rel=1e-5)
    torch.testing.assert_close(ours[1], own[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_logs_and_learns_what_it_does_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = _trained(_trainer(kind), kind)
    assert own[0].training[0]["mtp_loss"] > 0 or kind != "further tokens"
    trainer = _trainer(kind)
    start = trainer.model.generator.weight.clone()
    fuse(trainer.train_loss)
    fuse(trainer.valid_loss)
    monkeypatch.setattr(LossCompute, "_compute_ce_loss", _refuse)
    _assert_same(_trained(trainer, kind), own)
    assert not torch.equal(trainer.model.generator.weight, start)


def test_a_schedule_counts_updates() -> None:
    trainer, alpha, seen = _trainer("smoothed"), fl.nn.AlphaSchedule(UPDATES), []
    trainer.optim._optimizer.register_step_post_hook(lambda *_: alpha.step())

    def now() -> Tensor:
        seen.append(float(alpha()))
        return alpha()

    fuse(trainer.train_loss, "mixed_cross_entropy", alpha=now)
    seen.clear()
    _trained(trainer, "smoothed")
    assert seen == [fl.alpha_schedule(i, UPDATES) for i in range(UPDATES)]


#: One that is a sum over the classes, and has no label smoothing.
OVER_CLASSES = next(name for name, x in registered.items() if x.linear is not None and "label_smoothing" in x.without)
LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "focal": (fl.linear_focal_loss, {"gamma": 1.5}),
    "mixed": ("mixed_cross_entropy", {"alpha": 0.3}),
    "dsc": ("dsc_loss", {"alpha": 0.3}),
    "flex": (fl.flex_loss, {"loss_fn": lambda s: s.ce + 0.1 * s.entropy, "statistics": ("entropy",)}),
    "over the classes": (OVER_CLASSES, {}),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_any_loss_is_the_sum_of_its_row_form(loss: str) -> None:
    named, arguments = LOSSES[loss]
    compute = _trainer().train_loss
    fuse(compute, named, **arguments, budget=1024)
    row = getattr(fl, (named if isinstance(named, str) else named.__name__).removeprefix("linear_"))
    hidden, batch = torch.randn(3, 4, WIDTH, requires_grad=True), _batches()[0][0]
    value, stats, _ = compute(batch, hidden, {})
    logits = compute.generator(hidden.flatten(0, 1))
    target = batch["tgt"][:, 1:].flatten()
    expected = row(logits, target, **arguments, ignore_index=PAD, reduction="sum")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert stats.loss == value.item() and stats.n_correct == int((logits.argmax(-1) == target)[target != PAD].sum())
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (value, expected)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "autocast"])
def test_other_dtypes_are_eoles_up_to_their_digits(dtype: torch.dtype | str) -> None:
    compute, hidden = _trainer().train_loss, torch.randn(3, 4, WIDTH)
    if isinstance(dtype, torch.dtype):
        compute, hidden = compute.to(dtype), hidden.to(dtype)
    batch = _batches()[0][0]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        own = compute(batch, hidden, {})
        ours = fuse(compute)(batch, hidden, {})
    digits = 1e-6 if dtype == torch.float64 else 2e-2
    assert ours[1].loss == pytest.approx(own[1].loss, rel=digits) and ours[1].n_tokens == own[1].n_tokens


def test_lora_of_peft_on_the_generator() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs PEFT")
    compute = _trainer().train_loss
    wrapped = peft.get_peft_model(
        nn.ModuleDict({"generator": compute.generator}),
        peft.LoraConfig(target_modules=["generator"], r=2, init_lora_weights=False, lora_dropout=0.5),
    )
    compute.generator = wrapped.base_model.model["generator"]
    fuse(compute)
    compute.generator.eval()
    hidden, batch = torch.randn(3, 4, WIDTH), _batches()[0][0]
    ours = compute(batch, hidden, {})[0]
    torch.testing.assert_close(ours, unfuse(compute)(batch, hidden, {})[0])


# --- taking back, copies, and what is refused ---


def test_unfusing_gives_eoles_own_loss_back() -> None:
    compute = _trainer().train_loss
    names = {*compute.__dict__}
    assert unfuse(compute) is compute and fuse(compute) is compute
    assert fuse(compute, "focal_loss") is compute and {*compute.__dict__} == {*names, "_compute_ce_loss"}
    with pytest.raises(ValueError, match="gamma"):
        fuse(compute, "focal_loss", gamma=-1.0)
    assert compute._compute_ce_loss.args[1] is fl.linear_focal_loss  # still
    assert unfuse(compute) is compute and {*compute.__dict__} == names
    with pytest.raises(TypeError, match=r"train_loss and valid_loss of its Trainer, got Trainer"):
        fuse(_trainer())
    with pytest.raises(TypeError, match=r"must be a LossCompute of Eole, .*, got Linear"):
        unfuse(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_copy_computes_by_its_own_generator() -> None:
    compute = fuse(_trainer().train_loss)
    copied = copy.deepcopy(compute)
    with torch.no_grad():
        copied.generator.weight.zero_()
        copied.generator.bias.zero_()
    hidden, batch = torch.randn(3, 4, WIDTH), _batches()[0][0]
    tokens = int((batch["tgt"][:, 1:] != PAD).sum())
    assert copied(batch, hidden, {})[0].item() == pytest.approx(tokens * torch.tensor(VOCABULARY).log().item())
    assert compute(batch, hidden, {})[0].item() != copied(batch, hidden, {})[0].item()


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _lora_of_eole(compute: Any) -> None:
    from eole.modules.lora import QLoraLinear

    compute.generator = QLoraLinear(WIDTH, VOCABULARY, r=2, bias=True)


def _sparsemax(compute: Any) -> None:
    from eole.modules.sparse_losses import SparsemaxLoss

    compute.criterion = SparsemaxLoss(ignore_index=PAD, reduction="sum")


REFUSED: dict[str, tuple[Any, str]] = {
    "no generator": (lambda c: setattr(c, "generator", None), r"the builtins\.NoneType has no weight"),
    "a forward": (lambda c: setattr(c, "generator", _Scaled(WIDTH, 64)), r"eole\._Scaled has a forward of its own"),
    "a hook": (lambda c: c.generator.register_forward_hook(_refuse), r"Linear has the hook <function _refuse"),
    "Eole's LoRA": (_lora_of_eole, r"QLoraLinear_cls has a forward of its own"),
    "sparsemax": (_sparsemax, r"the criterion is SparsemaxLoss.*generator_function to softmax"),
    "a mean": (lambda c: setattr(c.criterion, "reduction", "mean"), r"reduction='sum' and no weight"),
    "weights": (lambda c: setattr(c.criterion, "weight", torch.ones(VOCABULARY)), r"reduction='sum' and no weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_linear_form_would_not_compute_is_refused_by_name(what: str) -> None:
    change, message = REFUSED[what]
    fused, compute = fuse(_trainer().train_loss), _trainer().train_loss
    for made in (compute, fused):
        change(made)
    with pytest.raises(ValueError, match=message):
        fuse(compute)
    assert "_compute_ce_loss" not in compute.__dict__
    with pytest.raises(ValueError, match=message):  # also where it changed after fusing
        fused(_batches()[0][0], torch.randn(3, 4, WIDTH), {})


def test_arguments_that_are_eoles_or_nobodys_are_refused() -> None:
    compute = _trainer("smoothed").train_loss
    for name in ("label_smoothing", "ignore_index", "reduction", "token_weight", "linear_bias", "softcap"):
        with pytest.raises(TypeError, match=rf"linear_cross_entropy\(\) gets '{name}' from the model"):
            fuse(compute, **{name: 0})
    with pytest.raises(TypeError, match="unexpected keyword argument 'gama'"):
        fuse(compute, "focal", gama=1)
    with pytest.raises(ValueError, match=rf"{OVER_CLASSES}\(\) has no label smoothing, but .* is 0\.2; set it to 0"):
        fuse(compute, OVER_CLASSES)


class _Capped(LossCompute):
    """Computes something else, as an Eole of another version may."""

    def _compute_ce_loss(self, output: Tensor, flat_tgt: Tensor) -> Any:
        scores = 3 * self.generator(self._bottle(output)).div(3).tanh()
        return self.criterion(scores, flat_tgt), scores


@pytest.mark.parametrize("other", [_Capped, "none"])
def test_another_eole_is_refused_with_its_version(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = _trainer().train_loss
    if other == "none":
        monkeypatch.delattr(LossCompute, "_compute_ce_loss")
    else:
        compute.__class__ = other
    with pytest.raises(RuntimeError, match=rf"of Eole {integration.eole.__version__} has .* tested with Eole 0\.6"):
        fuse(compute)
    assert "_compute_ce_loss" not in compute.__dict__


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eole", None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=r"^fusedloss\.integrations\.eole needs Eole: .*'fusedloss\[eole\]' \(.*eole"):
        importlib.import_module(integration.__name__)
