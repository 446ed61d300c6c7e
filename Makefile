# make demo   the whole thing on a laptop CPU: synthetic videos, SFT, GRPO with vLLM, evaluation
# make test   the tests that fit in a few minutes;  make test-all: every test
# make lint   format, lint and type check
# Each creates .venv and installs what is missing; a second call installs nothing.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
STAMP := $(VENV)/.installed-$(EXTRA)
PYTEST_ARGS ?=
BUDGET_S ?= 0

.PHONY: install demo test test-slow test-all lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt install.sh
	bash install.sh "$(PYTHON)" "$(VENV)" "$(EXTRA)"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m longrl_jax.demo

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
