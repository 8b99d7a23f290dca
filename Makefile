# make demo      export the demo model, classify with it and draw its features (one minute)
# make test      lint, types and tests, as CI runs them (ten minutes on two cores)
# make lint      lint and types only
# make demo-packages  make the shipped packages and pictures of the demo again
# make browser   test the web page in Chromium, as CI does (needs chromium and chromedriver)
# make engines   build TensorRT engines of whole encoders, as CI does (no GPU needed)
# make ray       test a Ray cluster of two workers on this machine (three minutes)
# make clean     remove the environment and everything that was built
#
# Each command first installs what it needs into .venv, again only after pyproject.toml changed.
# Python 3.11 or newer is needed: `make PYTHON=python3.12 test` uses another than python3.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Installed first and by version: an index may have the CPU build of this version only, and pip would
# otherwise choose the newest version that the extras allow.
TORCH := torch==2.13.0
SHIPPED := perception_rt/demo
SOURCES := perception_rt training benchmarks examples tests
# One process per core, each with one thread. A file stays in one process, and so do its fixtures.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo demo-packages test lint browser engines ray clean
.NOTPARALLEL:

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	@$(VENV)/bin/python examples/demo.py

# int8 of PLM-Demo is smaller than fp16 and as accurate; PE-Demo in int8 keeps its vocabulary in
# floats and is larger.
demo-packages: $(VENV)/.installed-demo
	$(VENV)/bin/perception-export --model PE-Demo --precision fp16 --force \
	  --out $(SHIPPED)/packages/pe
	$(VENV)/bin/perception-export --model PLM-Demo --precision int8 --force \
	  --out $(SHIPPED)/packages/plm
	$(VENV)/bin/python training/demo/pictures.py $(SHIPPED)/pictures

test: lint
	$(VENV)/bin/python -m pytest $(PARALLEL) --durations 10

# fp8 of the two larger encoders is left out for time: about 15 minutes, mostly calibration. They
# are built in fp16 only; `-k encoders` builds them in fp8 too.
engines: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m slow tests/export/test_tensorrt.py \
	  -k "encoders and not L14-336-fp8 and not L14-448-fp8"

# Without the check, pytest would skip every test.
browser: $(VENV)/.installed-test
	@{ command -v chromium || command -v google-chrome; } >/dev/null && \
	  command -v chromedriver >/dev/null || { \
	  echo "make browser needs Chromium and its driver: on Debian, install chromium and" \
	    "chromium-driver" >&2; \
	  exit 1; }
	$(VENV)/bin/python -m pytest -m slow tests/serve/test_web_page.py

ray: $(VENV)/.installed-ray
	$(VENV)/bin/python -m pytest -m slow tests/ray_cluster

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy --num-workers auto

$(VENV)/.installed-demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[export,train,video]"
	@touch $@

# The demo needs a part of what the tests need.
$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo

# Not a part of `dev`: Ray brings about 50 packages that no other test needs.
$(VENV)/.installed-ray: $(VENV)/.installed-test
	$(PIP) install -e ".[ray]"
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "perception_rt needs Python 3.11 or newer, but $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo missing)." \
	    "Choose another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot create a virtual environment: on Debian and Ubuntu, install" \
	    "python3-venv" >&2; \
	  exit 1; }

clean:
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
