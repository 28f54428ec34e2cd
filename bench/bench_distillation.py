"""A teacher's divergences, and targets for all the classes."""

import pytest
import torch
import torch.nn.functional as F
from linear_suite import measure_pair
from suite import measure
from torch import Tensor

import fusedloss as fl
from fusedloss.losses._registry import Example


def forward_kl(input: Tensor, target: Tensor) -> Tensor:
    # In bfloat16 the divergence of near rows is wrong by a tenth.
    dtype = torch.promote_types(input.dtype, torch.float32)
    log_p, log_y = (x.log_softmax(-1, dtype=dtype) for x in (input, target))
    return F.kl_div(log_p, log_y, log_target=True, reduction="none").sum(-1)


def reverse_kl(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    return forward_kl(target.to(input.dtype), input)


def tv(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    return 0.5 * (input.softmax(-1) - target.to(input.dtype).softmax(-1)).abs().sum(-1)


def jsd(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    log_p, log_y = (x.to(input.dtype).log_softmax(-1) for x in (input, target))
    log_m = (0.5 * (log_p.exp() + log_y.exp())).log()
    parts = (F.kl_div(log_m, x, log_target=True, reduction="none").sum(-1) for x in (log_p, log_y))
    return 0.5 * sum(parts)


def soft(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target.to(input.dtype), reduction="none")


def near(logits: Tensor, noise: Tensor) -> Tensor:
    """Logits of a teacher that is not far from the student."""
    return (logits + 0.5 * noise).to(logits.dtype)


def probabilities(logits: Tensor, noise: Tensor) -> Tensor:
    return noise.softmax(-1)


def test_forward_kl(benchmark, case):
    measure(benchmark, case, Example(fl.distillation_loss, forward_kl), second=near)


@pytest.mark.parametrize("formula", [reverse_kl, tv, jsd], ids=lambda formula: formula.__name__)
def test_others(benchmark, variant_case, formula):
    example = Example(fl.distillation_loss, formula, {"divergence": formula.__name__})
    measure(benchmark, variant_case, example, second=near)


def test_soft_targets(benchmark, variant_case):
    measure(benchmark, variant_case, Example(fl.cross_entropy, soft), second=probabilities)


def test_linear_forward_kl(benchmark, linear_large_case):
    measure_pair(benchmark, linear_large_case, forward_kl)
