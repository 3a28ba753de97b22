# Everything a person or CI types. Environments are made on first use and made again only when a
# lock file or pyproject.toml changes.

HERE := $(realpath $(dir $(lastword $(MAKEFILE_LIST))))
ifneq ($(HERE),$(realpath $(CURDIR)))
$(error everything here is relative to the checkout: run `make -C $(HERE) $(MAKECMDGOALS)`)
endif

PYTHON ?= python3.12
VENV ?= .venv
# PyTorch lives apart: it may need another Python, and nothing of it may leak into a run.
REFERENCE_PYTHON ?= python3.12
REFERENCE_VENV ?= .venv-reference
# XLA's compiler for GPUs lives apart too: on a path of its own, only where it is asked for.
GPU_COMPILER ?= .gpu-compiler
# Kernels of a library, on the CPU: apart too, and on a GPU host in the environment of a run.
LIBRARY_VENV ?= .venv-kernels
# A host with NVIDIA's driver gets CUDA with its environment, and trains on its GPUs.
GPU_HOST ?= $(shell command -v nvidia-smi)
RUN_ENV = $(VENV)/$(if $(GPU_HOST),.gpu,.base)
CONFIG ?= tiny
TRAIN_FLAGS ?= $(if $(GPU_HOST),,--emulate 8 --layout cube)
BENCH ?= step
SEED ?= 0
# Compiling dominates the tests, so a worker per core pays; a file stays whole for its fixtures, and
# the longest come first (tests/conftest.py). A worker that crashes ends the run: the others would
# wait for its tests forever.
PYTEST_FLAGS ?= --durations 20 -n logical --dist loadfile --no-loadscope-reorder --max-worker-restart 0

PY = $(VENV)/bin/python
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet --progress-bar off
# What one test has compiled, no other compiles: workers and the processes that tests start share it.
# Of a stated size, so that it is locked while it is written.
CACHED = test slow reference library gpu-proof
$(CACHED): export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/cache/tests
$(CACHED): export JAX_COMPILATION_CACHE_MAX_SIZE ?= 2000000000
$(CACHED): export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1
# Without this, pyright asks the network whether it is the newest.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
# tests/conftest.py finds the reference environment by it.
export REFERENCE_VENV
# tests/test_gpu_programs.py finds the compiler by it.
export GPU_COMPILER

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train r1 env dev-env gpu-env gpu-check gpu-proof test slow gpu-test gpu-compiler \
	gpu-programs library lint format types reference-env reference janus bench clean distclean

help:  ## list these targets
	@grep -E '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

train: $(RUN_ENV)  ## train a preset: CONFIG=tiny TRAIN_FLAGS="--emulate 8 --layout cube"
	$(PY) train.py --config $(CONFIG) $(TRAIN_FLAGS)

r1: $(VENV)/.base  ## R1-Zero in small, from random weights to runs/r1_zero/rl.png
	PYTHON=$(PY) runs/r1_zero.sh runs

env: $(VENV)/.base  ## environment of a run
dev-env: $(VENV)/.dev  ## the same with test, lint and type tools

gpu-env: $(VENV)/.gpu  ## environment of a run on GPUs: CUDA 13 and the library of kernels, locked

gpu-check: $(VENV)/.base  ## what this host would tell a run on its GPUs, with remedies
	$(PY) -m runtime.gpu_host

gpu-proof: $(RUN_ENV)  ## everything that a GPU can prove, in 8 minutes; without one, its dry form
	$(PY) -m bench.gpu_proof --json gpu_proof.json

test: $(VENV)/.dev  ## default tests
	$(PY) -m pytest $(PYTEST_FLAGS)

slow: $(VENV)/.dev  ## tests too long for the default suite
	$(PY) -m pytest $(PYTEST_FLAGS) -m "slow and not gpu and not reference and not gpu_compile and not library"

gpu-test: $(VENV)/.dev $(VENV)/.gpu  ## tests that need a GPU
	JAX_PLATFORMS=cuda,cpu $(PY) -m pytest -m gpu

gpu-compiler: $(GPU_COMPILER)/.installed  ## XLA's compiler for GPUs, without GPU or driver (840 MB)

gpu-programs: $(VENV)/.dev $(GPU_COMPILER)/.installed  ## compile train steps for absent GPUs and read them
	$(PY) -m pytest -n 2 -m "gpu_compile and not slow"

library: $(LIBRARY_VENV)/.installed $(GPU_COMPILER)/.installed  ## kernels of the library, on CPU and compiled
	$(LIBRARY_VENV)/bin/python -m pytest -p no:xdist -m library

lint: $(VENV)/.dev  ## formatting and lint, nothing is changed
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check

format: $(VENV)/.dev  ## format, and fix what lint can fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

types: $(VENV)/.dev  ## type check of packages and entry points
	$(VENV)/bin/pyright --pythonpath $(PY)

reference-env: $(REFERENCE_VENV)/.installed  ## PyTorch and transformers, apart: REFERENCE_PYTHON=python3.12

janus: $(VENV)/.base  ## a small Janus learns to read and draw scenes: SEED=0, in runs/janus
	$(PY) train.py --config janus_tiny_tokenizer --run-dir runs/janus/tokenizer --seed $(SEED)
	$(PY) train.py --config janus_tiny --run-dir runs/janus/model --seed $(SEED) \
		--init-from runs/janus/tokenizer

reference: $(VENV)/.dev $(REFERENCE_VENV)/.installed  ## parity with PyTorch
	$(PY) -m pytest $(PYTEST_FLAGS) -m reference

bench: $(VENV)/.base  ## one measurement: BENCH=step
	$(PY) -m bench.$(BENCH)

clean:  ## remove tool caches; environments, data caches and runs stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## also remove environments, data caches and runs
	rm -rf $(VENV) $(REFERENCE_VENV) $(LIBRARY_VENV) $(GPU_COMPILER) cache
	find runs -mindepth 1 -maxdepth 1 -not -name '*.sh' -exec rm -rf {} +

# A launcher may be on the PATH and still not run (pyenv), so the check runs it. $(1) is the
# interpreter, $(2) its lowest minor version, $(3) the variable that names another.
define require_python
	@$(1) -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, $(2)))' >/dev/null 2>&1 || { \
	echo "$(1) does not run here, is older than Python 3.$(2), or lacks the venv module." >&2; \
	echo "Install Python 3.$(2) or newer with venv, or name one: make $(3)=/path/to/python $(MAKECMDGOALS)" >&2; \
	exit 1; }
endef

$(PY):
	$(call require_python,$(PYTHON),12,PYTHON)
	$(PYTHON) -m venv $(VENV)

# The lock holds the build backend too, so the editable install fetches nothing.
$(VENV)/.base: requirements.lock pyproject.toml | $(PY)
	@echo "Installing requirements.lock into $(VENV) (about a minute)"
	$(PY) $(PIP_INSTALL) -r requirements.lock
	$(PY) $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.base
	$(PY) $(PIP_INSTALL) -r requirements-dev.lock
	@touch $@

$(VENV)/.gpu: requirements-cuda13.lock requirements-gpu-kernels.lock $(VENV)/.base
	@echo "Installing CUDA and the library of kernels into $(VENV) (some 5 GB)"
	$(PY) $(PIP_INSTALL) -r requirements-cuda13.lock -r requirements-gpu-kernels.lock
	@touch $@

$(LIBRARY_VENV)/.installed: requirements.lock requirements-dev.lock requirements-gpu-kernels.lock
	$(call require_python,$(PYTHON),12,PYTHON)
	@test -x $(LIBRARY_VENV)/bin/python || $(PYTHON) -m venv $(LIBRARY_VENV)
	@echo "Installing the library of kernels into $(LIBRARY_VENV) (2.5 GB)"
	$(LIBRARY_VENV)/bin/python $(PIP_INSTALL) $(addprefix -r ,$^)
	@touch $@

# torch first: a CPU build of this version that pip can see is then taken as it is.
$(REFERENCE_VENV)/.installed: pyproject.toml
	$(call require_python,$(REFERENCE_PYTHON),10,REFERENCE_PYTHON)
	@test -x $(REFERENCE_VENV)/bin/python || $(REFERENCE_PYTHON) -m venv $(REFERENCE_VENV)
	$(REFERENCE_VENV)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(REFERENCE_VENV)/bin/python $(PIP_INSTALL) transformers==5.23.0
	@touch $@

# A folder on the path of those who ask for it: the plugin must not be found by any other run.
PRINT_EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["gpu-compiler"])
$(GPU_COMPILER)/.installed: pyproject.toml | $(PY)
	@echo "Installing XLA's compiler for GPUs into $(GPU_COMPILER) (840 MB)"
	rm -rf $(GPU_COMPILER)
	$(PY) $(PIP_INSTALL) --no-deps --target $(GPU_COMPILER) $$($(PY) -c '$(PRINT_EXTRA)')
	@touch $@
