PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo fashion-mnist tables few-steps work-precision test test-float32 test-precision test-slow lint check clean

# Installs the package with its extras once, and again when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[examples,tests,dev]"
	touch $@

# Trains a small diffusion model on handwritten digits and compares samplers.
demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

# One network trained under VP, BDM and CLD on Fashion-MNIST, and all samplers measured:
# hours on two cores. It needs Debian's package dataset-fashion-mnist.
fashion-mnist: $(VENV)/.installed
	$(BIN)/python benchmarks/fashion_mnist.py

# The paper's tables and figures, with exact scores in place of networks: an hour.
tables: $(VENV)/.installed
	$(BIN)/python benchmarks/paper_tables.py

# The error of few steps on fourteen cases: a minute or two a case.
few-steps: $(VENV)/.installed
	$(BIN)/python benchmarks/few_steps.py

# Error against evaluations and time, all samplers, with a picture: several minutes a case.
work-precision: $(VENV)/.installed
	$(BIN)/python benchmarks/work_precision.py

# The test-suite, in double precision.
test: $(VENV)/.installed
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" \
		--durations=25

# The same with JAX's default of single precision.
test-float32: $(VENV)/.installed
	JAX_ENABLE_X64=0 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# What of it `.ci/run` runs: what is skipped in double precision, and what depends on it.
# And once what depends on how XLA compiles, without the flags that make the suite fast.
test-precision: $(VENV)/.installed
	JAX_ENABLE_X64=0 $(BIN)/python -m pytest -n 2 --dist worksteal \
		-m "(float32 or precision) and not slow"
	XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_ENABLE_X64=1 \
		$(BIN)/python -m pytest -n 2 -m "not slow" tests/test_gddim_precision.py

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Format, lint, types, and all tests in both precisions.
check: lint test test-float32

clean:
	rm -rf $(VENV) build dist *.egg-info
