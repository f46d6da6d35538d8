# make demo | test | simulate | test-vllm | test-gpu | test-faults | soak | bench | bench-gpu | lint. The first one run makes .venv;
# after that nothing is installed unless pyproject.toml changed, and no network is needed.

SHELL := /bin/sh
RUN := .venv/bin/python -m
INSTALLED := .venv/installed
# vLLM for GPUs and vLLM for CPUs cannot be in one environment.
GPU := $(shell if nvidia-smi -L >/dev/null 2>&1; then echo cuda; \
	elif rocm-smi >/dev/null 2>&1; then echo rocm; fi)
GPU_VENV := $(if $(GPU),.venv-$(GPU),.venv)
# Nothing here may reach for the network after the installation.
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_OFFLINE = 1
export VLLM_NO_USAGE_STATS = 1

# make test-vllm VERSION=0.29 (0.30, 0.31, 0.32, 0.33) [SHORT=1] [RUNNER=2]
VERSION ?= 0.29
VLLM_VENV := $(if $(filter 0.32,$(VERSION)),.venv,.venv-vllm-$(VERSION))

.PHONY: demo test simulate test-vllm test-gpu test-faults soak bench bench-gpu lint
.NOTPARALLEL:

demo: $(INSTALLED)
	@$(RUN) serve_apps.demo

test: $(INSTALLED)
	@$(RUN) pytest

# The tests that run an engine, and the demo, with another version of vLLM; with SHORT=1 what must hold on each
# version, without the demo; with RUNNER=2 the same on vLLM's Model Runner V2, in Triton's interpreter.
test-vllm: $(VLLM_VENV)/installed
	@$(if $(filter 2,$(RUNNER)),VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1) $(VLLM_VENV)/bin/python -m pytest \
		-m $(if $(SHORT)$(RUNNER),each_vllm,vllm) tests/vllm
	@$(if $(SHORT)$(RUNNER),true,$(VLLM_VENV)/bin/python -m serve_apps.demo --out build/vllm-$(VERSION))

# What needs a GPU; skipped, and says why, where there is none.
test-gpu: $(GPU_VENV)/installed
	@$(GPU_VENV)/bin/python -m pip install -q hypothesis pytest pytest-asyncio pytest-timeout
	@$(GPU_VENV)/bin/python -m pytest -m gpu -rs tests/kernels/test_pages.py tests/transfer/test_on_gpu.py

# The whole fault matrix and `ray up`, on hosts made of namespaces (needs root); writes docs/faults.md.
test-faults: $(INSTALLED)
	@FAULTS_TABLE=docs/faults.md $(RUN) pytest -m "faults or fault" tests/faults tests/serve/test_ray_up.py \
		tests/vllm/test_with_ray.py

# A cluster under simulated time: make simulate SEEDS=20000; with MUTATIONS=1 how soon it finds known bugs.
simulate: $(INSTALLED)
	@$(RUN) $(if $(MUTATIONS),tests.simulation.table,tests.simulation --seeds 0:$(or $(SEEDS),1000))

# Half an hour of traffic and random kills: make soak SECONDS=1800 [OUTPUT=build/soak.json].
soak: $(INSTALLED)
	@$(RUN) tests.faults.soak --seconds $(or $(SECONDS),1800) --output $(or $(OUTPUT),build/soak.json)

bench: $(INSTALLED)
	@mkdir -p build
	@$(RUN) benchmarks

bench-gpu: $(GPU_VENV)/installed
	@$(GPU_VENV)/bin/python -m benchmarks.gpu

lint: $(INSTALLED)
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@.venv/bin/lint-imports

.venv-$(GPU)/installed: pyproject.toml requirements/install
	@requirements/install .venv-$(GPU) $(GPU),demo

.venv-vllm-%/installed: $(INSTALLED) requirements/install-vllm
	@requirements/install-vllm $*

$(INSTALLED): pyproject.toml requirements/demo-model.txt requirements/install
	@requirements/install
