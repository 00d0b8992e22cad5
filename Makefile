# Everything needs only a Python (3.10 or newer, with venv): PYTHON=python3.12 make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where these are newer than the stamp, packages are installed again.
INPUTS := pyproject.toml constraints.txt
# Not ".": ruff would also rearrange the code in Markdown files.
SOURCES := $(wildcard carsam tests tools benchmarks)

# Twice quiet: errors only.
PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt

.PHONY: quickstart litemedsam test lint format clean help
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  quantize and measure the embedded model; results in runs/quickstart"
	@echo "make litemedsam  the same with real weights (downloads 37 MB, takes up to an hour; goes on where it stopped)"
	@echo "                 other images: ARGS='--calibration DIR --evaluation DIR', each with images/ and instances.json"
	@echo "make test        run the tests"
	@echo "make lint        check style and format"
	@echo "make format      fix style and format"
	@echo "make clean       remove results, caches and the virtual environment"

quickstart: $(VENV)/.installed
	@$(BIN)/python -m carsam.commands.quickstart

litemedsam: $(VENV)/.installed
	@$(BIN)/python -m carsam.commands.litemedsam $(ARGS)

# As many files at a time as there are cores; a file stays in one process, for what its tests share.
test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

$(BIN)/python:
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The environment's python is older than the inputs on most checkouts, so it may only be an order-only prerequisite.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing carsam into $(VENV) (minutes the first time)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing carsam and its development tools into $(VENV) (minutes the first time)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find carsam tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
