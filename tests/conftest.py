"""Fixtures that every test file may use."""

import importlib.util
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# Where there is no GPU, Triton's interpreter stands in for one. Triton reads this when it is imported.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import covering
import interpreted

from fusedloss import backends
from fusedloss.backends.cpu import _engine

pytest.register_assert_rewrite("oracle", "row_suite", "kernel_suite")

# A few cases, always the same ones; `make fuzz` draws many, which are new each time but for those that failed before.
_ANY = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("few", max_examples=60, derandomize=True, **_ANY)
_CASES = int(os.environ.get("CASES", "20000"))
hypothesis.settings.register_profile("fuzz", max_examples=_CASES, print_blob=True, **_ANY)
hypothesis.settings.load_profile("few")


if os.environ.get("TRITON_INTERPRET") == "1":
    interpreted.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triton", action="store_true", help="run every shared test on the interpreted Triton kernels: half an hour"
    )


def pytest_report_header(config: pytest.Config) -> str:
    reason = backends.unavailable("triton")
    if reason is not None:
        return f"triton: {reason}"
    if torch.cuda.is_available():
        return f"triton: compiled, for {torch.cuda.get_device_name()}"
    return f"triton: interpreted, {'in every shared test' if config.getoption('triton') else 'in test_triton.py alone'}"


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter is slow: what test_triton.py leaves out is for those who ask."""
    # A loss whose table of cases is empty has no such test.
    reasons = [(item, [mark.kwargs.get("reason", "") for mark in item.iter_markers("skip")]) for item in items]
    items[:] = [item for item, why in reasons if not any("empty parameter set" in reason for reason in why)]
    covering.mark(items)
    if config.getoption("triton"):
        return

    def asked_for(item: pytest.Item) -> object:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return item.get_closest_marker("gpu") or "triton" not in (
            parameters.get("impl"),
            parameters.get("compiled_impl"),
        )

    config.hook.pytest_deselected(items=[item for item in items if not asked_for(item)])
    items[:] = [item for item in items if asked_for(item)]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh uninitialised tensors hold NaN (integers: their largest value), so that one never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


#: Those that the shared tests run on; the CUDA kernels have test_cuda.py, and a GPU test_gpu.py.
SHARED = [name for name in backends.IMPLS if name != "cuda"]


def _ready(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable(request.param, torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=SHARED)
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that is ready on this machine."""
    return _ready(request)


@pytest.fixture(params=[name for name in SHARED if name != "reference"])
def compiled_impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that is ready and has kernels of its own."""
    return _ready(request)


@pytest.fixture(params=_engine.instruction_sets() if _engine else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the C++ engine on this machine."""
    before = _engine.instruction_set()
    _engine.use_instruction_set(request.param)
    yield request.param
    _engine.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets their number, which is afterwards what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20210629)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Counts what backends are asked to do, by (method, implementation): {("forward", "cpu"): 1, ...}.

    A forward pass without an epilogue counts as "statistics"; what a method asks of its own backend does not count.
    """
    calls: Counter[tuple[str, str]] = Counter()
    inside = []

    def counted(name: str, impl: str, method):
        def call(*arguments):
            if not inside:
                statistics = name == "forward" and not arguments[0].spec.epilogue
                calls["statistics" if statistics else name, impl] += 1
            inside.append(name)
            try:
                return method(*arguments)
            finally:
                inside.pop()

        return call

    for impl, backend in backends.BACKENDS.items():
        for name in ("forward", "backward", "with_gradient", "sums", "terms", "scale_"):
            monkeypatch.setattr(backend, name, counted(name, impl, getattr(backend, name)))
    return calls


@pytest.fixture
def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of four classes with their targets, of which the tests know the losses to eight digits."""
    rows = [[2, 0, -1, 0.5], [-1, 3, 0.25, 0], [0, 0, 0, 0]]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor([0, 2, 3])


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny encoder with random weights, whose words are those of the examples' made-up texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "?", "many", "who", "where", "win", "home", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("encoder") / "model"
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 lines of number words and their translation."""
    translations = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
    translations["house"] = "Haus"
    order = random.Random(0)
    lines = []
    for _ in range(400):
        words = order.choices(list(translations), k=order.randint(2, 9))
        lines.append(f"{' '.join(words)}\t{' '.join(translations[word] for word in words)}\n")
    path = tmp_path_factory.mktemp("corpus") / "pairs.tsv"
    path.write_text("".join(lines), encoding="utf-8")
    return path
