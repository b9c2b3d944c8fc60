# Every target sets itself up: a fresh machine needs Python >= 3.11 with venv, and make.
PYTHON ?= python3
BIN := .venv/bin
# torch first and by itself: whatever build of the pinned version pip finds (CPU or CUDA) is then the one all others use.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

LINT = $(BIN)/ruff check . && $(BIN)/mypy
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: help demo check test test-all bench

help:
	@echo "make demo      pretrain I-JEPA on ten real photographs: 4.6 TFLOP, minutes on two CPU cores; the bar says how many"
	@echo "make check     the linters and the quick tests: at most 90 CPU-seconds"
	@echo "make test      the linters and all tests that need no GPU, but for the slow ones: at most 16 CPU-minutes"
	@echo "make test-all  the slow ones too"
	@echo "make bench     the benchmarks"

demo: .venv/demo.done
	rm -rf runs/make_demo
	$(BIN)/python -m ijepa_fast.demo --config configs/demo.yaml train.folder=runs/make_demo

check: .venv/dev.done
	$(LINT)
	$(PYTEST) -m "not gpu and not slow and not long"

test: .venv/dev.done
	$(LINT)
	$(PYTEST) -m "not gpu and not slow"

test-all: .venv/dev.done
	$(LINT)
	$(PYTEST) -m "not gpu"

bench: .venv/dev.done
	$(BIN)/python -m pytest bench --benchmark-only

.venv/demo.done: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable ".[demo]"
	touch $@

.venv/dev.done: .venv/demo.done
	$(INSTALL) --editable ".[demo,dev,dali]"
# Alone, as its other needs are transformers' too: torchvision, which it asks for, is linked to CUDA's torch and cannot
# be imported beside one for CPUs. The tests give timm a stand-in (tests/torchvision_stand_in.py).
	$(INSTALL) --no-deps timm
	touch $@
