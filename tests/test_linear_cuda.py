"""The linear forms on CUDA, without a GPU: products, launches and memory are counted, and what they compute is held to
float64 by products on the CPU in the place of CUDA's."""

from typing import Any

import pytest
import test_linear
import torch
from no_gpu import NoGpu, count_launch
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.definition.projection import Form
from fusedloss.definition.rows import Rows, Spec
from fusedloss.engine import budgets, chunks
from fusedloss.tools.footprint import footprint

MIB = 2**20


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is taken for CUDA."""
    monkeypatch.setattr(budgets, "sums_in_float32", lambda device: True)
    monkeypatch.setattr(budgets, "most_rounded", lambda device: 1)


def step(
    rows: int, features: int, classes: int, dtype: torch.dtype, bias: bool = False, **options: Any
) -> tuple[NoGpu, tuple[Tensor, ...]]:
    """Counts a training step of the linear cross-entropy."""
    shapes = [(rows, features), (classes, features)] + [(classes,)] * bias
    sources = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    options |= {"linear_bias": sources[2]} if bias else {}
    with NoGpu(*sources, target) as gpu:
        loss = fl.linear_cross_entropy(sources[0], sources[1], target, impl="triton", **options)
        gradients = torch.autograd.grad(loss.sum(), sources)
    return gpu, gradients


@pytest.fixture
def counting(on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors run Triton's passes, of rows that are not split."""
    pytest.importorskip("triton")
    from fusedloss.triton_kernels import launch

    monkeypatch.setattr(backends, "resolve", lambda *arguments, **options: "triton")
    monkeypatch.setattr(backends.triton, "_launch", count_launch)
    monkeypatch.setattr(launch, "PROGRAMS", 0)


HALF = (torch.bfloat16, torch.float16)
each_half = pytest.mark.parametrize("dtype", HALF, ids=str)
#: Rows, features, classes, and the chunks of bfloat16 and float16.
SHAPES = {
    "one chunk": (4096, 4096, 128256, 1, 1),
    "few rows": (1024, 4096, 128256, 1, 1),
    "many chunks": (16384, 4096, 128256, 8, 8),
    "as many as one chunk of bfloat16 may have": (8192, 4096, 128256, 1, 4),
    "more by one": (8193, 4096, 128256, 5, 5),
    "a small layer": (4096, 512, 32000, 2, 2),
    "of one chunk": (2048, 64, 32000, 1, 1),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# --- counted ---


@each_half
@pytest.mark.parametrize(("rows", "chunks"), [(4096, 1), (16384, 8)])
def test_launches(rows, chunks, dtype, counting):
    """Of the loss, its divisor and its reduction too."""
    token_weight = torch.empty(rows, device="meta")
    plain, with_bias, weighted, both = (
        step(rows, 4096, 128256, dtype, **options)[0].launches
        for options in (
            {},
            {"bias": True},
            {"token_weight": token_weight},
            {"bias": True, "token_weight": token_weight},
        )
    )
    for launches in (plain, with_bias, weighted, both):
        assert launches.total() <= (40 if chunks == 1 else 16 * chunks), launches
    # In float16 the rows' units and the scales of the sums take five more, and the bias's sum three.
    half = dtype == torch.float16
    assert plain.total() <= 14 + (11 if half else 6) * chunks, plain
    assert with_bias.total() - plain.total() <= 3 + (3 if half else 2) * chunks
    assert plain["units_pass"] == half * chunks


@each_half
def test_launches_with_a_softcap(dtype, counting):
    gpu, _ = step(16384, 4096, 128256, dtype, softcap=30.0)
    chunks = len(gpu.products) // 3
    assert chunks == 16
    assert gpu.launches.total() <= 14 + (15 if dtype == torch.float16 else 9) * chunks, gpu.launches


@each_half
@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
def test_only_what_requires_grad_is_multiplied(needs, dtype, counting):
    shapes = {"hidden": (4096, 512), "weight": (32000, 512), "bias": (32000,)}
    sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    sources[needs].requires_grad_()
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    with NoGpu() as gpu:
        hidden, weight, bias = sources.values()
        fl.linear_cross_entropy(hidden, weight, target, linear_bias=bias).backward()
    extra = {"hidden": 1, "weight": 1, "bias": int(dtype == torch.float16)}[needs]
    assert len(gpu.products) == 2 * (1 + extra)
    assert sources[needs].grad.dtype == dtype


@each_half
def test_the_backward_scales_in_one_launch(dtype, counting):
    sources = [torch.empty(n, 512, dtype=dtype, device="meta", requires_grad=True) for n in (1024, 32000)]
    loss = fl.linear_cross_entropy(*sources, torch.empty(1024, dtype=torch.int64, device="meta"), reduction="sum")
    with NoGpu() as gpu:
        gradients = torch.autograd.grad(loss, sources, torch.empty((), device="meta"))
    scaling = "scale_pass" if dtype == torch.bfloat16 else "aten::mul.out"
    assert gpu.launches == {scaling: 2}
    assert [x.dtype for x in gradients] == [dtype, dtype]


# --- memory ---


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@each_shape
def test_products_and_peak_memory(shape, dtype, counting):
    """Three products a chunk. Gradients and at most the 4 bytes an element of a float32 sum, and 256 MiB; of what
    footprint() tells."""
    rows, features, classes = shape[:3]
    gpu, gradients = step(rows, features, classes, dtype)
    told = footprint(rows, features, classes, dtype, device="cuda")
    assert len(gpu.products) == 3 * told.chunks
    if dtype in HALF:
        assert told.chunks == shape[3 + HALF.index(dtype)]
        assert sum(m * n * k for m, n, k in gpu.products) == 3 * rows * features * classes
        assert max(size for product in gpu.products for size in product) == max(classes, features)  # no parts of them
    handed_over = sum(x.nbytes for x in gradients)
    wider = 4 * rows * features if dtype == torch.float16 else 0  # of the hidden states, until it is scaled
    assert gpu.peak <= handed_over + 4 * classes * features + 256 * MIB + wider
    # Beside what is told there are numbers for each row and class, and float16's hidden states times their rows' units.
    more = 2 * told.chunk_rows * features if dtype == torch.float16 else 0
    assert told.linear <= gpu.peak <= told.linear + more + 128 * rows + 16 * classes


@each_shape
def test_peak_memory_without_gradients(shape, counting):
    rows, features, classes = shape[:3]
    sources = [torch.empty(n, features, dtype=torch.bfloat16, device="meta") for n in (rows, classes)]
    with NoGpu(*sources) as gpu:
        fl.linear_cross_entropy(*sources, torch.empty(rows, dtype=torch.int64, device="meta"))
    told = footprint(rows, features, classes, torch.bfloat16, device="cuda").evaluation
    assert told <= gpu.peak <= told + 128 * rows and told <= 128 * MIB


def test_what_a_user_asks_for_is_the_budget(counting, monkeypatch):
    sizes = (4096, 4096, 128256, torch.bfloat16)
    assert len(step(*sizes, budget=256 * MIB)[0].products) == 3 * 4
    assert footprint(*sizes, budget=256 * MIB, device="cuda").chunks == 4
    monkeypatch.setenv("FUSEDLOSS_LINEAR_BUDGET", str(512 * MIB))
    assert len(step(*sizes)[0].products) == 3 * 2
    assert footprint(*sizes, device="cuda").chunks == 2


def test_the_rule_is_that_of_nvidias_gpus(monkeypatch):
    assert budgets.sums_in_float32(torch.device("cuda", 3)) == (torch.version.hip is None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for device in ("cuda", "cpu", "meta", "xpu"):
        assert not budgets.sums_in_float32(torch.device(device))
        assert footprint(4096, 4096, 128256, torch.bfloat16, device=device).chunk <= 128 * MIB


def test_ranks_agree_on_the_chunks_of_a_sequence(on_cuda):
    """By the rank with the most classes, whether or not a weight is frozen; of a budget that is given, by that."""
    found = set()
    for classes, frozen in ((60000, False), (68256, False), (68256, True)):
        hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (4096, classes))
        target = torch.empty(4 * 4096, dtype=torch.int64, device="meta")
        rows = Rows([hidden], [weight], None, [], target, None, None, [], None)
        forms = (Form(budget=budget, row_parts=4, most_classes=68256) for budget in (0, 64 * MIB))
        specs = [Spec("triton", needed=(True, not frozen), form=form) for form in forms]
        found.add(tuple(chunks._Chunks(rows, x, backends.BACKENDS["triton"], len(target)).size for x in specs))
    # As many bytes of logits as the weight of the rank with the most classes has elements; or 34 chunks of 64 MiB.
    assert found == {(4096 // 2, -(-4 * 4096 // 34))}


# --- computed ---


def _float32_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """What CUDA computes, by the same rules."""
    assert a.dtype == b.dtype and a.dtype in HALF and out.dtype == torch.float32 and out.is_contiguous()
    product = a.float() @ b.float()
    assert out.shape == product.shape
    out.copy_(out + product if add else product)


@pytest.fixture
def multiplied(on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """CUDA's way on a CPU; whether each of its products was added to others."""
    added: list[bool] = []

    def product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        added.append(add)
        _float32_product(a, b, out, add)

    monkeypatch.setattr(chunks, "_float32_product", product)
    return added


@each_half
@pytest.mark.parametrize("chunk", [13, 1000])
@pytest.mark.parametrize("name", ["token_weight and softcap", "class weights", "dsc one-vs-rest", "none"])
def test_factors_of_any_size(name, chunk, dtype, generator, multiplied):
    """From 2^-20 to 1: each row of the gradients of hidden states, weight and bias, beside those of the row form."""
    test_linear.check_small_factors(name, generator, chunk=chunk, dtype=dtype)
    valid = test_linear.ROWS - len(range(0, test_linear.ROWS, 9))  # on a CPU ignored rows are dropped
    added = [False] + [True] * (-(-valid // min(chunk, test_linear.ROWS)) - 1)
    if dtype == torch.bfloat16:  # the bias needs no product, and one chunk no sum
        assert multiplied == added[: len(added) if len(added) > 1 else 0]
    else:
        assert multiplied == [x for add in added for x in (False, add, add)]


@each_half
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("chunk", "softcap"), [(30, 3.0), (1000, None)])
def test_as_accurate_as_pytorch(chunk, softcap, reduction, dtype, generator, multiplied):
    data = test_linear.Data.make(generator, dtype, rows=200)
    test_linear.check_accuracy("cross_entropy", data, reduction, generator, chunk=chunk, softcap=softcap)
    assert len(multiplied) > 0 or (dtype == torch.bfloat16 and chunk == 1000)


@each_half
def test_many_chunks_lose_nothing(dtype, generator, multiplied):
    test_linear.test_weight_gradient_over_many_chunks(dtype, generator)
    assert multiplied.count(True) == 63


def test_a_factor_that_is_no_power_of_two_is_not_rounded(generator):
    """Trap: a 0-d factor takes the gradient's dtype on the way, and all of the gradient is off by as much."""
    data = test_linear.Data.make(generator, torch.bfloat16)
    options: dict[str, Any] = {"reduction": "sum", "ignore_index": -1}
    loss = test_linear.run_linear(fl.linear_cross_entropy, data.sources, data.target, **options)
    for kept in (True, False):
        factor = torch.tensor(1 / 3)
        whole = torch.autograd.grad(loss, data.sources, retain_graph=True)
        third = torch.autograd.grad(loss, data.sources, factor, retain_graph=kept)
        for a, b in zip(whole, third, strict=True):
            assert torch.equal(b, (a.float() * factor).bfloat16())
