# Two commands do everything from a fresh clone: `make demo` and `make test`. Both make and reuse .venv. `make help` lists all.
PYTHON ?= python3
BIN := .venv/bin
ROOM ?= cache
SOURCES := $(shell find configs data cache pipeline -name "*.py" -o -name "*.yaml" -o -name "page.*")

.PHONY: help demo test test-long test-one bench lint docs audit clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/installed ## the whole pipeline on a generated landscape
	$(BIN)/kdpipe demo

test: lint ## lint, and the tests that take a moment each
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-long: .venv/installed ## the tests that take seconds each: processes, packages, trainings
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'long and not slow'

test-one: .venv/installed ## the tests of one room of tests/: make test-one ROOM=cache
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m 'not slow' tests/$(ROOM)

lint: .venv/installed ## ruff, mypy and the order of the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# -W: a link that leads nowhere, a page that no other names and a docstring that does not render are errors.
docs: .venv/installed ## the generated tables of docs/, and the site
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs site
	@echo "the site is in site/index.html"

bench: .venv/installed ## all benchmarks, and one table of what they reached
	test -e ../shared/data/dubai -o -e demo_output/cache.zarr/manifest.json || $(BIN)/kdpipe demo
	$(BIN)/python tests/benchmarks/run.py --out demo_output/bench

audit: .venv/installed ## known vulnerabilities of what is installed, by pip-audit
	test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit; }
	build/audit/bin/pip-audit --path .venv/lib/python3.*/site-packages --progress-spinner off -f json | $(BIN)/python tests/packaging/audit.py

.venv/dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# A strict editable install lays out links to the files there are: a new file asks for it again, which takes seconds.
.venv/installed: .venv/dependencies $(SOURCES) setup.cfg
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean: ## remove .venv and everything that was built
	rm -rf .venv build site demo_output
