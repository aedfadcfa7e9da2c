# One command per task; each makes .venv, installs and builds if that is not done yet.
PYTHON ?= python3
VENV   ?= .venv
# Spinning threads of two busy processes stall each other: a 0.9 s test took 7.5 s.
export OMP_WAIT_POLICY ?= passive
PY      = $(VENV)/bin/python
SOURCES = $(wildcard setup.py tools/*_build.py csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
CPP     = $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/gpu/simt/*.h tests/gpu/simt/*.cpp)
# What is done, one empty file each. INSTALLED is torch, every package and the project itself, LINTERS is
# torch and the tools of `make lint`. LIBRARY is the whole library, with CUDA kernels as FASTTAX_CUDA has
# them, ONE_ISA is the CPU's for this machine; both are fasttax/_C.abi3.so, so each takes the other's away.
INSTALLED = $(VENV)/.installed
LINTERS   = $(VENV)/.linters
LIBRARY   = $(VENV)/.library-cuda-$(or $(FASTTAX_CUDA),auto)
ONE_ISA   = $(VENV)/.library-one-isa
# One case an op, of the kernels' own tests: what an edit of a kernel breaks first.
QUICK ?= tests/package/test_math.py
