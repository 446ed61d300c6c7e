# make demo   the whole thing on a laptop CPU: synthetic videos, SFT, GRPO with vLLM, evaluation
# make test   the tests that fit in a few minutes;  make test-all: every test
# make start  makes configs/models/tiny_vila_start, the checkpoint that the demo starts from, again: 25 minutes
# make lint   format, lint and type check
# Each creates .venv and installs what is missing; a second call installs nothing.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
STAMP := $(VENV)/.installed-$(EXTRA)
PYTEST_ARGS ?=
BUDGET_S ?= 0

PYTHON_M := $(BIN)/python -m longrl_jax

.PHONY: install demo start test test-slow test-all lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt install.sh
	bash install.sh "$(PYTHON)" "$(VENV)" "$(EXTRA)"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m longrl_jax.demo

start: $(STAMP)
	$(PYTHON_M).data.synthetic data/start --clips 1500 --validation 8 --lessons 24000 --seed 1
	$(PYTHON_M).convert init configs/models/tiny_vila.json runs/start/init \
		--corpus data/start/corpus.txt --time-tokens 64 --looking-back 5
	$(PYTHON_M).train configs/start/1_options.yaml
	$(PYTHON_M).train configs/start/2_told.yaml
	$(PYTHON_M).train configs/start/3_perception.yaml
	$(PYTHON_M).train configs/start/4_alignment.yaml
	$(PYTHON_M).train configs/start/5_reasoning.yaml
	$(PYTHON_M).convert to-hf runs/start/reasoning/export runs/start/tiny_vila_start --dtype bfloat16

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --budget-s $(BUDGET_S) $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
