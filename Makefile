# `make demo` and `make test` do all their set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# one file's tests stay in one of two processes, since they share what it has prepared
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-faults docs check prefect-ui mlflow-ui clean help

help:
	@echo "make demo       install and run the whole job on a simulated arena"
	@echo "make test       install and run the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-faults  a bad night: kills, full disks, lost servers"
	@echo "make docs       the documentation as pages, into .charm/site; every link is checked"
	@echo "make check      formatting, lint, types and tests: what CI runs"
	@echo "make prefect-ui the Prefect pages, http://127.0.0.1:4200"
	@echo "make mlflow-ui  the MLflow pages, http://127.0.0.1:5000"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
# torch first and pinned: an unpinned resolution can bring several GB of CUDA packages to a machine without a GPU
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m flows.calibrate --preset demo

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

test-faults: $(READY)
	$(BIN)/python -m pytest -q -m faults

docs: $(READY)
	$(BIN)/mkdocs build --strict

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

prefect-ui: $(READY)
	$(BIN)/prefect server start

mlflow-ui: $(READY)
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/.charm/mlflow.db --port 5000

clean:
	rm -rf $(VENV) .charm .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
