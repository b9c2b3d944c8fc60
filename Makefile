# Every target sets itself up: a fresh machine needs Python >= 3.11 with venv, and make.
PYTHON ?= python3
BIN := .venv/bin
# torch first and by itself: whatever build of the pinned version pip finds (CPU or CUDA) is then the one all others use.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test bench

help:
	@echo "make demo    pretrain I-JEPA on ten real photographs, in about three minutes on two CPU cores"
	@echo "make test    the linter and all tests that need no GPU"
	@echo "make bench   the benchmarks"

demo: .venv/demo.done
	rm -rf runs/make_demo
	$(BIN)/python -m ijepa_fast.demo --config configs/demo.yaml train.folder=runs/make_demo

test: .venv/dev.done
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n auto --dist loadfile

bench: .venv/dev.done
	$(BIN)/python -m pytest bench --benchmark-only

.venv/demo.done: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable ".[demo]"
	touch $@

.venv/dev.done: .venv/demo.done
	$(INSTALL) --editable ".[demo,dev,dali]"
	touch $@
