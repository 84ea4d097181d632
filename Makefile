# `make demo` trains the CIFAR CNN of fused modules on real images; `make test` proves every kernel without a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# executes Triton's intermediate code on the CPU; states Python >= 3.12, runs on 3.10 and newer, needs only numpy
TTSEM := ttsem==0.1.0

.PHONY: help demo perf test test-torch test-ttsem test-aot test-interp test-extended lint clean

help:
	@echo "make demo   train the fused CNN on real handwritten digits (about 2 minutes, no download of data)"
	@echo "make test   prove every kernel without a GPU, one process a gate: torch, ttsem, aot, interp"
	@echo "make test-extended   the exhaustive rest: every configuration, module samples on the kernels, long sweeps"
	@echo "make perf   time the operators against PyTorch and count a training step's bytes: CSVs and PNGs in runs/perf"
	@echo "make lint   ruff and mypy"

demo: $(VENV)/train.stamp
	$(BIN)/python -m models.train --data digits --out runs/demo

perf: $(VENV)/test.stamp
	rm -rf runs/perf
	$(BIN)/python -m perf sweep --op cnn conv_stage linear conv2d batch_norm cross_entropy --mode fwd full --quick \
		--csv runs/perf/sweep.csv
	$(BIN)/python -m perf traffic --no-inductor --csv runs/perf/traffic.csv
	$(BIN)/python -m perf plot runs/perf/sweep.csv runs/perf/traffic.csv

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

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,perf,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --ignore-requires-python --no-deps $(TTSEM)
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
