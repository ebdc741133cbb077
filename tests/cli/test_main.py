"""The command as people meet it: help, exit codes, what stands on standard error, what is imported before an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qlora.cli.main import main
from qlora.config.schema import JobConfig
from qlora.version import __version__

HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets"}
VERBS = ("train", "generate", "eval", "merge", "export", "prepare", "plan", "inspect", "status", "schema")
TOKEN = "hf_" + "a1B2" * 8


def qlora(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, listing on standard error every module it imports."""
    command = [sys.executable, "-X", "importtime", "-m", "qlora", *arguments]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    lines = done.stderr.splitlines(keepends=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
    assert not imported & HEAVY
    done.stderr = "".join(line for line in lines if not line.startswith("import time:"))
    return done


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("job.yaml").write_text("data: {train: [rows.jsonl], eval: [rows.jsonl]}\n")
    return "job.yaml"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """Put a function in the place of one that needs a model; returns the calls it gets."""

    def install(module: str, function: str, result: object) -> list:
        calls: list = []

        def called(*args: object, **kwargs: object) -> object:
            calls.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        fake = ModuleType(module)
        setattr(fake, function, called)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return install


@pytest.mark.parametrize("arguments", [(), *((verb,) for verb in VERBS)])
def test_help_is_there_without_torch(arguments: tuple[str, ...]) -> None:
    done = qlora(*arguments, "-h")
    assert done.returncode == 0, done.stderr
    assert "Usage: qlora" in done.stdout
    if not arguments:
        assert all(f"  {verb} " in done.stdout for verb in VERBS)


def test_the_entry_point_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("qlora")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "qlora"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"qlora {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("train", "missing.yaml"), "error: missing.yaml: no such job file"),
        (("train", "job.yaml", "train.lr=1"), "error: command line: train.lr: unknown key\n  next: did you mean"),
        (("train", "job.yaml", "data.train=[]"), "error: job.yaml: data.train: no data to train on"),
        (("eval", "job.yaml", "--adapter", "gone"), "error: gone: no such folder"),
        (("generate", "--prompt", "hi", "--adapter", "."), "error: .: not an adapter"),
        (("merge", "gone", "out"), "error: gone: no such folder"),
        (("inspect", "gone"), "error: gone: no such folder"),
        (("status", "gone"), "error: gone: no such run directory"),
    ],
)
def test_a_users_error_is_a_few_lines_before_torch(job_file: str, arguments: tuple[str, ...], wanted: str) -> None:
    done = qlora(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(wanted), done.stderr
    assert len(done.stderr.splitlines()) <= 4
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stdout == ""


def test_lines_are_not_wrapped_off_a_terminal(job_file: str) -> None:
    done = qlora("train", "job.yaml", "data.train=[./" + "long/" * 60 + "rows.jsonl]", COLUMNS="40")
    assert "long/" * 10 in done.stderr
    assert len(done.stderr.splitlines()) <= 4


@pytest.mark.parametrize("arguments", [("nonsense",), ("train",), ("train", "--what"), ("generate", "--temperature", "-1")])
def test_a_usage_error_is_2(arguments: tuple[str, ...]) -> None:
    assert main(arguments) == 2


def test_debug_shows_the_traceback(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "missing.yaml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "error: missing.yaml: no such job file" in shown


def test_train_hands_over_the_job(job_file: str, stand_in) -> None:
    calls = stand_in("qlora.train.setup", "run_training", 0)
    assert main(["train", job_file, "train.max_steps=3", "--dry-run", "train.seed=4"]) == 0
    ((config,), options) = calls[0]
    assert isinstance(config, JobConfig)
    assert (config.train.max_steps, config.train.seed) == (3, 4)
    assert options == {"dry_run": True, "force": False}


def test_the_exit_code_of_training_is_kept(job_file: str, stand_in) -> None:
    stand_in("qlora.train.setup", "run_training", 75)
    assert main(["train", job_file]) == 75


def test_an_interrupt_is_130(job_file: str, stand_in) -> None:
    stand_in("qlora.train.setup", "run_training", KeyboardInterrupt())
    assert main(["train", job_file]) == 130


def test_a_bug_keeps_its_traceback_and_no_secret(
    job_file: str, stand_in, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    stand_in("qlora.train.setup", "run_training", RuntimeError(f"GET {TOKEN} and 0123456789abcdef"))
    assert main(["train", job_file]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "RuntimeError: GET *** and ***" in shown
    assert TOKEN not in shown


def test_a_token_in_an_error_is_redacted(job_file: str) -> None:
    secret = "a-token-of-another-form"
    done = qlora("train", "job.yaml", f"model.dtype={secret}", "--debug", HF_TOKEN=secret)
    assert done.returncode == 2
    assert "found: '***'" in done.stderr
    assert secret not in done.stderr


def test_control_characters_do_not_reach_the_terminal(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "job.yaml", 'model.dtype="\\e]0;title\\a"']) == 2
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "\\x1b]0;title\\x07" in shown


def test_other_ranks_keep_to_a_line(
    job_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "job.yaml", "train.lr=1"]) == 2
    assert capsys.readouterr().err == "error (rank 3): command line: train.lr: unknown key\n"


def test_the_word_error_is_red_on_a_terminal_alone(job_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real terminal: the other end of a pseudo-terminal reads what is shown."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "qlora", "train", "missing.yaml"]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    assert process.wait(timeout=60) == 2
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert shown.startswith("\x1b[1;31merror:\x1b[0m missing.yaml: no such job file")


def test_generate_eval_and_merge_hand_over_what_they_were_given(
    job_file: str, adapter: Path, stand_in, capsys: pytest.CaptureFixture[str]
) -> None:
    generated = stand_in("qlora.infer.generate", "run_generate", ["an answer"])
    assert main(["generate", "--prompt", "hi", "--base", "builtin:tiny", "--system", "s", "--temperature", "0.5"]) == 0
    assert main(["generate", "--prompt", "hi", "--adapter", str(adapter), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == "an answer\nan answer\n"
    assert generated == [
        ((None, ["hi"]), {"base": "builtin:tiny", "system": "s", "max_new_tokens": 256, "temperature": 0.5}),
        ((adapter, ["hi"]), {"base": None, "system": None, "max_new_tokens": 3, "temperature": 0.0}),
    ]
    evaluated = stand_in("qlora.infer.evaluate", "run_evaluate", {})
    assert main(["eval", job_file, "--adapter", str(adapter), "data.max_length=64", "--json"]) == 0
    ((config, folder), options) = evaluated[0]
    assert (config.data.max_length, folder, options) == (64, adapter, {"as_json": True})
    merged = stand_in("qlora.adapter.merge_files", "run_merge", Path("out"))
    assert main(["merge", str(adapter), "out"]) == 0
    assert main(["merge", str(adapter), "out", "--onto", "original", "--dtype", "float16", "--base", "b"]) == 0
    others = {"shard_bytes": 5_000_000_000, "report": None, "measure_all": False}
    assert merged == [
        ((adapter, Path("out")), {"onto": "dequantized", "dtype": None, "base": None, **others}),
        ((adapter, Path("out")), {"onto": "original", "dtype": "float16", "base": "b", **others}),
    ]


def test_merge_does_not_overwrite(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter), str(adapter)]) == 2
    assert "would overwrite what is there" in capsys.readouterr().err


def test_schema_is_the_schema_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("$schema").startswith("https://json-schema.org/")
    assert shown == JobConfig.model_json_schema()
