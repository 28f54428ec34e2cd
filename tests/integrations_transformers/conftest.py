"""Fixtures of the tests of models of transformers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("fused_models")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """And on one thread: these models are too small for two to do anything but wait for each other."""
    torch.manual_seed(20210629)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    from fused_models import BATCH, LENGTH, VOCABULARY

    tokens = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    labels = tokens.clone()
    labels[0, :3] = labels[1, -2:] = -100
    return {"input_ids": tokens, "labels": labels}
