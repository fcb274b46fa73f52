# Front door. `make bench` and `make test` work after a clone and nothing else.
# Have an environment already? `make bench PY=python3` uses it and installs nothing.

VENV := .venv
PYTHON ?= python3
ifdef PY
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif
# The repository root holds kernels/, a name that belongs to Hugging Face: keep it off sys.path.
export PYTHONSAFEPATH := 1
ARGS ?=

.PHONY: setup bench test lint clean bench-kernels gate-table check-energy gate-replay

setup: $(READY)

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	# torch alone and by exact version first: a machine with a local CPU build takes that.
	$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

bench: $(READY)
	$(PY) -m minference_green.cli.app run $(ARGS)

# One thread each, or two test processes and their workers wait for each other on two cores.
# GPU tests share the device: make test ARGS="-m gpu -n 0".
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench-kernels: $(READY)
	$(PY) benchmarks/kernels.py $(ARGS)

# Four minutes; reports/README.md shows a part of it.
gate-table: $(READY)
	$(PY) benchmarks/gate.py $(ARGS) > reports/gate-table.txt
	cat reports/gate-table.txt

# Against reports/baselines/main; on a machine without its GPU, recomputes it instead.
check-energy: $(READY)
	$(PY) -m minference_green.cli.app check --verify-without-gpu $(ARGS)

# The gate on recorded blocks: make gate-replay RUN=reports/<a run of 40 blocks>
gate-replay: $(READY)
	$(PY) benchmarks/resample.py $(RUN) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
