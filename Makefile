# Two commands matter:  make quickstart  (first run)  and  make test  (everything that decides a change).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help quickstart install test lint types pytest slow bench clean

help:
	@echo "make quickstart   set up and train SmolLM2-135M to extract facts (a few minutes on 2 cores)"
	@echo "make test         set up and run lint, types and tests"
	@echo "make install      only set up, with everything the tests need"
	@echo "make lint types pytest slow bench clean"

$(BIN)/python:
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	@echo "== installing mnemic and what it needs (about a minute, 1.2 GB with a CPU torch)"
	@$(BIN)/python -m pip install -q -q -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "== installing mnemic with what its tests need (about two minutes, 1.7 GB with a CPU torch)"
	@$(BIN)/python -m pip install -q -q -e ".[dev]"
	@mkdir -p typed && ln -sfn .. typed/mnemic
	@touch $(VENV)/.core $@

install: $(VENV)/.dev

quickstart: $(VENV)/.core
	@echo "== training recipes/quickstart.yaml into runs/quickstart"
	@$(BIN)/mnemic train quickstart
	@echo "== asking the trained model"
	$(BIN)/mnemic generate runs/quickstart "Ines: My sister Paula just moved to Oslo, and I started learning the cello."

test: lint types pytest

lint: $(VENV)/.dev
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev
	@echo "== types"
	@out=$$($(BIN)/pyright --pythonpath $(BIN)/python) || { echo "$$out"; exit 1; }; echo "$$out"; \
	  ! echo "$$out" | grep -q "No source files found"  # which it does not call an error

pytest: $(VENV)/.dev
	@echo "== tests (the slow ones: make slow)"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

slow: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -m slow

bench: $(VENV)/.dev
	@$(BIN)/python scripts/bench_loop.py

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
