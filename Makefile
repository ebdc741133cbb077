# Everything a newcomer types. Both `make quickstart` and `make test` make the environment first and may be run twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-gpu test-long test-elastic test-slurm test-hosts test-packages chaos lint format bench clean

help:
	@echo "make quickstart   train and show a small adapter, two processes"
	@echo "make test         the tests, but for those below"
	@echo "make test-long    what takes many launches: lost ranks, offloading, every variant of LoRA"
	@echo "make test-gpu     the tests that need a GPU"
	@echo "make test-elastic every place a run can be saved at, gone on with at every other"
	@echo "make test-slurm   the tests that start a SLURM of their own"
	@echo "make test-hosts   the tests on two hosts of their own, joined by a cable that is cut"
	@echo "make chaos        kills a training run a hundred times, at random"
	@echo "make lint         ruff and mypy"
	@echo "make bench        benchmarks, against TRL + PEFT as well (installs them); long"

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' --constraint constraints.txt
	@touch $(VENV)/.made

venv: $(VENV)/.made

# One rank a GPU; two ranks over gloo where there is none.
quickstart: venv
	$(BIN)/python -m qlora.assets.quickstart data runs/quickstart-data
	$(LAUNCH) --config_file launch/accelerate/ddp.yaml --main_process_port 0 \
	  --num_processes $$($(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)") \
	  -m qlora train configs/quickstart.yaml
	$(BIN)/python -m qlora.assets.quickstart show runs/quickstart runs/quickstart-data

# Many tests kill, stop and time real processes, and a busy machine can be too slow for one of them: what fails is tried
# once more, alone, and what fails twice fails. The first failure stays in the output.
AGAIN := --last-failed --last-failed-no-failures none

test: venv
	$(BIN)/python -m pytest || $(BIN)/python -m pytest $(AGAIN)

# What takes many launches: lost ranks, errors of one rank, starts from weights or data, offloading, answers of many ranks, plans,
# and every variant of LoRA in shares.
test-long: venv
	$(BIN)/python -m pytest -m long || $(BIN)/python -m pytest -m long $(AGAIN)

# On a machine with a GPU; elsewhere each says that it was skipped.
test-gpu: venv
	$(BIN)/python -m pytest -m gpu tests/gpu

# 81 pairs, minutes. Of them `make test-long` takes one run through all places.
test-elastic: venv
	QLORA_TEST_ELASTIC=1 $(BIN)/python -m pytest tests/e2e/test_elastic.py -k every_place

# A controller and two nodes on this machine. Needs root and, on Debian, apt-get install slurm-wlm munge iproute2; says
# what is missing otherwise.
test-slurm: venv
	QLORA_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm || QLORA_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm $(AGAIN)

# Two network namespaces on this machine. Needs root and iproute2; says what is missing otherwise.
test-hosts: venv
	QLORA_TEST_HOSTS=1 $(BIN)/python -m pytest tests/hosts || QLORA_TEST_HOSTS=1 $(BIN)/python -m pytest tests/hosts $(AGAIN)

# Installs what the two need on Debian, as root, where apt works; leaves the machine as it is elsewhere.
test-packages:
	bash tests/slurm/install.sh

# CHAOS_SEED=7 kills it elsewhere.
CHAOS_SEED ?= 0
chaos: venv
	QLORA_CHAOS_KILLS=100 QLORA_CHAOS_CONTROL=10 QLORA_CHAOS_SEED=$(CHAOS_SEED) $(BIN)/python -m pytest -s tests/chaos

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# About an hour and a half on two quiet cores. BENCH_ROWS=packed,memory BENCH_PAIRS=1 for less, BENCH_ROWS=all for more
# (ranks, 8,192 tokens); what was measured already is not measured again.
BENCH_ROWS ?= quick
BENCH_PAIRS ?= 5
bench: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' --constraint constraints.txt
	$(BIN)/python benchmarks/load_memory.py
	$(BIN)/python benchmarks/against_trl.py --rows $(BENCH_ROWS) --pairs $(BENCH_PAIRS)
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/readme_table.py

clean:
	rm -rf $(VENV) runs
