"""On a GPU: the shared suite on CUDA tensors, the promise not to stall the stream, and what runs by default."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import test_linear
import torch
from row_losses import LOSSES, computed, each_inplace_loss, each_loss
from row_suite import RowLossSuite, logits_and_targets, modules_of_losses
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.tools.footprint import footprint

if not torch.cuda.is_available():
    pytest.skip("there is no GPU that torch can use", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["reference", "triton", "cuda"])
def impl(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable(request.param, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def on_gpu(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of the same numbers on the GPU; the suite stays on the CPU."""

    def there(x: Any) -> Any:
        return x.to("cuda") if isinstance(x, Tensor) else x

    def call(*arguments: Any, **options: Any) -> Any:
        result = loss(*map(there, arguments), **{name: there(value) for name, value in options.items()})
        if isinstance(result, Tensor):
            return result.cpu()
        rows, stats = result
        return rows.cpu(), fl.RowStats(*(column.cpu() for column in stats))

    return call


def _cases(*suites: type[RowLossSuite], certain: bool = False) -> list[Any]:
    cases = [case for suite in suites for case in (suite.CERTAIN if certain else suite.CASES)]
    return [replace(case, loss=on_gpu(case.loss)) for case in cases]


ALL = [module.TestRowLoss for module in modules_of_losses().values()]


class TestRowLoss(RowLossSuite):
    CASES: ClassVar = _cases(*ALL)
    CERTAIN: ClassVar = _cases(*ALL, certain=True)
    # The suite's logits are in another memory; see below.
    test_inplace_backward_gives_the_same_bits = None


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    z, target = logits_and_targets(64, 5000, torch.Generator().manual_seed(1), torch.float32)
    target[3] = -100
    return z.cuda().requires_grad_(), target.cuda()


def test_triton_runs_by_default_where_it_can(problem, kernel_calls):
    expected = "triton" if backends.unavailable("triton", torch.device("cuda")) is None else "reference"
    assert backends.resolve(None, torch.device("cuda")) == expected
    fl.cross_entropy(*problem)
    assert kernel_calls["forward", "triton"] == (expected == "triton")
    with pytest.raises(RuntimeError, match="it runs on CPU tensors, but the input is on cuda:0"):
        fl.cross_entropy(*problem, impl="cpu")


@each_inplace_loss
def test_inplace_backward_gives_the_same_bits(loss, problem):
    z, target = problem
    (fresh,) = torch.autograd.grad(loss(z, target, impl="triton"), z)
    z = computed(z)
    (gradient,) = torch.autograd.grad(loss(z, target, impl="triton", inplace_backward=True), z)
    assert gradient.data_ptr() == z.data_ptr()
    assert torch.equal(gradient, fresh)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("impl", ["triton", "cuda"], indirect=True)
@each_loss
def test_the_stream_is_not_stalled(loss, impl, problem):
    z, target = problem
    loss(z, target, impl=impl).backward()  # compiles
    hidden, weight = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (64, 5000))
    fl.linear_focal_loss(hidden, weight, target, budget=2**20).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (loss(z, target, impl=impl) / 3).backward()
        fl.linear_focal_loss(hidden, weight, target, budget=2**20).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in LOSSES if "classes" not in name])
def test_the_same_bits_twice(name, problem):
    z, target = problem
    first, second = (torch.autograd.grad(LOSSES[name](z, target), z)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["triton", "triton_fused", "cuda"])
@pytest.mark.parametrize("name", test_linear.SMALL_FACTORS)
def test_small_factors_in_float16(name, impl, generator):
    reason = backends.unavailable(impl, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    test_linear.check_small_factors(name, generator, impl, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "triton_fused"])
@pytest.mark.parametrize("budget", [None, 2**18], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("name", test_linear.LOSSES)
def test_linear_forms_equal_those_in_float64(name, budget, impl, dtype, generator):
    """On the CPU. Beyond a block of rows, a span of classes and a step of the depth, none of them a multiple."""
    shapes = (150, 77), (2100, 77)
    sources = [torch.randn(shape, generator=generator, dtype=torch.float64) / 3 for shape in shapes]
    target = torch.randint(2100, (150,), generator=generator)
    target[::5] = -100
    loss = test_linear.LOSSES[name].linear
    results = []
    for device, kind, options in (("cuda", dtype, {"impl": impl}), ("cpu", torch.float64, {"impl": "reference"})):
        own = [x.to(dtype).to(device, kind).requires_grad_() for x in sources]
        value = loss(*own, target.to(device), softcap=8.0, budget=budget, **options)
        results.append([x.cpu().double() for x in (value, *torch.autograd.grad(value, own))])
    for found, right in zip(*results, strict=True):
        allowed = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
        assert float((found - right).abs().max()) <= allowed * float(right.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "chunks"), [(1024, 1), (16384, None)])
def test_peaks_of_linear_forms_are_those_told(rows, chunks, dtype):
    features, classes = 1024, 50000
    told = footprint(rows, features, classes, dtype, device="cuda")
    assert told.chunks == chunks if chunks else told.chunks > 1
    sources = [torch.randn(n, features, device="cuda", dtype=dtype, requires_grad=True) for n in (rows, classes)]
    target = torch.randint(classes, (rows,), device="cuda")
    torch.autograd.grad(fl.linear_cross_entropy(*sources, target), sources)  # compiles, and takes cuBLAS's workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(fl.linear_cross_entropy(*sources, target), sources)
    assert 0.95 * told.linear < torch.cuda.max_memory_allocated() - before < 1.1 * told.linear


# --- CUDA graphs ---


def replayed(step: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], others: list[Tensor]) -> tuple[Tensor, ...]:
    """What a step computes of other numbers: captured after a warm-up, and replayed with them in the inputs' memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    for x in results:
        x.detach().fill_(torch.nan)
    graph.replay()
    return results


@pytest.mark.parametrize("impl", ["triton", "cuda"], indirect=True)
@each_loss
def test_row_losses_in_a_cuda_graph(loss, impl, problem):
    z, target = problem
    factor = torch.ones((), device="cuda")

    def step() -> tuple[Tensor, ...]:
        value = loss(z, target, impl=impl)
        return value, *torch.autograd.grad(value, z, factor)

    others = [torch.randn_like(z), torch.randint(5000, (64,), device="cuda"), torch.tensor(0.3, device="cuda")]
    results = replayed(step, [z, target, factor], others)
    for mine, right in zip(results, step(), strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "triton_fused"])
@pytest.mark.parametrize("budget", [None, 2**18], ids=["one chunk", "chunks"])
def test_linear_forms_in_a_cuda_graph(budget, impl, dtype, generator):
    """A number that changes from step to step is a tensor: the graph has the values of Python's numbers in it."""
    rows, features, classes = 300, 128, 5000
    shapes = (rows, features), (classes, features), (classes,)
    sources, others = (
        [(torch.randn(shape, generator=generator) / 8).to("cuda", dtype).requires_grad_() for shape in shapes]
        for _ in range(2)
    )
    targets = torch.randint(classes, (2, rows), generator=generator).cuda()
    gamma, factor = torch.tensor([2.0, 1.0], device="cuda")

    def step() -> tuple[Tensor, ...]:
        hidden, weight, bias = sources
        value = fl.linear_focal_loss(
            hidden, weight, targets[0], gamma=gamma, linear_bias=bias, budget=budget, impl=impl
        )
        return value, *torch.autograd.grad(value, sources, factor)

    inputs = [*sources, targets[0], gamma, factor]
    results = replayed(step, inputs, [*others, targets[1], torch.tensor(1.5), torch.tensor(1024.0)])
    for mine, right in zip(results, step(), strict=True):  # cuBLAS may take another way in a graph
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=1e-3 * float(right.abs().max()))
