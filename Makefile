# Two commands do all set-up: `make demo` and `make test`. Both work in a fresh clone with Python 3.11 and make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
CACHE := $(or $(FINETUNE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator)
# One environment per set of dependencies, shared by all clones. It holds the dependencies only; the code comes from
# this checkout.
LIST_DEPS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *sum(p["optional-dependencies"].values(), []), sep="\n")
DEPS := $(shell ($(PYTHON) -c '$(LIST_DEPS)'; cat constraints.txt) 2>/dev/null | sha256sum | cut -c1-12)
VENV := $(CACHE)/venv-$(DEPS)
BIN := $(VENV)/bin
export FINETUNE_CACHE := $(CACHE)
export PYTHONPATH := $(CURDIR)/crds:$(CURDIR)/operator:$(CURDIR)/trainer_image
export PATH := $(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
PYTEST := $(BIN)/python -m pytest
# A file of tests stays together: what its tests share is made once. The order of files is that of tests/conftest.py.
FILES := --dist loadfile --no-loadscope-reorder
# One thread a process, or they wait for each other.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -q -n logical --maxprocesses 4 $(FILES)

.PHONY: help
help: ## This list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.PHONY: setup
setup: $(VENV)/.complete ## Install the dependencies (once, about 3 minutes)

$(VENV)/.complete:
	@mkdir -p "$(CACHE)"
	@exec 9>"$(CACHE)/venv.lock"; flock 9; \
	if [ ! -f "$@" ]; then \
	  echo "Installing the dependencies into $(VENV) (about 5 GB, 3 minutes the first time)"; \
	  $(PYTHON) -c 'import sys; sys.exit("finetune-operator needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else None'; \
	  rm -rf "$(VENV)"; $(PYTHON) -m venv "$(VENV)"; \
	  $(PYTHON) -c '$(LIST_DEPS)' > "$(VENV)/requirements.txt"; \
	  $(BIN)/pip install --disable-pip-version-check -q -r "$(VENV)/requirements.txt" -c constraints.txt; \
	fi; touch "$@"

.PHONY: demo
demo: setup ## Fine-tune a real 135M model on this machine, and ask it who it is before and after
	$(BIN)/python examples/demo.py

.PHONY: test
test: setup lint check-generated test-unit binaries test-trainer test-cluster test-e2e ## Everything a change must pass (on a machine with a GPU, test-gpu too)

.PHONY: lint
lint: setup ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --cache-dir "$(CACHE)/mypy"
	$(BIN)/lint-imports

.PHONY: format
format: setup ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: generate
generate: setup ## Make the CRD, docs/api.md and the chart's generated files from the code
	$(BIN)/python -m finetune_api.crd --write
	$(BIN)/python -m finetune_api.reference --write
	$(BIN)/python -m finetune_api.method_pages --write
	$(BIN)/python charts/generate.py

.PHONY: check-generated
check-generated: setup ## Fail where a generated file differs from what the code makes
	$(BIN)/python -m finetune_api.crd --check
	$(BIN)/python -m finetune_api.reference --check
	$(BIN)/python -m finetune_api.method_pages --check
	$(BIN)/python charts/generate.py --check

.PHONY: methods-table
methods-table: setup ## Measure anew what docs/methods.md tells of the methods (the trainer's tests see it)
	rm -f crds/finetune_api/method_facts.json
	FINETUNE_METHOD_FACTS=write $(PYTEST) -q tests/trainer/test_methods_table.py
	FINETUNE_METHOD_FACTS=write $(PYTEST) -q tests/trainer/test_methods_resume.py -k two_processes_learn
	$(BIN)/python -m finetune_api.method_pages --write

.PHONY: test-unit
test-unit: setup ## Seconds, needs nothing but Python
	$(PARALLEL) --ignore=tests/trainer -m "not trainer and not cluster and not e2e and not gpu"

.PHONY: test-trainer
test-trainer: setup ## Trains tiny models on the CPU (minutes)
	$(PARALLEL) -m trainer

.PHONY: binaries
binaries: setup ## Build the test cluster's binaries from Go modules (7 minutes, once)
	$(BIN)/python -m tests.cluster.binaries
	$(BIN)/python -m tests.chart.judges

.PHONY: test-cluster
test-cluster: binaries ## Against a real Kubernetes API server
	$(PYTEST) -q -m cluster -n 2 $(FILES) --ignore=tests/trainer

.PHONY: test-e2e
test-e2e: binaries ## Two real kubelets, S3 server, Prometheus, the real images: the whole product (30 GB of disk)
	$(PYTEST) -q -m e2e tests/e2e tests/cluster

.PHONY: test-image
test-image: binaries ## Of these only the one that builds the trainer's real image
	$(PYTEST) -q -m image tests/e2e

.PHONY: test-gpu
test-gpu: setup ## On a machine with a GPU
	$(PYTEST) -q -m gpu

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: images
images: ## Build both images with buildah, podman or docker; with REGISTRY=… also push them there
	@tool=$$(command -v buildah || command -v podman || command -v docker) \
	  || { echo "images are built by buildah, podman or docker: install one of them" >&2; exit 1; }; \
	for part in operator trainer; do \
	  folder=$$part; [ $$part = operator ] || folder=trainer_image; \
	  name=$(if $(REGISTRY),$(REGISTRY:%/=%)/)finetune-$$part:$(VERSION); \
	  $$tool build -f $$folder/Containerfile -t $$name .; \
	  $(if $(REGISTRY),$$tool push $$name;) \
	done

.PHONY: cluster
cluster: binaries ## Start a real Kubernetes on this machine to play with
	$(BIN)/python -m tests.cluster --full
