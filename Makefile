# `make train` and `make test` need nothing but Python 3.11+ and a C++ compiler; the rest is set up by scripts/setup.sh.

BIN := .venv/bin

.PHONY: train test test-gpu test-long lint format setup clean

train: ## Set up, then train the main job. More arguments: make train ARGS="--num-gpus 2 --strategy zero2"
	@scripts/setup.sh train
	$(BIN)/zerofit train --preset shakespeare_char $(ARGS)

test: lint ## All checks, and every test that needs neither a GPU nor patience.
	$(BIN)/pytest

test-gpu: ## Tests that need an NVIDIA GPU.
	@scripts/setup.sh test
	$(BIN)/pytest -m gpu

test-long: ## Tests too long for every change.
	@scripts/setup.sh test
	$(BIN)/pytest -m long

lint:
	@scripts/setup.sh test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format:
	@scripts/setup.sh test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: ## Install again, whatever was installed before.
	@scripts/setup.sh test --again

clean: ## Remove caches and builds. The environment, data and runs stay.
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
