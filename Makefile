# One .venv for everything, made on first use and made again when pyproject.toml changes.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
RINGS := core service system
PYTEST := $(BIN)/pytest -q
SPREAD := --dist loadfile
BENCH ?= bus

.DEFAULT_GOAL := help
.PHONY: help setup run test check bench soak clean

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

setup: ## .venv with all that DeepFlow needs
	@test -n "$(PYTHON)" || { echo "DeepFlow needs Python 3.11 or newer: set PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" .ci/setup.py

run: setup ## start the platform (ARGS="--workers 2"); Ctrl-C stops it
	@exec $(BIN)/deepflow up $(ARGS)

# The first ring computes, the second one waits for other processes: together they use two cores best. Of the third, platforms of a test's own
# may run side by side; the one that the others share wants the machine for itself.
test: setup ## every test of the three rings
	@for ring in $(RINGS); do echo "$$ring: $$(sed -n "s/^  \"$$ring: \(.*\)\",\$$/\1/p" pyproject.toml)"; done
	$(PYTEST) -m "core or service" $(SPREAD) -n 3 $(ARGS)
	$(PYTEST) -m "system and apart" $(SPREAD) -n 3 $(ARGS)
	$(PYTEST) -m "system and not apart" $(ARGS)

check: setup ## format, lint, types, import contracts, core ring
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -q -m core

bench: setup ## one bench (BENCH=bus)
	@exec $(BIN)/deepflow bench $(BENCH) $(ARGS)

soak: setup ## the long tests in full length
	DEEPFLOW_SOAK=1 $(BIN)/pytest -m soak --timeout 7200 $(ARGS)

clean: ## everything that was made here, .venv too
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
