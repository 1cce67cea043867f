# make demo   fine-tune the built-in model and show it
# make test   run every test that needs no GPU, no Mac and no network
# Both make .venv on their first run and install into it; after that nothing is installed again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo
BACKEND ?= auto
DEVICE ?= auto
ON := --backend $(BACKEND) --device $(DEVICE)
# One thread a worker: on tiny models thread pools spin against each other.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# A worker a core. The tests of a file share a worker, and so its models; files keep their order,
# in which the long ones come first and the short unit tests even out the workers' ends.
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -n logical --dist loadfile --no-loadscope-reorder --durations=10

EXTRAS := mlx,cuda,nf4,dev

.PHONY: help demo test test-all check install clean

help:
	@sed -n 's/^# make/make/p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): phi3-lora with both backends (mlx, PyTorch) and the test tools"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --retries 0 \
	    --timeout 30 --index-url https://download.pytorch.org/whl/cpu \
	    "$$(grep '^torch==' constraints.txt)" >/dev/null 2>&1 \
	  || echo "no CPU build of PyTorch in reach: taking the index's own, of several GB on Linux"; fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)

demo: $(STAMP)
	@echo "== the base model on held-out orders (it answers, but not in JSON)"
	@$(BIN)/phi3-lora evaluate --model demo --data demo --generate --samples 2 $(ON)
	@echo "== fine-tuning it into $(RUN)"
	@rm -rf $(RUN)
	@$(BIN)/phi3-lora train --model demo --data demo --preset demo --output $(RUN) $(ON)
	@echo "== the same orders with the adapter"
	@$(BIN)/phi3-lora evaluate --model demo --adapter $(RUN)/adapter --data demo --generate --samples 2 $(ON)
	@echo "the adapter is in $(RUN)/adapter; the same on the other backend: make demo BACKEND=mlx DEVICE=cpu, or BACKEND=cuda DEVICE=cpu"

check: $(STAMP)
	@echo "formatting, lint, types, import rule"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/lint-imports

test: check
	@echo "tests: unit, command line, backends, parity laws, end to end"
	@$(PYTEST)

test-all: check
	@$(PYTEST) -m "not gpu"

clean:
	rm -rf $(VENV) runs build dist
