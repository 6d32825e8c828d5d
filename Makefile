# Everything a person types. Each target sets up .venv by itself; a second call is quick.
#
#   make demo       install lina and train a small language model on this machine
#   make test       install lina with its tests and run them all
#   make gpu-test   the tests that need an NVIDIA GPU; fails where there is none
#   make sanitize   the C core under ASan, UBSan and TSan; the kernels under compute-sanitizer where a GPU is
#   make lint       ruff, mypy, clang-format
#   make format     lays C sources out as make lint wants them
#   make wheel      a wheel in dist/
#   make clean      removes what was built, and .venv
#
# PYTHON     the Python that .venv is made from (default python3; 3.10 or newer)
# TORCH      which torch to install, as pip spells it: TORCH=torch==2.13.0 make test
# LINA_CUDA  1: build the GPU kernels; 0: do not; default: 1 where a GPU or nvcc is, else 0
# ARGS       further arguments of lina train, or of pytest
#
# Without TORCH a machine with an NVIDIA GPU gets PyPI's newest torch, which brings several GB of
# CUDA libraries. A machine without one gets the CPU build of the version below, 200 MB, from
# PyTorch's own index, or from pip's configured places where that index cannot be reached.

PYTHON ?= python3
ARGS ?=
GPU := $(shell test -e /dev/nvidiactl && echo yes)
CPU_TORCH := torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
TORCH ?= $(if $(GPU),torch>=2.10,$(CPU_TORCH))

# Nothing here could run a kernel and nothing here compiles one: do not fetch compilers for them.
ifeq ($(GPU)$(CUDA_HOME)$(shell command -v nvcc),)
LINA_CUDA ?= 0
endif
LINA_CUDA ?=
export LINA_CUDA

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := .venv/stamps
# One stamp a choice, so that another PYTHON, TORCH or LINA_CUDA installs again.
VENV := $(STAMPS)/venv-$(firstword $(shell echo '$(PYTHON)' | cksum))
TORCH_STAMP := $(STAMPS)/torch-$(firstword $(shell echo '$(TORCH)' | cksum))
LINA := $(STAMPS)/lina$(LINA_CUDA)
TESTS := $(STAMPS)/tests$(LINA_CUDA)
SOURCES := setup.py pyproject.toml $(shell find csrc build_backend -type f ! -name '*.pyc')

.PHONY: demo test gpu-test sanitize sanitize-cpu sanitize-gpu lint format wheel clean

demo: $(LINA)
	$(BIN)/lina train $(ARGS)

test: $(TESTS)
	$(BIN)/python -m pytest $(ARGS)

gpu-test: $(TESTS)
	$(BIN)/python -m pytest -m gpu $(ARGS)

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "lina: PYTHON=$(PYTHON) must be Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "lina: $(PYTHON) cannot make a virtual environment (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP) install -q --upgrade 'pip>=24' 'setuptools>=77'
	@mkdir -p $(STAMPS) && touch $@

$(TORCH_STAMP): $(VENV)
	@rm -f $(STAMPS)/torch-*
	$(PIP) install $(foreach word,$(TORCH),'$(word)')
	@touch $@

# Editable: a changed .py needs nothing, a changed source only what depends on it.
$(LINA): $(TORCH_STAMP) $(SOURCES)
	$(PIP) install -q -e .
	@rm -f $(STAMPS)/lina* && touch $@

$(TESTS): $(TORCH_STAMP) $(SOURCES)
	$(PIP) install -q -e '.[test]'
	@rm -f $(STAMPS)/lina* $(STAMPS)/tests* && touch $(LINA) $@

# ---- sanitizers ----

CALLS ?= 100000
SEED ?= 1
SANITIZE := -std=c11 -g -O1 -fno-omit-frame-pointer -fexceptions -Wall -Wextra -fsanitize=address,undefined \
  -fno-sanitize-recover=undefined -DLINA_CUDA=0 -Icsrc -Itests
# module*.c are the Python side and comm the GPUs' (below); everything else runs without Python, torch and CUDA.
CORE := $(filter-out csrc/module%.c csrc/comm/%,$(shell find csrc -name '*.c'))
FUZZ := build/fuzz

sanitize: sanitize-cpu sanitize-gpu

# Two fake torches: the newest, and 2.10, which lacks what came later.
$(FUZZ)/%/libtorch_cpu.so: tests/fake_torch.c tests/fake_torch.h tests/splitmix.h
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) $(if $(filter old,$*),-DFAKE_OLD) -fPIC -shared -Wl,-soname,libtorch_cpu.so -o $@ $<

$(FUZZ)/fuzz: $(FUZZ)/new/libtorch_cpu.so $(FUZZ)/old/libtorch_cpu.so $(wildcard tests/fuzz_*.[ch]) tests/fake_torch.h tests/splitmix.h $(SOURCES)
	$(CC) $(SANITIZE) -o $@ tests/fuzz_core.c tests/fuzz_draw.c tests/fuzz_tensor.c $(CORE) $< -lm -ldl -lpthread

PLAN := csrc/error.c $(wildcard csrc/plan/*.c)
$(FUZZ)/plan: $(wildcard tests/fuzz_plan*.[ch]) tests/splitmix.h csrc/error.h $(wildcard csrc/plan/*.h) $(PLAN)
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) -o $@ $(wildcard tests/fuzz_plan*.c) $(PLAN) -lm

$(FUZZ)/simulate: tests/fuzz_simulate.c tests/splitmix.h csrc/error.h $(wildcard csrc/plan/*.h) $(PLAN)
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) -o $@ $< $(PLAN) -lm

# csrc/comm over a fake CUDA, a fake NCCL and fakes of its kernels: no GPU and no header of CUDA's is needed.
ROUNDS ?= 200
COMM := $(wildcard csrc/comm/*.c) csrc/nccl_abi.c csrc/plan/policy.c csrc/plan/link.c csrc/error.c
COMM_FLAGS := $(filter-out -DLINA_CUDA=% -fsanitize=% -fno-sanitize-%,$(SANITIZE)) -DLINA_CUDA=1 -isystem tests/fake_cuda
flags_thread := -fsanitize=thread
flags_address := -fsanitize=address,undefined -fno-sanitize-recover=undefined
FAKE_NCCL := $(wildcard tests/fake_cuda*.c tests/fake_stream.c tests/fake_nccl*.c)
# Some kernels spread addresses wider than an older ThreadSanitizer can follow.
NEAR := $(shell setarch -R true 2>/dev/null && echo setarch -R)

$(FUZZ)/%/libnccl.so.2: $(FAKE_NCCL) $(wildcard tests/fake_*.h tests/fake_cuda/*.h) tests/splitmix.h csrc/nccl_abi.h
	@mkdir -p $(@D)
	$(CC) $(COMM_FLAGS) $(flags_$*) -fPIC -shared -Wl,-soname,libnccl.so.2 -o $@ $(FAKE_NCCL) -lpthread

# thread, address, or plain: no sanitizer.
.PRECIOUS: $(FUZZ)/%/libnccl.so.2
$(FUZZ)/%/comm: $(FUZZ)/%/libnccl.so.2 tests/splitmix.h $(wildcard tests/fuzz_comm*.[ch] csrc/comm/*.h csrc/plan/*.h csrc/cuda/peers*.h) $(COMM)
	$(CC) $(COMM_FLAGS) $(flags_$*) -o $@ $(wildcard tests/fuzz_comm*.c) $(COMM) $< -lm -ldl -lpthread

sanitize-cpu: $(FUZZ)/fuzz $(FUZZ)/plan $(FUZZ)/simulate $(FUZZ)/thread/comm $(FUZZ)/address/comm
	LD_LIBRARY_PATH=$(FUZZ)/new $< $(CALLS) $(SEED)
	LD_LIBRARY_PATH=$(FUZZ)/old $< $$(( $(CALLS) / 10 )) $(SEED)
	$(FUZZ)/plan $(CALLS) $(SEED)
	$(FUZZ)/simulate $(CALLS) $(SEED)
	LD_LIBRARY_PATH=$(FUZZ)/thread $(NEAR) $(FUZZ)/thread/comm $(ROUNDS) $(SEED)
	LD_LIBRARY_PATH=$(FUZZ)/address $(FUZZ)/address/comm $(ROUNDS) $(SEED)

sanitize-gpu:
ifeq ($(GPU),)
	@echo "sanitize: compute-sanitizer skipped: no NVIDIA GPU on this machine"
else
	@$(MAKE) --no-print-directory $(TESTS)
	@sanitizer=$$(PATH="$$PATH:$(CUDA_HOME)/bin:/usr/local/cuda/bin" command -v compute-sanitizer) || { \
	  echo "sanitize: compute-sanitizer skipped: not on PATH nor in CUDA_HOME/bin"; exit 0; }; \
	for tool in memcheck racecheck synccheck; do \
	  echo "compute-sanitizer --tool $$tool"; \
	  general=; [ $$tool = racecheck ] && general=--general; \
	  "$$sanitizer" --tool $$tool --error-exitcode 1 $(BIN)/python tests/sanitize_gpu.py $$general || exit 1; \
	done
endif

# ---- lint ----

$(STAMPS)/lint: $(VENV)
	@for tool in ruff mypy clang-format; do \
	  $(PIP) install -q $$tool || echo "lint: pip could not install $$tool; its checks will be skipped"; \
	done; touch $@

C_FILES := $(shell find csrc tests build_backend -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

lint: $(TESTS) $(STAMPS)/lint
	@rc=0; run() { \
	  tool=$$1; shift; \
	  if [ -x $(BIN)/$$tool ]; then echo "$$tool $$1"; $(BIN)/$$tool "$$@" || rc=1; \
	  else echo "lint: $$tool skipped: it could not be installed"; fi; }; \
	run ruff check .; run mypy; run clang-format --dry-run --Werror $(C_FILES); exit $$rc

format: $(STAMPS)/lint
	$(BIN)/clang-format -i $(C_FILES)
	$(BIN)/ruff check --fix .

wheel: $(VENV)
	$(PIP) wheel -q --no-deps -w dist .
	@ls dist

clean:
	rm -rf .venv build dist lina.egg-info lina/_C.abi3.so
