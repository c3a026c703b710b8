# The commands of the project. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin

# A .venv remembers which kind it is, so that `SYSTEM_TORCH=1` is said once, to `make setup`.
SYSTEM_TORCH ?= $(if $(wildcard .venv/.installed-with-system-torch),1)
STAMP := .venv/.installed-with-$(if $(SYSTEM_TORCH),system,own)-torch

# Files of tests run side by side, on as many cores as there are, but four at most: many start several ranks themselves.
BESIDE := --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: help setup quickstart test check soak bench clean
.DEFAULT_GOAL := help

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "PYTHON=python3.12 chooses the Python of .venv; SYSTEM_TORCH=1 keeps the torch of a container image."

setup: $(STAMP) ## install the project and its test tools into .venv

$(STAMP): setup.py
	@command -v $(PYTHON) >/dev/null || { echo "make setup: $(PYTHON) is not installed. \
	Install Python 3.11 or newer, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make setup: $(PYTHON) is \
	`$(PYTHON) -V 2>&1`; expected 3.11 or newer. Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make setup: $(PYTHON) cannot make virtual \
	environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -z "$(SYSTEM_TORCH)" || $(PYTHON) -c 'import torch' 2>/dev/null || { echo "make setup: SYSTEM_TORCH=1, but \
	$(PYTHON) has no torch. Name the Python that has it (PYTHON=...), or leave SYSTEM_TORCH out" >&2; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || echo "make setup: note: no C compiler found. Training on a \
	CPU works without; Triton needs one on a GPU (Debian and Ubuntu: apt-get install gcc)" >&2
	@if [ -d .venv ] && [ -z "$(wildcard $(STAMP))" ]; then rm -rf .venv; fi
	@echo "make setup: installing into .venv (minutes the first time)"
	@$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) .venv
	@SYSTEM_TORCH=$(SYSTEM_TORCH) $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

quickstart: setup ## text -> tokenizer -> training -> held-out loss -> sample -> verified export, offline
	@$(BIN)/python launch/quickstart.py

test: setup ## run the tests on the CPU: first the quick ones, then faults, clusters and many ranks
	@$(BIN)/python -m pytest $(BESIDE) -m "not slow"
	@$(BIN)/python -m pytest $(BESIDE) -m slow

check: setup ## check format, lint and types, then run the tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(MAKE) test

soak: setup ## the tests of faults with all their repetitions (10 to 30 minutes; LONGHAUL_SOAK=5: five of each)
	@LONGHAUL_SOAK=$(or $(LONGHAUL_SOAK),1) $(BIN)/python -m pytest tests/fault -s

bench: setup ## measure speed beside PyTorch, transformers and others: a table, and JSON in bench-results
	@PYTHON=$(BIN)/python bash benchmarks/gpu.sh

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks kernels pretrain launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
