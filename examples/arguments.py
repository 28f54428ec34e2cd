"""What the examples' command lines share: the types of arguments."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


def cpus() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(
    parser: argparse.ArgumentParser, quick: dict[str, Any], arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Add --quick, which changes defaults to `quick`, and parse: what is given by name holds all the same."""
    words = "small: to see it work, not to learn anything from it"
    parser.add_argument("--quick", action="store_true", help=words)
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = "whole number"  # argparse names the type in its message
    return parse


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, both excluded, got {value}")
    return value


def share_or_all(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {value}")
    return value
