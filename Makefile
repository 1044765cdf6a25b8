# make quickstart   set-up, data, then the main job
# make test         set-up, then the tests
# A GPU machine: make setup TORCH=torch==2.13.0

PYTHON ?= python3.11
TORCH ?= torch==2.13.0+cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.memtrain-setup
OPTIM_STAMP := .venv-optim/.memtrain-setup
QEMU_STAMP := .qemu/.memtrain-setup
MODEL := data/models/smollm2-135m
CORPUS := data/corpora/torch-sources
RECIPE := recipes/smollm2_135m_full_cpu.yaml

.PHONY: setup data quickstart test lint types imports package clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" VENV="$(VENV)" sh scripts/setup.sh
	touch $@

$(OPTIM_STAMP): $(STAMP) scripts/setup_optim.sh
	BASE="$(VENV)" VENV=.venv-optim sh scripts/setup_optim.sh
	touch $@

# Where it cannot be made the tests that need it are skipped, and say so; in CI they fail.
$(QEMU_STAMP): scripts/setup_qemu.sh
	-sh scripts/setup_qemu.sh && touch $@

data: $(MODEL)/config.json $(CORPUS)/meta.json

$(MODEL)/config.json: $(STAMP)
	$(BIN)/python scripts/fetch_model.py --output $(MODEL)
	touch $@

$(CORPUS)/meta.json: $(STAMP) $(MODEL)/config.json
	$(BIN)/python -m memtrain.data --tokenizer $(MODEL) --output $(CORPUS)
	touch $@

quickstart: data
	$(BIN)/torchrun --standalone --nproc-per-node 1 -m memtrain.train $(RECIPE)

# Two workers, a file of tests to each in turn: tests of one file may share what took long to make. In the order of
# the files, because a file with few tests may be a long one, and the last. Each worker has one thread of arithmetic
# (tests/conftest.py). `make test WORKERS=0` runs all in one process, where a debugger works.
WORKERS ?= 2
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# What needs Triton or a peer (marker venv_optim) runs in the environment that has them; what needs memory nodes
# (marker qemu) in a virtual machine.
test: setup $(OPTIM_STAMP) $(QEMU_STAMP)
	$(BIN)/python $(PYTEST)
	MEMTRAIN_REQUIRE_VENV_OPTIM=1 .venv-optim/bin/python $(PYTEST) -m venv_optim tests/optim tests/offload/test_bitsandbytes_steps.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/python scripts/typecheck.py

imports: setup
	$(BIN)/lint-imports

package: setup
	$(BIN)/python scripts/check_package.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
