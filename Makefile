# `make demo` and `make test` are all one needs; each sets up its own environment in .venv first (once, and again when the pins
# change). All paths are relative, so that a checkout may live under a path with spaces.

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.NOTPARALLEL:

# The Python that makes the environment, 3.11 or newer. Empty: the first on PATH that is.
PYTHON ?=
# Test processes; some tests start 4 ranks of their own.
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

# One thread per process: ranks and test processes share the cores.
export OMP_NUM_THREADS ?= 1

# Rows of `make zoo`; empty: all, and docs/models.md is written.
MODELS ?=

.PHONY: help setup demo test pytest lint docs serve zoo bench clean

help: ## this list
	@awk -F ':[^#]*## ' '/^[a-z]+:.*##/ { printf "  make %-8s%s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## make the environment in .venv

demo: $(INSTALLED) ## plan a Llama for 8 GPUs without any, then train a small GPT-2 on 4 local processes
	@$(BIN)/python examples/train_gpt2.py

test: lint docs pytest ## lint, types, import contracts, documentation, tests

pytest: $(INSTALLED) ## the tests alone
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10

lint: $(INSTALLED) ## ruff, mypy --strict, import contracts
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports

docs: $(INSTALLED) ## build the documentation into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict
	@echo "documentation built in site/"

serve: $(INSTALLED) ## show the documentation on a local port
	@$(BIN)/python -m mkdocs serve

zoo: $(INSTALLED) ## run every model of docs/models.md and write the page; MODELS="llama t5" runs some and prints them
	@$(BIN)/python -m zoo $(MODELS)

bench: $(INSTALLED) ## planning time, step time beside PyTorch's own, memory, and the verify matrices: JSON, kept in build/
	@mkdir -p build
	@set -o pipefail; for name in plan_time step_time memory_prediction verify_zoo verify_pipelines; do $(BIN)/python benchmarks/$$name.py | tee build/$$name.json; done

clean: ## remove the environment and everything built
	@rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

$(INSTALLED): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" ./scripts/setup.sh
