# make serve   make the environment if need be, and serve the built-in model on port 8000
# make test    the default tests
# make check   lint, types and the default tests: what must be green before a commit
# make gpu     what needs a CUDA device: its tests, then its benchmarks
# make bench   every benchmark that runs on this machine
# make kernels-aot   compile every Triton kernel for GPUs that are not here; writes docs/kernels-aot.md
#
# ARGS go to `herd serve`, PYTEST_ARGS to pytest:  make serve ARGS="--port 9000"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.herd-runtime
DEVELOPMENT := $(VENV)/.herd-development

# Without an NVIDIA driver the gigabytes of CUDA packages that newer releases bring are of no use.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0
else
TORCH ?= torch
endif

.PHONY: serve test check lint gpu bench kernels-aot clean

serve: $(RUNTIME)
	$(BIN)/herd serve $(ARGS)

test: $(DEVELOPMENT)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint test

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

gpu: $(DEVELOPMENT)
	-$(BIN)/python bench/kernels_aot.py --here
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)
	set -e; for script in $(wildcard bench/gpu_*.py); do $(BIN)/python $$script; done

bench: $(RUNTIME)
	$(BIN)/python bench/engine_decode.py
	$(BIN)/python bench/cpu_kernels.py
	$(BIN)/python bench/dispatch.py

kernels-aot: $(RUNTIME)
	$(BIN)/python bench/kernels_aot.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Herd needs Python 3.11 or newer: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(DEVELOPMENT): $(RUNTIME)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' --editable '.[dev]'
	touch $@
