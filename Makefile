# make demo   prunes the bundled model and evaluates it        make test   runs the tests        make lint   checks the style
# The first call creates .venv with PYTHON (make demo PYTHON=python3.11); it is filled again when deps/ changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Idle threads sleep: a run that shares its cores is many times faster so, one that does not is as fast.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint

demo: $(VENV)/.installed
	$(BIN)/python prune.py -m xvlm -p multiflow --num_batches 500 --evaluate

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: deps/requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -r deps/requirements.txt
	touch $@

$(VENV)/.installed-dev: deps/requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install -r deps/requirements-dev.txt
	touch $@
