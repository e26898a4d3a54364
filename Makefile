# `make demo` and `make test` are all that a newcomer needs: both make .venv once and use it again.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := constraints.txt pyproject.toml setup.py setup_npu.py CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.asc')
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.asc')

.PHONY: help setup demo test test-all lint format check-vectors check-ascend sanitize clean

help:
	@echo "make demo      set up, then walk the whole road on a small model"
	@echo "make test      set up, then run the tests (long ones left out)"
	@echo "make test-all  all tests, DeepSpeed's too (which it installs)"
	@echo "make lint      ruff, mypy, clang-format; changes nothing"
	@echo "make format    bring every file into the house's form"
	@echo "make check-vectors VECTORS=FILE  replay recorded Ascend C calls on the emulation"
	@echo "make check-ascend  compile the NPU's host code against torch_npu's headers (downloaded once), install for a simulated NPU"
	@echo "make sanitize  the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, the kernels under ThreadSanitizer"
	@echo "make clean     remove the environment and all that was built"

setup: .venv/.ready

# torch comes first and by its exact version: a range would bring a CUDA build of several gigabytes.
.venv/.ready: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python {sys.version.split()[0]} is too old, pyalpaca needs 3.10 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel cmake ninja pybind11
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,plot]'
	touch $@

demo: setup
	$(BIN)/pyalpaca demo

test: setup
	$(BIN)/python -m pytest -m "not long"

test-all: setup
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed tensorboard pyarrow
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

VECTORS ?= tests/data/ascend_c_vectors.jsonl

check-vectors: setup
	$(BIN)/python tests/ascend/check_vectors.py $(VECTORS)

check-ascend: setup
	$(BIN)/python tests/ascend/check_headers.py
	$(BIN)/python -m pytest tests/ascend/test_npu_build.py

sanitize: setup
	$(BIN)/python tests/ops/sanitize.py address
	$(BIN)/python tests/ops/sanitize.py thread

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build dist *.egg-info pyalpaca/_C*.so pyalpaca/libpyalpaca_npu_kernels.so pyalpaca/_C*.build.json
