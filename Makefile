# Everything sets itself up: a virtual environment, the dependencies, then the work.
PYTHON ?= python3
# The PyTorch to install. An unpinned "torch" may bring several GB of CUDA libraries.
TORCH ?= torch==2.13.0
# The Triton that goes with it. A PyTorch for CUDA asks for its own.
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1,triton)
VENV := .venv
BIN := $(VENV)/bin
OLDEST_TRITON := build/triton-oldest
ORACLE := build/oracle
# The oldest that lasp.hf takes, one between, and the newest that pip finds for this Python.
TRANSFORMERS ?= 5.17 5.20 5
TRACKERS := build/trackers
ARGS ?=
# Every process that tests start would compile what it imports, and a run all assertions, where nothing is kept.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup train test gpu exhaustive rest fuzz lint docs packages range triton oracle trackers clean FORCE
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

train: $(VENV)/.installed  ## train transnormer-tiny, its sequences split over two processes (ARGS="..." for options)
	$(BIN)/lasp train $(ARGS)

test: $(VENV)/.installed-dev lint  ## lint, type-check and run the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 5 --dist worksteal $(ARGS)

rest: $(VENV)/.installed-dev  ## the tests that `make test` leaves to continuous integration
	$(BIN)/python -m pytest -n auto --maxprocesses 5 --dist worksteal -m 'ci and not exhaustive' $(ARGS)

gpu: $(VENV)/.installed-dev  ## the tests of kernels, loss, exchanges and models of transformers on this machine's GPUs, which `make test` does not use
	LASP_TEST_DEVICE=cuda $(BIN)/python -m pytest -n auto --maxprocesses 8 -m 'not exhaustive' $(ARGS)

exhaustive: $(VENV)/.installed-dev  ## every case where `make test` takes a sample of them
	$(BIN)/python -m pytest -n auto --maxprocesses 5 --dist worksteal -m exhaustive $(ARGS)

fuzz: $(VENV)/.installed-dev  ## random calls of every operator against loops in fp64 (ARGS="--seconds 600 --seed 1")
	PYTHONPATH=src $(BIN)/python -m tests.fuzz $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## build these pages into build/docs, run the tutorial; any warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

packages: $(VENV)/.installed-dev  ## build wheel and source archive, install them and every extra by itself, and use them
	$(BIN)/python -m pytest tests/packaging -m exhaustive $(ARGS)

range:  ## the core of the tests on the oldest, usual and newest PyTorch and Triton, and on every Python that is here
	$(PYTHON) -m tests.range $(ARGS)

triton: $(OLDEST_TRITON)/.installed  ## read and compile a sample of the kernels by the oldest Triton, installed beside the environment
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest tests/kernels/triton/test_compile.py -m '' -k sample $(ARGS)

oracle: $(ORACLE)/.installed $(TRANSFORMERS:%=$(ORACLE)-%/.installed)  ## compare with flash-linear-attention and with transformers, installed beside the environment, on the CPU
	PYTHONPATH=$(ORACLE) $(BIN)/python -m pytest tests/oracle $(ARGS)
	for version in $(TRANSFORMERS); do \
	  echo "transformers $$version"; PYTHONPATH=$(ORACLE)-$$version $(BIN)/python -m pytest tests/hf -m "" -n auto --maxprocesses 5 $(ARGS) || exit 1; \
	done

trackers: $(TRACKERS)/.installed  ## write to the real TensorBoard and wandb, installed beside the environment
	PYTHONPATH=$(TRACKERS) $(BIN)/python -m pytest tests/trackers $(ARGS)

# Changes when another PyTorch is asked for.
$(VENV)/.wanted: FORCE
	@mkdir -p $(VENV) && echo '$(TORCH) $(TRITON)' | cmp -s - $@ || echo '$(TORCH) $(TRITON)' > $@

FORCE:

# One call of pip for each: the package is built anew in every one.
define install
	@$(PYTHON) -c 'import sys; sys.exit("lasp needs Python >= 3.10, found " + sys.version.split()[0] + ": pass PYTHON=/path/to/python3" if sys.version_info < (3, 10) else 0)'
	@echo "Setting up $(VENV) (about a minute, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' $(2) -e '.[$(1)]'
endef

comma := ,
ASKED := pyproject.toml Makefile $(VENV)/.wanted

$(VENV)/.installed: $(ASKED)
	$(call install,report)
	@touch $@

$(VENV)/.installed-dev: $(ASKED)
	$(call install,report$(comma)dev,'$(TRITON)')
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(ASKED)
	$(call install,report$(comma)docs)
	@touch $(VENV)/.installed $@

setup: $(ASKED)  ## install at once what the targets below ask for one after another
	$(call install,report$(comma)dev$(comma)docs,'$(TRITON)')
	@touch $(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs

# Only its language and its compiler are used, which need no GPU.
$(OLDEST_TRITON)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLDEST_TRITON) 'triton==3.6.0'
	@touch $@

# Not in the environment: importing it changes other libraries, and nothing else here needs it.
$(ORACLE)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(ORACLE) 'fla-core==0.6.0' einops
	@touch $@

$(ORACLE)-%/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(ORACLE)-$* 'transformers==$*.*' psutil datasets
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(ORACLE)-$* accelerate bitsandbytes peft trl
	@touch $@

$(TRACKERS)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(TRACKERS) tensorboard wandb
	@touch $@

clean:  ## remove the environment and all caches
	rm -rf $(VENV) $(OLDEST_TRITON) $(ORACLE)* $(TRACKERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
