# `make help` lists what there is.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION := false

.PHONY: help setup repro test faults chaos audit check ui dashboard serve doctor verify lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv from requirements.lock (done by the others when needed)

# uv itself is pinned by the lock file: pip only brings it there. Bytecode is compiled once, which
# halves the start of every command.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r <(awk '/^uv==/{p=1} p{print} p&&!/\\$$/{exit}' requirements.lock)
	@echo "installing the locked environment into $(VENV) (about 6 GB, once)"
	uv pip sync --quiet --python $(VENV)/bin/python --require-hashes --compile-bytecode requirements.lock
	uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

repro: $(READY) ## Run the pipeline: what changed is computed, the rest is kept
	@dvc repro || { cnn-tuning doctor --locks; exit 1; }
	@cnn-tuning summary

test: $(READY) ## Run the tests (without the slow ones)
	pytest -m "not slow" -n auto --dist loadscope --no-loadscope-reorder --durations 10 $(ARGS)

faults: $(READY) ## Run the test of each fault, print a table (ARGS='-k "10 or 25"': some)
	python bench/faults.py $(ARGS)

chaos: $(READY) ## Strike 50 runs of the pipeline at random, print a table (ARGS='--runs 7')
	python bench/chaos.py $(ARGS)

audit: $(READY) ## Known holes in packages, secrets in files, unsafe code
	python bench/audit.py

check: $(READY) ## Lint, types, import directions, generated files
	ruff check .
	ruff format --check .
	mypy
	lint-imports

ui: $(READY) ## Compare runs in the browser: http://127.0.0.1:5000
	mlflow ui

dashboard: $(READY) ## Look into searches, also running ones: http://127.0.0.1:8090
	@storage=$$(python -m cnn_tuning.search.latest) || exit 1; \
	echo "$$storage at http://127.0.0.1:8090 (Ctrl-C ends it)"; \
	optuna-dashboard --quiet --host 127.0.0.1 --port 8090 "$$storage"

serve: $(READY) ## Answer over HTTP with the champion: http://127.0.0.1:8080
	cnn-tuning serve $(ARGS)

doctor: $(READY) ## Check Python, disk, GPU and driver, tracking store, data remote
	@cnn-tuning doctor

verify: $(READY) ## Train again in a scratch folder and compare every byte with dvc.lock
	cnn-tuning verify

lock: $(READY) ## Pin requirements.in with hashes into requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" requirements.in requirements-ray.in requirements-dev.in --output-file requirements.lock

clean: ## Remove scratch work and unfinished state (keeps data, models, results, runs)
	rm -rf scratch .state/train .state/tuned .state/refit .state/registering .pytest_cache .hypothesis
