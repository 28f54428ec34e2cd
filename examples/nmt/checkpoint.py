"""Checkpoints: written whole, and read back only into the run that they are of."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from options import Config


class CheckpointError(Exception):
    """A checkpoint that this run cannot go on from; the message says what to do."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: an interruption leaves the checkpoint before."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    way_out = "--fresh starts anew in this folder, --out names another one"
    try:
        state = torch.load(path, weights_only=True)
        saved = state["config"]
    except Exception as error:  # whatever a damaged file makes the unpickler say
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); {way_out}") from None
    wanted = dataclasses.asdict(config)
    differing = [
        f"{name.replace('_', '-')} is {saved.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differing:
        raise CheckpointError(f"{path} is of another run: {', '.join(differing)}; {way_out}")
    return state
