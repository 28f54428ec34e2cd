"""The modules: their functions with the options held, the layer owned or tied, the schedule counted."""

import copy
import doctest
import gc
import inspect
import io
import pickle
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune
from products import Products
from row_losses import shared_options
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close

import fusedloss as fl
from fusedloss.losses import _registry
from fusedloss.nn import AlphaSchedule

ROWS, FEATURES, CLASSES = 12, 5, 7
IGNORED = -1


def poly1(s: fl.Statistics) -> Tensor:
    return s.ce + s.q


def arguments(function: Callable[..., Any], *without: str) -> dict[str, Any]:
    """The arguments that the signature has, with their defaults, and those of the dictionary of its options."""
    parameters = inspect.signature(function).parameters
    named = {name: p.default for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in without}
    assert not named.keys() & shared_options(function)
    return named | dict.fromkeys(shared_options(function))


ALL = {name: cls for name, cls in vars(fl.nn).items() if inspect.isclass(cls) and hasattr(cls, "_function")}
#: Losses against a teacher, which take other tensors.
TEACHERS = {name: cls for name, cls in ALL.items() if cls._function in _registry.OF_TEACHERS}
MODULES = {name: cls for name, cls in ALL.items() if name not in TEACHERS}
each_module = pytest.mark.parametrize("name", MODULES)
each_teacher = pytest.mark.parametrize("name", TEACHERS)

#: Arguments that are not the defaults, by the row form's name; positional ones first.
OWN: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "cross_entropy": ((), {"label_smoothing": 0.1}),
    "focal_loss": ((), {"gamma": 1.5}),
    "mixed_cross_entropy": ((), {"alpha": 0.3, "top_k": 2}),
    "dsc_loss": ((), {"alpha": 0.5, "squared": False}),
    "dice_loss": ((), {"smooth": 0.5}),
    "flex_loss": ((poly1,), {}),
}


def is_linear(name: str) -> bool:
    return name.startswith("Linear")


def own(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return OWN.get(MODULES[name]._function.__name__.removeprefix("linear_"), ((), {}))


def make(name: str, kind: Any = None, *first: Any, **options: Any) -> Any:
    """The module of that name, or a kind of it, with arguments of its own; a linear one in float64."""
    positional, keywords = own(name)
    sizes = (FEATURES, CLASSES) if is_linear(name) else ()
    dtype = {"dtype": torch.float64} if sizes else {}
    return (kind or MODULES[name])(*first, *sizes, *positional, **{**dtype, **keywords, **options})


@pytest.fixture
def batch(generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, targets and token weights."""
    hidden = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[::4] = IGNORED
    return hidden, target, torch.rand(ROWS, generator=generator, dtype=torch.float64)


def input_for(name: str, hidden: Tensor) -> Tensor:
    return hidden if is_linear(name) else torch.cat([hidden, hidden[:, : CLASSES - FEATURES]], 1)


def same(got: Tensor, expected: Tensor, sources: list[Any], **tolerance: float) -> None:
    """Values and gradients."""
    assert_close(got, expected, **tolerance)
    upstream = torch.rand_like(expected)
    gradients = (torch.autograd.grad(x, sources, upstream) for x in (got, expected))
    for mine, right in zip(*gradients, strict=True):
        assert_close(mine, right, **tolerance)


def assert_compiles(function: Callable[..., Tensor], sources: list[Any], *arguments: Any, **options: Any) -> None:
    """Without a break in the graph, to the same values and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    same(compiled(*arguments, **options), function(*arguments, **options), sources)


# --- all of them ---


def test_every_loss_has_its_module():
    losses = {function for loss in _registry.LOSSES.values() for function in (loss.row, loss.linear) if function}
    assert {cls._function for cls in MODULES.values()} == losses
    assert {cls._function for cls in TEACHERS.values()} == _registry.OF_TEACHERS.keys()


@each_module
def test_equals_the_function(name, batch, generator):
    hidden, target, token_weight = batch
    class_weight = torch.rand(CLASSES, generator=generator, dtype=torch.float64) + 0.5
    options: dict[str, Any] = {"weight": class_weight, "ignore_index": IGNORED, "z_loss": 0.01}
    of_layer: dict[str, Any] = {"softcap": 2.0} if is_linear(name) else {}
    module = make(name, **options, **of_layer, **({"bias": True} if is_linear(name) else {}))
    call: dict[str, Any] = {"token_weight": token_weight, "normalizer": 7.0, "return_stats": True}
    got, stats = module(input_for(name, hidden), target, **call)
    if is_linear(name):
        of_layer |= {"linear_weight": module.linear.weight, "linear_bias": module.linear.bias}
    positional, keywords = own(name)
    if positional:
        of_layer["loss_fn"] = poly1
    given = {"target": target, **call, **keywords, **options, **of_layer}
    expected, expected_stats = module._function(input_for(name, hidden), **given)
    assert_close(stats, expected_stats, rtol=0, atol=0, equal_nan=True)
    same(got, expected, [hidden, *module.parameters()], rtol=0, atol=0)
    assert "weight" in module.state_dict()


@pytest.mark.parametrize("name", ALL)
def test_signatures_are_the_functions(name):
    """Each argument is in the constructor, in forward, or where a value may be in both."""
    cls = ALL[name]
    of_function = arguments(cls._function)
    constructor, forward = arguments(cls), arguments(cls.forward, "self")
    layer = {"in_features", "num_classes", "bias", "device", "dtype"} if is_linear(name) else set()
    assert {*constructor, *forward} == {*of_function} - {"linear_weight", "linear_bias"} | layer
    assert {"input", "target", "token_weight", "normalizer", "group", "return_stats"} <= {*forward}
    parameters = inspect.signature(cls._function).parameters.items()
    both = {name for name, parameter in parameters if str(parameter.annotation).startswith("float | Tensor")}
    both |= {"normalizer", "return_stats"} if name in MODULES else {"normalizer"}
    assert {*forward} & {*constructor} == both
    own = inspect.signature(cls).parameters.keys() & of_function.keys()
    assert {k: constructor[k] for k in own} == {k: of_function[k] for k in own}
    assert "weight" not in forward and ("weight" in constructor) == (name in MODULES)
    assert cls.__module__ == "fusedloss.nn" and cls.__qualname__ == name


def test_return_stats_of_the_constructor_goes(batch):
    hidden, target, _ = batch
    with pytest.warns(DeprecationWarning, match="return_stats is an argument of the call") as warned:
        module = make("FocalLoss", return_stats=True, ignore_index=IGNORED)
    assert warned[0].filename == __file__
    z = input_for("FocalLoss", hidden)
    assert torch.equal(module(z, target)[0], module(z, target, return_stats=False))


OTHERS = ["AlphaSchedule", "SupConLoss", "CrossEntropySupConLoss"]


@pytest.mark.parametrize("name", [*ALL, *OTHERS])
def test_docstring_and_its_examples(name):
    cls = getattr(fl.nn, name)
    test = doctest.DocTestParser().get_doctest(cls.__doc__, {}, name, None, None)
    assert any(f"fl.nn.{name}(" in example.source for example in test.examples) or name in OTHERS
    out: list[str] = []
    assert not doctest.DocTestRunner().run(test, out=out.append).failed, "".join(out)
    assert max(map(len, cls.__doc__.split("The function,")[0].splitlines())) <= 120
    for argument in arguments(cls) if name in MODULES else ():
        assert re.search(rf"^ *([a-z_, ]*, )?{argument}(, [a-z_, ]*)?: \S", cls.__doc__, re.M), argument


#: With a buffer, a child and a layer; of the row form and of the linear one.
each_of_few = pytest.mark.parametrize(
    "name", ["FocalLoss", "MixedCrossEntropyLoss", "LinearFlexLoss", "LinearMixedCrossEntropyLoss"]
)


def saved_and_loaded(module):
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@each_of_few
def test_copies_do_as_the_original(name, batch):
    hidden, target, _ = batch
    module = make(name, weight=torch.arange(1.0, CLASSES + 1), ignore_index=IGNORED)
    expected = module(input_for(name, hidden), target)
    again = make(name, weight=torch.ones(CLASSES), ignore_index=IGNORED)
    again.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved_and_loaded(module), again):
        assert type(other) is MODULES[name] and repr(other) == repr(module)
        assert torch.equal(other(input_for(name, hidden), target), expected)


@each_of_few
def test_devices_and_dtypes(name, batch):
    """On meta, too, the options are tried on a CPU."""
    hidden, target, _ = batch
    module = make(name, weight=torch.ones(CLASSES), ignore_index=IGNORED).to(torch.float32)
    assert {x.dtype for x in module.state_dict().values()} == {torch.float32}
    assert module(input_for(name, hidden.float()), target).isfinite()
    with torch.device("meta"):
        made = make(name, weight=torch.ones(CLASSES), normalizer=torch.tensor(3.0))
        with pytest.raises(ValueError, match="z_loss"):
            make(name, z_loss=-1)
    for x in (*module.to("meta").state_dict().values(), *made.state_dict().values()):
        assert x.device.type == "meta"


@each_of_few
def test_subclass(name, batch):
    hidden, target, _ = batch

    class Doubled(MODULES[name]):
        """Mine."""

        def __init__(self, factor, *arguments, **options):
            super().__init__(*arguments, **options)
            self.factor = factor

        def forward(self, *arguments, **options):
            return self.factor * super().forward(*arguments, **options)

    module, plain = make(name, Doubled, 2.0, ignore_index=IGNORED), make(name, ignore_index=IGNORED)
    plain.load_state_dict(module.state_dict())
    z = input_for(name, hidden)
    assert torch.equal(module(z, target), 2 * plain(z, target))
    assert next(iter(inspect.signature(Doubled).parameters)) == "factor" and Doubled.__doc__ == "Mine."


@pytest.mark.compile
@pytest.mark.parametrize("name", ["FocalLoss", "LinearMixedCrossEntropyLoss"])
def test_compiles(name, batch):
    hidden, target, token_weight = batch
    module = make(name, weight=torch.ones(CLASSES), ignore_index=IGNORED)
    z = input_for(name, hidden)
    assert_compiles(module, [hidden, *module.parameters()], z, target, token_weight=token_weight)


def test_cross_entropy_takes_soft_targets(batch, generator):
    """As torch does; where classes are indices alone, the error of the function comes through."""
    hidden, _, _ = batch
    weight = torch.rand(FEATURES, generator=generator, dtype=torch.float64)
    y = torch.rand(hidden.shape, generator=generator, dtype=torch.float64)
    module = fl.nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1, reduction="sum")
    expected = nn.functional.cross_entropy(hidden, y, weight=weight, label_smoothing=0.1, reduction="sum")
    assert_close(module(hidden, y), expected)
    with pytest.raises(ValueError, match="the linear form takes class indices"):
        fl.nn.LinearCrossEntropyLoss(FEATURES, FEATURES, dtype=torch.float64)(hidden, y)


# --- against a teacher ---


@pytest.fixture
def teacher(generator) -> dict[str, Tensor]:
    """Of three features."""
    sizes = {"teacher_input": (ROWS, 3), "teacher_weight": (CLASSES, 3), "teacher_bias": (CLASSES,)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def teachers_logits(teacher: dict[str, Tensor], softcap: float = 1.5) -> Tensor:
    z = teacher["teacher_input"] @ teacher["teacher_weight"].t() + teacher["teacher_bias"]
    return softcap * (z / softcap).tanh()


OF_TEACHER: dict[str, Any] = {
    "divergence": "skew_kl", "beta": 0.3, "temperature": 2.0, "scale_by_temperature_squared": True, "hard_weight": 0.5,
    "ignore_index": IGNORED,
}  # fmt: skip


@each_teacher
def test_distillation_equals_the_function(name, batch, teacher):
    """With a target and without, whose rows and whose weight of 0 are left out."""
    hidden, target, token_weight = batch
    call = {"token_weight": token_weight.clone(), "normalizer": 7.0, "return_stats": True}
    call["token_weight"][1] = 0
    own: dict[str, Any] = {"rest": "renormalize"} if "Topk" in name else {}
    tensors = teacher if is_linear(name) else {"teacher": teachers_logits(teacher)}
    if "Topk" in name:
        log_prob, index = teachers_logits(teacher).log_softmax(-1).topk(3)
        tensors = {"index": index, "log_prob": log_prob}
    if is_linear(name):
        own |= {"softcap": 2.0, "drop_ignored": False, "budget": 2**12}
        own |= {} if "Topk" in name else {"teacher_softcap": 1.5}
        module = TEACHERS[name](FEATURES, CLASSES, bias=True, dtype=torch.float64, **OF_TEACHER, **own)
        own |= {"linear_weight": module.linear.weight, "linear_bias": module.linear.bias}
    else:
        module = TEACHERS[name](**OF_TEACHER, **own)
    z = input_for(name, hidden)
    got, stats = module(z, **tensors, target=target, **call)
    expected, expected_stats = module._function(z, **tensors, target=target, **call, **own, **OF_TEACHER)
    assert_close(stats, expected_stats, rtol=0, atol=0, equal_nan=True)
    same(got, expected, [hidden, *module.parameters()], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"hard_weight .* target is None, got 0.5"):
        module(z, **tensors)
    module.hard_weight, others = 0.0, {k: v for k, v in OF_TEACHER.items() if k != "hard_weight"}
    assert torch.equal(module(z, **tensors), module._function(z, **tensors, **own, **others))


@pytest.mark.compile
def test_distillation_compiles(batch, teacher):
    hidden, target, token_weight = batch
    module = fl.nn.LinearDistillationLoss(FEATURES, CLASSES, dtype=torch.float64, **OF_TEACHER)
    call = {**teacher, "target": target, "token_weight": token_weight}
    assert_compiles(module, [hidden, *module.parameters()], hidden, **call)


# --- values ---


def test_values_in_the_call_stand_in(batch):
    hidden, target, token_weight = batch
    target, gamma = target.clamp(max=4), token_weight * 2
    module = fl.nn.FocalLoss(gamma=3.0, ignore_index=IGNORED)
    expected = fl.focal_loss(hidden, target, gamma=gamma, ignore_index=IGNORED)
    assert torch.equal(module(hidden, target, gamma=gamma), expected)
    plain = fl.cross_entropy(hidden, target, ignore_index=IGNORED)
    candidates = target[:, None].clamp(0).expand(ROWS, 3)
    mixed = fl.nn.MixedCrossEntropyLoss(alpha=0.3, ignore_index=IGNORED)
    assert torch.equal(mixed(hidden, target, candidates=candidates), plain)
    module.gamma = 0.0
    assert torch.equal(module(hidden, target), plain)


def test_values_that_are_tensors(batch):
    hidden, target, _ = batch
    z, target = hidden.detach(), target.clamp(0, 4)
    learnt, held = (fl.nn.FocalLoss(gamma=gamma(torch.tensor(1.5))) for gamma in (nn.Parameter, Tensor.clone))
    assert [name for name, _ in learnt.named_parameters()] == ["gamma"] and not list(held.parameters())
    learnt(z, target).backward()
    assert learnt.gamma.grad is not None and learnt.gamma.grad != 0
    assert list(held.state_dict()) == ["gamma"] and repr(held) == "FocalLoss(gamma=1.5)"
    assert_close(held(z, target), learnt(z, target))


def test_flex_module_of_a_module(batch):
    """A loss function with parameters of its own is a child, and is not called before there is a batch."""

    class Poly(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.epsilon = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, s):
            self.calls += 1
            return s.ce + self.epsilon * s.q

    hidden, target, _ = batch
    function = Poly()
    module = fl.nn.FlexLoss(function, ignore_index=IGNORED)
    assert function.calls == 0 and [name for name, _ in module.named_parameters()] == ["loss_fn.epsilon"]
    loss = module(hidden, target.clamp(max=4))
    assert_close(loss, fl.flex_loss(hidden, target.clamp(max=4), poly1, ignore_index=IGNORED))
    loss.backward()
    assert function.epsilon.grad is not None and function.epsilon.grad != 0


@pytest.mark.parametrize("name", ["FlexLoss", "LinearFlexLoss"])
def test_row_tensors_of_a_batch(name, batch):
    hidden, target, own = batch
    sizes = (FEATURES, CLASSES) if is_linear(name) else ()
    module = MODULES[name](*sizes, lambda s, own: own * s.ce, per_chunk=True, ignore_index=IGNORED).double()
    logits = module.linear(hidden) if sizes else input_for(name, hidden)
    right = fl.cross_entropy(logits, target, token_weight=own, ignore_index=IGNORED)
    assert_close(module(input_for(name, hidden), target, row_tensors=(own,)), right)


# --- the schedule ---


def test_schedule_counts_when_told(batch):
    """Modules share it, and copies of them one of their own."""
    hidden, target, _ = batch
    target, schedule = target.clamp(max=4), AlphaSchedule(4, maximum=0.6)
    modules = nn.ModuleList(fl.nn.MixedCrossEntropyLoss(alpha=schedule, top_k=k, ignore_index=IGNORED) for k in (1, 2))
    for step in range(6):
        alpha = schedule()
        assert alpha.dtype == torch.float64 and float(alpha) == fl.alpha_schedule(step, 4, 0.6)
        for _ in range(2):  # a forward is not an update
            got = modules[0](hidden, target)
            assert torch.equal(got, fl.mixed_cross_entropy(hidden, target, alpha=alpha, ignore_index=IGNORED))
        schedule.step()
    assert "AlphaSchedule(updates=6, total_steps=4, maximum=0.6)" in repr(modules[1])
    copies = copy.deepcopy(modules)
    assert copies[0].alpha is copies[1].alpha is not schedule


def test_schedule_goes_on_where_it_was():
    """Its warm-up, too."""
    first, second = (
        fl.nn.LinearMixedCrossEntropyLoss(FEATURES, CLASSES, alpha=AlphaSchedule(10, warmup=5)) for _ in range(2)
    )
    for _ in range(3):
        first.alpha.step()
    state = first.state_dict()
    assert state["alpha.updates"].dtype == torch.int64 and set(state) == {"linear.weight", "alpha.updates"}
    second.load_state_dict(state)
    second.alpha.step()
    assert float(second.alpha()) == fl.alpha_schedule(4, 10, warmup=5) == 0
    assert second.to(torch.bfloat16).alpha.updates.dtype == torch.int64
    assert repr(second.alpha) == "AlphaSchedule(updates=4, total_steps=10, maximum=0.5, warmup=5)"


@pytest.mark.compile
def test_schedule_does_not_compile_anew(batch):
    torch._dynamo.reset()
    hidden, target, _ = batch
    module = fl.nn.MixedCrossEntropyLoss(alpha=AlphaSchedule(4), ignore_index=IGNORED)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    target = target.clamp(max=4)
    for _ in range(5):
        assert_close(compiled(hidden, target), module(hidden, target))
        module.alpha.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["nobody steps", "gradients are accumulated", "eval", "over"])
def test_schedule_that_nobody_steps_warns_once(name, monkeypatch):
    monkeypatch.setattr(fl.nn, "_CALLS_WITHOUT_A_STEP", 8)
    schedule = AlphaSchedule(4)
    if name == "eval":
        schedule.eval()
    elif name == "over":
        schedule.load_state_dict({"updates": torch.tensor(4)})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for call in range(1, 30):
            schedule()
            assert len(found) == (name == "nobody steps" and call >= 8)
            if name == "gradients are accumulated" and call == 7:
                schedule.step()
    message = "alpha was asked for 8 times, but AlphaSchedule.step() was never called"
    assert all(x.category is UserWarning and message in str(x.message) for x in found)


@pytest.mark.parametrize("name", ["MixedCrossEntropyLoss", "LinearMixedCrossEntropyLoss"])
def test_no_mixture_in_eval(name, batch):
    hidden, target, _ = batch
    module = make(name, top_k=1, alpha=0.5, ignore_index=IGNORED)
    z = input_for(name, hidden)
    logits = module.linear(z) if is_linear(name) else z
    plain, mixed = (fl.mixed_cross_entropy(logits, target, alpha=a, ignore_index=IGNORED) for a in (0, 0.5))
    assert plain != mixed
    assert_close(module(z, target), mixed)
    assert_close(module.eval()(z, target), plain)
    assert_close(module(z, target, alpha=0.5), mixed)
    assert_close(module.train()(z, target), mixed)


# --- the output layer ---


def test_layer_is_that_of_nn_linear():
    torch.manual_seed(1)
    module = make("LinearFocalLoss", bias=True)
    torch.manual_seed(1)
    layer = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    assert list(module.state_dict()) == ["linear.weight", "linear.bias"]
    assert torch.equal(module.linear.weight, layer.weight) and torch.equal(module.linear.bias, layer.bias)
    module = make("LinearFocalLoss", softcap=1.5)
    assert list(module.state_dict()) == ["linear.weight"]
    hidden = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    assert_close(module.logits(hidden), (hidden @ module.linear.weight.t() / 1.5).tanh() * 1.5)


class Tagger(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self, name: str = "LinearFocalLoss"):
        super().__init__()
        positional, keywords = own(name)
        self.embedding = nn.Embedding(CLASSES, FEATURES, dtype=torch.float64)
        self.loss = MODULES[name].tied(self.embedding, *positional, **keywords, ignore_index=IGNORED)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.embedding(tokens), target)


class TiedFirst(Tagger):
    """The loss is copied, saved and loaded before its layer."""

    def __init__(self):
        super().__init__()
        self._modules["embedding"] = self._modules.pop("embedding")


@pytest.mark.parametrize("name", ["LinearFocalLoss", "LinearFlexLoss"])
def test_tied_gradient_is_the_sum_of_both_uses(name, generator):
    """And the loss holds nothing of its own."""
    model = Tagger(name)
    tokens, target = torch.randint(CLASSES, (2, ROWS), generator=generator)
    model(tokens, target).backward()
    weights = [model.embedding.weight.detach().clone().requires_grad_() for _ in range(2)]
    positional, keywords = own(name)
    hidden = nn.functional.embedding(tokens, weights[0])
    loss = model.loss._function(hidden, weights[1], target, *positional, **keywords, ignore_index=IGNORED)
    parts = torch.autograd.grad(loss, weights)
    assert all(part.any() for part in parts)
    assert_close(model.embedding.weight.grad, parts[0] + parts[1])
    assert [key for key, _ in model.named_parameters()] == list(model.state_dict()) == ["embedding.weight"]
    assert list(model.loss.parameters()) == [] and list(model.loss.children()) == []
    assert list(safetensors.torch.load(safetensors.torch.save(model.state_dict()))) == ["embedding.weight"]
    assert repr(model.loss).endswith(f"tied to Embedding({CLASSES}, {FEATURES}))")


@pytest.mark.parametrize("kind", [Tagger, TiedFirst])
def test_tie_stays(kind):
    model, empty = kind(), kind().to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    copied = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_and_loaded(model), empty)
    tokens, target = torch.arange(2 * CLASSES).reshape(2, CLASSES) % CLASSES
    for kept in (*copied, copy.deepcopy(copied[0])):
        assert kept.loss.linear is kept.embedding is not model.embedding
        assert torch.equal(kept(tokens, target), model(tokens, target))
        with torch.no_grad():
            kept.embedding.weight.mul_(2)  # its own, not the model's
        assert not torch.equal(kept(tokens, target), model(tokens, target))
        assert len(list(kept.parameters())) == 1
    shallow = copy.copy(model.loss)
    assert shallow.linear is model.embedding and model.to(torch.float32).loss.linear.weight.dtype == torch.float32


def test_tied_follows_a_new_weight(batch):
    """One that was set, resized or parametrized, or stands in for a functional call."""
    hidden, target, _ = batch
    model, target = Tagger(), target.clamp(0)
    embedding = model.embedding

    def check(weight, got=None):
        expected = fl.linear_focal_loss(hidden, weight, target, gamma=1.5)
        assert_close(model.loss(hidden, target) if got is None else got, expected)

    other = torch.randn(CLASSES + 2, FEATURES, dtype=torch.float64)
    embedding.weight = nn.Parameter(other)
    check(other)
    embedding.weight.data = other[:CLASSES] + 1
    check(other[:CLASSES] + 1)
    model.forward = lambda: model.loss(hidden, target)
    check(other, torch.func.functional_call(model, {"embedding.weight": other}))
    nn.utils.parametrizations.weight_norm(embedding)
    with torch.no_grad():
        embedding.parametrizations.weight.original0.mul_(3)
    check((other[:CLASSES] + 1) * 3)
    model.loss(hidden, target).backward()
    assert all(p.grad is not None and p.grad.any() for p in embedding.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tied_loads_an_old_state_dict(dtype):
    """It has the layer twice, and both must be the same."""
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64)
    old = {"embedding.weight": weight, "loss.linear.weight": weight.clone()}
    for assign in (False, True):
        model = Tagger().to(dtype)
        model.load_state_dict(old, assign=assign)
        assert torch.equal(model.embedding.weight, weight if assign else weight.to(dtype))
    assert len(old) == 2
    old["loss.linear.weight"][0, 0] += 1
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for Tagger:\s+loss\.linear\.weight is"):
        model.load_state_dict(old)
    old["loss.linear.weight"] = torch.ones(CLASSES, FEATURES + 1)
    old["loss.linear.bias"] = torch.ones(CLASSES)
    with pytest.raises(RuntimeError, match=r'(?s)Unexpected key.*"loss\.linear\.bias".*loss\.linear\.weight is not'):
        model.load_state_dict(old)
    with torch.device("meta"), pytest.warns(UserWarning, match="meta parameter"):
        Tagger().load_state_dict(dict.fromkeys(("embedding.weight", "loss.linear.weight"), weight))


def test_tied_to_a_layer_that_is_gone(batch):
    """A copy of the loss alone has lost its layer too: nobody would train it."""
    hidden, target, _ = batch
    model = Tagger()
    for lost in (
        fl.nn.LinearFocalLoss.tied(nn.Linear(FEATURES, CLASSES)),
        copy.deepcopy(model.loss),
        pickle.loads(pickle.dumps(model.loss)),
        copy.deepcopy(copy.deepcopy(model.loss)),
    ):
        for use in (lambda x=lost: x(hidden, target), lambda x=lost: x.logits(hidden), lambda x=lost: x.linear):
            with pytest.raises(RuntimeError, match="the layer that this LinearFocalLoss was tied to is gone"):
                use()
        assert "tied to None" in repr(lost)
        lost.linear = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        assert list(lost.state_dict()) == ["linear.weight", "linear.bias"] and "tied" not in repr(lost)
        assert lost(hidden, target.clamp(0)).isfinite()


@pytest.mark.compile
def test_tied_compiles():
    tokens, target = torch.arange(2 * CLASSES).reshape(2, CLASSES) % CLASSES
    torch._dynamo.reset()
    model = Tagger()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        same(compiled(tokens, target), model(tokens, target), [model.embedding.weight])
        model.embedding.weight = nn.Parameter(model.embedding.weight.detach() * 2)
    exported = torch.export.export(model, (tokens, target))
    assert list(exported.state_dict) == ["embedding.weight"]


# --- a layer that is more than its weight and bias ---


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class Adapter(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer, self.weight = layer, layer.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.base_layer(input) + 1


class Holder(nn.Module):
    """A weight without a forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, FEATURES, dtype=torch.float64))


def linear(kind: type[nn.Linear] = nn.Linear, bias: bool = True) -> Any:
    return kind(FEATURES, CLASSES, bias=bias, dtype=torch.float64)


def embedding() -> Any:
    return nn.Embedding(CLASSES, FEATURES, dtype=torch.float64)


def changed(layer: Any, change: Callable[[Any], Any]) -> Any:
    change(layer)
    return layer


def look(*_: Any):
    """A hook."""


def prune(layer: nn.Module):
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


MORE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: linear(Doubling), "Doubling has a forward of its own"),
    "adapter": (lambda: Adapter(linear()), "Adapter has a forward of its own"),
    "replaced": (
        lambda: changed(linear(), lambda x: setattr(x, "forward", partial(Doubling.forward, x))),
        "linear.Linear has a forward that was put on",
    ),
    "post": (lambda: changed(linear(), lambda x: x.register_forward_hook(look)), "has the hook <function look"),
    "pruned": (lambda: changed(linear(), prune), "has the hook <torch.nn.utils.prune"),
    "pruned embedding": (lambda: changed(embedding(), prune), "Embedding has the hook <torch.nn"),
}


@pytest.mark.parametrize("what", MORE)
def test_a_layer_that_is_more_than_its_weight_raises(what, batch):
    hidden, target, _ = batch
    make_layer, message = MORE[what]
    owner, later = make("LinearFocalLoss"), linear()
    owner.linear = layer = make_layer()
    wrapped = fl.nn.LinearFocalLoss.tied(later)
    later.register_forward_hook(look)
    for expected, use in (
        (message, lambda: owner(hidden, target)),
        (message, lambda: owner.logits(hidden)),
        (message, lambda: fl.nn.LinearFocalLoss.tied(layer)),
        ("has the hook", lambda: wrapped(hidden, target)),
    ):
        with pytest.raises(ValueError, match=f"LinearFocalLoss reads .*{expected}.* focal_loss.layer.hidden., target"):
            use()


class Model(nn.Module):
    """An output layer, and a loss that is tied to it."""

    def __init__(self):
        super().__init__()
        self.head = linear()
        self.loss = fl.nn.LinearFocalLoss.tied(self.head, ignore_index=IGNORED)

    def forward(self, hidden, target):
        return self.loss(hidden, target)


@pytest.mark.parametrize("copied", [False, True])
def test_an_adapter_that_takes_a_tied_layer_raises(copied, batch):
    hidden, target, _ = batch
    model, other = Model(), Model()
    expected = model(hidden, target)
    model.head = Adapter(model.head)
    used = copy.deepcopy(model) if copied else model
    for use in (lambda: used(hidden, target), lambda: used.loss.logits(hidden)):
        with pytest.raises(ValueError, match=r"is now inside a .*Adapter, .* focal_loss.layer.hidden., target"):
            use()
    assert other(hidden, target) > 0  # which is tied to another layer
    used.head = used.head.base_layer  # the adapter is taken off again
    assert used(hidden, target) == expected


def test_a_copy_of_a_tied_layer_that_peft_trains_raises(batch):
    peft = pytest.importorskip("peft")
    hidden, target, _ = batch
    model = nn.ModuleDict({"body": nn.Linear(FEATURES, FEATURES, dtype=torch.float64), "model": Model()})
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"is now inside a peft\."):
        model["model"](hidden, target)


def test_what_may_hold_a_tied_layer(batch):
    """A container, a module that computes the same, and a layer that is registered late."""
    hidden, target, _ = batch
    layer = linear()
    loss = fl.nn.LinearFocalLoss.tied(layer, ignore_index=IGNORED)
    expected = loss(hidden, target)
    for hold in (nn.Sequential, lambda x: nn.ModuleDict({"head": x}), torch.compile, checkpoint_wrapper):
        holder = hold(layer)
        assert loss._holder is not None and loss._holder() is holder
        assert loss(hidden, target) == expected


@pytest.mark.compile
def test_a_compiled_model_does_not_depend_on_the_tied_losses_of_others():
    """One that registers a child in its forward, as fused models do: who is tied to what is not for it to know."""

    class Model(nn.Module):
        def forward(self, x):
            self.child = layer
            return self.child(x)

    torch._dynamo.reset()
    counter, layer, x = CompileCounter(), nn.Linear(2, 2), torch.ones(1, 2)
    other = linear()
    loss = fl.nn.LinearFocalLoss.tied(other)
    compiled = torch.compile(Model(), backend=counter, fullgraph=True)
    compiled(x), compiled(x)
    before = counter.frame_count
    del loss, other
    gc.collect()
    compiled(x)
    assert counter.frame_count == before


@pytest.mark.compile
def test_a_layer_that_is_more_raises_while_compiling(batch):
    torch._dynamo.reset()
    hidden, target, _ = batch
    owner = make("LinearFocalLoss")
    owner.linear.register_forward_hook(look)
    for fullgraph, error in ((True, torch._dynamo.exc.Unsupported), (False, ValueError)):
        with pytest.raises(error, match="LinearFocalLoss reads the weight and bias"):
            torch.compile(owner, backend="eager", fullgraph=fullgraph)(hidden, target)


#: Layers whose weight is all there is to them.
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: linear(type("Named", (nn.Linear,), {})),
    "weight_norm": lambda: changed(linear(), nn.utils.parametrizations.weight_norm),
    "pruned": lambda: changed(linear(), lambda x: (prune(x), nn.utils.prune.remove(x, "weight"))),
    "holder": Holder,
    # as accelerate leaves a layer from which it has removed its hook
    "own forward put back": lambda: changed(linear(), lambda x: setattr(x, "forward", x.forward)),
    "normed": lambda: changed(embedding(), nn.utils.parametrizations.weight_norm),
    # as transformers does for checkpointing: what it does to the inputs is none of the output layer's business
    "post": lambda: changed(embedding(), lambda x: x.register_forward_hook(lambda _, __, y: y.requires_grad_())),
    "pre": lambda: changed(embedding(), lambda x: x.register_forward_pre_hook(look)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_layer_whose_weight_is_all(kind, batch):
    hidden, target, _ = batch
    layer = PLAIN[kind]()
    tied = fl.nn.LinearCrossEntropyLoss.tied(layer, ignore_index=IGNORED)
    owner = fl.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, ignore_index=IGNORED)
    owner.linear = layer
    for loss in (tied, owner):
        logits = nn.functional.linear(hidden, layer.weight, getattr(layer, "bias", None))
        expected = nn.functional.cross_entropy(logits, target, ignore_index=IGNORED)
        same(loss(hidden, target), expected, [p for p in layer.parameters() if p.requires_grad])
        assert_close(loss.logits(hidden), logits)


# --- refused ---


def tied(*arguments: Any, **options: Any) -> Any:
    return fl.nn.LinearCrossEntropyLoss.tied(*arguments, **options)


def of_layer(**options: Any) -> Any:
    return fl.nn.LinearCrossEntropyLoss(**({"in_features": FEATURES, "num_classes": CLASSES} | options))


def called(**options: Any) -> Any:
    return fl.nn.FocalLoss()(torch.zeros(2, 3), **({"target": torch.tensor([0, 2])} | options))


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (fl.nn.FocalLoss, {"gamma": -1.0}, ValueError, "gamma must be at least 0, got -1.0"),
        (fl.nn.FocalLoss, {"gama": 1}, TypeError, r"^FocalLoss.__init__\(\) got an unexpected .* 'gama'$"),
        (fl.nn.FocalLoss, {"token_weight": torch.ones(3)}, TypeError, "'token_weight'"),
        (fl.nn.FocalLoss, {"normalizer": 2.0, "reduction": "sum"}, ValueError, "reduction='sum'"),
        (fl.nn.CrossEntropyLoss, {"weight": [1.0]}, TypeError, "weight must be a floating point tensor, got list"),
        (fl.nn.CrossEntropyLoss, {"impl": "fast"}, ValueError, "'fast'"),
        (fl.nn.MixedCrossEntropyLoss, {}, TypeError, r"MixedCrossEntropyLoss.__init__\(\) missing .*'alpha'"),
        (fl.nn.MixedCrossEntropyLoss, {"alpha": AlphaSchedule(9), "top_k": 3}, ValueError, "top_k must be .* got 3"),
        (fl.nn.MixedCrossEntropyLoss, {"alpha": nn.Linear(1, 1)}, TypeError, "argument"),
        (fl.nn.FlexLoss, {"loss_fn": "ce"}, TypeError, "loss_fn must be callable, got 'ce'"),
        (AlphaSchedule, {"total_steps": 0}, ValueError, "total_steps must be greater than 0, got 0"),
        (of_layer, {"in_features": 2.5}, TypeError, "in_features must be an int, got 2.5"),
        (of_layer, {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        (of_layer, {"budget": 10}, ValueError, "budget of 10 bytes is too small"),
        (of_layer, {"weight": torch.ones(CLASSES - 1)}, ValueError, rf"weight must be \({CLASSES},\)"),
        (of_layer, {"inplace_backward": True}, TypeError, "'inplace_backward'"),
        (tied, {"layer": torch.ones(CLASSES, FEATURES)}, TypeError, "layer must be a module"),
        (tied, {"layer": nn.ReLU()}, ValueError, r"that of ReLU\(\) is None"),
        (tied, {"layer": nn.Conv1d(2, 3, 1)}, ValueError, r"is \(3, 2, 1\)"),
        (tied, {"layer": nn.Linear(2, 3), "bias": True}, TypeError, "bias=True, which the layer has"),
        (tied, {"layer": nn.Linear(2, 3), "weight": torch.ones(2)}, ValueError, r"weight must be \(3,\)"),
        (called, {"reduction": "sum"}, TypeError, r"FocalLoss\.forward\(\) got an unexpected .* 'reduction'"),
        (called, {"gamma": -1.0}, ValueError, "gamma must be at least 0"),
        (called, {"target": torch.tensor([1, 3])}, IndexError, "target 3 is out of range"),
    ],
)  # fmt: skip
def test_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.compile
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int32, Fraction])
def test_numbers_that_are_not_pythons_compile(kind):
    z, target = torch.randn(3, 5), torch.tensor([0, 0, 1])
    for loss in (
        fl.nn.FocalLoss(gamma=kind(2)),
        fl.nn.CrossEntropyLoss(temperature=kind(2)),
        fl.nn.SupConLoss(kind(2)),
    ):
        compiled = torch.compile(loss, backend="eager", fullgraph=True)(z, target)
        torch.testing.assert_close(compiled, loss(z, target))


@each_teacher
def test_distillation_refuses_at_construction(name):
    sizes = (FEATURES, CLASSES) if is_linear(name) else ()
    with pytest.raises(ValueError, match="hard_weight must be at least 0, got -1"):
        TEACHERS[name](*sizes, hard_weight=-1.0)
    for argument in ("return_stats", "weight", "target"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
            TEACHERS[name](*sizes, **{argument: None})


# --- LoRA on the output layer ---


def with_lora(layer: nn.Linear, *, more: bool = False, **options: Any) -> tuple[Any, Any]:
    """PEFT's layer, with an adapter or two, and its model around it."""
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"head": layer})
    config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False, **options)
    torch.manual_seed(2)
    adapted = peft.get_peft_model(model, config)
    if more:
        adapted.add_adapter("more", peft.LoraConfig(r=3, target_modules=["head"], init_lora_weights=False))
        adapted.base_model.set_adapter(["default", "more"])
    return model["head"], adapted


def trained(hidden: Tensor, head: nn.Module) -> list[Tensor]:
    return [hidden, *(x for x in head.parameters() if x.requires_grad)]


#: Options of the adapter; whether the layer has a bias, and whether it is trained as well.
LORA: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "frozen": ({}, False, False),
    "trained, with bias": ({"lora_bias": True, "lora_alpha": 3}, True, True),
    "bias of the adapter alone": ({"lora_bias": True}, False, False),
    "dropout": ({"lora_dropout": 0.5}, True, False),
    "two": ({"more": True, "lora_dropout": 0.3}, True, False),
}
LORA_LOSSES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("LinearFocalLoss", (), {"gamma": 1.5, "label_smoothing": 0.1}),
    ("LinearFocalLoss", (), {"softcap": 2.0, "reduction": "sum"}),
    ("LinearDSCLoss", (), {"alpha": 0.5, "reduction": "sum"}),
    ("LinearMixedCrossEntropyLoss", (), {"alpha": 0.3, "reduction": "none"}),
    ("LinearFlexLoss", (poly1,), {}),
]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("first", ["tie", "peft"])
@pytest.mark.parametrize("kind", LORA)
def test_lora_is_what_pefts_layer_computes(kind: str, first: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, target, token_weight = batch
    options, bias, is_trained = LORA[kind]
    layer = linear(bias=bias)

    def tie(layer: nn.Module) -> list[Any]:
        budget = 6 * CLASSES * 8  # a few rows at a time
        common = {"ignore_index": IGNORED, "budget": budget}
        return [MODULES[name].tied(layer, *values, **common, **own) for name, values, own in LORA_LOSSES]

    losses = tie(layer) if first == "tie" else []
    head, _ = with_lora(layer, **options)
    losses = losses or tie(head)
    layer.requires_grad_(is_trained)
    for loss, (_, values, own) in zip(losses, LORA_LOSSES, strict=True):
        torch.manual_seed(4)  # of the dropout
        z, form = head(hidden), dict(own)
        softcap = form.pop("softcap", None)
        z = z if softcap is None else softcap * (z / softcap).tanh()
        row = getattr(fl, loss._function.__name__.removeprefix("linear_"))
        expected = row(z, target, *values, ignore_index=IGNORED, token_weight=token_weight, impl="reference", **form)
        torch.manual_seed(4)
        same(loss(hidden, target, token_weight=token_weight), expected, trained(hidden, head))
        torch.manual_seed(4)
        assert_close(loss.logits(hidden), z)


def test_distillation_with_lora_on_a_tied_layer(batch, teacher):
    """The student's output layer is that of the other modules, and its temperature a buffer."""
    hidden, target, _ = batch
    head, _ = with_lora(linear())
    options = OF_TEACHER | {"temperature": torch.tensor(2.0)}
    loss = fl.nn.LinearDistillationLoss.tied(head, **options)
    assert list(loss.state_dict()) == ["temperature"]
    teachers = teachers_logits(teacher, 1e9)
    right = fl.distillation_loss(head(hidden), teachers, target=target, impl="reference", **OF_TEACHER)
    same(loss(hidden, **teacher, target=target), right, trained(hidden, head))


@pytest.mark.parametrize("wider", [False, True], ids=["", "float32 adapters"])
def test_lora_in_half_precision(wider: bool, generator: torch.Generator) -> None:
    """PEFT keeps adapters of bfloat16 models in float32; their products are in the layer's dtype, as in autocast."""
    rows, features, classes = 64, 16, 50
    head, _ = with_lora(nn.Linear(features, classes, bias=False, dtype=torch.bfloat16))
    if not wider:
        head.to(torch.bfloat16)
    assert head.lora_A["default"].weight.dtype == (torch.float32 if wider else torch.bfloat16)
    loss = fl.nn.LinearCrossEntropyLoss.tied(head, budget=9 * classes * 2)
    hidden = torch.randn(rows, features, generator=generator).bfloat16()
    target, exact = torch.randint(classes, (rows,), generator=generator), copy.deepcopy(head).double()
    results = []
    for layer, function in ((head, loss), (head, None), (exact, None)):
        own = hidden.to(torch.float64 if layer is exact else hidden.dtype).requires_grad_()
        value = fl.cross_entropy(layer(own), target, impl="reference") if function is None else function(own, target)
        results.append([value, *torch.autograd.grad(value, trained(own, layer))])
    assert [x.dtype for x in results[0]] == [x.dtype for x in results[1]]
    for mine, theirs, truth in zip(*results, strict=True):
        errors = [(x.double() - truth).abs().max().item() for x in (mine, theirs)]
        assert errors[0] <= 2 * errors[1] + 2**-8 * truth.abs().max().item()


def test_lora_that_adds_nothing_and_that_comes_and_goes(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, target, _ = batch
    model = Model()
    plain, layer = model(hidden, target), model.head
    model.head, adapted = with_lora(layer)
    loss, copied = model(hidden, target), copy.deepcopy(model)
    assert abs(loss - plain) > 1e-3 and copied(hidden, target) == loss
    with torch.no_grad():
        copied.head.lora_B["default"].weight.zero_()
    assert copied(hidden, target) == plain and model(hidden, target) == loss
    with adapted.disable_adapter():
        assert model(hidden, target) == plain
    adapted.merge_adapter()
    assert_close(model(hidden, target), loss)
    with adapted.disable_adapter():  # for which PEFT unmerges them
        assert_close(model(hidden, target), plain)
    assert not model.head.merged
    model.head.set_adapter([])
    assert_close(model(hidden, target), plain)
    model.head = layer
    assert_close(model(hidden, target), plain)


def test_a_frozen_layer_under_lora_costs_no_product(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, target, _ = batch
    head, _ = with_lora(linear(bias=False))
    loss = fl.nn.LinearFocalLoss.tied(head, ignore_index=IGNORED)
    for is_trained, expected in ((False, 6), (True, 7)):  # lora_A; two make the logits; two by hidden states; lora_B
        head.base_layer.weight.requires_grad_(is_trained)
        with Products(CLASSES) as products:
            loss(hidden, target)
        assert products.calls.total() == expected


def test_statistics_and_second_derivatives_with_lora(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, target, _ = batch
    head, _ = with_lora(linear())
    loss = fl.nn.LinearFocalLoss.tied(head, ignore_index=IGNORED)
    results = []
    for value, stats in (
        loss(hidden, target, return_stats=True),
        fl.focal_loss(head(hidden), target, ignore_index=IGNORED, return_stats=True),
    ):
        first = torch.autograd.grad(value, trained(hidden, head), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), trained(hidden, head))
        results.append([value, *stats, *second])
    for mine, right in zip(*results, strict=True):
        assert_close(mine, right, equal_nan=True)


class Quantized(nn.Linear):
    """As bitsandbytes has them: the weight is not what the forward multiplies by."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


LORA_REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dora": (
        lambda: with_lora(linear(bias=False), use_dora=True)[0],
        "'default', which is no plain LoRA but a Dora",
    ),
    "quantized": (lambda: with_lora(linear(Quantized))[0], "Quantized as its base_layer, which has a f"),
    "hook": (
        lambda: changed(with_lora(linear())[0], lambda x: x.lora_B["default"].register_forward_hook(look)),
        r"Linear as its lora_B\['default'\], which has the hook <function look",
    ),
}


@pytest.mark.parametrize("kind", LORA_REFUSED)
def test_lora_that_is_more_than_products_is_refused(kind: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    make_layer, message = LORA_REFUSED[kind]
    owner = make("LinearFocalLoss")
    owner.linear = head = make_layer()
    for use in (lambda: fl.nn.LinearFocalLoss.tied(head), lambda: owner(*batch[:2])):
        with pytest.raises(ValueError, match=f"LinearFocalLoss reads .*lora.*{message}"):
            use()


def test_products_on_the_chip_are_refused_with_lora(batch, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = with_lora(linear())
    loss = fl.nn.LinearFocalLoss.tied(head, ignore_index=IGNORED)
    monkeypatch.setattr(fl.backends, "resolve", lambda *_: "triton_fused")
    with pytest.raises(ValueError, match="impl='triton_fused' multiplies one weight on the chip, but LoRA makes 2"):
        loss(*batch[:2])


@pytest.mark.compile
@pytest.mark.parametrize("first", ["tie", "peft"])
def test_lora_compiles_without_a_break(first: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, target, _ = batch
    layer = linear()
    loss = fl.nn.LinearFocalLoss.tied(layer, ignore_index=IGNORED) if first == "tie" else None
    head, _ = with_lora(layer, more=True)
    loss = loss or fl.nn.LinearFocalLoss.tied(head, ignore_index=IGNORED)
    assert_compiles(loss, trained(hidden, head), hidden, target)
