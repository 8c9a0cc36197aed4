# All that a checkout needs: 'make' alone says what there is.

PYTHON ?= python3
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help setup train test fuzz sanitize lint clean

help:
	@echo "make setup  make .venv ready: pinned packages, Horovod, this package"
	@echo "make train  run the main job on 3 processes (ARGS=... are passed on)"
	@echo "make test   run every test (ARGS=... are passed to pytest)"
	@echo "make fuzz   feed the core's decoder damaged payloads for ten minutes (DURATION=seconds, RUNS=..., SEED=...)"
	@echo "make sanitize  the core's round trips and 200000 mutations under the address and behaviour sanitizers"
	@echo "make lint   check the code's style"
	@echo "make clean  remove .venv and all else that was made here"

setup:
	@$(PYTHON) environment/prepare.py

train: setup
	$(RUN) horovodrun -np 3 python train/wgan.py $(ARGS)

test: setup
	$(RUN) HYPOTHESIS_STORAGE_DIRECTORY=.cache/hypothesis pytest tests $(ARGS)

fuzz sanitize:
	@$(MAKE) --no-print-directory -C tests/fuzz $@

lint: setup
	$(RUN) ruff check .

clean:
	rm -rf .venv .cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.DEFAULT:
	$(error There is no target '$@'; 'make help' lists those there are)
