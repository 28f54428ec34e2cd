"""Options of the benchmarks, their cases, and what the JSON says of the machine."""

from __future__ import annotations

from typing import Any

import pytest
import suite
import torch

import fusedloss
from fusedloss import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedloss")
    group.addoption("--quick", action="store_true", help="two shapes, float32, no variants: a minute or two")
    group.addoption("--full", action="store_true", help="every loss at every shape, more rounds: half an hour")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick") and config.getoption("full"):
        raise pytest.UsageError("--quick and --full exclude each other")


def _extent(config: pytest.Config) -> suite.Extent:
    return suite.QUICK if config.getoption("quick") else suite.FULL if config.getoption("full") else suite.DEFAULT


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    extent = _extent(metafunc.config)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", suite.cases(extent), ids=str)
    if "variant_case" in metafunc.fixturenames:
        metafunc.parametrize("variant_case", suite.variant_cases(extent), ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    if not suite.variant_cases(_extent(config)):
        variants = [item for item in items if "variant_case" in item.fixturenames]
        config.hook.pytest_deselected(items=variants)
        items[:] = [item for item in items if item not in variants]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fusedloss"] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": fusedloss.__version__,
        "impl": backends.resolve(None, torch.device("cpu")),
    }
