"""Every file a user may start from is loaded here, and nothing in it is dead."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from qlora.config.load import load_config
from qlora.config.rules import check_job

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "configs").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "launch/accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "launch/deepspeed").glob("*.json"))
SCRIPTS = sorted((ROOT / "launch/slurm").glob("*.sbatch"))
# Where the files with these endings put the frozen base and the optimizer.
OFFLOADS = {
    "": {},
    "offload": {"offload_param": "cpu", "offload_optimizer": "cpu"},
    "nvme": {"offload_param": "nvme", "offload_optimizer": "cpu"},
}


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_job_file_is_a_job(path: Path) -> None:
    config = load_config(path)
    # As on the machine that submits a job: keys and combinations, not the paths of another machine.
    check_job(config, "slurm", str(path))
    assert Path(config.train.output_dir).name == path.stem


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_commands_in_a_job_file_name_files_that_exist(path: Path) -> None:
    words = [word for line in path.read_text().splitlines() if line.startswith("#") for word in line.split()]
    named = [word for word in words if word.startswith(("launch/", "configs/")) and "." in word]
    assert named or path.stem == "quickstart"
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.name)
def test_launch_file_holds_only_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(path))  # raises for keys it does not know
    named = config.deepspeed_config.get("deepspeed_config_file")
    assert (named is not None) == path.stem.startswith("zero")
    if named:
        assert ROOT / named in DEEPSPEED


def test_every_deepspeed_file_is_named_by_a_launch_file() -> None:
    named = {yaml.safe_load(path.read_text()).get("deepspeed_config", {}).get("deepspeed_config_file") for path in LAUNCHES}
    assert {str(path.relative_to(ROOT)) for path in DEEPSPEED} == named - {None}


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.name)
def test_deepspeed_file_leaves_the_jobs_numbers_to_the_job(path: Path) -> None:
    config = json.loads(path.read_text())
    zero = config.pop("zero_optimization")
    name, _, offload = path.stem.partition("_")
    assert name == f"zero{zero['stage']}"
    assert OFFLOADS[offload] == {key: zero[key]["device"] for key in zero if key.startswith("offload_")}
    # Torch's optimizer, wherever its state is.
    assert config.pop("zero_force_ds_cpu_optimizer", None) == (False if offload else None)
    assert set(config.values()) == {"auto"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_batch_script_parses(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "#SBATCH --signal=B:USR1@300" in path.read_text()
