# Two commands do everything from a fresh clone: `make demo` and `make test`. Both make and reuse .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find configs data cache pipeline -name "*.py" -o -name "*.yaml" -o -name "page.*")

.PHONY: demo test bench lint docs clean

demo: .venv/installed
	$(BIN)/kdpipe demo

test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# -W: a link that leads nowhere, a page that no other names and a docstring that does not render are errors.
docs: .venv/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs site
	@echo "the site is in site/index.html"

bench: .venv/installed
	test -e ../shared/data/dubai -o -e demo_output/cache.zarr/manifest.json || $(BIN)/kdpipe demo
	$(BIN)/python tests/benchmarks/run.py --out demo_output/bench

.venv/dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# A strict editable install lays out links to the files there are: a new file asks for it again, which takes seconds.
.venv/installed: .venv/dependencies $(SOURCES) setup.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv build site demo_output
