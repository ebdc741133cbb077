"""`qlora slurm` as people meet it: a script, a submission to an sbatch that is a shell script, errors, no torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli.main import main

HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets", "peft"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a space in its name, a job file and the project's launch files."""
    folder = tmp_path / "work dir"
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "job.yaml").write_text("train: {output_dir: runs/my run}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(folder))  # no sbatch, wherever the tests run
    return folder


def make_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/sbatch").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def script(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", *arguments]) == 0
    return capsys.readouterr().out


def test_a_script_imports_no_torch(place: Path) -> None:
    code = (
        "import sys\nfrom qlora.cli.main import main\n"
        "code = main(['slurm', 'job.yaml', '--nodes', '2', '--gpus-per-node', '8'])\n"
        f"sys.exit(code or ', '.join(sorted({HEAVY!r} & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    subprocess.run(["/bin/bash", "-n"], input=done.stdout, text=True, check=True)


def test_the_script(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(
        capsys, "job.yaml", "train.max_steps=3", "--nodes", "2", "--gpus-per-node", "8", "--dependency", "singleton"
    )
    assert "#SBATCH --job-name=my-run\n" in text
    assert "#SBATCH --dependency=singleton\n" in text
    assert f"cd -- {shlex.quote(str(place))}\n" in text
    assert "train=(job.yaml train.max_steps=3)\nrun_dir='runs/my run'\nlaunch=launch/accelerate/zero2.yaml\n" in text
    assert f"export PATH={shlex.quote(sys.prefix)}/bin:$PATH" in text or sys.prefix == sys.base_prefix
    text = script(capsys, "job.yaml", "--ranks-per-node", "1")
    assert "--gpus" not in text
    assert "launch=launch/accelerate/single.yaml\n" in text
    text = script(capsys, "job.yaml", "--gpus-per-node", "4", "--launch", "launch/accelerate/zero3.yaml", "--venv", "my env")
    assert "launch=launch/accelerate/zero3.yaml\n" in text
    assert f"export PATH={shlex.quote(str(place / 'my env'))}/bin:$PATH\n" in text


def test_an_array(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ("--task", "train.seed=1", "--task", "train.seed=2 train.output_dir=runs/two", "--array-limit", "1")
    text = script(capsys, "job.yaml", "lora.r=4", "--gpus-per-node", "1", *tasks)
    assert "#SBATCH --job-name=my-run\n#SBATCH" in text
    assert "#SBATCH --array=0-1%1\n" in text
    assert "train=(job.yaml lora.r=4 train.seed=1 'train.output_dir=runs/my run/0')\n    run_dir='runs/my run/0'\n" in text
    assert "train=(job.yaml lora.r=4 train.seed=2 train.output_dir=runs/two)\n    run_dir=runs/two\n" in text


def test_submitting(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_sbatch(place, monkeypatch, 'cat >taken; echo "$*" >words; echo "17;here"')
    text = script(capsys, "job.yaml", "--gpus-per-node", "8", "--submit", "--out", "kept", "--logs", "the logs")
    assert (place / "taken").read_text() == (place / "kept").read_text()
    assert (place / "the logs").is_dir()
    assert "job 17, my-run, 1 node" in text
    assert "the logs/slurm-my-run-17.log" in text
    assert "qlora status 'runs/my run'" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "2"], "how many GPUs"),
        (["--gpus-per-node", "0"], "how many ranks"),
        (["--gpus-per-node", "8", "train.max_step=3"], "did you mean train.max_steps"),
        (["--gpus-per-node", "8", "--task", "lora.rr=3"], "lora.rr"),
        (["--gpus-per-node", "8", "--task", "'"], "cannot be split"),
        (["--gpus-per-node", "8", "--launch", "zero4"], "zero3"),
        (["--gpus-per-node", "8", "--launch", "single"], "starts one process"),
        (["--gpus-per-node", "8", "--array-limit", "2"], "--task"),
        (["--gpus-per-node", "8", "--submit"], "no sbatch on this machine"),
    ],
)
def test_mistakes(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["slurm", "job.yaml", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_from_another_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "launch").unlink()
    assert main(["slurm", "job.yaml", "--gpus-per-node", "8"]) == 2
    assert "from the repository root" in capsys.readouterr().err
    launch = str(ROOT / "launch/accelerate/zero2.yaml")
    assert main(["slurm", "job.yaml", "--gpus-per-node", "8", "--launch", launch]) == 2
    assert "launch/deepspeed/zero2.json" in capsys.readouterr().err


def test_sbatch_refuses(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_sbatch(place, monkeypatch, 'echo "sbatch: error: invalid partition specified: x" >&2; exit 1')
    assert main(["slurm", "job.yaml", "--gpus-per-node", "8", "--submit", "--partition", "x"]) == 2
    assert "invalid partition specified: x" in capsys.readouterr().err
