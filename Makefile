# Every target that CI uses. Each sets up what it needs: an active environment that has torch is used with the torch
# that it has, else .venv is made.
TORCH := 2.13.0
ACTIVE := $(if $(or $(VIRTUAL_ENV),$(CONDA_PREFIX)),$(shell python -c "import torch, sys; print(sys.prefix)" 2>/dev/null))
BIN := $(if $(ACTIVE),$(ACTIVE)/bin,.venv/bin)
PYTHON := "$(BIN)/python"
# a checksum of the environment's path, in which there may be spaces
STAMP := $(if $(ACTIVE),build/installed-$(firstword $(shell printf %s "$(ACTIVE)" | cksum)),.venv/installed)
TRAINERS := $(STAMP)-trainers
INSTALL = $(PYTHON) -m pip install -q --constraint $(STAMP).torch
# Threads that wait must not spin: two workers with two threads each share two cores (an example took 119 s in the suite, 11 s alone).
export OMP_WAIT_POLICY := PASSIVE
NATIVE := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.py')
CPP := $(shell find csrc benchmarks tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: help install demo test test-times test-programs test-trainers test-ranks test-gpu-source test-package test-versions mutants lint
.PHONY: format bench plots evidence wheel wheels doctor cuda-check clean
help:
	@echo "make demo    train a small model with 'ntp' and with 'ntp + nitp' and compare (about five minutes)"
	@echo "make test    the test suite          make lint    ruff, pyright, clang-format"
	@echo "make bench   the quick benchmark     make doctor  a check of every backend"
	@echo "make test-times  the same, with the twenty slowest tests"
	@echo "make test-programs  benchmarks and long examples at toy sizes"
	@echo "make test-package  archives and wheels, built and installed into real environments"
	@echo "make test-versions  one wheel under the oldest and the newest torch (downloads both)"
	@echo "make test-trainers  the trainers that people have, with their real packages    make test-ranks  on 2 and 4 processes"
	@echo "make test-gpu-source  run the CUDA and Triton kernels on the CPU, compile Triton's for sm_80 and sm_90"
	@echo "make mutants  one-line edits of kernels, objectives, engine and adapters, each of which must turn tests red; PART=cpu for a part"
	@echo "make cuda-check  compile the CUDA kernels for every architecture, print their registers, count instructions"
	@echo "make plots   measure how cost grows and draw it         make evidence  whole trainings on two texts"
	@echo "make format  rewrite the sources     make clean"
	@echo "make wheel   dist/*.whl for this Python and machine"
	@echo "make wheels  the archive and the wheels of a release, checked: any Linux with glibc >= 2.28, any Python"

install: $(STAMP)

$(STAMP): $(NATIVE)
ifeq ($(ACTIVE),)
	python3 -m venv .venv
	$(PYTHON) -m pip install -q --upgrade pip
	$(PYTHON) -m pip install -q torch==$(TORCH)
endif
	@mkdir -p $(dir $@)
	@$(PYTHON) csrc/tools/installed_torch.py > $@.torch
	$(INSTALL) -e ".[dev]"
	@touch $@

$(TRAINERS): $(STAMP) tests/trainers/requirements.txt
	@$(PYTHON) csrc/tools/installed_torch.py > $(STAMP).torch
	$(INSTALL) $$(sed -n 's/^trainers = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	$(INSTALL) --no-deps -r tests/trainers/requirements.txt
	@touch $@

demo: $(STAMP)
	$(PYTHON) examples/pretrain.py

test: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not (gpu_source or package or programs or trainers or ranks)"

test-times: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist worksteal --durations=20 -m "not (gpu_source or package or programs or trainers or ranks)"

test-programs: $(TRAINERS)  # models and peers that benchmarks compare with
	$(PYTHON) -m pytest -n 2 --dist worksteal -m programs

test-trainers: $(TRAINERS)
	$(PYTHON) -m pytest -n 2 --dist worksteal -m trainers

test-ranks: $(TRAINERS)  # DeepSpeed among them
	$(PYTHON) -m pytest -m ranks

test-package: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist loadfile -m package

test-versions: $(STAMP)
	$(PYTHON) -m tests.project.versions

test-gpu-source: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist worksteal -m gpu_source

mutants: $(TRAINERS)
	$(PYTHON) -m tests.mutants.run $(PART)

lint: $(TRAINERS)  # pyright reads the adapters beside the packages that they adapt
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	rm -rf build/layers && NITP_OPS_PURE=1 $(PYTHON) -m pip install -q --no-deps --no-build-isolation --target build/layers .
	cd build/layers && PYTHONPATH="$(CURDIR)" $(abspath $(BIN))/lint-imports --no-cache "$(CURDIR)/pyproject.toml"
	"$(BIN)/clang-format" --dry-run --Werror $(CPP)

format: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	"$(BIN)/clang-format" -i $(CPP)

bench: $(STAMP)
	$(PYTHON) -m benchmarks --quick

plots: $(STAMP)
	$(PYTHON) -m benchmarks --case scaling --save
	$(PYTHON) -m benchmarks plot

evidence: $(STAMP)
	$(PYTHON) experiments/evidence.py

wheel: $(STAMP)
	$(PYTHON) -m pip wheel -q --no-deps -w dist .

wheels: $(STAMP)
	$(PYTHON) -m tests.packaging.wheels dist

doctor: $(STAMP)
	$(PYTHON) -m nitp_ops doctor

cuda-check: $(STAMP)
	$(PYTHON) csrc/tools/cuda_check.py

clean:
	rm -rf build dist *.egg-info nitp_ops/*.so .venv/installed
