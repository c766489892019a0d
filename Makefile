# A fresh clone needs python3 (3.10 to 3.13), make and a package index.
#   make demo PYTHON=python3.12     with another Python
#   make test ARGS="-k images -x"   pass arguments to the underlying program
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Number of test processes.
WORKERS ?= 2
BIN = $(VENV)/bin
BOOTSTRAP = command -v "$(PYTHON)" >/dev/null 2>&1 || { \
  echo "setup: there is no $(PYTHON) here. Install Python 3.10 to 3.13 or name yours: make PYTHON=/path/to/python3" >&2; \
  exit 1; }; "$(PYTHON)" -I jobs/bootstrap.py "$(VENV)"
PYTEST = OMP_WAIT_POLICY=PASSIVE "$(BIN)/python" -m pytest \
  --numprocesses "$(WORKERS)" --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo check test test-long lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup:  ## install the runtime packages into VENV; a no-op if done already
	@$(BOOTSTRAP)

setup-dev:  ## the same, plus the packages for tests and lint
	@$(BOOTSTRAP) --dev

demo: setup  ## label toy images, train a student, evaluate both, offline
	@"$(BIN)/maskmill" demo $(ARGS)

check: lint  ## for daily work, in minutes: lint and the quick tests
	@$(PYTEST) -m "not (slow or cluster or browser or long)" $(ARGS)

test: setup-dev  ## all tests except the long ones, in WORKERS processes; WORKERS=0 for a debugger
	@$(PYTEST) -m "not long" $(ARGS)

test-long: setup-dev  ## the long tests: twenty kills, lost nodes, poisonous images, a faulty object store, README on a cluster, rows of the toy benchmark, the GPU script at toy size
	@$(PYTEST) -m long $(ARGS)

lint: setup-dev  ## check style, types and import directions
	@status=0; \
	"$(BIN)/ruff" check . || status=1; \
	"$(BIN)/ruff" format --check . || status=1; \
	"$(BIN)/mypy" || status=1; \
	"$(BIN)/lint-imports" || status=1; \
	exit $$status

bench: setup  ## compare the labelling job with a bare loop and a naive script
	@"$(BIN)/python" -m benchmarks.label_job $(ARGS)

clean:  ## remove the environment, caches and the demo's output
	rm -rf "$(VENV)" demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find models pipeline jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
