# make quickstart   an environment, a small SFT model, and SPIN on it (DEVICES, TP, PP change the layout)
# make test         an environment, lint, all tests (PYTHON=python3.12 for the other supported stack)
# make check-nemo   NeMo 2 and NeMo 1 themselves read what is written here (downloads some GB the first time)
# make soak         kills a run KILLS times at random moments (SEED) and compares its end; CLI=1: through the command
# make fuzz         malformed data and configurations for MINUTES, and a table of what became of them
# make bench        speed and memory, side by side with transformers
# make bench-peers  an iteration and its parts, side by side with transformers and TRL (BENCH_ARGS=--quick)
# make bench-scaling  tensor, pipeline and data parallelism, beside a cost model (BENCH_ARGS=--quick)
# make study        what the SPIN paper claims, looked up with small models (STUDY_ARGS=--fast, --full, --write-docs)
# make clean        remove the environments and what tools leave behind
#
# The PyTorch that pip finds under the name TORCH is installed. Without a GPU its CPU build is enough, and smaller:
# point pip to where that lies, as in  make quickstart TORCH=torch==2.13.0+cpu PIP_ARGS="--extra-index-url ..."

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
PIP_ARGS ?=
KILLS ?= 50
SEED ?= 0
DEVICES ?= 2
TP ?= 2
PP ?= 1
MINUTES ?= 10
BENCH_ARGS ?=
STUDY_ARGS ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: quickstart test check-nemo soak fuzz bench bench-peers bench-scaling study clean

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart/run.py --devices $(DEVICES) --tp $(TP) --pp $(PP)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check-nemo: $(INSTALLED)
	$(BIN)/python tests/compat/check_with_nemo.py --pip-args="$(PIP_ARGS)" $(CHECK_ARGS)

soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/$(if $(CLI),command_line,soak).py --kills $(KILLS) --seed $(SEED)

fuzz: $(INSTALLED)
	NEMO_SPIN_FUZZ_MINUTES=$(MINUTES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/checkpoints.py

bench-peers: $(INSTALLED)
	$(BIN)/python benchmarks/peers/compare.py --pip-args="$(PIP_ARGS)" $(BENCH_ARGS)

bench-scaling: $(INSTALLED)
	$(BIN)/python benchmarks/scaling.py $(BENCH_ARGS)

study: $(INSTALLED)
	$(BIN)/python examples/study/run.py $(STUDY_ARGS)

# torch first: what comes after must not choose another build of it
$(INSTALLED): pyproject.toml
	@test -n "$(VERSION)" || { echo "$(PYTHON) does not run: install it, or give one with PYTHON=..."; exit 1; }
	@echo "Installing into $(VENV) (Python $(VERSION)); this takes some minutes the first time."
	$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing: on Debian, apt install python3-venv"; exit 1; }
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv .venv-3.* .venv-peers build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
