# The first target that needs it creates .venv with PYTHON (make test PYTHON=python3.12), of the versions in
# deps/constraints.txt; it is filled again when a file of deps/ changes. Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSIONS := -c deps/constraints.txt
WORKERS ?= 2

# Idle threads sleep: a run that shares its cores is many times faster so, one that does not is as fast.
export OMP_WAIT_POLICY ?= passive

# WORKERS processes of one thread each; tests/conftest.py says which tests share one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: demo test test-fast test-all test-newest lint format docs lock

# Prune the bundled model with MULTIFLOW and with the solver of `-p best` (which also shares out the zeros, and takes ten
# times as long), measure how sensitive its layers are, and put all of it into one file, output/demo/report.html.
DEMO := $(BIN)/python prune.py -m xvlm --output_dir output/demo
demo: $(VENV)/.installed
	$(DEMO) -p multiflow -s 63,75 --num_batches 32 --evaluate
	$(DEMO) -p best -s 63,75 --num_batches 16 --evaluate
	$(BIN)/python compare.py --pruned output/demo

# All tests but the slow ones: with lint, what must pass before a change is accepted.
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

# Unit tests only, for use while editing.
test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not script and not multiprocess and not gpu and not network"

# Every test.
test-all: $(VENV)/.installed-dev
	$(PYTEST)

# The tests with the newest versions that deps/requirements.txt allows, in a venv of its own.
test-newest:
	rm -f .venv-newest/.installed*
	$(MAKE) test VENV=.venv-newest VERSIONS="--upgrade --upgrade-strategy eager"

# Style, format and types.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Format all files and fix what can be fixed of the style.
format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site of README.md and docs/ in output/docs/site, with the packages of a venv of its own.
PAGES := output/docs/pages
docs: .venv-docs/.installed
	rm -rf $(PAGES)
	mkdir -p $(PAGES)/images
	cp docs/*.md docs/site.css CONTRIBUTING.md CHANGELOG.md $(PAGES)
	cp README.md $(PAGES)/index.md
	cp images/*.png $(PAGES)/images
	sed -i.bak 's#](docs/#](#g; s#](\.\./README\.md#](index.md#g; s#](\.\./#](#g' $(PAGES)/*.md
	rm $(PAGES)/*.bak
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@echo "site: output/docs/site/index.html"

.venv-docs/.installed: deps/requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -r $<
	touch $@

# Write the versions of a venv whose tests have passed to deps/constraints.txt (newest: make lock VENV=.venv-newest).
lock:
	test -e $(VENV)/.installed-dev
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel > $(VENV)/freeze
	( echo "# Exact versions that the tests run with, direct and indirect; \`make lock\` writes this file."; \
	  sed -n 's/^\([^ ]*==[^+ ]*\).*/\1/p' $(VENV)/freeze | LC_ALL=C sort -f ) > deps/constraints.txt

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: deps/requirements.txt deps/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(VERSIONS) -r deps/requirements.txt
	touch $@

$(VENV)/.installed-dev: deps/requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install $(VERSIONS) -r deps/requirements-dev.txt
	touch $@
