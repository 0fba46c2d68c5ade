# `make demo` and `make test` do all their set-up: they make .venv on the first run and nothing after.
# Variables: PYTHON (which Python makes .venv), TORCH (another torch, as pip spells it), WORKERS
# (test processes), PYTEST_ARGS (handed to pytest).

PYTHON ?= python3
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

export PYTHONUNBUFFERED := 1
# Modules, and assertions of tests, are compiled once and not by each process.
unexport PYTHONDONTWRITEBYTECODE
# Compiled kernels and simulator builds of this checkout stay in it.
export FLASHCORE_CACHE_DIR ?= $(CURDIR)/.cache/flashcore

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-thorough test-gpu lint gate gate-all docs sanitize clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(READY): scripts/bootstrap.py pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) scripts/bootstrap.py --venv $(VENV)

setup: $(READY) ## only make .venv

demo: $(READY) ## attention on real input, checked against a float64 oracle
	$(BIN)/flashcore demo

# Lint and docs use one core each, and run beside the gate.
test: $(READY) ## style, types, resource gate (a sample), pages, simulator and CPU tests; GPU tests where there is one
	@$(MAKE) --no-print-directory -j3 $(if $(filter output-sync,$(.FEATURES)),-O) lint docs gate
	$(PYTEST) -m "not thorough" $(PYTEST_ARGS)

test-thorough: $(READY) ## the tests that `make test` leaves out: each planted bug, many schedules of the simulator
	$(PYTEST) -m thorough $(PYTEST_ARGS)

test-gpu: $(READY) ## the whole suite on the GPU at hand; fails where there is none
	$(PYTEST) --require-gpu $(PYTEST_ARGS)

# In an environment that borrows a prepared Python's packages the style tools may be missing.
lint: $(READY) ## ruff and mypy
	@if [ -f $(VENV)/borrowed ] && ! $(BIN)/python -c 'import ruff, mypy' 2>/dev/null; then \
	  echo "lint skipped: this Python has no ruff and mypy, and no package index answered"; \
	else \
	  set -ex; \
	  $(BIN)/python -m ruff check .; \
	  $(BIN)/python -m ruff format --check .; \
	  $(BIN)/python -m mypy; \
	fi

gate: $(READY) ## compile a sample of the kernels for every architecture, check the resource budget (no GPU needed)
	$(BIN)/flashcore resources --check --sample

gate-all: $(READY) ## the same with every configuration (some six minutes on two cores)
	$(BIN)/flashcore resources --check

# -n -W: a reference or a link that leads nowhere is an error. Nothing is fetched: links to other sites
# are not followed. Sphinx is missing where a prepared Python is borrowed, MyST on Python 3.10.
docs: $(READY) ## pages and reference as HTML in build/site
	@if ! $(BIN)/python -c 'import sphinx, myst_parser, furo, sphinx_copybutton' 2>/dev/null; then \
	  echo "docs skipped: this environment has no sphinx, myst-parser, furo and sphinx-copybutton"; \
	else \
	  set -ex; \
	  $(BIN)/python -m sphinx -q -n -W --keep-going -c docs -d .cache/sphinx . build/site; \
	fi

sanitize: $(READY) ## compute-sanitizer over calls of every kernel (needs a GPU)
	$(BIN)/python scripts/sanitize.py

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) .cache build dist .hypothesis .ruff_cache src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
