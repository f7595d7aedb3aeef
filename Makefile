# Needs python3 (3.11 or newer, with venv), make and a C++ compiler (Inductor compiles CPU code with it).
PYTHON ?= python3
BIN := .venv/bin
PLUGIN := tests/plugin_package
ARGS ?=

# Two workers on two cores: one thread each, and no pool of compile processes beside them.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test sweep check format bench size clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

venv: .venv/installed  ## .venv with effopt and all that its checks need

# torch brings the setuptools of constraints.txt, so effopt is built with that one and none is fetched beside it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# A third-party plugin as its users have it: a package of its own, found by its entry points.
.venv/plugin: .venv/installed $(wildcard $(PLUGIN)/pyproject.toml)
	@if [ -f $(PLUGIN)/pyproject.toml ]; then \
	  $(BIN)/pip install --quiet --no-deps --no-build-isolation -e $(PLUGIN); fi
	@touch $@

demo: .venv/installed  ## a small model, compiled, checked and reported on
	$(BIN)/effopt demo $(ARGS)

test: .venv/plugin  ## all tests but the sweep; ARGS='tests/graph -k blocks' narrows them
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow" $(ARGS)

sweep: .venv/plugin  ## the tests marked slow: sixty more architectures, further spellings and sizes
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow $(ARGS)

check: .venv/installed  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed  ## put the code in the one format, and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed  ## measure on this machine; ARGS are handed on
	$(BIN)/effopt bench $(ARGS)

size:  ## lines of the core, of passes and of kernels, and files above the soft limit of 300
	@find effopt -name '*.py' | sort | xargs wc -l | awk ' \
	  $$2 == "total" { next } \
	  $$2 ~ /^effopt\/passes\//           { kind = "passes" } \
	  $$2 ~ /^effopt\/backends\/triton\// { kind = "kernels" } \
	  $$2 !~ /^effopt\/(passes|backends\/triton)\// { kind = "core" } \
	  { lines[kind] += $$1; if ($$1 > 300) print "  above 300: " $$2 " (" $$1 ")" } \
	  END { for (kind in lines) printf "  %-8s %5d lines\n", kind, lines[kind] }'

clean:  ## remove .venv, caches and build output
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache torch_compile_debug
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +
