# What a newcomer needs is `make demo`; what a change needs is `make lint test`.
# Everything runs from .venv, which `make setup` fills from requirements.lock.

PYTHON ?= $(shell command -v python3.11 >/dev/null && python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NODE := tests/node/node_modules/.installed
LANGCHAIN := tests/langchain/.venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# uv reads no pip configuration; the index and the certificates that pip is told about are passed on.
UV := UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(PIP) config get global.index-url 2>/dev/null)}}"; \
  test -n "$$UV_DEFAULT_INDEX" && export UV_DEFAULT_INDEX || unset UV_DEFAULT_INDEX; \
  VIRTUAL_ENV=$(VENV) $(BIN)/uv --quiet

.PHONY: setup demo test clients browser clock redis lint bench simulate faults lock docs clean help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## fill .venv from requirements.lock; quick when nothing changed

# pip alone needs a minute for what uv does in seconds, so pip installs uv, by its locked hash, and stands by in case
# that uv cannot use an index that pip is configured for.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock.txt
	@$(PIP) install -qq --require-hashes -r $(VENV)/uv.lock.txt
	@{ $(UV) pip install --compile-bytecode --require-hashes -r requirements.lock; } \
	  || $(PIP) install -qq --require-hashes -r requirements.lock
	@$(PIP) install -qq --no-deps --no-build-isolation --no-index -e .
	@touch $@

demo: setup ## a server, a slow provider, three bursts, a verdict; then the server stays up
	@$(BIN)/oncewise demo

test: setup clients browser clock redis ## the whole test suite
	@$(BIN)/python -m pytest

clients: $(NODE) $(LANGCHAIN) ## other people's clients, for the tests that run them against the server

# autocannon, openai-node and the Vercel AI SDK; where there is no npm their tests say that they were skipped.
$(NODE): tests/node/package-lock.json
	@if command -v npm >/dev/null; then cd tests/node && npm ci --silent --no-audit --no-fund; \
	  else echo "npm is missing: tests with Node.js clients will be skipped"; fi
	@mkdir -p $(@D) && touch $@

# LangChain has an environment of its own: it wants uuid-utils below 1, and nothing of it is ours to depend on.
$(LANGCHAIN): tests/langchain/requirements.lock | setup
	@$(PYTHON) -m venv $(@D)
	@{ $(UV) pip install --python $(@D)/bin/python --require-hashes -r $<; } \
	  || $(@D)/bin/python -m pip --disable-pip-version-check install -qq --require-hashes -r $<
	@touch $@

# Chromium, for the test that watches a stream as a page does. Browsers come as Debian packages, which only root installs.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && echo "installing chromium" && apt-get -qq update >/dev/null \
	  && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
	  || echo "chromium is missing: the test with a browser will not run"

# libfaketime, for the tests with a server whose clock is wrong; also a Debian package.
clock:
	@ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || test -n "$$ONCEWISE_TEST_FAKETIME" \
	  || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && echo "installing libfaketime" && apt-get -qq update >/dev/null \
	  && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends libfaketime >/dev/null; } \
	  || echo "libfaketime is missing: the tests with a wrong clock will be skipped"

# Valkey comes with the Python packages; the contract of the coordination is held to Redis itself as well.
redis:
	@command -v redis-server >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && echo "installing redis-server" && apt-get -qq update >/dev/null \
	  && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq install -y --no-install-recommends redis-server >/dev/null; } \
	  || echo "redis-server is missing: the tests of the coordination run on Valkey alone"

lint: setup ## style, types, and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: setup ## every benchmark, then the page of figures; forty-five minutes
	@$(BIN)/python -m bench.run

simulate: setup ## fifty thousand histories of a fleet under faults, in virtual time; a few minutes
	@$(BIN)/python -m tests.simulation

faults: setup clock ## real processes killed, stopped, cut off and starved by the hundred; the figures, in about an hour
	@$(BIN)/python -m tests.faults

lock: ## resolve the dependencies anew
	@$(UV) pip compile pyproject.toml --extra local --group dev --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-emit-index-url --no-header --output-file requirements.lock
	@$(UV) pip compile pyproject.toml --extra local --universal --python-version 3.11 --generate-hashes \
	  --constraint requirements.lock --no-annotate --no-emit-index-url --no-header --output-file deploy/requirements.lock
	@$(UV) pip compile tests/langchain/requirements.in --universal --python-version 3.11 --generate-hashes --upgrade \
	  --no-emit-index-url --no-header --output-file tests/langchain/requirements.lock

docs: setup ## rewrite the reference pages that are made from the code
	@$(BIN)/python -m tests.docs.reference

clean: ## remove what was installed and cached
	rm -rf $(VENV) tests/node/node_modules tests/langchain/.venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist
