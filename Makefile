# Everything runs in .venv, which the first target that needs it makes. `make PYTHON=python3.12 test` chooses
# another interpreter for it, `make test ARGS="-k focal"` passes arguments on, and pip's own settings
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) say where torch comes from: the default build of it is for NVIDIA GPUs.

PYTHON ?= python3
ARGS ?=
PAPERS ?= calibration dice contrastive mixed_cross_entropy
CASES ?= 20000
BIN := .venv/bin
# Modules are compiled when they are imported, of torch's a small part.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/cuda tools -name '*.cpp' -o -name '*.h' -o -name '*.cu')
SANITIZED := build/sanitize
VERSIONS := build/versions
VERSION_TESTS := $(addprefix tests/test_,$(addsuffix .py,compile autograd operators transforms flex supcon distillation linear nn triton)) \
    -k "not (TestRowLoss or TestKernels or TestSecondRow or gradcheck or accurate or small_factors or every_size or peak_memory or not_stored)"
# ON builds the CUDA kernels or fails, OFF leaves them out; AUTO builds them where there are an NVIDIA GPU and nvcc.
CUDA ?= AUTO
export SKBUILD_CMAKE_DEFINE = FUSEDLOSS_CUDA=$(CUDA)
# Two at a time, whose threads must not spin while they wait; pytest-benchmark wants to be alone and has no part in it.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadscope -p no:benchmark
# The tests start a hundred processes that import torch, which takes three times as long where each compiles its modules.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-lm demo-tp demo-fewshot demo-distill demo-eole papers test test-all test-versions fuzz bench report scale compile-report gpu-report shape lint docs dist wheel sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24

# Each demo takes ARGS=--quick, with which it ends in under 2 minutes.
demo: .venv/installed ## train a small translation model, CE beside mixed CE, about 4 minutes on 2 cores
	$(BIN)/python examples/nmt/train.py $(if $(findstring --quick,$(ARGS)),,--steps 600) $(ARGS)

demo-lm: .venv/installed ## train a small language model with transformers' Trainer, about 3 minutes
	$(BIN)/python examples/lm/train.py $(ARGS)

demo-tp: .venv/installed ## the same model, its output layer divided over 2 ranks, against one rank: about 2 minutes
	$(BIN)/torchrun --nproc-per-node 2 examples/lm/tensor_parallel.py $(ARGS)

demo-fewshot: .venv/installed ## fine-tune an encoder on few questions, CE against CE + SupCon: 10 minutes of processor time
	$(BIN)/python examples/fewshot/train.py $(ARGS)

demo-distill: .venv/installed ## teach small translation models by a first one, against CE and mixed CE: 5 minutes on 2 cores
	$(BIN)/python examples/distill/train.py $(if $(findstring --quick,$(ARGS)),,--steps 320) $(ARGS)

demo-eole: .venv/installed-eole ## train Eole's Transformer by its own loss and by the fused one: 15 minutes of processor time
	$(BIN)/python examples/eole/train.py $(ARGS)

papers: .venv/installed ## what the losses' papers claim, on real data, up to 50 minutes each: PAPERS=calibration
	@for paper in $(PAPERS); do echo "$$paper"; $(BIN)/python examples/papers/$$paper.py $(ARGS) || exit 1; done

test: .venv/installed build/triton36/installed .venv/tried-eole ## run the tests
	$(PYTEST) $(ARGS)

test-all: .venv/installed build/triton36/installed .venv/tried-eole ## run them on all products of losses, shapes, dtypes and options
	$(PYTEST) -m "" $(ARGS)

# What depends on torch most: its compiler, its autograd functions, the triton that comes with it. Digits, shapes and memory
# are left to `make test`.
test-versions: $(VERSIONS)/oldest/installed $(VERSIONS)/newest/installed ## run a part of the tests on the oldest torch and on the newest
	@for torch in oldest newest; do \
	    $(VERSIONS)/$$torch/bin/python -c 'import torch; print("torch", torch.__version__)' && \
	    $(subst $(BIN),$(VERSIONS)/$$torch/bin,$(PYTEST)) -q \
	        -m "not exhaustive" $(VERSION_TESTS) $(ARGS) || exit 1; \
	done

fuzz: .venv/installed ## draw losses, arguments and logits at random, half an hour: CASES=100000, ARGS="-k levels"
	CASES=$(CASES) OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 -p no:benchmark tests/test_fuzz.py \
	    --hypothesis-profile=fuzz --hypothesis-show-statistics --tb=short $(ARGS)

bench: .venv/installed ## run the benchmarks, ARGS="-k focal" some; compares with this machine's report, writes into build
report: .venv/installed ## run all of them, half an hour; writes this machine's report, and README if the figures there are its
bench: OUTPUT := --output build/bench
bench report:
	@mkdir -p build
	$(BIN)/pytest bench --benchmark-json=build/pytest-benchmark.json $(ARGS)
	$(BIN)/python bench/report.py build/pytest-benchmark.json $(OUTPUT)

scale: .venv/installed ## predict the losses on many GPUs; writes a table and a plot
	$(BIN)/python bench/scale.py $(ARGS)

compile-report: .venv/installed build/triton36/installed ## compile the Triton and CUDA kernels for GPUs that need not be here; writes tables
	$(BIN)/python bench/compile_report.py $(ARGS)

gpu-report: .venv/installed ## on a machine with a GPU, 8 minutes: what is right and how fast; ARGS=--rehearse needs none
	$(BIN)/python bench/gpu_report.py $(ARGS)

shape: .venv/installed ## print the figures of the package's shape and their bars; ARGS=--assert fails where one is over
	$(BIN)/python tools/shape.py $(ARGS)

lint: .venv/installed-lint ## ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

docs: .venv/installed-lint ## build the documentation into build/docs; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -q docs build/docs $(ARGS)

dist: .venv/installed-lint ## build dist/*.tar.gz, and the wheel from it
	rm -rf dist
	$(BIN)/python -m build

wheel: .venv/installed-lint ## build dist/*.tar.gz, and from it a wheel for every Linux with glibc 2.28 or newer
	tools/wheel.sh

sanitize: $(SANITIZED)/installed ## run the tests on an engine built with ASan and UBSan (g++)
	env LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    FUSEDLOSS_KEEP_BYTES=0 \
	    $(SANITIZED)/venv/bin/python -m pytest -n 2 -p no:benchmark -m "not compile" $(ARGS)

clean: ## remove everything that these targets made
	rm -rf .venv build dist

# The whole chain of "from nothing": each line says what to install where something is missing.
.venv/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || \
	    { echo "No $(PYTHON) here. On Debian or Ubuntu: apt install python3 python3-venv python3-dev"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "fusedloss needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version)." \
	           "Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make a virtual environment." \
	           "On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	    { echo "The headers of $(PYTHON) are missing (Python.h)." \
	           "On Debian or Ubuntu: apt install python3-dev"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	    { echo "No C++ compiler here. On Debian or Ubuntu: apt install g++"; exit 1; }
	$(PYTHON) -m venv .venv

# Editable, so that a changed .py needs no reinstall; the kept build folder makes a changed .cpp a matter of
# seconds. Only the first run shows what is being installed.
.venv/installed: $(BUILD_INPUTS) | .venv/pyvenv.cfg
	$(PIP_INSTALL) $(if $(wildcard $@),--quiet) cmake ninja pybind11 scikit-build-core
	SKBUILD_BUILD_DIR=build/make $(PIP_INSTALL) $(if $(wildcard $@),--quiet) \
	    --no-build-isolation --editable ".[test,demo,bench]"
	@touch $@

.venv/installed-lint: pyproject.toml constraints.txt | .venv/installed
	SKBUILD_BUILD_DIR=build/make $(PIP_INSTALL) $(if $(wildcard $@),--quiet) \
	    --no-build-isolation --editable ".[dev]"
	@touch $@

# Eole asks for 28 packages, web servers and spaCy among them, of which its training needs few.
# The tests of it are skipped, and say so, where pip has none for this Python.
.venv/tried-eole: examples/eole/requirements.txt | .venv/installed
	@$(MAKE) --silent .venv/installed-eole > $@.log 2>&1 || { echo "No Eole in .venv; pip said:"; tail -n 1 $@.log; }
	@touch $@

.venv/installed-eole: examples/eole/requirements.txt | .venv/installed
	$(PIP_INSTALL) pydantic
	$(PIP_INSTALL) --no-deps -r $<
	@touch $@

# Environments that have a torch of their own, and find all else in .venv, the built engine too, which links no torch.
# The oldest is the one that pyproject.toml names. No constraints: what such a torch needs is its own affair.
$(VERSIONS)/oldest/installed: TORCH = $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]/torch==\1.0/p' pyproject.toml)
$(VERSIONS)/newest/installed: TORCH = --upgrade torch
$(VERSIONS)/%/installed: pyproject.toml constraints.txt | .venv/installed
	$(BIN)/python -m venv --clear $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > \
	    "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-compile --quiet $(TORCH)
	@touch $@

# The oldest Triton that is supported, beside the installed one: kernels are compiled with both. Where pip has none, the
# tests of it are skipped and say why; another try is made when the folder has been removed.
build/triton36/installed: .venv/pyvenv.cfg
	@rm -rf $(@D) && mkdir -p $(@D)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet --no-deps --target $(@D) triton==3.6.0 \
	    2> $(@D).log || { echo "No triton 3.6.0 beside the installed one; pip said:"; tail -n 1 $(@D).log; }
	@touch $@

# An environment of its own for the sanitized engine; everything else it finds in .venv, through a .pth file.
$(SANITIZED)/installed: $(BUILD_INPUTS) | .venv/installed
	$(BIN)/python -m venv --clear $(SANITIZED)/venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    "$$($(SANITIZED)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	CXX="$(CXX)" SKBUILD_BUILD_DIR=$(SANITIZED)/cmake SKBUILD_INSTALL_STRIP=false \
	    SKBUILD_CMAKE_DEFINE="FUSEDLOSS_SANITIZE=ON;FUSEDLOSS_CUDA=OFF" $(SANITIZED)/venv/bin/python -m pip install --quiet \
	    --no-deps --no-build-isolation --editable .
	@touch $@
