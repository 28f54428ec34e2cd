"""Real processes over gloo, which all tests of a pytest worker share: a test sends one scene to as many as it needs."""

import atexit
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import interpreted
import pytest
import torch
import torch.distributed as dist

MOST = 4
#: Seconds for a scene, in which the ranks may import what they have not imported before.
LIMIT = 240

#: What torch.compile says of its own code, as in pyproject.toml.
COMPILER_WARNINGS = (
    "`torch.jit.script",
    "Guards may run slower on Python 3.13.0",
    ".*autograd.function.Function.* should not be instantiated",
    "The .grad attribute of a Tensor that is not a leaf",
)

#: A function of the rank and the number of ranks, of a module's top level, since it travels to other processes.
Scene = Callable[[int, int], None]


def tests_of(scenes: Mapping[Scene, Sequence[int]]) -> Callable[[Scene, int], None]:
    """Return the test of some scenes, each with its numbers of ranks, for a module to name `test_scene`."""
    cases = [
        pytest.param(scene, world, id=f"{scene.__name__.strip('_')}-{world}")
        for scene, worlds in scenes.items()
        for world in worlds
    ]

    @pytest.mark.parametrize(("scene", "world"), cases)
    def test_scene(scene: Scene, world: int) -> None:
        run(scene, world)

    return test_scene


def run(scene: Scene, world: int, limit: float = LIMIT) -> None:
    """Run a scene on ranks; what one of them raises first is raised here. After a failure others take their place."""
    pipes = _started()[:world]
    with tempfile.TemporaryDirectory() as folder:
        for pipe in pipes:
            pipe.send((scene, world, os.path.join(folder, "store")))
        waiting: list[Any] = list(pipes)
        while waiting:
            ready = wait(waiting, limit)
            failure = None if ready else f"{scene.__name__} was stopped after {limit} s: ranks wait for each other"
            for pipe in ready:
                try:
                    failure = failure or pipe.recv()
                except EOFError:
                    failure = f"rank {pipes.index(pipe)} of {world} died in {scene.__name__}"
                waiting.remove(pipe)
            if failure is not None:
                _stop()
                pytest.fail(failure, pytrace=False)


_ranks: list[tuple[Any, Connection]] = []


def _started() -> list[Connection]:
    """Where processes can be forked, the ranks are copies of one that has nothing but the imports behind it."""
    if not _ranks:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        modules = ["torch.distributed.tensor", "torch.distributed.fsdp", "fusedloss"]
        if os.environ.get("TRITON_INTERPRET") == "1":
            modules.append("triton.runtime.interpreter")
        multiprocessing.set_forkserver_preload(modules)
        context: Any = multiprocessing.get_context(method)
        for rank in range(MOST):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            _ranks.append((process, here))
    return [pipe for _, pipe in _ranks]


@atexit.register
def _stop() -> None:
    for process, pipe in _ranks:
        process.kill()
        process.join()
        pipe.close()
    _ranks.clear()


def _serve(rank: int, pipe: Connection) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreted.prepare()
    torch.set_num_threads(1)
    environment = dict(os.environ)
    while True:
        try:
            scene, world, store = pipe.recv()
            _play(scene, rank, world, store)
            answer = None
        except EOFError:
            return
        except BaseException:  # of pytest's own, too
            answer = f"rank {rank}: {traceback.format_exc()}"
        pipe.send(answer)
        os.environ.clear()
        os.environ.update(environment)


def _play(scene: Scene, rank: int, world: int, store: str) -> None:
    """In a process group of its own; a deprecated function is an error as everywhere in these tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in COMPILER_WARNINGS:
            warnings.filterwarnings("ignore", message)
        torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
        timeout = timedelta(seconds=LIMIT)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
        scene(rank, world)
        if dist.is_initialized():
            dist.barrier()  # a rank that is still connecting a group needs the others, which may not have used it
            dist.destroy_process_group()
