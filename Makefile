# What people and CI call. `make build test` in a virtual environment is the whole workflow.
.PHONY: build test test-asan test-asan-emulated test-avx512 bench format check stubs clean
PYTHON ?= python
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cc csrc/*/*.cu csrc/*/*.cuh tests/emulate/*.h tests/emulate/*.cc tests/emulate/*/*.cuh examples/cpp/*.cc)

build:  ## install the package with everything that tests and checks need
	$(PYTHON) -m pip install ".[gemma,test,dev]"

test:
	$(PYTHON) -m pytest

SANITIZED := LD_PRELOAD="$(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0

# A build folder of its own: CMake remembers its options, and the next plain install must not inherit them.
test-asan:  ## the op tests, emulated CUDA too, with address and undefined-behaviour sanitizers
	CMAKE_ARGS="-DFULLBEAM_SANITIZE=ON -DFULLBEAM_CUDA=OFF" $(PYTHON) -m pip install --target build/asan --no-deps --upgrade \
	  -C build-dir=build/asan-tree .
	$(SANITIZED) PYTHONPATH=build/asan $(PYTHON) -m pytest tests/ops tests/test_emulate.py

SAMPLE ?= 1000000
test-asan-emulated:  ## of these, SAMPLE tests of the emulated CUDA kernels alone: no build but theirs; part of CI
	$(SANITIZED) $(PYTHON) -m pytest tests/test_emulate.py
	$(SANITIZED) $(PYTHON) -m pytest tests/ops --backend emulated --sample $(SAMPLE)

test-avx512:  ## the op tests with the AVX-512 kernels simulated on AVX2, see tests/simulate/immintrin.h
	CMAKE_ARGS="-DFULLBEAM_SIMULATE_AVX512=ON -DFULLBEAM_CUDA=OFF" $(PYTHON) -m pip install --target build/simulate \
	  --no-deps --upgrade -C build-dir=build/simulate-tree .
	PYTHONPATH=build/simulate $(PYTHON) -c \
	  "from fullbeam import _core; assert 'avx512' in _core.available_isas(), _core.__file__"
	PYTHONPATH=build/simulate $(PYTHON) -m pytest tests/ops

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
