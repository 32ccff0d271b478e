# `make demo` and `make test` are all that a newcomer needs; both begin with `make install`.
PYTHON ?= python3
# Neighbours in a file share its fixtures, so each worker takes a run of them.
PYTEST ?= .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist worksteal
RUN := .venv/bin/python
LOCK := requirements-lock.txt
INSTALL := $(RUN) -m pip install --quiet --constraint $(LOCK)

.PHONY: install hashed demo test test-slow lint audit
.DELETE_ON_ERROR:

install: .venv/core

.venv/core: requirements.txt $(LOCK) setup.py
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

# For CI: all packages but PyTorch, each with the digest that it had when the versions were locked.
hashed:
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --no-deps --require-hashes -r requirements-hashes.txt

# The extras bring PyTorch as a reference for the tests, and the tools that read the code.
.venv/test: .venv/core
	$(INSTALL) -e '.[test]'
	touch $@

# The type checker reads benchmarks/ too, which import PyTorch and diffusers.
.venv/dev: .venv/test
	$(INSTALL) -e '.[dev]'
	touch $@

# Large pages spare a CPU the faults of fresh memory, a fifth of each step.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: install
	$(RUN) -m cogvideox_jax.demo --config=configs/tiny.py --workdir=runs/demo

# XLA compiles for longer than most tests compute, so here it optimizes little, and emits loops in the
# way that compiles fastest.
test: .venv/test
	XLA_FLAGS="$$XLA_FLAGS $$($(RUN) tests/quick_xla.py)" $(PYTEST)

# All tests, those that take minutes among them, with XLA's optimizations as users have them.
test-slow: .venv/test
	$(PYTEST) -m ""

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)
	.venv/bin/shellcheck --external-sources launch/*.sh tests/*.sh .ci/run

# Known vulnerabilities of what CI and the image install.
audit: .venv/dev
	$(RUN) tests/audit.py requirements-hashes.txt launch/requirements-hashes.txt
