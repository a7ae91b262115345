PYTHON = python3
SETUP = $(PYTHON) .ci/setup
SCRIPTS = $(sort $(wildcard *.py .ci/*.py) $(shell grep -l -d skip '^.!.*python' .ci/*))
export PYTHONPYCACHEPREFIX = $(CURDIR)/.cache/pycache
unexport PYTHONDONTWRITEBYTECODE
export HYPOTHESIS_STORAGE_DIRECTORY = $(CURDIR)/.cache/hypothesis

.PHONY: help demo test lint faults soak bench matrix clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## see it work: a test CA and a web server on this machine, nothing else touched
	@$(SETUP) pebble >/dev/null && python=$$($(SETUP) crypto) && exec "$$python" .ci/demo

test: ## all tests; one part with ARGS="-k words"
	@$(SETUP) venv >/dev/null
	@$(SETUP) pebble >/dev/null || echo "the tests that need pebble will be skipped"
	@.venv/bin/python -W error -m pytest -rs $(ARGS)

lint: ## ruff and mypy --strict
	@$(SETUP) lint >/dev/null
	@.venv/bin/python -m ruff check --quiet $(SCRIPTS) && echo "ruff: no findings"
	@.venv/bin/python -m mypy $(SCRIPTS)

faults: ## every step on the disk failed, stopped and killed, and what becomes of it; ARGS=--short
	@$(SETUP) venv >/dev/null
	@.venv/bin/python .ci/faults $(ARGS)

soak: ## issue and renew 50 times in a row at a test CA that refuses nonces and is slow; ARGS=ROUNDS
	@$(SETUP) venv >/dev/null
	@.venv/bin/python .ci/soak $(ARGS)

bench: ## what it costs, beside every other client that is here: half an hour; ARGS="--short" or names of cases
	@$(SETUP) venv >/dev/null
	@.venv/bin/python .ci/bench $(ARGS)

matrix: ## the quick tests, on each Python with the oldest and the newest cryptography
	@$(PYTHON) .ci/matrix

clean: ## remove .venv and .cache
	rm -rf .venv .cache
