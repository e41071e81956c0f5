# Every target does all of its own set-up, from nothing, into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= default
# On a terminal pip says what it fetches. Python compiles what is imported, a small part of what is installed.
PIP    := $(BIN)/pip install --no-compile $(shell test -t 2 || echo --quiet)

# What costs no compilation: the scheduler, the wire, the client and the server, all where JAX is absent; then
# the planners of attention, and the walls between rooms.
WITHOUT_JAX := $(addprefix tests/,scheduler serve/client serve/reading serve/server serve/text serve/test_config.py serve/test_config_file.py)
PLANNERS := $(addprefix tests/,attention/test_layout.py attention/test_tile*.py test_rooms.py)

# A file's tests share what they compile; tests/conftest.py says in which order files are run. Two cores have
# time for a third worker while tests wait for the processes that they start.
SHARED := -n 3 --dist loadfile --no-loadscope-reorder --cpu 20

.PHONY: demo test-fast test sample test-tpu test-all test-deploy check test-oracle test-answers lock protos pages figures clean

demo: $(VENV)/.installed
	$(BIN)/taper-demo --model $(MODEL)

# For every save.
test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --without-jax $(WITHOUT_JAX)
	$(BIN)/python -m pytest -n 2 $(PLANNERS)

# For every commit: style and types beside a sample of the matrices. The CPU seconds of the sample are printed,
# and those of one test are bounded; CONTRIBUTING.md says how.
test: $(VENV)/.installed-test
	$(MAKE) --no-print-directory --jobs 2 check sample

sample: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SHARED) --cpu-bound 25 --ignore tests/tpu

# The same for TPUs: what libtpu compiles for chips that are not here.
test-tpu: $(VENV)/.installed-tpu
	$(BIN)/python -m pytest $(SHARED) tests/tpu

# Before a release: everything but the oracle. The clients and gateways that nobody here wrote are named.
test-all: $(VENV)/.installed-tpu check
	$(BIN)/python -m pytest $(SHARED) -m 'not oracle and not outside'
	$(BIN)/python -m pytest --verbose -m outside

# What operators are given, by the programs that read it; without Prometheus and Python 3.12, less of it.
test-deploy: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m 'outside or not outside' tests/deploy

# Static checks: style, types.
check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Compares live with transformers (installs torch: gigabytes); RECORD=1 rewrites the goldens.
test-oracle: $(VENV)/.installed-oracle
	$(BIN)/python -m pytest -m oracle $(if $(RECORD),--record-goldens)

# The default model on QUESTIONS held-out questions, under every policy and with preemption.
QUESTIONS ?= 500
test-answers: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m 'full or not full' tests/serve/test_tiny_answers.py -s --questions $(QUESTIONS)

# What the Dockerfile installs: every package of a server on NVIDIA GPUs, with hashes, whichever index has it.
# Keeps the versions that it has; UPGRADE=1 looks for newer ones.
lock: $(VENV)/.installed-test
	$(PIP) uv
	printf 'setuptools>=77\n' | $(BIN)/uv pip compile --quiet pyproject.toml - --extra gpu --extra gateway \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url \
	  --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade) --output-file requirements.lock

# The stubs of the protos, and what the reference says of them.
protos: $(VENV)/.installed-test
	$(BIN)/python serve/client/protos/generate.py
	$(BIN)/python -m docs.make

# The pages of docs/ that are made from the code.
pages: $(VENV)/.installed-test
	$(BIN)/python -m docs.make

# The figures of pages, where a file of bench/results says something else.
figures: $(VENV)/.installed-test
	$(BIN)/python -m docs.make.stale --write

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing JAX and what else a server needs into $(VENV): about 600 MB, a minute or two'
	$(PIP) --editable '.[convert]'
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing a server and its tests into $(VENV)'
	$(PIP) --editable '.[convert,test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-tpu: $(VENV)/.installed-test
	$(PIP) --editable '.[convert,tpu-test]'
	touch $@

$(VENV)/.installed-oracle: $(VENV)/.installed-test
	$(PIP) --editable '.[convert,test,oracle]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
