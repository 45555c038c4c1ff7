# Two commands on a fresh machine: `make demo` and `make test`. Every target sets up `.venv` first.
PYTHON ?= python3
BIN := .venv/bin

# Where Linux gives huge pages to those who ask, recognition on CPUs takes an eighth less with them
# (docs/LOG.md); other C libraries ignore it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: setup demo picture test lint format bench plan docs clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	# A browser for the tests of report.html, which are skipped where there is none.
	which chromium-headless-shell chromium google-chrome >/dev/null || { apt-get -qq update && \
	  apt-get -qq install --no-install-recommends chromium-headless-shell >/dev/null; } || true
	touch $@

demo: setup
	$(BIN)/flax-distil demo

# docs/report.png, of the demo's report.
picture: setup
	$(BIN)/python docs/report_picture.py runs/demo/report.html docs/report.png

test: setup
	$(BIN)/pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

# Two recipes on two TPU slices, compiled without a TPU; what was compiled once is kept.
plan: setup
	$(BIN)/flax-distil plan recipes/small-12-4.toml recipes/large-v2-32-2.toml \
	  --topology v4-8 v5e-8 --programs train --answers tests/plan/golden

docs: setup
	NO_COLOR=1 $(BIN)/zensical build --strict

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
