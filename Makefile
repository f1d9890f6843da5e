# Targets but gpu-check and clean make their environment (.venv; test-plugins and docs one of their
# own) if it is not there, from pinned packages for a machine without a GPU, build the library if
# they need it, and run. A second call installs nothing; a changed native source rebuilds the library
# alone.
PYTHON ?= python3
# PyPI's torch for Linux brings several GB of CUDA; this index has the build without.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
# Tests run side by side, one process a core, four at most.
PYTEST_JOBS ?= -n auto --maxprocesses 4 --dist worksteal
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

# OpenMP threads that wait shall sleep: where other work shares the cores, spinning ones made these
# small operators 25 times slower.
test test-all test-races test-plugins test-asan demo: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all test-races test-plugins test-asan bench docs wheel gpu-check lint clean

demo: .venv/.built
	$(BIN)/python -m diffad_fast.data.demo --out out/demo

test: .venv/.built
	$(BIN)/python -m pytest $(PYTEST_JOBS)

test-all: .venv/.built
	$(BIN)/python -m pytest $(PYTEST_JOBS) -m "slow or not slow"

# CUDA's kernels, compiled for the CPU, under ThreadSanitizer.
test-races: .venv/.built
	$(BIN)/python -m pytest $(PYTEST_JOBS) -m slow tests/test_emulation.py

# The integrations beside the hosts that they are made for, in an environment of their own.
test-plugins: .venv-plugins/.built
	.venv-plugins/bin/python -m pytest $(PYTEST_JOBS) -m "slow or not slow" \
		tests/integrations tests/test_examples.py

test-asan: .venv/.installed
	tests/asan.sh $(abspath $(BIN)/python) out/asan

bench: .venv/.built .venv/.bench
	$(BIN)/python -m benchmarks cpu

# Into out/docs. The pages are read from the sources: nothing of the library is imported.
docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict --site-dir out/docs

# One wheel for the Python that builds it, with CUDA inside where nvcc is found (DIFFAD_FAST_CUDA).
wheel: .venv/.installed
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# On a machine with a GPU, with its own Python and torch: no .venv, no network.
gpu-check:
	PYTHON=$(PYTHON) benchmarks/gpu_check.sh $(or $(OUT),out/gpu-check)

lint: .venv/.installed
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-plugins .venv-docs build dist out diffad_fast.egg-info diffad_fast/*.so
	find diffad_fast kernels tests benchmarks -name __pycache__ -prune -exec rm -r {} +

# torch comes first and alone: the other packages are to take the one that is there.
%/.torch: requirements-cpu.txt
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --no-deps --extra-index-url $(TORCH_INDEX) \
		$$(grep '^torch==' requirements-cpu.txt)
	$*/bin/python -m pip install -r requirements-cpu.txt
	touch $@

.venv/.installed: .venv/.torch
	touch $@

.venv-plugins/.installed: .venv-plugins/.torch requirements-plugins.txt
	.venv-plugins/bin/python -m pip install --no-deps -r requirements-plugins.txt
	touch $@

.venv-docs/.installed: requirements-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -r requirements-docs.txt
	touch $@

.venv/.bench: requirements-bench.txt .venv/.installed
	$(BIN)/python -m pip install --no-deps -r requirements-bench.txt
	touch $@

%/.built: %/.installed pyproject.toml setup.py $(NATIVE)
	$*/bin/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

# Kept once made: to make they are steps on the way to another file.
.PRECIOUS: %/.torch %/.built
