# Two commands are enough: `make demo` and `make test`. Both set up .venv from this folder first, once.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint types demo-source clean help

help:
	@echo "make demo         fine-tune a tiny model plainly and with guided attention; opens the way to a report"
	@echo "make test         run the whole test suite"
	@echo "make lint types   what continuous integration checks besides"
	@echo "make demo-source  train the bundled encoder again"
	@echo "make clean        remove the environment and build products"

demo: $(VENV)/.ready
	@$(BIN)/foveal demo

test: $(VENV)/.ready-dev
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.ready-dev
	@$(BIN)/ruff check src tests benchmarks recipes docs
	@$(BIN)/ruff format --check src tests benchmarks recipes docs

types: $(VENV)/.ready-dev
	@$(BIN)/mypy

demo-source: $(VENV)/.ready
	@$(BIN)/python recipes/demo_source.py

# A marker is written last, so an interrupted set-up starts again; pyproject.toml newer than it sets up again.
$(VENV)/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "foveal needs Python 3.11 or later; no '$(PYTHON)' was found"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "foveal needs Python 3.11 or later; this is Python %d.%d.%d. Try: make PYTHON=python3.12 ..." % v[:3])'
	@echo "Setting up $(VENV) (once; PyTorch is a large download) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "python3 could not make a virtual environment; on Debian or Ubuntu install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
