# A fresh machine needs Python 3.11 and make; no compiler. `make PYTHON=/path/to/python3.11 demo` for another one.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test hosts quickstarts search mutants check cluster-check bench format settings clean

demo: $(STAMP)
	$(BIN)/recray run --recipe demo --workspace ./workspace-demo

# Two processes: one for tests on clusters, which mostly wait; tests/conftest.py says what goes where.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

# Each takes ten to twenty minutes on two cores, and `hosts` a superuser for its networks.
hosts: $(STAMP)
	$(BIN)/python tests/ways/hosts.py

quickstarts:
	$(PYTHON) tests/ways/quickstarts.py

search: $(STAMP)
	$(BIN)/python tests/ways/search.py

# Faults done on purpose to a copy of the tree; the fast tests have to see each.
mutants: $(STAMP)
	$(BIN)/python tests/mutants.py

# Alone on the machine, or its times mean nothing.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench_scoring --out benchmarks/results
	$(BIN)/python -m benchmarks.bench_checkpoint --out benchmarks/results
	$(BIN)/python -m benchmarks.bench_global_batch --out benchmarks/results
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_negatives --out benchmarks/results
	$(BIN)/python -m benchmarks.bench_audit --out benchmarks/results
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_evaluation --out benchmarks/results
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_guard --out benchmarks/results

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python cluster/check.py
	$(BIN)/hadolint docker/Dockerfile

# Cluster files alone, against the schemas of Ray, KubeRay and Kubernetes; also part of `check`.
cluster-check: $(STAMP)
	$(BIN)/python cluster/check.py

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

settings: $(STAMP)
	$(BIN)/recray settings > docs/settings.md

# The stamp is newer than what it was installed from: a second `make` installs nothing.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) workspace-demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
