# make setup | demo | test | check | bench | study-gates | gpu-check
# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DATA := data/digits

.PHONY: setup demo test check bench study-gates gpu-check clean

setup: $(VENV)/.setup-done

# Reinstalls only when the dependencies change.
$(VENV)/.setup-done: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ii_dist needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[demo,test]'
	touch $@

demo: setup
	$(BIN)/python -m tools.import_dataset digits --out $(DEMO_DATA)
	$(BIN)/python -m launch submit configs/demo/digits.yaml

# A process a core, each with one thread: more threads than cores make every one of them slow.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

study-gates: setup
	$(BIN)/python -m benchmarks.study_gates

bench: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[bench]'
	$(BIN)/python -m benchmarks.run_all

gpu-check: setup
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
