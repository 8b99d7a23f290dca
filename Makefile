# make demo   export the demo model, classify with it, draw its features (about a minute)
# make test   lint, types and tests, as CI does
# make lint   only the first two
# make engines   TensorRT engines of whole encoders, as CI builds them too (20 minutes)
#
# Each installs what it needs into .venv first, and again only when pyproject.toml has changed.
# Needs Python 3.11 or newer: `make PYTHON=python3.12 test` names another than python3.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# By name and first: an index may have the CPU build of this version only, and pip would otherwise
# take the newest that the extras allow.
TORCH := torch==2.13.0
SOURCES := perception_rt training benchmarks examples tests

.PHONY: help demo test lint engines clean
.NOTPARALLEL:

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	@$(VENV)/bin/python examples/demo.py

test: lint
	$(VENV)/bin/python -m pytest

engines: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m slow tests/export/test_tensorrt.py -k encoders

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy examples/demo.py

$(VENV)/.installed-demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[export,train,video]"
	@touch $@

# The tests need all that the demo needs.
$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "perception_rt needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: install python3-venv)" >&2; \
	  exit 1; }

clean:
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
