# Every target makes what it needs from a fresh clone: an environment in .venv from the lock, upstream,
# the compiled library. `make help` lists the targets.
#
#   PYTHON=python3.12    interpreter that .venv is made from (3.11 to 3.13)
#   MAX_JOBS=1           compiler processes
#   PYTEST_ARGS="-k x"   passed to pytest
#   BENCH="attention"    passed to the benchmarks' runner
#   GPU="--deadline 300" passed to `make gpu`
#   PYTHONS="a b"        interpreters that `make wheel` tests with
#   TORCH=torch==2.11.0  the torch that `make wheel` and `make test-torch` take
# pip reads its own variables, for example PIP_EXTRA_INDEX_URL for an index with CPU builds of torch.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
PYTEST_ARGS ?=
# One process a core and one thread each: two threads each would fight.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

.PHONY: help
help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

# ---- environment: a stamp per step, remade when what it was made from changes

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v or sys.exit(f"make: $(PYTHON) is Python {v[0]}.{v[1]}, expected 3.11 or newer (PYTHON=python3.12 make ...)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/dev: requirements/dev.txt requirements/upstream.txt requirements/demo.txt requirements/triton.txt | $(STAMPS)/venv
	$(PIP) install --quiet --no-compile -r requirements/dev.txt
	$(PIP) install --quiet --no-compile --no-deps -r requirements/upstream.txt -r requirements/demo.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PIP) install --quiet --no-compile -r requirements/triton.txt
	touch $@

# Installed in place: edits of Python files need nothing, edits of csrc/ one compilation.
$(STAMPS)/package: pyproject.toml setup.py $(STAMPS)/dev
	MUSICLM_FAST_BUILD=0 $(PIP) install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(STAMPS)/library: CMakeLists.txt setup.py $(shell find csrc -type f) $(STAMPS)/package
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

READY := $(STAMPS)/library

# ---- tests

SCHEMA = $(VENV)/bin/check-jsonschema --builtin-schema

.PHONY: lint
lint: $(STAMPS)/dev  ## ruff, mypy, codespell, workflows and forms; pre-commit runs the same
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell
	$(VENV)/bin/zizmor --quiet --offline --strict-collection .github
	$(SCHEMA) vendor.github-workflows .github/workflows/tests.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff

.PHONY: test
test: $(READY)  ## the tests, under 15 minutes on two cores
	$(PYTEST) $(PYTEST_ARGS)

# pytest ends with 5 where nothing is selected: no slow test is not a failure.
.PHONY: test-full
test-full: $(READY)  ## what is too slow for `make test`: slow tests, sanitizers, compilers, versions
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	for script in tests/full/*.sh; do echo "== $$script"; PYTHON=$(abspath $(PY)) bash $$script; done

.PHONY: test-torch
test-torch: $(READY)  ## the tests on another torch, TORCH=torch==2.14.1 (default: the newest); gigabytes
	PYTHON=$(PYTHON) bash tests/torch_version.sh $(PYTEST_ARGS)

# On the Python, torch and pytest that are there, without a network: a machine with a GPU has its own.
# A library that was compiled elsewhere serves there too.
.PHONY: test-gpu
test-gpu:  ## the ops' tests that need a CUDA device, with the environment's own torch, offline
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make: torch {torch.__version__} finds no CUDA device")'
	[ -e musiclm_fast/libmusiclm_fast_ops.so ] || $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m tests.parallel -m gpu tests/ops $(PYTEST_ARGS)

# ---- a GPU that is at hand: everything that it has to say, in under eight minutes

GPU ?=

.PHONY: gpu
gpu:  ## parity, speed and profile on a CUDA GPU, with the environment's own torch, offline
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; no = [n for n in ("numpy", "pytest", "torch") if not find_spec(n)]; no and sys.exit(f"make: {sys.executable} has no {chr(44).join(no)}: PYTHON=... make gpu")'
	$(PYTHON) -m benchmarks.harvest $(GPU)

.PHONY: gpu-dry
gpu-dry: $(READY)  ## the same lines on the CPU, at the smallest sizes
	TRITON_INTERPRET=1 $(PY) -m benchmarks.harvest --tiny $(GPU)

.PHONY: gpu-bare
gpu-bare: $(READY)  ## both, and the GPU tests, where only torch 2.11, Triton 3.6 and pytest are; gigabytes
	bash tests/bare_environment.sh

# ---- benchmarks and demonstration

BENCH ?=

.PHONY: bench
bench: $(READY)  ## CPU benchmarks against upstream, about eight minutes on two cores
	$(PY) -m benchmarks.run $(BENCH)

.PHONY: bench-full
bench-full: $(READY)  ## every peer and mode: compiled, bf16; no time limit
	$(PY) -m benchmarks.run --mode full $(BENCH)

# By the oldest Triton that is supported and by the environment's own.
OLD_TRITON := .venvs/triton-3.6.0

$(OLD_TRITON)/.complete: | $(STAMPS)/venv
	$(PIP) install --quiet --no-deps --target $(@D) triton==3.6.0
	touch $@

.PHONY: kernels
kernels: $(READY) $(OLD_TRITON)/.complete  ## after a GPU kernel changes: its counts, tables and predictions; no GPU
	$(PY) -m benchmarks.sass --markdown $(OLD_TRITON)
	$(PY) -m tests.ops.triton_resources --markdown $(OLD_TRITON)
	PYTHONPATH=$(OLD_TRITON) $(PY) -m benchmarks.predict
	$(PY) -m benchmarks.predict --other

.PHONY: bench-gpu
bench-gpu:  ## GPU benchmarks, with the environment's own torch, offline
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.run --mode gpu $(BENCH)

.PHONY: demo
demo: $(READY)  ## render instruments, train a small MuLaN on them, answer with it
	$(VENV)/bin/musiclm-fast demo --output demo-output
	$(VENV)/bin/musiclm-fast similarity demo-output/trumpet.wav "a trumpet" "a french horn" "a violin" "an acoustic grand piano"

# Whatever made it, a MuLaN that is there is gone on from.
demo-output/mulan.pt: | $(READY)
	$(VENV)/bin/musiclm-fast demo --output demo-output

.PHONY: demo-music
demo-music: $(READY) demo-output/mulan.pt  ## train a small MusicLM on the demo's MuLaN, generate and evaluate
	$(VENV)/bin/musiclm-fast demo-music --checkpoint demo-output/mulan.pt --output demo-output/music

.PHONY: wheel
wheel: $(READY)  ## the source distribution and a manylinux wheel, tested, in dist/
	PYTHON=$(abspath $(PY)) bash tests/wheel.sh

.PHONY: clean
clean:  ## remove what was built, except the environment (`rm -rf .venv .venvs` removes that)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	rm -f musiclm_fast/*.so $(STAMPS)/library
	find musiclm_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
