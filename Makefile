# `make demo` trains the CIFAR CNN of fused modules on real images; `make test` proves every kernel without a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# groups of pyproject.toml are known to pip 25.1 and newer, which a new venv need not have
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# executes Triton's intermediate code on the CPU; states Python >= 3.12, runs on 3.10 and newer, needs only numpy
TTSEM := ttsem==0.1.0

# the versions of a machine with a GPU that is to be expected, and of our packages what such a machine has
COMPAT ?= .venv-compat
# python3.12 of the path, or pyenv's, whose shim for it answers only where 3.12 is switched on
COMPAT_PYTHON ?= $(shell { python3.12 -c 'print("python3.12")' \
	|| ls -d "$$(pyenv prefix "$$(pyenv latest 3.12)")"/bin/python3.12 || echo python3.12; } 2>/dev/null)
COMPAT_RUN = PYTHONPATH=$(CURDIR) $(COMPAT)/bin/python -m
COMPAT_PACKAGES := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 \
	pytest pytest-xdist hypothesis numpy pandas matplotlib tqdm scikit-learn

# each gate of `make test` would compile the tests anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo perf docs hub test test-torch test-ttsem test-aot test-interp test-extended compat mutants lint dist clean

help:
	@echo "make venv   an environment with all that tests, measurements and examples need, in .venv"
	@echo "make demo   train the fused CNN on real handwritten digits (about 2 minutes, no download of data)"
	@echo "make test   prove every kernel without a GPU, one process a gate: torch, ttsem, aot, interp"
	@echo "make test-extended   the exhaustive rest: every configuration, module samples on the kernels, long sweeps"
	@echo "make compat   the torch gate, the aot gate for sm_90 and a dry run of perf gpu on Python 3.12, torch 2.11, triton 3.6"
	@echo "make mutants   put one fault at a time into the source: do the tests see it? (an hour or two)"
	@echo "make perf   time the operators against PyTorch and count a training step's bytes: CSVs and PNGs in runs/perf"
	@echo "make docs   README's pages and the API reference as a site to open: runs/docs/index.html"
	@echo "make hub    the layout of Hugging Face's kernels hub, in runs/hub; nothing is uploaded (wants Python 3.11)"
	@echo "make lint   ruff and mypy"
	@echo "make dist   a wheel and the sources' archive, checked, in dist"

demo: $(VENV)/train.stamp
	$(BIN)/python -m models.train --data digits --out runs/demo

perf: $(VENV)/test.stamp
	rm -rf runs/perf
	$(BIN)/python -m perf sweep --op cnn conv_stage linear conv2d batch_norm cross_entropy --mode fwd full --quick \
		--csv runs/perf/sweep.csv
	$(BIN)/python -m perf traffic --no-inductor --csv runs/perf/traffic.csv
	$(BIN)/python -m perf plot runs/perf/sweep.csv runs/perf/traffic.csv

# (the variable: no advertisement of the theme's; --quiet would hide warnings from --strict)
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file .docs/mkdocs.yml
	@echo "runs/docs/index.html"

hub:
	rm -rf runs/hub
	$(PYTHON) .hub/build.py runs/hub

venv: $(VENV)/test.stamp

test: test-torch test-ttsem test-aot test-interp

test-torch: $(VENV)/test.stamp
	TK_GATE=torch $(PYTEST)

test-ttsem: $(VENV)/test.stamp
	TK_GATE=ttsem $(PYTEST)

test-aot: $(VENV)/test.stamp
	TK_GATE=aot $(PYTEST)

test-interp: $(VENV)/test.stamp
	TK_GATE=interp $(PYTEST)

test-extended: $(VENV)/test.stamp
	TK_GATE=torch TK_EXTENDED=1 $(PYTEST)
	TK_GATE=ttsem TK_EXTENDED=1 $(PYTEST)
	TK_GATE=aot TK_EXTENDED=1 $(PYTEST)
	TK_GATE=interp TK_EXTENDED=1 $(PYTEST)

compat: $(COMPAT)/compat.stamp
	TK_GATE=torch $(COMPAT_RUN) pytest -n 2 --dist worksteal
	TK_GATE=aot TK_AOT=sm_90 $(COMPAT_RUN) pytest -n 2 --dist worksteal
	out=$$(mktemp -d) && $(COMPAT_RUN) perf gpu --dry-run --out "$$out/run"; status=$$?; rm -rf "$$out"; exit $$status

mutants: $(VENV)/test.stamp
	$(BIN)/python -m tests.mutants

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: $(VENV)/train.stamp
	$(INSTALL) --group release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-compat runs dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) 'pip>=25.1'
	$(INSTALL) --editable . --group train
	touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) 'pip>=25.1'
	$(INSTALL) --editable . --group train --group perf --group test --group ecosystem --group docs
	$(INSTALL) --ignore-requires-python --no-deps $(TTSEM)
	touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) 'pip>=25.1'
	$(INSTALL) --group docs
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(INSTALL) --group dev
	touch $@

$(COMPAT)/bin/python:
	@$(COMPAT_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { \
		echo "make compat wants Python 3.12, which $(COMPAT_PYTHON) is not: make compat COMPAT_PYTHON=/path/to/python3.12"; \
		exit 1; }
	$(COMPAT_PYTHON) -m venv $(COMPAT)

$(COMPAT)/compat.stamp: Makefile | $(COMPAT)/bin/python
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check $(COMPAT_PACKAGES)
	touch $@
