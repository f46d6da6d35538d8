# make demo | test | bench | bench-gpu | lint. The first one run makes .venv; after that nothing is installed
# unless pyproject.toml changed, and no network is needed.

SHELL := /bin/sh
RUN := .venv/bin/python -m
INSTALLED := .venv/installed
# Nothing here may reach for the network after the installation.
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_OFFLINE = 1
export VLLM_NO_USAGE_STATS = 1

.PHONY: demo test bench bench-gpu lint
.NOTPARALLEL:

demo: $(INSTALLED)
	@$(RUN) serve_apps.demo

test: $(INSTALLED)
	@$(RUN) pytest

bench: $(INSTALLED)
	@mkdir -p build
	@$(RUN) benchmarks

bench-gpu: $(INSTALLED)
	@$(RUN) benchmarks.gpu

lint: $(INSTALLED)
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@$(RUN) mypy -p serve_apps
	@.venv/bin/lint-imports

$(INSTALLED): pyproject.toml requirements/demo-model.txt requirements/install
	@requirements/install
