# Every verb makes its environment first (.venv) and costs nothing the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= runs
WORKERS ?= auto
# A process a core, each with one thread: the nets of the tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist loadscope

.PHONY: setup lint format types test test-slow test-oldest demo docs dist-check clean

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "$(PYTHON) is missing or older than 3.10; name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "$(PYTHON) cannot make a virtual environment: its venv module (or ensurepip) is missing." >&2; \
	    echo "Install it (Debian, Ubuntu: apt install python3-venv) and call make again." >&2; exit 1; }
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m slow

demo: $(STAMP)
	$(BIN)/qkd run configs/digits/demo.yaml --runs-dir $(RUNS)

# Warnings are errors. Links between pages are checked by the build; those to other sites by `make docs BUILDER=linkcheck`.
BUILDER ?= html
docs: $(STAMP)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -c docs/site -b $(BUILDER) docs build/docs
	@echo build/docs/index.html

dist-check: $(STAMP)
	$(BIN)/pytest -m slow tests/test_packaging.py

# The fast tests with the oldest versions that pyproject.toml allows, in a separate environment.
test-oldest: $(STAMP)
	$(BIN)/python tests/oldest_versions.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qkd quantizers export tests -name __pycache__ -type d -exec rm -rf {} +
