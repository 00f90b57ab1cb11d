# Needs Python >= 3.10 with venv, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
# Worker processes of the test run.
WORKERS ?= 2

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-slow lint format docs clean

help:
	@echo "make demo       teach the embedded tiny model 16 new things, with a report: about 4 minutes"
	@echo "make test       run the tests (make test-slow: the full-size models too)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       write docs/settings.md from the settings"
	@echo "make setup      only create $(VENV) and install into it"

setup: $(STAMP)

# One pip call with the constraints: no package may bring another build of torch along.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev,data,examples,optimizers]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m sdtune demo

# One thread for each worker: on 2 cores twice as fast as workers whose threads fight for them.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .

docs: $(STAMP)
	$(BIN)/python -m sdtune.config.schema > docs/settings.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
