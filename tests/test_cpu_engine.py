"""The C++ engine: instruction sets, threads, number formats, bounds of memory, and what it refuses."""

import ast
import ctypes
import functools
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from kernel_suite import ROW_EPILOGUES, MomentSuite, job_of, run_job
from oracle import assert_as_accurate_as
from row_losses import INPLACE, LOSSES, computed, each_inplace_loss, takes
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.backends.native import native
from fusedloss.checks import compute_dtype
from fusedloss.definition.rows import Job, Rows, Spec
from fusedloss.definition.statistics import COEFFICIENTS, MAX, STATISTICS, SUM_EXP, TARGET_GRADIENT, TARGET_LOGIT, A
from fusedloss.engine import operators
from fusedloss.losses import _registry

if backends.unavailable("cpu") is not None:
    pytest.skip(str(backends.unavailable("cpu")), allow_module_level=True)

from fusedloss import _engine

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(
    rows: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits of which every second target is likely."""
    z = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    z[torch.arange(0, rows, 2), target[::2]] += 8
    return z.to(dtype), target


def rows_and_gradient(loss: Callable[..., Tensor], z: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    z = computed(z) if options.get("inplace_backward") else z.detach().requires_grad_()
    rows = loss(z, target, reduction="none", **options)
    upstream = torch.linspace(1, 2, rows.numel(), dtype=rows.dtype)
    return rows.detach(), torch.autograd.grad(rows, z, upstream)[0]


def statistics_of(z: Tensor, target: Tensor, top_k: int = 1, **picks: bool) -> tuple[Tensor, Tensor]:
    return operators.forward(*Rows.of(z, target), None, Spec("cpu", top_k=top_k, **picks).encode())[1:3]


def gradient_of_a(z: Tensor, target: Tensor, a: Tensor | float) -> Tensor:
    """a exp(z) as the gradient pass writes it, and `a` itself at the target."""
    rows, dtype = len(z), compute_dtype(z.dtype)
    statistics, coefficients = (torch.zeros(n, rows, dtype=dtype) for n in (STATISTICS, COEFFICIENTS))
    statistics[SUM_EXP] = 1
    coefficients[A] = coefficients[TARGET_GRADIENT] = a
    saved = (statistics, torch.zeros(0, rows, dtype=torch.int64), coefficients, None)
    return operators.backward(*Rows.of(z, target), *saved, Spec("cpu").encode())[0]


# Instruction sets


def test_the_best_instruction_set_runs_by_default():
    names = _engine.instruction_sets()
    assert names[-1] == "generic"
    _engine.use_instruction_set("")
    assert _engine.instruction_set() == names[0]
    with pytest.raises(ValueError, match="'sse9' is not available"):
        _engine.use_instruction_set("sse9")
    assert _engine.instruction_set() == names[0]


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_inplace_loss
def test_instruction_sets_agree(loss, dtype, instruction_set, generator):
    """Each is as good as the reference, at sizes below, at and beyond a vector, a block and a chunk of each."""
    for rows, classes in ((7, 3), (5, 16), (4, 67), (3, 2049), (2, 8200)):
        z, target = problem(rows, classes, generator, dtype)
        options = {"weight": torch.linspace(0.5, 2, classes)} if rows % 2 else {}
        truth, slope = rows_and_gradient(loss, z.double(), target, impl="reference", **options)
        full = z.to(torch.float64 if dtype == torch.float64 else torch.float32)
        eager, eager_slope = rows_and_gradient(loss, full, target, impl="reference", **options)
        got, got_slope = rows_and_gradient(loss, z, target, impl="cpu", **options)
        if dtype == torch.float64:  # no better truth; DSC cancels in it
            torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(got_slope, slope, rtol=1e-10, atol=1e-14)
            continue
        assert_as_accurate_as(got, eager, truth, ulps=8)
        # Terms of a gradient are p_j, and 1 - p_t at the target: those that cancel are as small as they are.
        p = z.double().softmax(-1)
        others = p.scatter(1, target[:, None], 0)
        scale = others.scatter(1, target[:, None], others.sum(-1, keepdim=True)) + slope.abs()
        assert_as_accurate_as(got_slope, eager_slope.to(dtype), slope, 16, scale)


# Threads


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 60_000), (3, 25_000), (129, 700), (5, 9000)], ids=str)
@pytest.mark.parametrize("name", INPLACE)
def test_bits_do_not_depend_on_threads_and_other_rows(name, shape, dtype, generator, threads):
    """Few rows are split over the threads, many are dealt to them, and one thread takes all: the same bits."""
    z, target = problem(*shape, generator, dtype)
    z[:, shape[1] // 3] = z[:, -1] = z.max() + 1  # a tie that may fall to different threads
    target[shape[0] // 2 + 1 :: 5] = -100
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(rows_and_gradient(LOSSES[name], z, target, impl="cpu", z_loss=0.01))
    for rows, slope in results[1:]:
        assert torch.equal(rows, results[0][0])
        assert torch.equal(slope, results[0][1])
    alone = LOSSES[name](z[-1:], target[-1:], reduction="none", impl="cpu", z_loss=0.01)
    assert torch.equal(alone, rows[-1:])


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 15, 16, 17, 50])
@pytest.mark.parametrize("classes", [1, 2, 9, 64, 65])
def test_narrow_rows_side_by_side_are_as_if_alone(rows, classes, dtype, generator, instruction_set):
    """Whatever the others hold: logits that are not finite, no target; each row with its own alpha and class weight."""
    z, target = problem(rows, classes, generator, dtype)
    z[1::7, 0], z[2::7, -1], z[3::7, -1] = torch.inf, torch.nan, -torch.inf
    target[::5] = -100
    alpha = torch.tensor([0.0, 0.01, 0.5, 1.0, 2.0]).repeat(rows)[:rows]
    weight = 0.5 + torch.rand(classes, generator=generator)

    def run(z: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return rows_and_gradient(fl.dsc_loss, z, target, alpha=alpha, weight=weight, z_loss=0.1, impl="cpu")

    loss, gradient = run(z, target, alpha)
    upstream = torch.linspace(1, 2, rows, dtype=loss.dtype)
    for i in range(rows):
        row, alone = run(z[i : i + 1], target[i : i + 1], alpha[i : i + 1])
        torch.testing.assert_close(loss[i], row[0], rtol=0, atol=0, equal_nan=True)
        wide = alone[0].to(loss.dtype) * upstream[i]
        torch.testing.assert_close(
            gradient[i].to(loss.dtype), wide, rtol=0.02 if z.itemsize == 2 else 1e-6, atol=1e-30, equal_nan=True
        )


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (50, 9), (17, 64), (19, 65), (3, 5000)], ids=str)
@pytest.mark.parametrize("name", ROW_EPILOGUES)
def test_a_gradient_made_with_the_loss_is_that_of_the_gradient_pass(name, shape, dtype, generator, instruction_set):
    """Also of logits that are not finite."""
    rows, spec, upstream = job_of(name, "cpu", *shape, dtype, generator)
    z = rows.logits
    z[1::7, 0], z[2::7, -1], z[3::7, -1] = torch.inf, torch.nan, -torch.inf
    found = [run_job(rows, spec, upstream, one_read) for one_read in (True, False)]
    for one, two in zip(*found, strict=True):
        wide = torch.promote_types(one.dtype, torch.float32)
        accuracy = {"rtol": 2 * torch.finfo(dtype).eps + 1e-5 * (wide != torch.float64), "atol": 1e-7}
        torch.testing.assert_close(one.to(wide), two.to(wide), equal_nan=True, **accuracy)


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
def test_the_gil_is_released(pass_name, generator, threads, monkeypatch):
    """While a pass runs, other Python threads do: a data loader's, a progress bar's."""
    threads(1)
    z, target = problem(256, 60_000, generator, torch.float64)
    engine_pass, span, ticks = getattr(_engine, pass_name), [], []

    def timed(*arguments: Any) -> None:
        span[:] = [time.perf_counter()]
        engine_pass(*arguments)
        span.append(time.perf_counter())

    monkeypatch.setattr(_engine, pass_name, timed)
    for _ in range(20):  # on a busy machine the other thread may have no turn for as long as the pass takes
        worker = threading.Thread(target=rows_and_gradient, args=(fl.cross_entropy, z, target), kwargs={"impl": "cpu"})
        worker.start()
        while worker.is_alive():
            time.sleep(0.0005)
            ticks.append(time.perf_counter())
        if sum(span[0] < tick < span[1] for tick in ticks) > 1:
            return
    pytest.fail(f"no other thread ran during the {pass_name}")


def test_calls_from_several_threads_do_not_mix(generator):
    problems = [problem(6, 9000, generator) for _ in range(4)]
    run = functools.partial(rows_and_gradient, LOSSES["dsc_loss one_vs_rest"], impl="cpu")
    expected = [run(*p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda p: [run(*p) for _ in range(5)][-1], problems), expected, strict=True):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


# Forked processes


def _processor_time(z: Tensor, target: Tensor, expected: Tensor) -> float:
    """The processor time of a pass over that of the thread that calls it, where the result has the right bits."""
    before = time.process_time(), time.thread_time()
    statistics = statistics_of(z, target, below=True, mean=True)[0]
    whole, own = time.process_time() - before[0], time.thread_time() - before[1]
    assert np.array_equal(statistics.numpy(), expected.numpy())  # torch's own comparison runs on threads
    return whole / own


def _a_child_on_threads(z: Tensor, target: Tensor, expected: Tensor) -> None:
    torch.use_deterministic_algorithms(False)
    assert _processor_time(z, target, expected) < 1.2
    fl.set_threads_after_fork(4)
    assert _processor_time(z, target, expected) > 1.4
    in_a_child(_a_child_of_that, z, target, expected)


def _a_child_of_that(z: Tensor, target: Tensor, expected: Tensor) -> None:
    assert _processor_time(z, target, expected) < 1.2


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("shape", [(2, 400_000), (400, 2000)], ids=["rows shared by threads", "rows to each thread"])
def test_a_forked_process_uses_threads_where_it_is_told_to(shape, generator, threads):
    """One until then, and one again in a child of its own; the bits are the parent's."""
    threads(2)
    z, target = problem(*shape, generator, torch.float64)
    expected = statistics_of(z, target, below=True, mean=True)[0]
    in_a_child(_a_child_on_threads, z, target, expected)
    for bad, error in ((True, TypeError), ("4", TypeError), (0, ValueError), (-1, ValueError)):
        with pytest.raises(error, match=f"threads must be .*{bad!r}"):
            fl.set_threads_after_fork(bad)
    fl.set_threads_after_fork(3)  # in a process that was not forked it changes nothing


#: Losses with a compiled epilogue; the others call torch.log, which may hang in a forked process.
COMPILED = [name for name in INPLACE if not name.startswith("flex_loss")]


def _check_losses(z, target, expected):
    # No operator of torch that runs on several threads belongs here: those do hang in a forked child.
    torch.use_deterministic_algorithms(False)  # or large new tensors are filled
    for name, right in zip(COMPILED, expected, strict=True):
        for x, y in zip(rows_and_gradient(LOSSES[name], z, target, impl="cpu"), right, strict=True):
            assert abs(x.numpy() - y.numpy()).max() < 1e-6


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("shape", [(2, 40_000), (300, 700)], ids=["rows shared by threads", "rows to each thread"])
def test_fork_after_threads_does_not_hang(shape, generator, threads):
    """Trap: a child that waits for worker threads which only its parent has."""
    threads(2)
    z, target = problem(*shape, generator)
    expected = [rows_and_gradient(LOSSES[name], z, target, impl="cpu") for name in COMPILED]
    in_a_child(_check_losses, z, target, expected)
    _check_losses(z, target, expected)  # and the parent still has its threads


OUT_OF_MEMORY = """
import os, resource
import torch
from fusedloss import _engine
from fusedloss.backends.native import native
from fusedloss.definition.rows import Job, Rows, Spec

ROWS, CLASSES = 16, 2000
torch.set_num_threads(2)
logits, target = torch.zeros(ROWS, CLASSES), torch.zeros(ROWS, dtype=torch.int64)

def forward(picks, outputs, candidates):
    loss, statistics, index, coefficients = outputs
    rows = Rows.of(logits, target, candidates=candidates)
    job = Job(rows, Spec("cpu"), statistics, index, loss, coefficients)
    _engine.forward(native(_engine.Job, job, (0, False), given=picks))

def tensors(picks):
    sizes = (1, 6 + picks, picks, 3 + picks)
    dtypes = (torch.float32, torch.float32, torch.int64, torch.float32)
    outputs = [torch.empty(size, ROWS, dtype=dtype) for size, dtype in zip(sizes, dtypes)]
    return outputs, torch.zeros(ROWS, picks, dtype=torch.int64)

def limit(more):
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))

def refused():
    try:
        forward(MANY, *many)
    except MemoryError:
        return True

FEW, MANY = 3, 1_000_000  # 32 MB for each thread
few, many = tensors(FEW), tensors(MANY)
forward(FEW, *few)
expected = few[0][0].tolist()
limit(2**22)
assert refused()
forward(FEW, *few)
child = os.fork()
if child == 0:
    _engine.set_threads_after_fork(2)
    assert refused()
    _engine.set_threads_after_fork(64)  # whose stacks there is no memory for
    few[0][0].zero_()
    forward(FEW, *few)
    os._exit(few[0][0].tolist() != expected)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and a limit of memory")
def test_memory_that_is_not_there_is_an_error_and_not_the_end():
    """In a thread's own memory, where an exception that gets out ends the process; and for the threads themselves."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the address sanitizer needs all the memory that there is")
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["0"]), done.stderr


# Number formats. The kernels read logits into `max` and the target's logit, and write a gradient of a * exp(0).


def all_bit_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_as_torch_reads_it(dtype, instruction_set):
    halves = all_bit_patterns(dtype)
    wide = halves.float()
    z = halves[:, None].expand(-1, 19)  # a vector of any set, and a tail
    target = torch.zeros(len(halves), dtype=torch.int64)
    for contiguous in (z.contiguous(), z[:, :3].contiguous()):
        statistics, index = statistics_of(contiguous, target)
        for name in (TARGET_LOGIT, STATISTICS):
            read = statistics[name]
            exact = ~wide.isnan()
            if name == TARGET_LOGIT:
                assert read[~exact].isnan().all()
            assert torch.equal(read[exact].view(torch.int32), wide[exact].view(torch.int32)) or (
                # of zeros, either may be the largest
                torch.equal(read[exact], wide[exact])
            )
        assert torch.equal(index[0], torch.zeros_like(target))
        finite = wide.isfinite()
        assert torch.equal(statistics[MAX][finite], wide[finite])
        assert statistics[SUM_EXP][wide.isnan()].isnan().all()


def roundings(dtype: torch.dtype) -> Tensor:
    """Floats at which rounding to `dtype` changes: all of its numbers, the midpoints between them, and neighbours."""
    numbers = all_bit_patterns(dtype).double()
    numbers = numbers[numbers.isfinite()].sort().values
    exact = numbers.float()
    middle = ((numbers[:-1] + numbers[1:]) / 2).float()
    infinity = torch.tensor(torch.inf)
    parts = [x for y in (exact, middle) for x in (y, y.nextafter(infinity), y.nextafter(-infinity))]
    top = torch.finfo(dtype).max
    beyond = [top * 1.0001, top * 1.001, top * 1.01, 65519.996, 65520.0, 1e-8, 3e-8, 1e-40, 1e-45, torch.inf]
    edges = torch.tensor(beyond, dtype=torch.float64).float()
    return torch.cat([*parts, edges, -edges, torch.tensor([torch.nan])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_float_is_written_as_torch_writes_it(dtype, instruction_set):
    """Ties to even, subnormal halves, overflow to infinity, NaN; in whole vectors, in tails and one by one."""
    values = roundings(dtype)
    expected = values.to(dtype)
    classes = 19
    z = torch.zeros(len(values), classes, dtype=dtype)
    got = gradient_of_a(z, torch.full((len(values),), classes - 1), values)
    assert expected.isinf().any() and (expected == 0).any() and expected.isnan().sum() == 1
    for column in got.unbind(1):
        assert torch.equal(column.isnan(), expected.isnan())
        same = column.view(torch.int16) == expected.view(torch.int16)
        wrong = values[~same & ~expected.isnan()]
        assert not len(wrong), f"{len(wrong)} floats, such as {wrong[:4].tolist()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp_is_accurate_over_its_range(dtype, instruction_set):
    lowest, deepest = (-87.0, -200.0) if dtype == torch.float32 else (-708.0, -2000.0)
    ln2 = 0.6931471805599453
    x = torch.cat([
        torch.linspace(lowest, 0, 60_000, dtype=torch.float64),
        -torch.logspace(-30, 1.9, 20_000, dtype=torch.float64),
        (torch.arange(-250, 1) * ln2 / 2).double().clamp(min=lowest),  # where the reduced argument is largest
        torch.tensor([0.0, -0.0]).double(),
    ]).to(dtype)[None]  # fmt: skip
    got = _exponential(x)
    error = (got.double() - x.double().exp()).abs() / x.double().exp()
    if dtype == torch.float64:  # the truth is as coarse there
        assert error.max() < 4 * torch.finfo(dtype).eps
    else:
        # Log(2) is rounded once: 2e-9 for each power of two, under what rounding x itself does to exp(x).
        assert (error / (1.5 + x.abs() / 64)).max() < torch.finfo(dtype).eps
    beyond = torch.tensor([[lowest - 0.1, lowest - 10, deepest, -1e30, -torch.inf]], dtype=dtype)
    assert not _exponential(beyond).any()
    assert _exponential(torch.tensor([[torch.nan, -torch.nan]], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("a", [0.70711, -3e-5, -(2.0**60)], ids=str)
def test_bfloat16_gradients_are_rounded_once(a, instruction_set):
    """a exp(z) where the exponential itself is rounded to bfloat16, and outside of the scales at which it is."""
    z = all_bit_patterns(torch.bfloat16)
    z = z[z <= 0][None]
    for scale in (a, a * 2.0**-80):
        got = _exponential(z, scale)
        assert got.dtype == torch.bfloat16
        exact = scale * z.double().exp()
        # Half of the last of 8 bits, and what float rounds before; exponentials end at -87, numbers at 2^-126.
        allowed = 0.5001 * torch.exp2(exact.abs().log2().floor() - 7)
        allowed[(z < -87) | (exact.abs() < 2.0**-126 * 1.0001)] += 2.0**-125
        assert ((got.double() - exact).abs() <= allowed).all()
        assert not got[z == -torch.inf].any()
    near = z[z > -80][None]
    assert _exponential(near, torch.nan).isnan().all()
    assert (_exponential(near, -torch.inf) == -torch.inf).all()
    assert not _exponential(near, 0.0).any()


def _exponential(x: Tensor, a: float = 1.0) -> Tensor:
    """a exp(x) as the gradient pass computes it, x (1, V)."""
    padded = torch.cat([x, x.new_zeros(1, 1)], 1)  # the last column is the target, whose gradient is another
    return gradient_of_a(padded, torch.tensor([x.shape[1]]), a)[:, :-1]


@each_inplace_loss
def test_huge_gaps_between_logits(loss, instruction_set):
    """Rows whose exponentials underflow but for one, either way around: finite, and exact where the limit is."""
    z = torch.zeros(4, 50)
    z[0, 7], z[1, 7], z[3] = 3e38, -3e38, -3e38
    z[2] = torch.linspace(-3e38, 3e38, 50, dtype=torch.float64)
    target = torch.tensor([7, 3, 49, 11])
    rows, slope = rows_and_gradient(loss, z, target, impl="cpu")
    truth, its_slope = rows_and_gradient(loss, z.double(), target, impl="reference")
    mixes_others_in = "mixed" in repr(loss)
    assert rows.isfinite().all() or mixes_others_in
    torch.testing.assert_close(rows.double(), truth, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(slope.double(), its_slope, rtol=2e-6, atol=1e-7)


# Bounds of memory


def _map_with_guards(size: int) -> tuple[mmap.mmap, int]:
    """Memory with `size` bytes, whole pages, between two pages that nobody may touch; and the offset of the first."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + page + size):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    return memory, page


def guarded(values: Tensor, at_end: bool) -> Tensor:
    """A copy of `values` that starts right after, or ends right before, memory that nobody may touch."""
    bytes_used = values.numel() * values.element_size()
    size = -(-bytes_used // mmap.PAGESIZE) * mmap.PAGESIZE
    memory, offset = _map_with_guards(size)
    if at_end:
        offset += size - bytes_used
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return flat.view(values.shape).copy_(values)


def in_a_child(body: Callable[..., None], *arguments: Any) -> None:
    """Runs it in a forked process, which an access to the wrong memory ends with a signal."""
    child = multiprocessing.get_context("fork").Process(target=body, args=arguments)
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode == 0


needs_guards = pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs mmap and fork")


def _run_between_guards(dtype: torch.dtype, classes: int, at_end: bool) -> None:
    torch.use_deterministic_algorithms(False)  # whose filling of memory runs on threads, which a child lacks
    generator = torch.Generator().manual_seed(1)
    z, target = problem(2, classes, generator, dtype)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    weight = guarded(torch.linspace(0.5, 2, classes, dtype=full), at_end)
    for name in INPLACE:
        smooth = {"label_smoothing": 0.1} if takes(LOSSES[name], "label_smoothing") else {}
        for options in ({}, {"weight": weight, **smooth}):
            expected = rows_and_gradient(LOSSES[name], z, target, impl="cpu", **options)[1]
            logits, index = guarded(z, at_end), guarded(target, at_end)
            got = rows_and_gradient(LOSSES[name], logits, index, impl="cpu", inplace_backward=True, **options)[1]
            assert got.data_ptr() == logits.data_ptr()
            assert torch.equal(got, expected)


@needs_guards
@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_outside_of_the_rows_is_touched(dtype, at_end, instruction_set):
    """Vectors that reach beyond the last column, in reads of logits and weights and in writes of gradients."""
    for classes in (2, 17, 95, 8193):
        in_a_child(_run_between_guards, dtype, classes, at_end)


def _ignore_rows(ignore_index: int) -> None:
    torch.use_deterministic_algorithms(False)
    for at_end in (False, True):
        z = guarded(torch.randn(2, 512), at_end)  # whole pages: guards on both sides
        weight = guarded(torch.ones(1024), at_end)[:512]
        target = torch.tensor([ignore_index, ignore_index])
        for loss in (LOSSES[name] for name in INPLACE):
            rows, slope = rows_and_gradient(loss, z, target, weight=weight, ignore_index=ignore_index, impl="cpu")
            assert not rows.any() and not slope.any()
        candidates = torch.full((2, 2), 511)
        fl.mixed_cross_entropy(z, target, alpha=0.5, candidates=candidates, ignore_index=ignore_index, impl="cpu")


@needs_guards
def test_ignore_index_is_looked_at_before_it_is_an_index():
    """A read at z[-100], or beyond the row, or of the weight of class -100, for a row that counts for nothing."""
    for ignore_index in (-100, 5000, 2**40):
        in_a_child(_ignore_rows, ignore_index)


# What it is told


def test_first_invalid():
    large, many = (2**32, 2**32 + 1, 2**63 - 1, -(2**63)), [1] * 5000
    cases = [
        ([], {}, -1), ([0, 4, -100, 2], {}, -1), ([0, 5, -1], {}, 1), ([0, 4, -1, 7], {}, 2), ([-100, -99], {}, 1),
        ([3], {"ignored": 3}, -1), ([-100], {"ignored": 3}, 0), (many, {}, -1), ([*many, 5], {}, 5000),
        *(([1, x], {}, 1) for x in large), *(([1, x], {"ignored": x}, -1) for x in large),
    ]  # fmt: skip
    for target, options, expected in cases:
        tensor = torch.tensor(target, dtype=torch.int64)
        found = _engine.first_invalid(tensor.data_ptr(), len(target), 5, options.get("ignored", -100))
        assert found == expected, (target[:9], options)


def test_more_parameters_than_there_is_room_for_are_refused():
    rows = Rows.of(torch.zeros(1, 3), torch.tensor([0]), params=[torch.zeros(())] * 5)
    with pytest.raises(ValueError, match="at most 4 parameters"):
        native(_engine.Job, Job.new(rows, Spec("cpu")), (0, False))


def test_the_stub_names_what_is_there():
    stub = ast.parse((Path(fl.__file__).parent / "_engine.pyi").read_text(encoding="utf8"))
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert declared == {name for name in dir(_engine) if not name.startswith("_")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_very_different_height(dtype, generator, instruction_set):
    """Exponentials are taken relative to a logit seen early, which later ones may exceed by little or by far."""
    steps = torch.tensor([0.0, 5, 30, 31.5, 33, 60, 90, 300])
    rise = steps[torch.randint(len(steps), (60, 20), generator=generator)].repeat_interleave(512, 1)
    z = (torch.randn(60, 10_240, generator=generator) + rise).to(dtype)
    z[:20, :300] = -torch.inf
    z[10:30, 3000:9000] = -torch.inf
    target = torch.randint(z.shape[1], (60,), generator=generator)
    stats = fl.cross_entropy(z, target, reduction="none", return_stats=True, impl="cpu")[1]
    exact = z.double().logsumexp(1)
    torch.testing.assert_close(stats.lse.double(), exact, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0)
    assert torch.equal(stats.argmax, z.double().argmax(1))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_terms_of_small_and_of_large_probabilities(dtype, weighted, generator, instruction_set):
    """A class term is a polynomial where all probabilities of some columns are small."""
    rows, classes = 24, 9000
    z = torch.randn(rows, classes, generator=generator)
    z[::2] += torch.tensor([0.0, 24.0, 10.0]).repeat_interleave(3000)  # powers of exp(24) are infinite
    z[::3, torch.randint(classes, (5,), generator=generator)] += 7  # probabilities of some percent
    z[::4, 1000:3000] = -torch.inf
    z[1] = 0
    z = z.to(dtype)
    target = torch.where(
        torch.arange(rows) % 5 < 2, z.argmax(1), torch.randint(3000, classes, (rows,), generator=generator)
    )
    weight = torch.rand(classes, generator=generator) if weighted else None
    upstream = torch.linspace(1, 2, rows)
    terms: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (fl.dsc_loss, {"alpha": alpha, "smooth": smooth, "squared": squared, "detach_weight": detach})
        for alpha, smooth, squared, detach in [
            (1.0, 1.0, False, False),
            (torch.linspace(0, 8, rows), 1.0, True, False),
            (0.5, 1e-2, False, True),
            (0.5, 1e-9, True, False),
        ]
    ]
    (with_prices,) = [
        x.row for name, x in _registry.LOSSES.items() if x.without and name not in ("dsc_loss", "dice_loss")
    ]
    terms.append((with_prices, {"alpha": 0.9, "beta": 0.1, "smooth": 0.5}))
    for loss, options in terms:
        results = []
        for logits, impl in ((z, "cpu"), (z.double(), "reference")):
            kind = compute_dtype(logits.dtype)
            same = {k: v.to(kind) if isinstance(v, Tensor) else v for k, v in options.items()}
            weights = {} if weight is None else {"weight": weight.to(kind)}
            leaf = logits.detach().requires_grad_()
            row = loss(leaf, target, reduction="none", form="one_vs_rest", impl=impl, **same, **weights)
            results.append((row.detach(), torch.autograd.grad(row, leaf, upstream.to(row.dtype))[0]))
        (row, gradient), (exact_row, exact) = results
        torch.testing.assert_close(row.double(), exact_row, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
        rounding = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 2**-8}[dtype]
        off = (gradient.double() - exact).abs() - rounding * exact.abs()
        error = 1e-12 if dtype == torch.float64 else 3e-5
        assert (off <= error * exact.abs().amax(1, keepdim=True)).all(), (loss, options)


@pytest.mark.covering(2)
class TestMoments(MomentSuite):
    ENTROPY_ERROR = (2, 1)
    PARTS_OF: ClassVar = [(4, 3), (40, 64), (5, 2049), (3, 20001)]

    @pytest.fixture
    def impl(self) -> str:
        return "cpu"
