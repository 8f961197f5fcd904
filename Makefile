# Two commands for a newcomer: `make pretrain` and `make test`. `make help` lists the rest.
#
#   VENV=<dir>     virtual environment to use or create (default .venv). Several checkouts may share one: this
#                  package is never installed into it; it is found through PYTHONPATH and built in place.
#   PYTHON=<path>  interpreter a new environment is made with (default: found on PATH or under pyenv).
#   RUN_NAME=<n>   the run's directory below runs/ (the script names the default).
#   ARGS="..."     further Megatron flags for `make pretrain`; they win over the script's own.
#   TESTS="..."    what `make test` runs (default: all of tests/).
#   JOBS=<n>       test files side by side (default: one for each processor, 8 at most; 0: no further processes).

VENV ?= .venv
TESTS ?= tests
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
ifneq ($(words $(VENV)),1)
$(error VENV must be one path without spaces, got "$(VENV)")
endif
override VENV := $(abspath $(VENV))
export VIRTUAL_ENV := $(VENV)
export PATH := $(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

PYTHON_SOURCES := megatron_graft tools tests scripts setup.py
CPP_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.h')
SHELL_SOURCES = .ci/run $(shell find scripts examples tools tests -name '*.sh' -o -name '*.sbatch')

# Within single quotes of the shell, which ARGS may hold, too.
WITH_ARGS = $(if $(ARGS), ARGS="$(subst ','\'',$(ARGS))")

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup native pretrain pretrain-baseline pretrain-shuffled pretrain-engram pretrain-both test check lint types lint-cpp lint-shell lint-docker rules \
        format test-tools lock wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: VENV=<dir> PYTHON=<path> ARGS=\"<megatron flags>\" RUN_NAME=<name> TESTS=\"<pytest arguments>\" JOBS=<n> FUZZ_SECONDS=<n> POSITIONS=<n>"

setup: ## create VENV and install requirements.lock into it (does nothing when that is done)
	@if [ -x $(VENV)/bin/python ]; then python=$(VENV)/bin/python; else python=$$(scripts/find_python.sh); fi; \
	    "$$python" scripts/setup_environment.py $(VENV)

native: setup ## build the C++ extension in place
	@scripts/require_compiler.sh
	@python setup.py --quiet build_ext --inplace

pretrain: native ## the main job: corpus, tokenizer, bank, training, evaluation, report in runs/RUN_NAME
	@RUN_COMMAND='make pretrain$(WITH_ARGS)' bash examples/pretrain_graft_moe.sh $(ARGS)

pretrain-baseline: native ## the same run with no memory, as runs/baseline
	@GRAFT_BANK=none RUN_NAME=baseline RUN_COMMAND='make pretrain-baseline$(WITH_ARGS)' \
	    bash examples/pretrain_graft_moe.sh $(ARGS)

pretrain-shuffled: native ## the same run with the bank's rows shuffled among its keys, as runs/shuffled
	@work="$${WORK_DIR:-work}"; python tools/build_bank.py --from-bank "$$work/bank" --control shuffled \
	    --output "$$work/bank-shuffled"
	@GRAFT_BANK="$${WORK_DIR:-work}/bank-shuffled" RUN_NAME=shuffled RUN_COMMAND='make pretrain-shuffled$(WITH_ARGS)' \
	    bash examples/pretrain_graft_moe.sh $(ARGS)

pretrain-engram: native ## the same run with trainable hashed tables instead of the bank, as runs/engram
	@GRAFT_BANK=none ENGRAM_LAYERS='2 3' RUN_NAME=engram RUN_COMMAND='make pretrain-engram$(WITH_ARGS)' \
	    bash examples/pretrain_graft_moe.sh $(ARGS)

pretrain-both: native ## the same run with the bank and hashed tables, summed, as runs/both
	@ENGRAM_LAYERS='2 3' RUN_NAME=both RUN_COMMAND='make pretrain-both$(WITH_ARGS)' \
	    bash examples/pretrain_graft_moe.sh $(ARGS)

.PHONY: arms
arms: native ## matched arms: train, evaluate and record what is left of them (hours; again to go on), then the report
	@python tools/run_arms.py examples/arms/matched_arms.yaml --jobs $(shell nproc) $(ARGS)
	@python tools/compare_arms.py examples/arms/matched_arms.yaml

test: native ## run the tests
	@python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --durations 25 $(TESTS)

# C++ programs: built by csrc/programs.mk into build/native/, without Python.
FUZZ_SECONDS ?= 60
POSITIONS ?= 5000000
PROGRAMS = $(MAKE) --silent -j$(shell nproc) -f csrc/programs.mk
.PHONY: test-native test-asan test-tsan test-python-asan fuzz prove-lookup

test-native: ## build and run the C++ tests
	@$(PROGRAMS) FLAVOUR=release tests
	@build/native/release/run_tests

test-asan: ## the same under the address and undefined-behaviour sanitizers; replays the fuzzers' kept inputs
	@$(PROGRAMS) FLAVOUR=asan tests fuzz_open fuzz_lookup
	@scripts/under_sanitizer.sh asan

test-tsan: ## the same under the thread sanitizer
	@$(PROGRAMS) FLAVOUR=tsan tests
	@scripts/under_sanitizer.sh tsan

test-python-asan: native ## the Python tests of bank and lookup with the extension under the address sanitizer
	@scripts/python_under_asan.sh $(ARGS)

fuzz: ## fuzz opening and looking up for FUZZ_SECONDS (60)
	@scripts/fuzz.sh $(FUZZ_SECONDS)

prove-lookup: ## compare POSITIONS (5000000) answers with the brute-force oracle; build/prove/lookup.json
	@$(PROGRAMS) FLAVOUR=fast prove_lookup
	@mkdir -p build/prove
	@build/native/fast/prove_lookup --positions $(POSITIONS) --json build/prove/lookup.json

# Everything is made below build/bench and kept. ARGS="--entries small" checks the answers only; see --help of the tool.
.PHONY: bench-lookup
bench-lookup: native ## measure lookup, gather and opening; build/bench/lookup.json and a table (idle machine, ARGS="...")
	@scripts/install_bench_libraries.sh
	@python tools/bench/lookup.py $(ARGS)

# The same for building. Its text, tokenizer and donor are those of `make pretrain`, or given by ARGS.
.PHONY: bench-build
bench-build: native ## measure counting, its memory, and the donor's packs; build/bench/building.json and a table
	@python tools/bench/build.py $(ARGS)

# With and without the memory of a run in one process. The run is that of `make pretrain`, cut to one step if need be.
.PHONY: bench-overhead
bench-overhead: native ## measure what memory adds to a step; build/bench/overhead/overhead.json and a table (idle machine)
	@[ -f runs/overhead/run.json ] || RUN_NAME=overhead EVALUATION=none \
	    bash examples/pretrain_graft_moe.sh --train-iters 1
	@python tools/bench/overhead.py --run runs/overhead $(ARGS)

check: lint types lint-cpp lint-shell lint-docker rules ## formatting, lint, types and the house's rules

lint: setup
	@ruff format --check $(PYTHON_SOURCES)
	@ruff check $(PYTHON_SOURCES)

types: setup
	@mypy

lint-cpp: setup
	@clang-format --dry-run --Werror $(CPP_SOURCES)

lint-shell: setup
	@shellcheck $(SHELL_SOURCES)

lint-docker: setup
	@hadolint Dockerfile

rules: setup
	@python -m pytest -q tests/unit/test_architecture.py tests/unit/test_house_rules.py

format: setup ## rewrite the sources in the house's format
	@ruff format $(PYTHON_SOURCES)
	@ruff check --fix $(PYTHON_SOURCES)
	@clang-format -i $(CPP_SOURCES)

test-tools: ## install what some tests use that no Python package brings (Slurm, debootstrap), as root on Debian or Ubuntu
	@scripts/install_test_tools.sh

lock: setup ## rewrite requirements.lock from what is installed in VENV
	@python scripts/lock_requirements.py write

wheel: setup ## build the wheel into dist/
	@scripts/require_compiler.sh
	@python -m build --no-isolation

clean: ## remove what was built (not VENV, not runs/)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find megatron_graft tools tests scripts -name __pycache__ -prune -exec rm -rf {} +
	@find megatron_graft -name '*.so' -delete
