"""Times of a step on a GPU: between events with a cold cache, of the host, and of the GPU alone by a graph's replay."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 * 2**20  # beyond any L2 cache

Step = Callable[[], object]


class Times(NamedTuple):
    """`cold`: milliseconds between events around the call; `host`: microseconds until the call returns."""

    cold: float
    host: float


class Clock:
    """On a CPU (a rehearsal) every time is the host's, and there are no graphs."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.captures = self.on_gpu
        self._flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.int8, device=device)

    def spin(self) -> None:
        """A third of a second of products: after compiling the GPU's clock is low."""
        x = torch.randn(4096 if self.on_gpu else 4, 4096 if self.on_gpu else 4, device=self._flush.device)
        begin = time.perf_counter()
        while self.on_gpu and time.perf_counter() - begin < 0.3:
            x @ x
            torch.cuda.synchronize()

    def reset_memory(self) -> None:
        """Before a step whose peak is asked for."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before if self.on_gpu else 0

    def empty_memory(self) -> None:
        gc.collect()
        if self.captures:
            torch.cuda.empty_cache()

    def turn(self, step: Step, reset: Step | None = None) -> Times:
        if reset is not None:
            reset()
        self._flush.zero_()
        if not self.on_gpu:
            begin = time.perf_counter()
            step()
            took = time.perf_counter() - begin
            return Times(took * 1e3, took * 1e6)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return Times(start.elapsed_time(end), host * 1e6)

    def median(self, step: Step, rounds: int = 7) -> float:
        step()
        return median(self.turn(step).cold for _ in range(rounds if self.on_gpu else 1))

    def replayed(self, steps: Sequence[Step], reset: Step | None = None, rounds: int = 3) -> float | None:
        """Milliseconds of each of the steps in a graph of all; None where there are no graphs. They have run before."""
        if not self.captures:
            return None
        # After a failed capture the allocator of torch 2.11 believes that it still runs, and cannot free memory.
        self.captures = False
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # torch.cuda.graph would collect garbage and free all memory, each time
            graph.capture_begin()
            try:
                for step in steps:
                    step()
            finally:
                graph.capture_end()
        self.captures = True
        graph.replay()
        return median(self.turn(graph.replay, reset).cold for _ in range(rounds)) / len(steps)
