# make setup | demo | test | check | bench | bench-peers | study-gates | gpu-check | fault-table
# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DATA := data/digits

.PHONY: setup demo test check bench bench-peers study-gates gpu-check fault-table clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

study-gates: setup
	$(BIN)/python -m benchmarks.study_gates

bench: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[bench]'
	$(BIN)/python -m benchmarks.run_all

# The same training by timm's script, torchvision's reference and ii_dist, in turns. About twenty minutes.
bench-peers: setup
	$(BIN)/python -m benchmarks.peers

# What faults cost: real processes killed and hung, a real SLURM (see tests/slurm). About a quarter of an hour.
fault-table: setup
	rm -f docs/launch-faults.md
	II_DIST_FAULT_TABLE=docs/launch-faults.md II_DIST_RANDOM_STOPS=20 $(BIN)/python -m pytest -q \
	  --timeout 1800 tests/ranks/test_launch_faults.py tests/slurm/test_slurm_faults.py tests/slurm/test_slurm_chain.py \
	  tests/unit/launch/test_launch_owner.py

gpu-check: setup
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
