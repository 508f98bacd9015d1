# What people and CI call. `make build test` in a virtual environment is the whole workflow.
.PHONY: build test test-asan bench format check stubs clean
PYTHON ?= python
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cc csrc/*/*.cu csrc/*/*.cuh)

build:  ## install the package with everything that tests and checks need
	$(PYTHON) -m pip install ".[gemma,test,dev]"

test:
	$(PYTHON) -m pytest

test-asan:  ## the op tests against a build with address and undefined-behaviour sanitizers
	CMAKE_ARGS="-DFULLBEAM_SANITIZE=ON" $(PYTHON) -m pip install --target build/asan --no-deps --upgrade .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/asan $(PYTHON) -m pytest tests/ops

bench:
	$(PYTHON) -m benchmarks ops

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(SOURCES)

check:  ## what pre-commit and CI run
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(SOURCES)
	mypy
	$(PYTHON) tests/check_stubs.py

stubs:  ## python/fullbeam/_core.pyi from the installed native module
	$(PYTHON) tests/check_stubs.py --write

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
