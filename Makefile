# Each target makes its own environment in .venv; see tools/bootstrap.py.

# The first Python that really runs: a pyenv shim on PATH may not.
PYTHON := $(shell for p in python3 python /usr/bin/python3; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 && echo $$p && break; \
    done)
BOOTSTRAP = $(or $(PYTHON),$(error no Python >= 3.8 runs here: install python3)) tools/bootstrap.py

.PHONY: demo test test-gpu setup format
demo:  # train a language model with dilated attention on real text, about two minutes on 2 cores
	@$(BOOTSTRAP) demo
test:  # everything that is checked
	@$(BOOTSTRAP) test
test-gpu:  # the tests that need a GPU; one that skips counts as failed
	@$(BOOTSTRAP) test-gpu
setup:  # only the environment
	@$(BOOTSTRAP) setup
format:
	@$(BOOTSTRAP) run ruff check --fix .
	@$(BOOTSTRAP) run ruff format .
