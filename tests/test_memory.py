"""The memory of gradients that is kept from step to step."""

import gc

import pytest
import torch
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.backends import buffer_pool as memory

if backends.unavailable("cpu") is not None:
    pytest.skip(str(backends.unavailable("cpu")), allow_module_level=True)
if not hasattr(memory.mmap, "MAP_ANONYMOUS"):
    pytest.skip("this system has no anonymous memory maps: every gradient is torch's", allow_module_level=True)

ROWS, CLASSES = 128, 8192  # 4 MB of float32


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDLOSS_KEEP_BYTES", raising=False)
    gc.collect()
    memory._kept.clear()


def problem(rows: int = ROWS, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, classes, generator=generator)
    return z.requires_grad_(), torch.randint(classes, (rows,), generator=generator)


def gradient(z: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(fl.cross_entropy(z, target, impl="cpu"), z)[0]


def expected(z: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(torch.nn.functional.cross_entropy(z, target), z)[0]


def test_the_memory_of_a_gradient_that_is_gone_is_taken_again() -> None:
    z, target = problem()
    first = gradient(z, target)
    where = first.data_ptr()
    assert not memory._kept
    del first
    assert len(memory._kept) == 1
    again = gradient(z, target)
    assert again.data_ptr() == where and not memory._kept
    torch.testing.assert_close(again, expected(z, target))


def test_a_gradient_that_someone_holds_keeps_its_values() -> None:
    z, target = problem()
    other, other_target = problem(seed=1)
    truth = expected(z, target)
    fl.cross_entropy(z, target, impl="cpu").backward()
    held = [gradient(z, target)[5:], gradient(z, target).numpy(), gradient(z, target).detach(), z.grad]
    gc.collect()
    torch.testing.assert_close(gradient(other, other_target), expected(other, other_target))
    torch.testing.assert_close(held[0], truth[5:])
    for x in held[1:]:
        torch.testing.assert_close(torch.as_tensor(x), truth)


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    z, target = problem()
    for limit in ("0", str(2**20)):
        monkeypatch.setenv("FUSEDLOSS_KEEP_BYTES", limit)
        torch.testing.assert_close(gradient(z, target), expected(z, target))
        assert not memory._kept
    for limit in ("-1", "much", "1.5"):
        monkeypatch.setenv("FUSEDLOSS_KEEP_BYTES", limit)
        with pytest.raises(ValueError, match=f"FUSEDLOSS_KEEP_BYTES .* got '{limit}'"):
            memory.empty((3, 5), torch.float32)
