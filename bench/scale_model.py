"""A model of the vocabulary-parallel losses: time, traffic and memory of a step, for any number of ranks.

A rank of R holds V / R columns of the logits or rows of the output layer's weight, and all N rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fusedloss.engine.budgets import DEFAULT_BUDGET
from fusedloss.engine.operators import STATISTICS


class Link(NamedTuple):
    latency: float  # seconds of a ring's step
    bandwidth: float  # bytes a second, each way


class Machine(NamedTuple):
    name: str
    copy: float  # bytes a second of a copy, those read and those written
    flops: float  # a second, of large matrix products
    row: float  # time of the passes over rows, over that of a copy of as many bytes
    start: float  # seconds of a collective besides its steps
    fixed: float  # seconds of a loss, forward and backward, besides what grows with the sizes
    inner: Link
    outer: Link
    node: int  # ranks that have the inner link between them
    sums: bool = True  # adds products of half precision in float32; else of many chunks the weight's is made twice


#: From NVIDIA's data sheets (NVLink 4: 900 GB/s both ways; ConnectX-7: 400 Gb/s a GPU), published benchmarks (copy,
#: products) and the latencies by which NCCL plans (src/graph/tuning.cc: rings, LL128). `row`, `fixed` are assumed.
H100 = Machine("H100", 3.0e12, 750e12, 1.0, 14e-6, 200e-6, Link(1.9e-6, 450e9), Link(4.0e-6, 50e9), 8)


class Work(NamedTuple):
    """An output layer and its loss."""

    rows: int  # N, of all ranks of the group together
    features: int
    classes: int
    ranks: int = 1
    size: int = 2  # bytes of an element
    picks: int = 0
    budget: int = DEFAULT_BUDGET
    sequence: bool = False  # a rank has N / R of the hidden states
    by_chunks: bool = False  # an all-gather for each chunk, for which the backward need not make the logits again

    @property
    def shard(self) -> int:
        return -(-self.classes // self.ranks)

    @property
    def chunks(self) -> tuple[int, int]:
        """How many chunks of logits, and their rows."""
        count = max(1, -(-self.rows // max(1, self.budget // (self.shard * self.size))))
        return count, -(-self.rows // count)

    @property
    def told(self) -> int:
        """Bytes of the statistics that a rank tells the others."""
        return 4 * (STATISTICS + self.picks) * self.rows


class Parts(NamedTuple):
    """Seconds of a step, forward and backward."""

    products: float = 0.0
    passes: float = 0.0  # over the logits, and over the statistics of all ranks
    sums: float = 0.0  # the weight gradient's, over chunks and into its dtype
    statistics: float = 0.0  # the all-gather
    hidden: float = 0.0  # collectives of hidden states and their gradient, as far as nothing hides them
    fixed: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


# --- collectives ---


class Layout(NamedTuple):
    """Ranks of a group: so many in a node, and on so many nodes."""

    inside: int
    nodes: int


def layout(machine: Machine, ranks: int, stride: int = 1) -> Layout:
    """Of ranks one after the other, or every `stride`-th."""
    inside = max(1, min(ranks, machine.node // stride))
    return Layout(inside, -(-ranks // inside))


def all_gather(machine: Machine, size: float, group: Layout) -> float:
    """Rings between the nodes, then inside them; `size` bytes come from each rank."""
    inside, nodes = group
    if inside * nodes == 1:
        return 0.0
    between = (nodes - 1) * (machine.outer.latency + size / machine.outer.bandwidth)
    return machine.start + between + (inside - 1) * (machine.inner.latency + nodes * size / machine.inner.bandwidth)


def all_reduce(machine: Machine, size: float, group: Layout) -> float:
    """Reduce-scatter inside the nodes, rings between them, all-gather inside."""
    inside, nodes = group
    if inside * nodes == 1:
        return 0.0
    within = (inside - 1) * (machine.inner.latency + size / inside / machine.inner.bandwidth)
    between = (nodes - 1) * (machine.outer.latency + size / inside / nodes / machine.outer.bandwidth)
    return machine.start + 2 * (within + between)


def traffic(work: Work) -> dict[str, int]:
    """Bytes that a rank sends in a step."""
    others = work.ranks - 1
    part = -(-work.rows // work.ranks) * work.features * work.size
    return {"statistics": others * work.told, "hidden": (3 if work.sequence else 2) * others * part}


def memory(work: Work) -> dict[str, int]:
    """Bytes of a rank. Of several chunks the weight's gradient is summed in float32, and handed over in its dtype."""
    layer, (count, rows) = work.shard * work.features, work.chunks
    own = -(-work.rows // work.ranks) if work.sequence else work.rows
    gathered = 2 * rows * work.features * work.size if work.sequence else 0
    return {
        "weight": layer * work.size,
        "gradient": layer * (4 if work.size == 4 else work.size + 4 * (count > 1)),
        "logits": rows * work.shard * work.size,
        "hidden": 2 * own * work.features * work.size + gathered,
        "statistics": work.ranks * work.told if work.ranks > 1 else 0,
    }


# --- the forms ---


def _product(machine: Machine, m: float, n: float, k: float, size: int) -> float:
    return max(2 * m * n * k / machine.flops, size * (m * k + k * n + m * n) / machine.copy)


def _rows(work: Work, machine: Machine) -> Parts:
    """What both forms have: three times the bytes of the logits, and what the ranks tell each other of their rows."""
    passes = 3 * work.rows * work.shard * work.size * machine.row
    merged = work.ranks * work.told if work.ranks > 1 else 0
    times = work.chunks[0] if work.by_chunks else 1
    gathered = times * all_gather(machine, work.told / times, layout(machine, work.ranks))
    return Parts(passes=(passes + merged) / machine.copy, statistics=gathered, fixed=machine.fixed)


def row_form(work: Work, machine: Machine) -> Parts:
    """Statistics, one all-gather, epilogue, gradient."""
    return _rows(work, machine)


def linear_form(work: Work, machine: Machine, overlap: bool = True) -> Parts:
    """Three products a chunk where there is but one rank. Of more, statistics are whole when all chunks are through, so
    that the backward makes the logits once more."""
    count, _ = work.chunks
    rows, shard, features, size = work.rows / count, work.shard, work.features, work.size
    logits = _product(machine, rows, shard, features, size)
    by_hidden = _product(machine, rows, features, shard, size)
    half, again = size < 4, work.ranks > 1 and not work.by_chunks
    lost = half and count > 1 and not machine.sums
    by_weight = (1 + lost) * _product(machine, shard, features, rows, size)
    products = count * ((1 + again) * logits + by_hidden + by_weight)
    # Bytes for each element of the weight, where there is a sum: it is read for each chunk but the first, written wider
    # than the product would be, and handed over. A factor of 1 in the backward costs nothing.
    add = (4 + 2 * half) * (count > 1) + lost * (8 + 2 * size)
    handed = (4 + size) * half - 4
    sums = (count * add + handed * (count > 1)) * shard * features / machine.copy
    parts = _rows(work, machine)._replace(products=products, sums=sums)
    forward = logits + parts.passes / 3 / count
    backward = (products + sums + parts.passes) / count - forward
    last = by_weight + add * shard * features / machine.copy if overlap else 0.0
    return parts._replace(hidden=_hidden(work, machine, forward, backward, last))


def _hidden(work: Work, machine: Machine, forward: float, backward: float, last: float) -> float:
    """The collectives of hidden states and their gradient, less what hides them: the last product of the weight's
    gradient; of a chunk, the work on the chunk beside it."""
    if work.ranks == 1:
        return 0.0
    group = layout(machine, work.ranks)
    if not work.sequence:
        return max(0.0, all_reduce(machine, work.rows * work.features * work.size, group) - last)
    count, rows = work.chunks
    gathered = all_gather(machine, rows * work.features * work.size / work.ranks, group)
    reduced = gathered  # the same rings, the other way round
    between = max(0.0, gathered - forward) + max(0.0, gathered + reduced - backward)
    return 2 * gathered + max(0.0, reduced - last) + (count - 1) * between


def data_parallel(work: Work, machine: Machine, replicas: int) -> float:
    """The all-reduce of the weight's gradient over the groups; behind the backward of the model, where there is one."""
    size = work.shard * work.features * work.size
    return all_reduce(machine, size, layout(machine, replicas, stride=work.ranks))


#: What is made twice as fast to see how much depends on it.
RESOURCES: dict[str, Callable[[Machine], Machine]] = {
    "products": lambda m: m._replace(flops=2 * m.flops),
    "memory": lambda m: m._replace(copy=2 * m.copy),
    "bandwidth": lambda m: _links(m, 1.0, 2.0),
    "latency": lambda m: _links(m._replace(start=m.start / 2, fixed=m.fixed / 2), 0.5, 1.0),
}


def _links(machine: Machine, latency: float, bandwidth: float) -> Machine:
    inner, outer = (Link(latency * x.latency, bandwidth * x.bandwidth) for x in (machine.inner, machine.outer))
    return machine._replace(inner=inner, outer=outer)


def limit(seconds: Callable[[Machine], float], machine: Machine) -> str:
    """That which, made twice as fast, would save the most."""
    return min(RESOURCES, key=lambda name: seconds(RESOURCES[name](machine)))


def smallest(holds: Callable[[int], bool], powers: range = range(41)) -> int | None:
    """The smallest power of two for which it holds."""
    return next((2**power for power in powers if holds(2**power)), None)
