"""Options of the benchmarks, their cases, and what the JSON says of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import linear_suite
import pytest
import suite
import supcon_suite
import torch

import fusedloss
from fusedloss import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedloss")
    group.addoption("--quick", action="store_true", help="two shapes, float32, no variants: a minute or two")
    group.addoption("--full", action="store_true", help="every loss at every shape, more rounds: half an hour")
    group.addoption("--linear-grid", action="store_true", help="the linear forms on their whole grid: hours")


def pytest_configure(config: pytest.Config) -> None:
    for other in ("full", "linear_grid"):
        if config.getoption("quick") and config.getoption(other):
            raise pytest.UsageError(f"--quick and --{other.replace('_', '-')} exclude each other")


def _extent(config: pytest.Config) -> suite.Extent:
    return suite.QUICK if config.getoption("quick") else suite.FULL if config.getoption("full") else suite.DEFAULT


def _linear_extent(config: pytest.Config) -> linear_suite.Extent:
    if config.getoption("linear_grid"):
        return linear_suite.GRID
    return linear_suite.QUICK if config.getoption("quick") else linear_suite.DEFAULT


def _supcon_cases(config: pytest.Config) -> list[supcon_suite.Case]:
    if config.getoption("full"):
        return supcon_suite.FULL
    return supcon_suite.QUICK if config.getoption("quick") else supcon_suite.DEFAULT


def _cases(config: pytest.Config) -> dict[str, Sequence[suite.Case | linear_suite.Case | supcon_suite.Case]]:
    """By the fixture that they parametrize."""
    extent, linear_extent = _extent(config), _linear_extent(config)
    return {
        "case": suite.cases(extent),
        "variant_case": suite.variant_cases(extent),
        "both_case": suite.both_cases(extent),
        "growth_case": suite.growth_cases(extent),
        "linear_case": linear_suite.cases(linear_extent),
        "linear_variant_case": linear_suite.variant_cases(linear_extent),
        "linear_large_case": linear_suite.large_cases(linear_extent),
        "supcon_case": _supcon_cases(config),
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, cases in _cases(metafunc.config).items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, cases, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    empty = {fixture for fixture, cases in _cases(config).items() if not cases}
    none = [item for item in items if empty & set(item.fixturenames)]
    config.hook.pytest_deselected(items=none)
    items[:] = [item for item in items if item not in none]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fusedloss"] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": fusedloss.__version__,
        "impl": backends.resolve(None, torch.device("cpu")),
    }
