"""A teacher's divergences, and targets for all the classes."""

import pytest
import torch
import torch.nn.functional as F
from linear_suite import measure_pair
from suite import measure
from torch import Tensor

import fusedloss as fl
from fusedloss.losses._registry import Example


def log_probabilities(*logits: Tensor) -> list[Tensor]:
    # In bfloat16 the divergence of near rows is wrong by a tenth.
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    return [x.log_softmax(-1, dtype=dtype) for x in logits]


def forward_kl(input: Tensor, target: Tensor) -> Tensor:
    log_p, log_y = log_probabilities(input, target)
    return F.kl_div(log_p, log_y, log_target=True, reduction="none").sum(-1)


def reverse_kl(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    return forward_kl(target.to(input.dtype), input)


def tv(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    log_p, log_y = log_probabilities(input, target)
    return 0.5 * (log_p.exp() - log_y.exp()).abs().sum(-1)


def jsd(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    log_p, log_y = log_probabilities(input, target)
    log_m = (0.5 * (log_p.exp() + log_y.exp())).log()
    parts = (F.kl_div(log_m, x, log_target=True, reduction="none").sum(-1) for x in (log_p, log_y))
    return 0.5 * sum(parts)


def skew_kl(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    log_p, log_y = log_probabilities(input, target)
    log_m = (0.1 * log_y.exp() + 0.9 * log_p.exp()).log()
    return F.kl_div(log_m, log_y, log_target=True, reduction="none").sum(-1)


def skew_reverse_kl(input: Tensor, target: Tensor, divergence: str) -> Tensor:
    return skew_kl(target, input, divergence)


def soft(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target.to(input.dtype), reduction="none")


def near(logits: Tensor, noise: Tensor) -> Tensor:
    """Logits of a teacher that is not far from the student."""
    return (logits + 0.5 * noise).to(logits.dtype)


def probabilities(logits: Tensor, noise: Tensor) -> Tensor:
    return noise.softmax(-1)


def test_forward_kl(benchmark, case):
    measure(benchmark, case, Example(fl.distillation_loss, forward_kl), second=near)


@pytest.mark.parametrize(
    "formula", [reverse_kl, tv, jsd, skew_kl, skew_reverse_kl], ids=lambda formula: formula.__name__
)
def test_others(benchmark, both_case, formula):
    example = Example(fl.distillation_loss, formula, {"divergence": formula.__name__})
    measure(benchmark, both_case, example, second=near)


def test_soft_targets(benchmark, variant_case):
    measure(benchmark, variant_case, Example(fl.cross_entropy, soft), second=probabilities)
    benchmark.extra_info["loss"] = "cross_entropy(soft targets)"  # which is not that of classes


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_forward_kl(benchmark, linear_large_case, reduction):
    measure_pair(benchmark, linear_large_case, forward_kl, reduction)
