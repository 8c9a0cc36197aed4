# All that a checkout needs: 'make' alone says what there is.

PYTHON ?= python3
TESTS ?= tests
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
PYTEST := $(RUN) HYPOTHESIS_STORAGE_DIRECTORY=.cache/hypothesis pytest
CORE = $(shell find hvd_qgenx/csrc tests/fuzz tests/gpu -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

.PHONY: help setup train experiment test quick fuzz emulate sanitize format lint types dist image clean

help:
	@echo "make setup  make .venv ready: pinned packages, Horovod, this package"
	@echo "make train  run the main job on 3 processes (ARGS=... are passed on)"
	@echo "make experiment  the paper's figure for six compressions (PRESET=paper HOSTS=node1,node2,node3 ARGS=...)"
	@echo "make test   run every test (TESTS=path runs those alone; ARGS=... are passed to pytest)"
	@echo "make quick  run the tests that start no other processes and are not slow, in less than a minute"
	@echo "make fuzz   feed the core's decoder damaged payloads for ten minutes (DURATION=seconds, RUNS=..., SEED=...)"
	@echo "make emulate   compare 20000 drawn cases and 20000 damaged payloads of a GPU's kernels, emulated, with the core"
	@echo "make sanitize  the core's round trips and 200000 mutations under the address and behaviour sanitizers"
	@echo "make format lay out all Python, C and C++ as the style wants it"
	@echo "make lint   check the code's style"
	@echo "make types  check the package's types"
	@echo "make dist   build a wheel and a source distribution in dist/, and check them"
	@echo "make image  build the CPU's container image and run its quick tests inside (BASE=image, ARGS=... for the build)"
	@echo "make clean  remove .venv, the compiled library and all else that was made here (runs/ stays)"

setup:
	@$(PYTHON) environment/prepare.py

train: setup
	$(RUN) horovodrun -np 3 python train/wgan.py $(ARGS)

experiment: setup
	$(RUN) python benchmarks/experiment.py $(if $(PRESET),--size $(PRESET)) $(if $(HOSTS),--hosts $(HOSTS)) $(ARGS)

# Tests of one process share the cores, and so do those that wait; others of several processes need all of them. 5 is
# "no tests of this kind".
test: setup
	$(PYTEST) -n 2 --dist loadfile -m "not parallel" $(TESTS) $(ARGS) || [ $$? = 5 ]
	$(PYTEST) -n 2 --dist loadfile -m waiting $(TESTS) $(ARGS) || [ $$? = 5 ]
	$(PYTEST) -m "parallel and not waiting" $(TESTS) $(ARGS) || [ $$? = 5 ]

quick: setup
	$(PYTEST) -m "not parallel and not slow" $(TESTS) $(ARGS)

fuzz sanitize:
	@$(MAKE) --no-print-directory -C tests/fuzz $@

format: setup
	$(RUN) ruff format .
	$(RUN) clang-format -i $(CORE)

emulate: setup
	$(RUN) python tests/gpu/cases.py --cases 20000 --damaged 20000 $(ARGS)

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) clang-format --dry-run --Werror $(CORE)

types: setup
	$(RUN) mypy hvd_qgenx

dist: setup
	rm -rf dist *.egg-info
	$(RUN) python -m build --no-isolation
	$(RUN) twine check --strict dist/*

image:
	BASE="$(BASE)" docker/image cpu $(ARGS)

clean:
	rm -rf .venv .cache build dist *.egg-info hvd_qgenx/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.DEFAULT:
	$(error There is no target '$@'; 'make help' lists those there are)
