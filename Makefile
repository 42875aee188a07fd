# make run: everything from installation to the executed notebook.  make help: all targets.
PYTHON ?= python3
RUN ?=
TIMES ?= 20

ifeq ($(OS),Windows_NT)
PY := .venv/Scripts/python
else
PY := .venv/bin/python
endif
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help run test test-fast chaos fuzz lint bench bench-accuracy report

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "cellseg needs Python 3.11 to 3.13: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into .venv (once; some minutes)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

run: $(STAMP) ## execute Training.ipynb from top to bottom; its copy goes to the run's folder
	@$(PY) -u -m cellseg run

test: $(STAMP) ## run all tests
	$(PY) -m pytest

test-fast: $(STAMP) ## run the tests that take no more than a few seconds each
	$(PY) -m pytest -m "not slow"

chaos: $(STAMP) ## cause every fault that a run must survive; under six minutes on two cores
	@$(PY) tests/chaos.py

fuzz: $(STAMP) ## try many more broken and hostile files than the tests do: make fuzz TIMES=50
	CELLSEG_FUZZ=$(TIMES) $(PY) -m pytest tests/test_fuzz_*.py

lint: $(STAMP) ## check style and format, the notebook included
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(STAMP) ## time and compare every stage with the usual way; writes benchmarks/results.md
	$(PY) -m benchmarks.run

bench-accuracy: $(STAMP) ## train two recipes on real tissue, 45 minutes each, and compare their scores
	@$(PY) -m benchmarks.accuracy

report: $(STAMP) ## write report.pdf of a run: make report RUN=runs/sample/NAME
	@test -n "$(RUN)" || { echo "which run? make report RUN=runs/NAME"; exit 1; }
	$(PY) -m cellseg report $(RUN)
