# Everything a newcomer types. Both `make quickstart` and `make test` make the environment first and may be run twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slurm lint format bench clean

help:
	@echo "make quickstart   train and show a small adapter, two processes"
	@echo "make test         all tests"
	@echo "make test-slurm   the tests that start a SLURM of their own"
	@echo "make lint         ruff and mypy"
	@echo "make bench        benchmarks against TRL + PEFT (installs them)"

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

test: venv
	$(BIN)/python -m pytest

# A controller and two nodes on this machine. Needs root and, on Debian, apt-get install slurm-wlm munge iproute2; says
# what is missing otherwise.
test-slurm: venv
	QLORA_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' --constraint constraints.txt
	$(BIN)/python benchmarks/load_memory.py
	$(BIN)/python benchmarks/against_trl.py

clean:
	rm -rf $(VENV) runs
