# Everything happens inside .venv, which `make install` makes from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
DATA := data/openmoji

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-faults fuzz images-check ui cluster cluster-down docs bench lint lock audit clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | column -t -s '	'

install: .venv/.installed ## make .venv with everything that is locked

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11 to 3.13 is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (the first time a few minutes, mostly torch) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -m mmdiff_ray.evaluation.weights
	@touch $@

demo: install ## build OpenMoji shards, train 4 to 5 minutes on two Ray workers, evaluate
	@test -f $(DATA)/manifest.json || $(BIN)/mmdiff data build openmoji --out $(DATA)
	@$(BIN)/mmdiff train pipelines/configs/demo.yaml

test: install ## all tests but the long faults, two at a time
	@$(BIN)/python -m pytest -m "not faults" --numprocesses 2

test-fast: install ## the tests that take seconds
	@$(BIN)/python -m pytest -m "not slow"

test-faults: install ## long runs whose workers, drivers and nodes are killed
	@$(BIN)/python -m pytest -m faults --timeout 1200

fuzz: install ## 10,000 generated inputs: each is refused in one line or taken whole
	@FUZZ_CASES=10000 $(BIN)/python -m pytest tests/fuzz

images-check: install ## build the CPU and MLflow images with buildah, as root, and run them
	@$(BIN)/python -m tests.cluster.images

ui: install ## open MLflow on the runs of this folder
	@$(BIN)/mmdiff ui

cluster: install ## start a Ray cluster of three nodes on this machine
	@$(BIN)/mmdiff cluster up

cluster-down: install ## end that cluster, and no other Ray
	@$(BIN)/mmdiff cluster down

docs: install ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "site/index.html"

bench: install ## measure speed against named alternatives
	@test -f $(DATA)/manifest.json || $(BIN)/mmdiff data build openmoji --out $(DATA)
	@$(BIN)/python -m benchmarks

lint: install ## check style and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

lock: ## choose the versions of requirements.lock anew
	@$(BIN)/uv pip compile --quiet --universal --no-emit-index-url --no-annotate --no-header --all-extras \
	  --python-version 3.11 pyproject.toml -o requirements.lock

audit: install ## write sbom.json (CycloneDX), and look for known vulnerabilities of the locked packages
	@$(BIN)/uv tool run --quiet --from cyclonedx-bom cyclonedx-py requirements requirements.lock -o sbom.json
	@echo sbom.json
	@found=$$($(BIN)/uv tool run --quiet pip-audit -r requirements.lock --no-deps --disable-pip 2>&1); code=$$?; \
	case "$$found" in \
	  *"could not be audited: numpy "* | *ConnectionError* | *"Max retries"*) \
	    echo "vulnerabilities: skipped, the service that lists them cannot be reached" ;; \
	  *) echo "$$found"; exit $$code ;; \
	esac

clean: ## remove .venv and what tests left; data and runs stay
	@rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache
