# `make demo` runs the whole job on this machine, `make test` runs the tests; both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FOR_TESTS := $(VENV)/.installed-for-tests

.DEFAULT_GOAL := help
.PHONY: help deps demo demo-seeds base test ops test-long check format schema pictures clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

deps: $(FOR_TESTS) ## create .venv and install memfit with what the demo and the tests need

# --no-compile: byte-compiling every file of torch and transformers would take longer than installing them.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (about 1.6 GB with a CPU build of torch; a CUDA build adds about 3 GB of download)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memfit needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[demo]"
	@touch $@

$(FOR_TESTS): $(INSTALLED)
	@echo "Installing the tools of the tests into $(VENV)"
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[demo,dev,deepspeed]"
	@touch $@

demo: $(INSTALLED) ## check, forecast, fine-tune, evaluate and report on handwritten order slips
	@$(BIN)/python demo/run.py

demo-seeds: $(INSTALLED) ## the demo under three seeds, one after another
	@$(BIN)/python demo/run.py --seeds 0 1 2

base: $(INSTALLED) ## train the demo's embedded base model again from nothing
	@$(BIN)/python demo/base.py

test: $(FOR_TESTS) ## run the tests (under 12 minutes on 2 cores)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not long and not gpu"

ops: $(FOR_TESTS) ## compile DeepSpeed's two operators for CPU ranks (some minutes, once; tests of ZeRO are skipped without)
	@PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -c "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder as Comm; CPUAdamBuilder().load(); Comm().load()"

test-long: ops ## run all tests, the long ones included; docs/measured/invariants.md tells of the layouts
	@$(BIN)/python -m pytest -q --ignore tests/invariant
	@$(BIN)/python -m tests.invariant.matrix

check: $(FOR_TESTS) ## format, lint, types and the tests that need no torch (under a minute)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python tools/recipe_docs.py --check
	@$(BIN)/python tools/physics_docs.py --check
	@$(BIN)/python tools/demo_docs.py --check
	@$(BIN)/python tools/models_docs.py --check
	@$(BIN)/python tools/proof_docs.py --check
	@$(BIN)/python tools/openbmb_docs.py --check
	@$(BIN)/python -m pytest -q -n 2 tests/null
	@$(BIN)/python -m pytest -q tests/null/test_floors.py -k house_limits

format: $(FOR_TESTS) ## format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

schema: $(FOR_TESTS) ## write docs/recipe.schema.json and docs/recipe.md from the recipe's types
	@$(BIN)/python tools/recipe_docs.py
	@$(BIN)/python tools/physics_docs.py
	@$(BIN)/python tools/models_docs.py

pictures: $(INSTALLED) ## screenshots of the newest demo report into docs/pictures (needs chromium)
	@$(BIN)/python tools/report_pictures.py

clean: ## remove what the targets made, the run folders excepted
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache *.egg-info demo/data
