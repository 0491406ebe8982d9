# Everything a reader, a contributor or a CI service needs. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
PAPER ?= diffusion-classifier
SLUG ?= $(PAPER)
PROFILE ?= cpu
JOBS ?= 2
# The resolution of dependencies to install with; empty means "whatever pyproject.toml allows".
CONSTRAINTS ?= constraints.txt
RESOLUTION ?= highest

VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Without compiled bytecode every process would compile torch and friends again.
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export MINILIB_PROGRESS ?= 0
export MPLBACKEND ?= Agg

.PHONY: help setup reproduce page pages book test lint bench lock clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  variables: PAPER=$(PAPER) SLUG=<page> PROFILE=smoke|cpu|gpu (now $(PROFILE)) JOBS=$(JOBS)"

setup: $(VENV)/.stamp ## create the environment (once)

$(VENV)/.stamp: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "uv>=0.8,<1"
	$(BIN)/uv pip install -q --python $(BIN)/python --resolution $(RESOLUTION) \
	  $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[all]"
	touch $@

reproduce: setup ## run one paper, print its claims table, render its page   [PAPER= PROFILE=]
	snakemake --profile profiles/local --cores $(JOBS) --config profile=$(PROFILE) -- results/$(PROFILE)/$(PAPER).json
	@python -m minilib.publish table $(PAPER) --profile $(PROFILE)
	@python book/build.py --results results/$(PROFILE) --page $(PAPER)

page: setup ## run one page and publish its outputs and its record, both or neither   [SLUG= PROFILE=]
	python -m minilib.publish $(SLUG) --profile $(PROFILE)

pages: setup ## run the fleet: every page whose inputs changed   [PROFILE=]
	snakemake --profile profiles/local --cores $(JOBS) --config profile=$(PROFILE)

book: setup ## build the book, strictly
	python book/build.py

lint: setup ## style
	ruff check .
	ruff format --check .

test: setup lint ## lint, unit tests, doctests, then every page once at smoke
	pytest -q -n $(JOBS) --dist loadfile --doctest-modules tests minilib
	rm -rf results/receipts && mkdir -p results/receipts && date +%s > results/receipts/.start
	MINILIB_PROFILE=smoke MINILIB_RECEIPTS=$(CURDIR)/results/receipts pytest -q --nbval-lax -n $(JOBS) --dist loadfile notebooks
	python -m minilib.publish receipts results/receipts --since "$$(cat results/receipts/.start)"

bench: setup ## time minilib against its peers; writes tests/benchmarks/record.json
	python -m minilib.bench

lock: ## resolve the dependencies again into constraints.txt
	printf "triton==3.7.1 ; sys_platform == 'linux'\ntorch==2.13.0\n" > build-torch.pin
	$(BIN)/uv pip compile -q pyproject.toml --extra all --universal --python-version 3.11 \
	  --no-emit-package torch -c build-torch.pin -o build-lock.txt
	( echo "# One resolution for CI and for the published runs; users get the wide ranges of pyproject.toml."; \
	  echo "# Made by: make lock"; grep -vE '^(nvidia|cuda|triton)|^ *#|^WARNING' build-lock.txt; cat build-torch.pin ) > constraints.txt
	rm -f build-torch.pin build-lock.txt

clean: ## remove what was made, but not the environment
	rm -rf results build dist .pytest_cache .ruff_cache .snakemake
