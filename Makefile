# An install reports on standard error: the only thing that `make demo` prints is the model's answer.
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo dev check lint types test soak bench gpu clean

demo: $(VENV)/.installed  ## Install, and stream an answer of the bundled model.
	@$(BIN)/gptoss-lite generate --temperature 0.7 "Tell me a story about the sea."

dev: $(VENV)/.installed-dev  ## Install what development needs.

check: lint types test  ## What every change must pass.

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/mypy

test: dev
	$(BIN)/pytest -m "not soak"

soak: dev  ## The tests that take minutes.
	$(BIN)/pytest -m soak

bench: dev  ## Kernels and steps, timed and checked, as shares of yardsticks beside stored ones. BENCH_OPTIONS="-k experts"
	@mkdir -p .benchmarks
	$(BIN)/pytest bench --benchmark-columns=min,median,max,rounds --benchmark-group-by=func \
	  --benchmark-json=.benchmarks/latest.json $(BENCH_OPTIONS)

gpu:  ## Check and time the CUDA path on this machine's GPU; installs nothing. GPU_OPTIONS="--out DIR --quick"
	@$(PYTHON) -m bench.gpu $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ": give another as PYTHON=")'
	@$(PYTHON) -m venv $(VENV) >&2

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV) ..." >&2
	@$(BIN)/pip install --quiet --editable . >&2
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV) ..." >&2
	@$(BIN)/pip install --quiet --editable ".[dev]" >&2
	@touch $@ $(VENV)/.installed
