# One command per task; each makes .venv, installs and builds if that is not done yet.
PYTHON ?= python3
VENV   ?= .venv
# Spinning threads of two busy processes stall each other: a 0.9 s test took 7.5 s.
export OMP_WAIT_POLICY ?= passive
PY      = $(VENV)/bin/python
STAMP   = $(VENV)/.fasttax
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := help
.PHONY: help demo demo-tiny test bench bench-gpu lint format doctor clean

help:            ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@echo "[fasttax] making $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python $(SOURCES)
	@echo "[fasttax] installing torch and build tools (a few minutes the first time), then building the kernels"
	$(PY) -m pip install -q "torch>=2.11" numpy "setuptools>=77" wheel ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	$(PY) -m fasttax doctor
	@touch $(STAMP)

demo: $(STAMP)   ## align SmolLM2-135M four ways and write the report (about 8 minutes on 2 cores)
	$(PY) -m fasttax demo

demo-tiny: $(STAMP) ## the same on a small model trained from scratch (about 90 seconds, no download)
	$(PY) -m fasttax demo --tiny

test: $(STAMP)   ## the test suite, two files at a time
	$(PY) -m pytest -n 2 --dist loadfile

bench: $(STAMP)  ## measure against eager PyTorch, torch.compile and foreach; writes bench/results and README's table
	$(PY) -m bench

bench-gpu: $(STAMP) ## the same on a GPU: CUDA C++ and Triton; writes bench/results/gpu.json
	$(PY) -m bench gpu

lint: $(STAMP)   ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh

format: $(STAMP) ## apply ruff's fixes, its layout, and clang-format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh

doctor: $(STAMP) ## which kernels run here, and why
	$(PY) -m fasttax doctor

clean:           ## remove what was built, and .venv
	rm -rf $(VENV) build *.egg-info fasttax/*.so
