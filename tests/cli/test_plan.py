"""`qlora plan` as people meet it: a table, JSON, errors, and no torch behind any of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli.main import main
from qlora.cli.plan import parse_size
from qlora.errors import ConfigError

TINY = Path(__file__).parents[2] / "qlora/assets/tiny"
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets", "peft"}


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("lora: {r: 8}\n")
    return "job.yaml"


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_imports_no_torch(job_file: str) -> None:
    code = (
        "import sys\nfrom qlora.cli.main import main\n"
        "code = main(['plan', 'job.yaml', '--gpus', '16', '--nodes', '2', '--gpu-memory', '80GiB'])\n"
        f"sys.exit(code or ', '.join(sorted({HEAVY!r} & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "zero3" in done.stdout


def test_the_table(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", job_file, "--gpus", "8", "--nodes", "2", "--gpu-memory", "200MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = {line[:30].strip(): line[30:].split() for line in lines}
    assert row["a rank keeps"] == ["ddp", "zero1", "zero2", "zero3"]
    # 4,816,896 weights in 4 bits are 2,408,448 bytes, an eighth of which is 301,056.
    assert row["packed weights"] == ["2.3", "MiB", "2.3", "MiB", "2.3", "MiB", "294.0", "KiB"]
    assert row["in 200.0 MiB"] == ["fits", "too", "large", "too", "large", "too", "large"]
    assert row["gathered a micro-step"][:3] == ["-", "-", "-"]
    assert row["from other nodes"][:3] == ["-", "-", "-"]
    assert "--dry-run` measures" in lines[-1]


def test_json_is_for_programs(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, job_file, "--gpus", "8", "--nodes", "2", "--gpu-memory", "80 GB")
    assert (found["gpus"], found["nodes"], found["gpu_memory"]) == (8, 2, 80_000_000_000)
    assert found["num_weights_in_4_bits"] == 4_816_896
    assert found["num_trained"] == 236_544
    zero3 = found["modes"]["zero3"]
    assert zero3["kept_bytes"] == sum(zero3["kept"].values())
    assert zero3["total_bytes"] == zero3["kept_bytes"] + sum(zero3["working"].values())
    assert zero3["left_bytes"] == 80_000_000_000 - zero3["total_bytes"]
    # Of the seven others that a rank hears from, four are on the other node.
    assert zero3["gathered_from_other_nodes"] == zero3["gathered_bytes_a_micro_step"] * 4 // 7
    assert found["modes"]["zero2"]["gathered_bytes_a_micro_step"] == 0


def test_one_gpu_one_mode_and_overrides(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(facts(capsys, job_file)["modes"]) == ["single", "zero1", "zero2", "zero3"]
    found = facts(capsys, job_file, "--gpus", "2", "--mode", "zero3", "model.quantization=null", "lora.r=4")
    assert list(found["modes"]) == ["zero3"]
    assert found["num_weights_in_4_bits"] == 0
    assert found["num_trained"] == 236_544 // 2
    found = facts(capsys, job_file, "--gpus", "2", "train.optimizer=adamw_8bit")
    assert list(found["modes"]) == ["ddp"]


def test_a_config_alone_is_enough(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base").mkdir()
    shutil.copy(TINY / "config.json", "base")
    computed = facts(capsys, job_file, "--gpus", "4", "model.base=./base")
    exact = facts(capsys, job_file, "--gpus", "4")
    assert computed["shapes_from"] == "config.json, computed"
    assert [entry["kept"] for entry in computed["modes"].values()] == [entry["kept"] for entry in exact["modes"].values()]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["model.base=owner/name"], "error: model.base: a plan fetches nothing from the hub"),
        (["model.base=./gone"], "error: model.base: no such folder"),
        (["--gpu-memory", "much"], "error: --gpu-memory: not a size"),
        (["--gpus", "8", "--nodes", "3"], "error: --nodes: GPUs are not spread evenly"),
        (["--gpus", "8", "--mode", "single"], "error: --mode: one process takes one GPU"),
        (["--mode", "zero2", "train.optimizer=adamw_8bit"], "error: train.optimizer: adamw_8bit needs"),
        (["lora.target_modules=[q_prj]"], "error: lora.target_modules: the entry 'q_prj' matches no module"),
        (["lora.train_head=true"], "error: lora.train_embeddings, lora.train_head: the base ties"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_say_what_to_do(job_file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], wanted: str) -> None:
    assert main(["plan", job_file, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(wanted), shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * 2**30),
        ("80 gb", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "80", "80 parsecs", "1e3MiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)
