# One command per task; each makes .venv, installs and builds what it needs if that is not done yet.
PYTHON ?= python3
VENV   ?= .venv
# Spinning threads of two busy processes stall each other: a 0.9 s test took 7.5 s.
export OMP_WAIT_POLICY ?= passive
PY      = $(VENV)/bin/python
CPP     = $(wildcard $(addprefix csrc/,*.cpp */*.h */*.cpp */*.cu */*.cuh))
SIMT    = $(wildcard $(addprefix tests/gpu/,simt/*.h simt/*.cpp fake/*.h fake/*.cpp fake/*/*.h ptx/*.h \
  ptx/*.cpp ptx/cuda/*))
SOURCES = setup.py $(wildcard tools/*_build.py) $(CPP)
# Stamps of what is done. Both kinds of library are fasttax/_C.abi3.so, so that making one takes
# the other's stamp away; one that was built by hand is newer than any stamp.
LINTERS   = $(VENV)/.linters
INSTALLED = $(VENV)/.installed
DOCS      = $(VENV)/.docs
LIBRARY   = $(VENV)/.library-cuda-$(or $(FASTTAX_CUDA),auto)
ONE_ISA   = $(VENV)/.library-one-isa
BUILT     = $(wildcard fasttax/_C*.so)
# Of each CPU kernel's tests those that a wrong edit fails first.
QUICK   = $(addprefix tests/, \
  kl/test_kl.py::test_options kl/test_kl.py::test_vocabularies \
  kl/test_kl.py::test_small_kl_keeps_its_digits \
  kl/test_kl_stats_rows.py::test_options kl/test_kl_stats_rows.py::test_vocabularies \
  kl/test_gemm.py::test_equals_float64 kl/test_project.py::test_equals_float64 \
  ewc/test_ewc.py::test_penalty_add_grad_and_prox ewc/test_ewc.py::test_lora_kernel \
  ewc/test_optim.py::test_steps_are_the_formula \
  fisher/test_functional_fisher.py::test_native_equals_the_reference \
  fisher/test_accumulate_sqgrad.py::test_equals_float64 fisher/test_fisher_head.py::test_any_row)

# Every public op over what hypothesis draws.
CALLS   = tests/faults/test_calls.py tests/faults/test_calls_weights.py

.DEFAULT_GOAL := help
.PHONY: help demo demo-tiny demo-full test test-gpu test-ptx machine-code test-trl pairs matrix soak \
  sanitize sanitize-sample clang mutants quick t bench bench-gpu lint types format docs hooks wheels house doctor clean

help:            ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PY):
	@echo "[fasttax] making $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -U "pip>=25.1"

$(LINTERS): $(PY) pyproject.toml
	@echo "[fasttax] installing torch and the tools of make lint"
	$(PY) -m pip install -q "torch>=2.11" --group lint
	@touch $@

$(INSTALLED): $(PY) pyproject.toml
	@echo "[fasttax] installing torch and what the tests need, then building the kernels"
	$(PY) -m pip install -q "torch>=2.11" numpy "setuptools>=77" ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

$(DOCS): $(INSTALLED) pyproject.toml
	@echo "[fasttax] installing the tools of make docs"
	$(PY) -m pip install -q --group docs
	@touch $@

$(LIBRARY): $(INSTALLED) $(SOURCES) $(BUILT)
	rm -f $(VENV)/.library-*
	$(PY) setup.py -q build_ext --inplace
	$(PY) -m fasttax doctor
	@touch $@

$(ONE_ISA): $(INSTALLED) $(SOURCES) $(BUILT)
	rm -f $(VENV)/.library-*
	$(PY) setup.py -q build_ext --inplace --isa native
	@touch $@

demo: $(LIBRARY) ## align SmolLM2-135M by every method, one seed, and write the report
	$(PY) -m fasttax demo

demo-tiny: $(LIBRARY) ## the same on a small model trained from scratch, 3 seeds, no download
	$(PY) -m fasttax demo --tiny

demo-full: $(LIBRARY) ## make demo with 3 training seeds
	$(PY) -m fasttax demo --seeds 3

test: $(LIBRARY) ## the test suite, two files at a time
	$(PY) -m pytest -n 2 --dist loadfile

test-gpu: $(LIBRARY) ## the device cases of the suite on this machine's GPU; without one it says so
	$(PY) -m tests.gpu

test-ptx: $(LIBRARY) ## every kernel's PTX on the simulator of tests/gpu/ptx, and machine code; needs nvcc, no GPU
	$(PY) -m pytest -n 2 --dist load -m "full or not full" tests/gpu/test_ptx_*.py
	$(PY) -m pytest -n 2 --dist load -m full tests/gpu/test_machine_code.py tests/gpu/test_triton_kl.py

machine-code: $(LIBRARY) ## registers, spills, widths and bytes under way of every kernel: docs/machine-code.md
	$(PY) -m tests.gpu.machine_code

# Torch and all that this version is content with are $(VENV)'s own.
test-trl: $(LIBRARY) ## patch and FullKL on another TRL: make test-trl V=1.9.2 (transformers: HF=5.16.1)
	@test -n "$(V)" || { echo "which TRL? make test-trl V=1.15.0 HF=5.17.0"; exit 2; }
	test -d $(VENV)/trl-$(V) || $(PY) -m venv $(VENV)/trl-$(V)
	$(PY) -c "import site; print(site.getsitepackages()[0])" \
	  > $$($(VENV)/trl-$(V)/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(VENV)/trl-$(V)/bin/python -m pip install -q "trl==$(V)" $(if $(HF),"transformers==$(HF)")
	$(VENV)/trl-$(V)/bin/python -m pytest -q tests/integrations/test_patch.py \
	  tests/integrations/test_full_kl.py::test_is_the_kl_in_the_loss

pairs: $(LIBRARY)  ## patch, FullKL and EWC in four other pairs of TRL and transformers, a few each
	$(PY) -m tests.integrations.matrix --envs $(VENV) --pairs \
	  --only "EWC: SFT" "EWC: PPO" "FullKL: SFT" "patch: GKD"

matrix: $(LIBRARY) ## versions x features, launchers and frameworks, each cell run: docs/versions.md
	$(PY) -m tests.integrations.matrix --envs $(VENV) --write

soak: $(LIBRARY) ## the long forms of tests/faults: files, kills, forks, threads, Ctrl-C, growth (K="kill")
	$(PY) -m pytest -q tests/faults --soak -k "$(K)"
	TRITON_INTERPRET=1 FASTTAX_BACKEND=triton $(PY) -m pytest -q --soak $(CALLS)
	FASTTAX_BACKEND=reference $(PY) -m pytest -q --soak $(CALLS)

sanitize: $(INSTALLED) ## the CPU kernels under ASan and UBSan, then TSan, in build/sanitize
	$(PY) tools/sanitize.py address $(QUICK) $(CALLS) -k "not reference-"
	$(PY) tools/sanitize.py thread $(QUICK) tests/faults/test_processes.py \
	  -k "not reference- and not fork and not ctrl and not loader and not handler and not another"

sanitize-sample: $(INSTALLED) ## both of every public op, as hypothesis draws it, and of eight threads
	$(PY) tools/sanitize.py address $(CALLS) -k "not reference-"
	$(PY) tools/sanitize.py thread tests/faults/test_processes.py -k eight

clang: $(INSTALLED) ## the CPU kernels by clang (PATH's, else of PyPI's ziglang), in build/clang
	$(PY) -c "import shutil; exit(not shutil.which('clang++'))" || $(PY) -m pip install -q --group clang
	$(PY) tools/clang.py $(QUICK) \
	  -k "not reference- and (ragged or softcap or 9001 or ewc or fisher)"

mutants: $(LIBRARY) ## plant 200 faults in the kernels, one at a time: who finds each (N=20 for a sample)
	$(PY) -m tests.mutants $(if $(N),--sample $(N) --seed $(or $(SEED),0)) --only "$(K)"

quick: $(ONE_ISA) ## after an edit of a CPU kernel: build one instruction set, run the tests it breaks first
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -x $(QUICK) -k "not reference-"

t:               ## tests by words and place, on what is built: make t K="topk and not mask" T=tests/kl
	$(PY) -m pytest -q -k "$(K)" $(T)

bench: $(LIBRARY) ## measure against eager PyTorch, torch.compile and foreach; writes bench/results and docs/speed.md
	$(PY) -m bench

bench-gpu: $(LIBRARY) ## the same on a GPU, beside Liger and TRL too; writes bench/results/<gpu>.json, 7 minutes
	$(PY) -m bench gpu

lint: $(LINTERS) ## ruff, mypy, clang-format; builds nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(SIMT)

types: $(INSTALLED) ## strict pyright on a user's script: no Any from fasttax
	$(PY) -m pip install -q --group types
	$(PY) -m pytest -q tests/package/test_pyright.py

format: $(LINTERS) ## apply ruff's fixes, its layout, and clang-format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP) $(SIMT)

# Material's own advice on MkDocs 2 is no warning of the site's.
docs: $(DOCS) ## the site in build/site from docs/, README and docstrings; every link is checked
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	$(PY) tools/docs_check.py build/site

hooks: $(LINTERS) ## check what a commit touches before it is made (pre-commit, with the tools of .venv)
	$(VENV)/bin/pre-commit install

wheels: $(INSTALLED) ## a checked CPU wheel and the sdist in dist/; T="2.13.0" tries it beside that torch
	$(PY) -m pip install -q --group wheels
	$(PY) tools/wheels.py --torch $(T)

house:           ## the numbers that this house is held to: circles, rooms, floors, wide lines
	$(PYTHON) tools/house.py

doctor: $(LIBRARY) ## which kernels run here, and why
	$(PY) -m fasttax doctor

clean:           ## remove what was built, and .venv
	rm -rf $(VENV) build *.egg-info fasttax/*.so
