"""Real processes over gloo, each of which runs the scenes of a test file one after the other."""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import interpreted
import torch
import torch.distributed as dist

#: What torch.compile says of its own code, as in pyproject.toml.
COMPILER_WARNINGS = (
    "`torch.jit.script",
    "Guards may run slower on Python 3.13.0",
    ".*autograd.function.Function.* should not be instantiated",
    "The .grad attribute of a Tensor that is not a leaf",
)

#: A function of the rank and the number of ranks, of a module's top level, since it travels to other processes.
Scene = Callable[[int, int], None]


def _rank(rank: int, world: int, store: str, scenes: Sequence[Scene]) -> None:
    """A process of its own, in which a deprecated function is an error as everywhere in these tests."""
    warnings.simplefilter("error")
    for message in COMPILER_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreted.prepare()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    for scene in scenes:
        scene(rank, world)
    dist.destroy_process_group()


def run(scenes: Sequence[Scene], world: int, tmp_path: Path) -> None:
    """All the scenes in one start of the processes, which costs more than they do; a traceback names the scene.

    Where processes can be forked, they are copies of one that has nothing but the imports behind it.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    modules = ["torch.distributed.tensor", "torch.distributed.fsdp", "fusedloss"]
    if os.environ.get("TRITON_INTERPRET") == "1":
        modules.append("triton.runtime.interpreter")
    multiprocessing.set_forkserver_preload(modules)
    arguments = (world, str(tmp_path / "store"), list(scenes))
    torch.multiprocessing.start_processes(_rank, arguments, world, start_method=method)
