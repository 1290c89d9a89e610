PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: demo deploy-demo test test-long faults fuzz test-demo check clean

demo: $(READY)
	$(BIN)/sonofed-lab demo

deploy-demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/demo.sh

# Four workers of one thread each, for half of the time is waiting for processes; a file stays
# whole, so its fixtures are made once.
WORKERS := --numprocesses 4 --dist loadfile --no-loadscope-reorder

test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not demo and not faults and not long" $(PYTEST_ARGS)

test-long: export OMP_NUM_THREADS := 1
test-long: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m long $(PYTEST_ARGS)

faults: export OMP_NUM_THREADS := 1
faults: $(READY)
	$(BIN)/python -m pytest -m faults $(PYTEST_ARGS)

fuzz: export OMP_NUM_THREADS := 1
fuzz: export SONOFED_FUZZED_REQUESTS := 200000
fuzz: $(READY)
	$(BIN)/python -m pytest -k mutated_requests --timeout 5400 -s tests/integration/test_enclave_process.py $(PYTEST_ARGS)

test-demo: $(READY)
	$(BIN)/python -m pytest -m demo $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("SonoFed needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
