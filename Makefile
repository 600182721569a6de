# Every command of the project, in one place: README, hooks and CI call these.
#
#   PYTHON  the interpreter that creates the environment; its torch is used if it has one
#   TORCH   the arguments of `pip install` if that interpreter has no torch, such as
#           TORCH='--no-deps torch==2.15.0 nvidia-cublas'
#   VENV    the environment; an existing one is used unchanged
#   REPO_ID owner/name of the repository on the Hugging Face Hub, for `make hub`
#   INSTALL_PYTHONS, INSTALL_WHEELS  interpreters that have torch, and wheels, for `make installs`
#   BUDGET  the most seconds that `make gpu` takes; STAGES chooses its stages
#   OUT     the folder for the pictures of `make demo-long` and `make demo-audio`
#   WHEEL_TORCHES, WHEEL_PYTHONS  versions of torch, and interpreters, that `make wheels` builds for
#   MINUTES how long `make fuzz` tests each file format
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
REPO_ID ?=
INSTALL_PYTHONS ?= $(PY)
INSTALL_WHEELS ?=
DROPINS_VENV ?= .venv-dropins
OUT ?= runs/long_context
BUDGET ?= 240
STAGES ?=
# The oldest, the developed and the newest torch; a release has every minor version.
WHEEL_TORCHES ?= 2.11.0 2.13.0 2.15.0
WHEEL_PYTHONS ?=
MINUTES ?= 10
# The newest Triton; `make gates` checks its machine code too.
NEXT_TRITON := 3.9.0
# The version of Hugging Face's `kernels` that `make hub` loads the kernel with.
HUB_KERNELS := 0.17.2

PY := $(VENV)/bin/python
PIP := -m pip --quiet --quiet --disable-pip-version-check --no-input
# Each process runs adjacent tests, which share fixtures, and takes tests from others at the end.
PARALLEL := -n logical --dist worksteal
quoted = '$(subst ','\'',$(1))'
CLANG_FORMAT := $(PY) -c 'from clang_format import clang_format as run; run()'
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(VENV)/.installed-lm ## train, evaluate and sample a small model; results in runs/demo
	$(VENV)/bin/transformer-xl demo --out runs/demo

demo-long: $(DROPINS_VENV)/.installed ## a training step on 2k to 32k tokens, Hugging Face's Inkling and patched; picture and JSON in OUT
	$(DROPINS_VENV)/bin/python -m benchmarks.long_context inkling --out $(call quoted,$(OUT))

demo-audio: $(DROPINS_VENV)/.installed ## an encoder on 1 to 20 minutes of audio, Hugging Face's Parakeet and patched; picture and JSON in OUT
	$(DROPINS_VENV)/bin/python -m benchmarks.long_context parakeet --out $(call quoted,$(OUT))

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

# Debian's package g++-aarch64-linux-gnu has the compiler; test-arm prints the names of all packages.
cross-arm: $(VENV)/.installed-dev ## compile the CPU kernels for aarch64; nothing is run
	$(PY) -m tools.arm --compile-only

test-arm: $(VENV)/.installed-dev ## build for aarch64 and run the op tests in QEMU's emulation
	$(PY) -m tools.arm --torch '$(TORCH)'

hub: $(VENV)/.installed-dev build/kernels-$(HUB_KERNELS) ## txl_kernels for Hugging Face's `kernels`, in build/hub; tested with that package (REPO_ID=)
	$(PY) -m tools.hub --out build/hub $(if $(REPO_ID),--repo-id '$(REPO_ID)')
	PYTHONPATH=build/kernels-$(HUB_KERNELS) $(PY) -m pytest tests/tools/hub

fuzz: $(VENV)/.installed-fuzz ## damage every file format that is read, each for MINUTES=10; coverage-guided
	nice $(PY) -m tools.fuzz --minutes $(MINUTES)

audit: ## known vulnerabilities in the packages of the extras; fails if the service cannot be reached
	$(PYTHON) -m venv build/audit
	build/audit/bin/python $(PIP) install pip-audit
	build/audit/bin/python tools/audit.py

test-dropins: $(DROPINS_VENV)/.installed ## compare patched models with the libraries' own classes; takes about 20 minutes
	OMP_NUM_THREADS=1 $(DROPINS_VENV)/bin/python -m pytest -n logical tests/transformer_xl/integrations/dropins \
	  tests/benchmarks/test_dropins.py tests/benchmarks/test_long_context.py

# It sees the packages of $(VENV), and so the same torch and the same kernels.
$(DROPINS_VENV)/.installed: $(VENV)/.installed-dev
	$(PY) -m venv $(DROPINS_VENV)
	$(PY) -c 'import site; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' \
	  > "$$($(DROPINS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	$(DROPINS_VENV)/bin/python $(PIP) install transformers==5.24.0
	$(DROPINS_VENV)/bin/python $(PIP) install --no-deps peft==0.21.2 torchao==0.18.0
	$(DROPINS_VENV)/bin/python $(PIP) install --no-deps speechbrain==1.1.2 enformer-pytorch==0.8.12 \
	  borzoi-pytorch==0.5.1 einops==0.8.2 ray==2.58.0
	$(DROPINS_VENV)/bin/python $(PIP) install --no-deps espnet==202511 funasr==1.4.16 \
	  chatterbox-tts==0.1.7 cosyvoice2-eu==0.2.8 fireredasr==0.0.2
	$(DROPINS_VENV)/bin/python $(PIP) install --no-deps nemo-toolkit==3.0.0 omegaconf==2.3.0 \
	  antlr4-python3-runtime==4.9.3 hydra-core==1.3.2 wrapt==2.5.2
	@touch $@

bench-hf-env: ## an environment with Hugging Face's TransfoXL, a peer in the benchmarks
	$(PYTHON) -m venv $(HF_VENV)
	$(HF_VENV)/bin/python $(PIP) install torch==2.13.0
	$(HF_VENV)/bin/python $(PIP) install transformers==4.37.2 'numpy<2' torch==2.13.0

bench-dropins-env: $(DROPINS_VENV)/.installed ## ONNX Runtime and OpenVINO, peers of the drop-ins, in the environment of test-dropins
	$(DROPINS_VENV)/bin/python $(PIP) install --no-deps -r benchmarks/peers/requirements.txt

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

types: $(VENV)/.installed-dev ## mypy, strict, on both packages and some tools
	$(PY) -m mypy

# pip would reuse a wheel that it built and cached from an earlier sdist of the same name. This build
# is not optimised, which halves its time: it shows that the sdist is complete and installs anywhere.
wheel: $(VENV)/.installed-dev ## sdist, installed in a clean environment and tested from outside
	rm -rf build/wheel
	$(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("build/wheel")' > /dev/null
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python $(PIP) install $(TORCH)
	TORCH=$(call quoted,$(TORCH)) build/wheel/venv/bin/python tools/environment_torch.py prepare
	CXXFLAGS="-O0 -DNDEBUG" CMAKE_ARGS=-DCMAKE_BUILD_TYPE=None build/wheel/venv/bin/python $(PIP) \
	  install --no-cache-dir --config-settings=--global-option=--require-native build/wheel/*.tar.gz
	cd / && "$(CURDIR)/build/wheel/venv/bin/python" -W 'ignore:Failed to init' \
	  "$(CURDIR)/tests/packaging/smoke.py"

installs: torch ## logs of every way to install, each with the smoke test; in build/installs (INSTALL_PYTHONS=, INSTALL_WHEELS=)
	$(PYTHON) -m tools.installs --python $(INSTALL_PYTHONS) --wheel $(INSTALL_WHEELS)

# A library takes three minutes of one processor; afterwards only changed sources are compiled again.
wheels: build/wheels/env/.installed ## the wheel for Linux, the one for every system, and the sdist; in dist/
	build/wheels/env/bin/python -m tools.wheels --torch $(WHEEL_TORCHES) \
	  $(if $(WHEEL_PYTHONS),--python $(WHEEL_PYTHONS)) --jobs $(or $(MAX_JOBS),1) --output dist

# ruff and mypy use one core each while pip installs torch for the wheel.
ci: ## all checks, in order
	$(MAKE) venv CMAKE_ARGS=-DTXL_WERROR=ON
	$(MAKE) lint types & checks=$$!; $(MAKE) wheel; wait $$checks
	$(MAKE) gates-ci
	@if command -v aarch64-linux-gnu-g++ > /dev/null; then $(MAKE) cross-arm; \
	  else echo "left out: make cross-arm (no aarch64-linux-gnu-g++)" >&2; fi
	$(MAKE) test

clean: ## remove builds, downloads under build and caches of tools; $(VENV) and runs stay
	rm -rf build dist *.egg-info python/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf txl_kernels/_native txl_kernels/_native_build.json txl_kernels/_C.*.so $(VENV)/.installed-*

.PHONY: help run demo-long demo-audio test bench gpu gates gates-ci cross-arm test-arm bench-hf-env bench-dropins-env venv build format lint types wheel ci clean native-status torch hub installs wheels fuzz audit test-dropins

# ---- the environment

# An error if the variable CI is set: no test may be skipped there for lack of the kernels.
native-status:
	@$(PY) -c 'import os; from txl_kernels.backends import native; \
	  reason = native.unavailable_reason(); \
	  print("native kernels:", reason or "built and loaded"); \
	  raise SystemExit(bool(reason and os.environ.get("CI")))'

# The build tools in fixed versions, so that the wheels have the same bytes wherever they are built.
build/wheels/env/.installed: tools/wheels/requirements.txt
	$(PYTHON) -m venv build/wheels/env
	build/wheels/env/bin/python $(PIP) install -r $<
	@touch $@

# PYTHONPATH gives it precedence over the environment's own; Triton needs no other package.
build/triton-%: | $(VENV)/.installed-dev
	$(PY) $(PIP) install --no-deps --target $@ triton==$*

# Without its dependencies: the extra `lm` has those that loading a local folder needs, and signatures of
# published kernels, which need the others, are not checked here.
build/kernels-%: | $(VENV)/.installed-dev
	$(PY) $(PIP) install --no-deps --target $@ kernels==$*

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
	@$(PY) tools/environment_torch.py installed > /dev/null || { \
	  (set -x; $(PY) $(PIP) install $(TORCH)); \
	  TORCH=$(call quoted,$(TORCH)) $(PY) tools/environment_torch.py prepare; \
	}
	@TORCH=$(if $(filter command environment,$(origin TORCH)),$(call quoted,$(TORCH))) \
	  $(PY) tools/environment_torch.py check

$(VENV)/.installed-%: pyproject.toml setup.py build_target.py CMakeLists.txt $(NATIVE_SOURCES) | torch
	$(PY) $(PIP) install -e '.[$*]' torch==$$($(PY) tools/environment_torch.py installed)
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
