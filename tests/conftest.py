"""Fixtures that every test file may use."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from fusedloss import backends, ops

pytest.register_assert_rewrite("oracle", "row_suite")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh uninitialised tensors hold NaN (integers: their largest value), so that one never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=backends.IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that is ready on this machine."""
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=[name for name in backends.IMPLS if name != "reference"])
def compiled_impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that is ready and has kernels of its own."""
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20210629)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Counts the kernels that ran, by (operator, implementation): {("row_loss", "cpu"): 1, ...}."""
    calls: Counter[tuple[str, str]] = Counter()

    def counted(name: str, impl: str, kernel):
        def call(*arguments):
            calls[name, impl] += 1
            return kernel(*arguments)

        return call

    for (name, device, impl), kernel in list(ops._kernels.items()):
        monkeypatch.setitem(ops._kernels, (name, device, impl), counted(name, impl, kernel))
    return calls


@pytest.fixture
def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of four classes with their targets, of which the tests know the losses to eight digits."""
    rows = [[2, 0, -1, 0.5], [-1, 3, 0.25, 0], [0, 0, 0, 0]]
    return torch.tensor(rows, dtype=torch.float64), torch.tensor([0, 2, 3])
