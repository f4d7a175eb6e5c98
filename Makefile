PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: check clean demo docs docs-serve few-steps fashion-mnist learned-solvers lint release
.PHONY: tables test test-all test-float32 test-newest test-oldest test-slow
.PHONY: work-precision

# Installs the package with its extras once, and again when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[examples,tests,dev]"
	touch $@

# Trains a small diffusion model on handwritten digits and compares samplers.
demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

# Trains one network under VP, BDM and CLD on Fashion-MNIST, and compares all samplers:
# hours on two cores. Needs Debian's package dataset-fashion-mnist.
fashion-mnist: $(VENV)/.installed
	$(BIN)/python benchmarks/fashion_mnist.py

# The paper's tables and figures, with exact scores in place of networks: an hour.
tables: $(VENV)/.installed
	$(BIN)/python benchmarks/paper_tables.py

# The error with few steps, in fourteen cases: a minute or two per case.
few-steps: $(VENV)/.installed
	$(BIN)/python benchmarks/few_steps.py

# Solvers that are learned for mixtures and for the included networks: an hour.
learned-solvers: $(VENV)/.installed
	$(BIN)/python benchmarks/learned_solvers.py

# Work-precision diagrams of all samplers: several minutes per case.
work-precision: $(VENV)/.installed
	$(BIN)/python benchmarks/work_precision.py

# Every law, one solve per feature, messages: in double precision.
test: $(VENV)/.installed
	JAX_ENABLE_X64=1 $(PYTEST) -m "not (thorough or slow)" --durations=25

# Also orders, statistics, adjoints, devices and networks against oracles; examples,
# benchmarks and pages; what is skipped in double precision or depends on the precision; and
# what depends on how XLA compiles, without the flags that make the suite fast.
test-all: test
	JAX_ENABLE_X64=1 $(PYTEST) -m "thorough and not slow" --durations=25
	JAX_ENABLE_X64=0 $(PYTEST) -m "(float32 or precision) and not slow"
	XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_ENABLE_X64=1 \
		$(PYTEST) tests/thorough/test_accuracy.py \
		-k "medians or agrees_with_double or survive"

# All of it in JAX's default, single precision.
test-float32: $(VENV)/.installed
	JAX_ENABLE_X64=0 $(PYTEST) -m "not slow"

# Also the few cases that take minutes, such as training that is killed ten times.
test-slow: $(VENV)/.installed
	$(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Formatting, lint, types, and the test suite.
check: lint test-all

# The site, in site/. Executes its tutorials.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

# Builds the distributions, and tests the wheel in a clean environment.
release: $(VENV)/.installed
	ADDRESS="$(ADDRESS)" PATH="$(abspath $(BIN)):$$PATH" .ci/release

# The test suite with the oldest versions of all dependencies that pyproject.toml allows.
test-oldest:
	.ci/test-versions lowest-direct 3.11

# With the newest, on the newest Python that is installed of those that are supported.
test-newest:
	.ci/test-versions highest 3.13 3.12 3.11

clean:
	rm -rf $(VENV) .venv-* .cache build dist site *.egg-info
