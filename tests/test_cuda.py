"""The CUDA kernels, on a host that plays the GPU (tests/cuda/host_device.h): blocks of fibers, in clusters.

The shared suite on the cases that differ in them, and what is theirs alone. On a GPU those of test_gpu.py take over.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
import test_distillation
import torch
from cuda_host import ROOT, compiler, load
from kernel_suite import CASES, ROW_EPILOGUES, SUITES, WAYS, KernelSuite, job_of, rows_of_moments, run_job
from row_losses import computed
from row_suite import RowLossSuite, compute_dtype, logits_and_targets, with_gradient
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.backends import cuda
from fusedloss.backends.base import Epilogues
from fusedloss.definition.rows import Rows, Spec
from fusedloss.definition.statistics import ALL_MOMENTS
from fusedloss.engine import operators as ops

if compiler() is None:
    pytest.skip("there is no C++ compiler to build the kernels for the host with", allow_module_level=True)

pytestmark = pytest.mark.compile

CUDA, PLAN = backends.BACKENDS["cuda"], cuda.plan

#: Of the host's blocks: two warps, so that rows of the tests have several tiles, more than are on their way at a time.
THREADS = 64


def cut(parts: int = 1, on_chip: bool = True, threads: int = THREADS) -> Callable[..., cuda.Plan]:
    """A plan of so many parts, with room for all of each, or for no more than the tiles on their way."""

    def plan(classes: int, itemsize: int, *limits: object) -> cuda.Plan:
        packs = -(-classes * itemsize // 16)
        tiles = -(-(-(-packs // parts) * 16) // (threads * cuda.ITEM_BYTES))
        return cuda.Plan(threads, parts, tiles if on_chip else cuda.STAGES)

    return plan


@pytest.fixture(scope="module", autouse=True)
def _on_the_host() -> Iterator[None]:
    """The kernels that were built for the host, in place of those of a GPU, if there are any."""
    with pytest.MonkeyPatch.context() as patch:
        kernels = load()
        patch.setattr(cuda, "_cuda", kernels)
        patch.setattr(cuda.Cuda, "epilogues", Epilogues.of(kernels))
        patch.setattr(cuda.Cuda, "runs_on", "cpu")
        cuda._limits.cache_clear()
        yield
        cuda._limits.cache_clear()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "plan", cut(2))
    monkeypatch.setattr(cuda, "_SUM_BLOCKS", 2)


@pytest.fixture
def impl() -> str:
    return "cuda"


@pytest.fixture
def compiled_impl() -> str:
    return "cuda"


@pytest.mark.covering(1)
class TestRowLoss(RowLossSuite):
    """All of the suite, on one case for each way through the kernels."""

    CASES: ClassVar = [CASES[name] for name in WAYS]
    CERTAIN: ClassVar = [
        case if i % 4 == 0 else pytest.param(case, marks=pytest.mark.exhaustive)  # the engine's epilogues, as they are
        for suite in SUITES.values()
        for i, case in enumerate(suite.CERTAIN)
    ]

    test_gradcheck = None
    test_long_rows = None


@pytest.mark.covering(1)
class TestKernels(KernelSuite):
    SUMS: ClassVar = [(5, 9), (270, 9), (20, 600)]
    WIDTHS: ClassVar = [1, 2, 70, 4099]
    #: In one block and in clusters of them, some of which have no column, and with tiles that are read twice.
    DIVISIONS: ClassVar = {
        f"{parts} parts, {'on chip' if on_chip else 'too wide'}": (cuda, "plan", cut(parts, on_chip))
        for parts, on_chip in ((1, True), (1, False), (2, True), (2, False), (4, True), (8, True))
    }
    SCALE_PROGRAMS: ClassVar = (cuda, "_SCALE_BLOCKS")


# --- loss and gradient of one read ---


NAMES = ("loss", "statistics", "index", "coefficients", "gradient")


@pytest.mark.covering(1)
@pytest.mark.parametrize("on_chip", [True, False], ids=["on chip", "too wide"])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("epilogue", ROW_EPILOGUES)
def test_one_read_gives_the_bits_of_two(epilogue, parts, on_chip, generator, monkeypatch):
    for classes, dtype in ((9, torch.float32), (4099, torch.float64), (33000, torch.bfloat16)):
        monkeypatch.setattr(cuda, "plan", cut(parts, on_chip))
        rows, spec, row_weight = job_of(epilogue, "cuda", 4, classes, dtype, generator)
        spec = spec._replace(moments=ALL_MOMENTS if dtype == torch.float64 else 0)
        one, two = (
            run_job(rows._replace(hidden=[z]), spec, row_weight, one_read, z)
            for one_read in (True, False)
            for z in [rows.logits.clone()]
        )
        for name, x, y in zip(NAMES, one, two, strict=True):
            assert torch.equal(x, y), name
        assert not one[-1][2].any()
        assert one[-1].isfinite().all()


#: Each dtype, in one part and in two, on chip and too wide for it.
CUT = [
    (torch.bfloat16, 1, True),
    (torch.bfloat16, 2, False),
    (torch.float32, 1, False),
    (torch.float64, 2, True),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("dtype", "parts", "on_chip"), CUT, ids=str)
@pytest.mark.parametrize("epilogue", ["cross_entropy", "dsc_one_vs_rest", "mixture_kl", "soft_targets"])
def test_bits_do_not_depend_on_the_address(epilogue, dtype, parts, on_chip, generator, monkeypatch):
    """Rows and their gradients begin at every distance from a multiple of 16 bytes, and from each other's."""
    monkeypatch.setattr(cuda, "plan", cut(parts, on_chip))
    size = dtype.itemsize
    rows = pack = 16 // size
    tiles = cuda.STAGES + 1  # of each warp, and a few columns
    classes = parts * tiles * THREADS * cuda.ITEM_BYTES // size + 3
    batch, spec, row_weight = job_of(epilogue, "cuda", rows, classes, dtype, generator)

    def moved_by(offset: int, stride: int, x: Tensor) -> Tensor:
        return x.new_empty(rows * stride + pack)[offset:].as_strided((rows, classes), (stride, 1)).copy_(x)

    def laid_out(offset: int, stride: int) -> Rows:
        teacher = [moved_by(offset // 2, stride, x) for x in batch.teacher]
        return batch._replace(hidden=[moved_by(offset, stride, batch.logits)], teacher=teacher)

    aligned = laid_out(0, classes + 16 - 3)
    assert aligned.logits.stride(0) % pack == 0
    right = run_job(aligned, spec, row_weight, True, aligned.logits)
    for offset in range(pack):
        moved = laid_out(offset, classes)
        for one_read, grad in ((True, None), (False, None), (True, moved.logits)):
            found = run_job(moved, spec, row_weight, one_read, grad)
            assert [torch.equal(x, y) for x, y in zip(found, right, strict=True)] == [True] * 5, offset


def test_moments_take_nothing_from_the_other_statistics(generator, monkeypatch):
    """Which have the same digits; and the moments do not depend on how the rows are cut."""
    z, target = rows_of_moments(4099, generator, torch.float64)
    z[7, target[7]] = -torch.inf
    rows = Rows.of(z, target, candidates=torch.randint(4099, (9, 3), generator=generator))
    found = []
    for parts, on_chip, moments in (
        (2, True, 0),
        (1, True, ALL_MOMENTS),
        (2, False, ALL_MOMENTS),
        (8, True, ALL_MOMENTS),
    ):
        monkeypatch.setattr(cuda, "plan", cut(parts, on_chip))
        spec = Spec("cuda", top_k=2, below=True, mean=True, moments=moments)
        found.append(ops.forward(*rows, None, spec.encode())[1:3])
    without = found[0][0].shape[0]
    for statistics, index in found[1:]:
        torch.testing.assert_close(statistics[:without], found[0][0], rtol=1e-13, atol=0)
        torch.testing.assert_close(statistics[without:], found[1][0][without:], rtol=1e-13, atol=0)
        assert torch.equal(index, found[0][1])


def test_more_warps_than_a_warp_has_threads(generator, monkeypatch):
    """A thread then merges the sums of several warps, those of equal maxima and of class terms among them."""
    z, target = (x[3:6] for x in rows_of_moments(4099, generator, torch.float64))
    rows, loss = Rows.of(z, target), partial(fl.dsc_loss, target=target, reduction="none", impl="cuda")
    found = []
    for plan in (cut(1), cut(8, threads=cuda.MAX_THREADS)):
        monkeypatch.setattr(cuda, "plan", plan)
        specs = Spec("cuda", top_k=2, below=True, mean=True, moments=ALL_MOMENTS), Spec("cuda")
        statistics = [ops.forward(*rows, None, spec.encode())[1:3] for spec in specs]
        found.append((*statistics, with_gradient(loss, z, torch.ones(3))))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-18)


def test_the_lowest_number_is_a_logit():
    """It is also what the maximum of no logits begins with."""
    low, nothing = torch.finfo(torch.float32).min, -torch.inf
    z = torch.tensor([[low, low, low], [nothing, low, nothing], [low, nothing, 1.0]])
    losses = [
        partial(fl.cross_entropy, target=torch.tensor([1, 1, 0]), reduction="none", impl=x) for x in ("cuda", "cpu")
    ]
    found, right = (with_gradient(loss, z, torch.ones(3)) for loss in losses)
    torch.testing.assert_close(found, right)
    assert not found[1][1].any()


def test_candidates_of_one_class_share_a_column(generator):
    """More of them than threads of a warp, most of them twice, some of them the target."""
    z, target = logits_and_targets(3, 300, generator, torch.float64)
    candidates = torch.randint(40, (3, cuda.MAX_CANDIDATES), generator=generator)
    candidates[:, 5] = candidates[:, 63] = target
    results = [
        with_gradient(lambda x, i=impl: fl.mixed_cross_entropy(x, target, alpha=0.5, candidates=candidates, impl=i), z)
        for impl in ("cuda", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


def test_what_the_gradient_does_not_read_again(generator, monkeypatch):
    """On chip, a second look costs no read: the launch has room for all tiles, and for few where it looks but once."""
    jobs = []
    monkeypatch.setattr(cuda, "plan", cut(1))
    monkeypatch.setattr(CUDA, "_launch", lambda function, job, logits: jobs.append(job.slots))
    rows = Rows.of(*logits_and_targets(2, 33000, generator, torch.float32))
    for needed in ((True,), ()):
        ops.forward(*rows, None, Spec("cuda", "cross_entropy", needed=needed).encode())
    assert jobs == [-(-33000 * 4 // (THREADS * cuda.ITEM_BYTES)), cuda.STAGES]


@pytest.mark.covering(1)
class TestSecondRow(test_distillation.TestSecondRow):
    """The shared tests of what the kernels compute."""


# --- a mean or a sum, whose gradient is made with it ---

ONE_READ = {("with_gradient", "cuda"): 1}
TWO_READS = {("forward", "cuda"): 1, ("backward", "cuda"): 1}


def _problem(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    z, target = logits_and_targets(7, 300, generator, dtype)
    target[2] = -100
    return z.requires_grad_(), target


#: Options by which the divisor and the rows' weights differ: of a generator, which gives token weights.
REDUCED = {
    "mean": lambda g: {},
    "sum": lambda g: {"reduction": "sum"},
    "weights": lambda g: {"weight": torch.rand(300, generator=g).double()},
    "token weights": lambda g: {"token_weight": torch.rand(7, generator=g).double()},
    "sum of token weights": lambda g: {"token_weight": torch.rand(7, generator=g).double(), "reduction": "sum"},
    "over the token weights": lambda g: {
        "token_weight": torch.rand(7, generator=g).double(),
        "normalizer": "token_weight",
    },
    "a number": lambda g: {"normalizer": 12.5},
    "a tensor": lambda g: {"normalizer": torch.tensor(12.5)},
    "a tensor in float64": lambda g: {"normalizer": torch.tensor(12.5).double()},
    "a count": lambda g: {"normalizer": torch.tensor(3)},
    "all terms": lambda g: {"label_smoothing": 0.1, "z_loss": 0.01, "weight": torch.rand(300, generator=g).double()},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", REDUCED)
@pytest.mark.parametrize("loss", [fl.cross_entropy, fl.dsc_loss], ids=["cross_entropy", "dsc_loss"])
def test_a_reduced_loss_is_of_one_read(loss, options, dtype, generator, monkeypatch, kernel_calls):
    """Which gives the bits of two. Its backward scales the gradient, for several upstream gradients a copy."""
    z, target = _problem(generator, dtype)
    own = {k: v.to(compute_dtype(dtype)) if k.endswith("weight") else v for k, v in REDUCED[options](generator).items()}
    if loss is fl.dsc_loss:
        own.pop("label_smoothing", None)
    results = []
    for impl, one_read, calls in (("cuda", True, ONE_READ), ("cuda", False, TWO_READS), ("reference", True, {})):
        monkeypatch.setattr(CUDA, "one_read", lambda *_, one_read=one_read: one_read)
        kernel_calls.clear()
        value, stats = loss(z, target, return_stats=True, impl=impl, **own)
        upstream = torch.tensor([1.0, -0.37], dtype=value.dtype)
        results.append((value, *stats, *(torch.autograd.grad(value, z, u, retain_graph=True)[0] for u in upstream)))
        if impl == "cuda":
            assert bool(kernel_calls.pop(("scale_", "cuda"), 0)) == one_read
            assert dict.fromkeys(kernel_calls, 1) == calls
        if one_read and impl == "cuda":
            (got,) = torch.autograd.grad(value, z, upstream, is_grads_batched=True)
            torch.testing.assert_close(got, torch.stack(results[-1][-2:]), rtol=0.01, atol=0)
    tolerance = {"rtol": 1e-11, "atol": 1e-15} if dtype == torch.float64 else {}
    torch.testing.assert_close(results[0][:-1], results[1][:-1], rtol=0, atol=0, equal_nan=True)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(results[0], results[2], equal_nan=True, **tolerance)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reduction", "none"), ("inplace_backward", True), ("gamma", torch.tensor(2.0, requires_grad=True)),
        ("token_weight", torch.ones(7, requires_grad=True)), ("normalizer", torch.tensor(3.0, requires_grad=True)),
        ("impl", "cuda"),
    ],
)  # fmt: skip
def test_what_takes_two_reads(name, value, generator, kernel_calls):
    """What needs the logits, other gradients than theirs, or float16, which is not rounded before it is scaled."""
    z, target = _problem(generator, torch.float16 if name == "impl" else torch.float32)
    results = []
    for impl in ("cuda", "cpu"):
        logits = computed(z.clone())
        loss = fl.focal_loss(logits, target, **{name: value, "impl": impl})
        results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
    torch.testing.assert_close(*results, rtol=1e-3 if z.dtype == torch.float16 else 1e-5, atol=1e-7)
    assert not {("with_gradient", "cuda"), ("scale_", "cuda")} & kernel_calls.keys()


def test_no_gradient_where_none_is_asked_for(generator, kernel_calls):
    z, target = _problem(generator)
    with torch.no_grad():
        without = fl.cross_entropy(z, target, impl="cuda")
    assert torch.equal(fl.cross_entropy(z.detach(), target, impl="cuda"), without)
    assert kernel_calls == {("forward", "cuda"): 2}
    assert torch.equal(fl.cross_entropy(z, target, impl="cuda"), without)


@pytest.mark.parametrize("hooks", [False, True])
def test_a_kept_gradient_is_not_scaled_twice(hooks, generator):
    """Nor where saved tensors come back as they are, by hooks."""
    z, target = _problem(generator, torch.float32)
    hooked = torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
    with hooked if hooks else contextlib.nullcontext():
        loss = fl.cross_entropy(z, target, impl="cuda")
    (right,) = torch.autograd.grad(fl.cross_entropy(z, target, impl="cpu"), z)
    for factor, keep in ((3.0, True), (3.0, True), (1.0, True), (0.25, hooks)):
        (gradient,) = torch.autograd.grad(loss, z, torch.tensor(factor), retain_graph=keep)
        torch.testing.assert_close(gradient, factor * right, rtol=1e-5, atol=1e-8)
        if not hooks:
            gradient.zero_()  # it is the caller's
    if not hooks:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, z)


def test_a_saved_gradient_does_not_hide_a_change_of_the_logits(generator):
    """It would be that of other logits than the caller has."""
    z, target = _problem(generator)
    logits = 1 * z
    loss = fl.cross_entropy(logits, target, impl="cuda")
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- how rows are cut ---

H100, A100 = (227 * 1024, True), (163 * 1024, False)


@pytest.mark.parametrize("limits", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_plans(itemsize, limits):
    for classes in (1, 7, 128, 1000, 32000, 50257, 128256, 151936, 262144, 2**30):
        threads, parts, slots = PLAN(classes, itemsize, *limits)
        assert threads % 32 == 0 and 32 <= threads <= cuda.MAX_THREADS
        assert parts in ((1, 2, 4, 8) if limits[1] else (1,))
        assert slots * (threads * cuda.ITEM_BYTES + threads // 2) + cuda.OVERHEAD <= limits[0]
        if classes * itemsize <= (parts if limits[1] else 1) * 150 * 1024:
            assert slots * threads * cuda.ITEM_BYTES * parts >= classes * itemsize  # on chip
        else:
            assert slots >= cuda.STAGES
    # Large vocabularies stay on chip where there are clusters.
    assert [PLAN(v, 2, *H100)[1:] for v in (32000, 128256, 262144)] == [(1, 8), (4, 8), (8, 8)]
    assert PLAN(262144, 2, *A100) == (256, 1, cuda.STAGES)


def test_sizes_are_those_of_the_kernels():
    names = ("MAX_THREADS", "ITEM_BYTES", "STAGES", "SUM_BYTES", "MAX_CANDIDATES")
    assert [getattr(cuda, name) for name in names] == [getattr(cuda._cuda, name.lower()) for name in names]
    for itemsize, dtype in ((2, 2), (4, 1), (8, 0)):
        threads, _, slots = PLAN(128256, itemsize, *H100)
        beside = cuda._cuda.shared_bytes(dtype, threads, slots) - slots * (threads * cuda.ITEM_BYTES + threads // 2)
        assert 0 < beside <= cuda.OVERHEAD


def test_what_it_does_not_take_is_refused(generator):
    z, target = logits_and_targets(2, 300, generator, torch.float32)
    candidates = torch.zeros(2, cuda.MAX_CANDIDATES + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 64 candidates for each target, got 65"):
        fl.mixed_cross_entropy(z, target, alpha=0.5, candidates=candidates, impl="cuda")
    fl.mixed_cross_entropy(z, target, alpha=0.5, candidates=candidates[:, :-1], impl="cuda")
    many = z[:, :1].expand(2, 2**30 + 1)
    with pytest.raises(ValueError, match="at most 1073741824 classes, got 1073741825"):
        CUDA._run(None, many, on_chip=False)
    with pytest.raises(ValueError, match="fewer than 1073741824 rows of 300 classes, got 1073741824"):
        CUDA._run(None, z[:1].expand(2**30, 300), on_chip=False)


def test_launches(tmp_path):
    """Attributes are set once for each kernel and device, and an error is that of the call that it came of."""
    program = tmp_path / "launches"
    folders = ("-I", str(ROOT / "tests/cuda/runtime"), "-I", str(ROOT / "csrc"))
    source = str(ROOT / "tests/cuda/launches.cpp")
    subprocess.run(
        [str(compiler()), "-std=c++17", "-Wall", "-Wextra", *folders, source, "-o", str(program)], check=True
    )
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines() == [
        "0",
        "shared memory of a CUDA kernel: invalid value",
        "4 3 of 1000 and 100",
        "launch of a CUDA kernel, or work that was launched before: invalid value",
        "a CUDA call before the launch of a kernel: illegal address",
        "6",
    ]


# --- where it runs ---


REFUSED = """
import sys, torch, fusedloss as fl
from unittest.mock import Mock
from fusedloss.backends import cuda
for kernels in (None, Mock()):
    cuda._cuda = kernels
    try:
        fl.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), impl="cuda")
    except RuntimeError as error:
        print(error)
print(fl.backends.resolve(None, torch.device("cpu")))
"""


def test_tensors_on_a_cpu_are_refused_and_nobody_gets_it_without_asking():
    blocked = "import sys; sys.modules['fusedloss._cuda'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + REFUSED], capture_output=True, text=True, timeout=120)
    not_built, built, default = done.stdout.splitlines()
    assert not_built.startswith("impl='cuda' cannot run: it is not built; with nvcc on PATH, SKBUILD")
    assert built.startswith("impl='cuda' cannot run: it runs on GPU tensors, but the") and default == "cpu"


# --- how it is built ---


def _configure(folder: Path, mode: str, path: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Where there is no nvcc, unless CUDACXX names one; `path` comes first on PATH."""
    paths = f"{path}{os.pathsep}{os.environ.get('PATH', '')}"
    cmake = shutil.which("cmake", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{paths}")
    if cmake is None or find_spec("pybind11") is None:
        pytest.skip("there is no cmake, or no pybind11, to configure a build with")
    import pybind11

    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DFUSEDLOSS_CUDA={mode}", *options]
    environment = os.environ | {"CUDACXX": "/nowhere/nvcc", "PATH": paths} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_build_without_nvcc_fails_only_where_it_must(tmp_path):
    for mode, message in (("ON", "CMake found no nvcc"), ("maybe", "must be AUTO, ON or OFF, and is maybe")):
        done = _configure(tmp_path / "build", mode)
        assert done.returncode != 0
        assert message in " ".join(done.stderr.split())
    done = _configure(tmp_path / "build", "OFF")
    assert "CUDA kernels: not built, because FUSEDLOSS_CUDA is OFF" in done.stdout, done.stderr


def test_kernels_are_built_where_a_gpu_is_seen(tmp_path):
    """And not for the compiler's sake alone. The driver's tool is another one here."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    tool.chmod(0o755)
    nvcc = {"CUDACXX": shutil.which("nvcc")} if shutil.which("nvcc") else {}
    done = _configure(tmp_path / "build", "AUTO", str(tmp_path), **nvcc)
    message = "CUDA kernels: built with " if nvcc else "CUDA kernels: not built, because CMake found no nvcc"
    assert done.returncode == 0 and message in done.stdout, done.stderr
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU here")
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    done = _configure(tmp_path / "build", "AUTO", str(tmp_path), **nvcc)
    assert "CUDA kernels: not built, because there is no NVIDIA GPU here; FUSEDLOSS_CUDA=ON builds" in done.stdout
