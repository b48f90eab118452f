# Each target makes .venv when it is missing and installs what it needs.
# `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DATA   ?= data

.PHONY: demo test chapters site lint bench lab parity kill-tests clean

demo: .venv/core  ## a real Llama, trained by us, tells a story
	$(BIN)/minllama generate "Once upon a time" --seed 1

test: .venv/dev  ## all tests, on a CPU, without network
	$(BIN)/python -m pytest

chapters: .venv/dev  ## run every notebook from top to bottom
	$(BIN)/python -m pytest tests/test_chapters.py

site: .venv/dev  ## the book, into site/
	$(BIN)/python docs/build_site.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/dev  ## a few seconds of each benchmark; see each file for the full run
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file --smoke || exit 1; done

lab: .venv/lab  ## the chapters in Jupyter
	$(BIN)/jupyter lab chapters

parity: .venv/dev  ## real tokenizers against their own libraries: make parity DATA=folder
	$(BIN)/python benchmarks/parity_tokenizers.py $(DATA)

kill-tests: .venv/dev  ## 50 random kills of a save in progress: none may lose a checkpoint
	$(BIN)/python -m tests.dist_checkpoint.kill_tests

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[dev]'
	touch $@

.venv/lab: .venv/core
	$(PIP) -e '.[lab]'
	touch $@

clean:
	rm -rf .venv site .site build *.egg-info
