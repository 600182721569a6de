# Every command of the project, in one place: README, hooks and CI call these.
#
#   PYTHON  the interpreter that creates the environment; its torch is used if it has one
#   TORCH   the requirement that pip installs if that interpreter has no torch
#   VENV    the environment; an existing one is used unchanged
#   BUDGET  the most seconds that `make gpu` takes; STAGES chooses its stages
#   MAX_JOBS (or CMAKE_BUILD_PARALLEL_LEVEL) limits the number of compilers at a time
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
HF_VENV ?= .venv-hf
DROPINS_VENV ?= .venv-dropins
BUDGET ?= 240
STAGES ?=
# The newest Triton; `make gates` checks its machine code too.
NEXT_TRITON := 3.9.0

PY := $(VENV)/bin/python
PIP := -m pip --quiet --quiet --disable-pip-version-check --no-input
# Each process runs adjacent tests, which share fixtures, and takes tests from others at the end.
PARALLEL := -n logical --dist worksteal
CLANG_FORMAT := $(PY) -c 'from clang_format import clang_format as run; run()'
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(VENV)/.installed-lm ## train, evaluate and sample a small model; results in runs/demo
	$(VENV)/bin/transformer-xl demo --out runs/demo

test: $(VENV)/.installed-dev ## the full test suite, on all cores; Triton kernels in processes that interpret them
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) -m 'not interpreted'
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest $(PARALLEL) -m interpreted tests/txl_kernels

bench: $(VENV)/.installed-dev ## the benchmarks: one table, JSON and a plot
	$(PY) -m benchmarks

gpu: ## on a machine with a GPU: check, measure; JSON in benchmarks/results (BUDGET=240, STAGES=a,b)
	$(PYTHON) -m tools.gpu --budget $(BUDGET) --stages '$(STAGES)'

gates: $(VENV)/.installed-dev build/triton-$(NEXT_TRITON) ## check the machine code of all GPU kernels; needs no GPU
	@status=0; set -x; \
	$(PY) -m tools.gates || status=1; \
	PYTHONPATH=build/triton-$(NEXT_TRITON) $(PY) -m tools.gates || status=1; \
	$(PY) -m tools.gates.cuda || status=1; \
	exit $$status

gates-ci: $(VENV)/.installed-dev ## the most common launches for three architectures, as in CI
	$(PY) -m tools.gates --headline --arch 80 90 120

test-dropins: $(DROPINS_VENV)/.installed ## compare patched models with the libraries' own classes; takes about 20 minutes
	OMP_NUM_THREADS=1 $(DROPINS_VENV)/bin/python -m pytest -n logical tests/transformer_xl/integrations/dropins

# It sees the packages of $(VENV), and so the same torch and the same kernels.
$(DROPINS_VENV)/.installed: $(VENV)/.installed-dev
	$(PY) -m venv $(DROPINS_VENV)
	$(PY) -c 'import site; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' \
	  > "$$($(DROPINS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	$(DROPINS_VENV)/bin/python $(PIP) install transformers==5.24.0
	$(DROPINS_VENV)/bin/python $(PIP) install --no-deps peft==0.21.2 torchao==0.18.0
	@touch $@

bench-hf-env: ## an environment with Hugging Face's TransfoXL, a peer in the benchmarks
	$(PYTHON) -m venv $(HF_VENV)
	$(HF_VENV)/bin/python $(PIP) install torch==2.13.0
	$(HF_VENV)/bin/python $(PIP) install transformers==4.37.2 'numpy<2' torch==2.13.0

venv: $(VENV)/.installed-dev ## the environment with all packages for development
	@echo "$(PY) is ready"

build: torch ## rebuild the native part, in place
	$(PY) $(PIP) install --no-deps -e .
	@$(MAKE) native-status

format: $(VENV)/.installed-dev ## format Python and C++
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(NATIVE_SOURCES)

lint: $(VENV)/.installed-dev ## check the form of Python and C++
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(NATIVE_SOURCES)

types: $(VENV)/.installed-dev ## mypy, strict, on both packages
	$(PY) -m mypy

# pip would reuse a wheel that it built and cached from an earlier sdist of the same name. This build
# is not optimised, which halves its time: it shows that the sdist is complete and installs anywhere.
wheel: $(VENV)/.installed-dev ## sdist, installed in a clean environment and tested from outside
	rm -rf build/wheel
	$(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("build/wheel")' > /dev/null
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python $(PIP) install $(TORCH)
	CXXFLAGS="-O0 -DNDEBUG" CMAKE_ARGS=-DCMAKE_BUILD_TYPE=None build/wheel/venv/bin/python $(PIP) \
	  install --no-cache-dir --config-settings=--global-option=--require-native build/wheel/*.tar.gz
	cd / && "$(CURDIR)/build/wheel/venv/bin/python" -W 'ignore:Failed to init' \
	  "$(CURDIR)/tests/packaging/smoke.py"

# ruff and mypy use one core each while pip installs torch for the wheel.
ci: ## all checks, in order
	$(MAKE) venv CMAKE_ARGS=-DTXL_WERROR=ON
	$(MAKE) lint types & checks=$$!; $(MAKE) wheel; wait $$checks
	$(MAKE) gates-ci
	$(MAKE) test

clean: ## remove builds and caches of tools; environments and runs stay
	rm -rf build dist *.egg-info python/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f txl_kernels/_C.*.so txl_kernels/_native_build.json $(VENV)/.installed-*

.PHONY: help run test test-dropins bench gpu gates gates-ci bench-hf-env venv build format lint types wheel ci clean native-status torch

# ---- the environment

# An error if the variable CI is set: no test may be skipped there for lack of the kernels.
native-status:
	@$(PY) -c 'import os; from txl_kernels.backends import native; \
	  reason = native.unavailable_reason(); \
	  print("native kernels:", reason or "built and loaded"); \
	  raise SystemExit(bool(reason and os.environ.get("CI")))'

# PYTHONPATH gives it precedence over the environment's own; Triton needs no other package.
build/triton-%: | $(VENV)/.installed-dev
	$(PY) $(PIP) install --no-deps --target $@ triton==$*

# If PYTHON has a torch of a supported version, the environment sees that interpreter's packages.
$(PY):
	$(PYTHON) -m venv $(VENV)
	@site=$$($(PYTHON) -c "$$FIND_SITE_OF_TORCH"); \
	if [ -n "$$site" ]; then \
	  echo "using the torch in $$site"; \
	  echo "import site; site.addsitedir('$$site')" \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active_python.pth"; \
	fi

torch: $(PY)
	@$(PY) -c 'import importlib.util as u; raise SystemExit(not u.find_spec("torch"))' \
	  || { set -x; $(PY) $(PIP) install $(TORCH); }

$(VENV)/.installed-%: pyproject.toml setup.py build_target.py CMakeLists.txt $(NATIVE_SOURCES) | torch
	$(PY) $(PIP) install -e '.[$*]'
	@$(MAKE) native-status
	@touch $@

define FIND_SITE_OF_TORCH
try:
    import torch
except ImportError:
    raise SystemExit
import pathlib, re
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 11):
    print(pathlib.Path(torch.__file__).parents[1])
endef
export FIND_SITE_OF_TORCH
