"""What a user can do wrong: one error that says where and what, exit code 2, no traceback, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.cli.main import main

pytestmark = pytest.mark.e2e
Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(project: Any, capfd: pytest.CaptureFixture[str]) -> Train:
    """`qlora train JOB train.output_dir=RUN_DIR OVERRIDES` in this process; returns exit code and standard error."""

    def run(run_dir: Path, *overrides: str, base: Path | None = None) -> tuple[int, str]:
        argv = ["train", str(project.job), f"train.output_dir={run_dir}", *overrides]
        code = main([*argv, f"model.base={base}"] if base else argv)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, err

    return run


def is_one_error(err: str, *parts: str) -> None:
    assert err.count("error:") == 1, err
    for part in parts:
        assert part in err, err


ACC2 = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")  # as in the finished run


def test_missing_data_file(train: Train, tmp_path: Path) -> None:
    code, err = train(tmp_path / "run", f"data.train=[{tmp_path}/no.jsonl]")
    assert code == 2
    is_one_error(err, "data.train[0]", "no.jsonl")
    assert not (tmp_path / "run").exists()


def test_unknown_key(train: Train, tmp_path: Path) -> None:
    code, err = train(tmp_path / "run", "train.learning_rat=1")
    assert code == 2
    is_one_error(err, "train.learning_rat", "learning_rate")
    assert not (tmp_path / "run").exists()


def test_bad_json_line(train: Train, project: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = project.train.read_text().splitlines()
    rows.write_text("\n".join([*lines[:3], lines[3][:-5], *lines[4:]]))
    code, err = train(tmp_path / "run", f"data.train=[{rows}]")
    assert code == 2
    is_one_error(err, f"{rows}:4")
    assert not (tmp_path / "run").exists()


def test_no_target_token(train: Train, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "is anybody there"}]}) + "\n")
    code, err = train(tmp_path / "run", f"data.train=[{rows}]")
    assert code == 2
    is_one_error(err)
    assert not (tmp_path / "run").exists()


def test_base_without_safetensors(train: Train, project: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(project.base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    (base / "pytorch_model.bin").write_bytes(b"never opened")
    code, err = train(tmp_path / "run", base=base)
    assert code == 2
    is_one_error(err, str(base), "pytorch_model.bin", "safetensors")
    assert not (tmp_path / "run").exists()


def test_float16_on_a_cpu(train: Train, tmp_path: Path) -> None:
    code, err = train(tmp_path / "run", "model.dtype=float16")
    assert code == 2
    is_one_error(err, "model.dtype", "float16", "bfloat16")
    assert not (tmp_path / "run").exists()


def test_tokenizer_with_more_tokens_than_the_embedding_has_rows(
    train: Train, project: Any, make_small_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_small_base(tmp_path / "base", vocabulary_rows=99)
    code, err = train(tmp_path / "run", base=base)
    assert code == 2
    is_one_error(err, "99")
    assert not (tmp_path / "run").exists()


def test_target_that_matches_nothing(train: Train, tmp_path: Path) -> None:
    code, err = train(tmp_path / "run", "lora.target_modules=[query]")
    assert code == 2
    is_one_error(err, "query", "q_proj")
    assert not (tmp_path / "run").exists()


def test_r_beyond_every_layer(train: Train, tmp_path: Path) -> None:
    code, err = train(tmp_path / "run", "lora.r=1000")
    assert code == 2
    is_one_error(err, "lora.r", "1000", "64")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoints(train: Train, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = ("train.learning_rate=1e30", "train.lr_scheduler_type=constant", "checkpoint.every_steps=1")
    code, err = train(run_dir, *overrides)
    assert code == 2
    is_one_error(err, "not finite at step")
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("failed", 2, True)
    newest = run_dir / f"checkpoints/step-{status['step']:08d}"
    assert (newest / "COMMITTED").exists()
    assert main(["inspect", str(newest)]) == 0


# Resuming


def files_of(run_dir: Path) -> dict[str, str]:
    """Hashes of what must not change by a refused start."""
    found = {}
    for path in sorted(run_dir.rglob("*")):
        if path.is_file() and path.name not in ("LOCK", "status.json"):
            found[str(path.relative_to(run_dir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_resume_with_another_config_is_refused_key_by_key(train: Train, finished_run: Path) -> None:
    before = files_of(finished_run)
    code, err = train(finished_run, *ACC2, "train.learning_rate=5e-3", "lora.r=4", "logging.log_every_steps=2")
    assert code == 2
    is_one_error(err, "train.learning_rate: 0.01 then, 0.005 now", "lora.r: 3 then, 4 now", "--force")
    assert "log_every_steps" not in err
    assert "max_steps" not in err
    assert files_of(finished_run) == before


def test_resume_with_another_global_batch_is_refused(train: Train, finished_run: Path) -> None:
    code, err = train(finished_run, "train.per_device_train_batch_size=3")
    assert code == 2
    is_one_error(err, "train.per_device_train_batch_size: 2 then, 3 now")


def test_resume_with_other_data_is_refused(train: Train, project: Any, finished_run: Path, tmp_path: Path) -> None:
    before = files_of(finished_run)
    more = tmp_path / "more.jsonl"
    more.write_text(project.train.read_text() + project.eval.read_text())
    code, err = train(finished_run, *ACC2, f"data.train=[{more}]")
    assert code == 2
    is_one_error(err, "data: the token rows differ", "data.train:")
    assert files_of(finished_run) == before


def test_resume_with_another_base_is_refused(train: Train, project: Any, finished_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(project.base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    code, err = train(finished_run, *ACC2, base=base)
    assert code == 2
    is_one_error(err, "their weights differ")


def test_force_goes_on_with_another_global_batch_and_says_so(train: Train, finished_run: Path) -> None:
    for step in (7, 6):
        shutil.rmtree(finished_run / f"checkpoints/step-{step:08d}")
    code, err = train(finished_run, "train.per_device_train_batch_size=3", "--force")
    assert code == 0
    assert "warning: --force: train.per_device_train_batch_size: 2 then, 3 now" in err
    assert "no longer continues exactly" in err
    assert rows_of(finished_run)[-1]["step"] == 7


def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(
    train: Train, project: Any, close_relative: Callable[..., None], finished_run: Path
) -> None:
    newest = finished_run / "checkpoints/step-00000007"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    code, err = train(finished_run, *ACC2)
    assert code == 0
    assert "warning:" in err
    assert "optimizer.safetensors does not match its checksum" in err
    assert "aside-1-step-00000007" in err
    losses = [row["loss"] for row in rows_of(finished_run)]
    close_relative(losses, project.result("single.acc2").values("loss"), 1e-4)
    aside = finished_run / "checkpoints/aside-1-step-00000007"
    assert (aside / "optimizer.safetensors").read_bytes() == bytes(content)
    assert main(["inspect", str(newest)]) == 0


@pytest.mark.parametrize("damage", ["truncated", "manifest", "missing"])
def test_only_damaged_checkpoints_are_an_error(train: Train, finished_run: Path, damage: str) -> None:
    for folder in (finished_run / "checkpoints").iterdir():
        if damage == "truncated":
            weights = folder / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])
        elif damage == "manifest":
            manifest = folder / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))
        else:
            (folder / "trainer_state.json").unlink()
    before = files_of(finished_run)
    code, err = train(finished_run, *ACC2)
    assert code == 2
    is_one_error(err, "every checkpoint of this run is damaged")
    assert err.count("warning:") == 3
    assert files_of(finished_run) == before


def test_other_versions_are_said(train: Train, finished_run: Path) -> None:
    folder = finished_run / "checkpoints/step-00000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["versions"]["torch"] = "1.0"
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMITTED").write_text(hashlib.sha256(content).hexdigest())
    code, err = train(finished_run, *ACC2)
    assert code == 0
    assert "warning: torch 1.0 ->" in err


def test_a_new_run_in_an_old_folder_sets_its_checkpoints_aside(train: Train, finished_run: Path) -> None:
    """Otherwise the old run's later steps would be kept in place of the new run's, and resumed from."""
    code, err = train(finished_run, *ACC2, "checkpoint.resume=none", "train.max_steps=2", "checkpoint.keep_last=1")
    assert code == 0
    assert err.count("warning: the run does not go on from this checkpoint") == 3
    names = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert names == [*(f"aside-1-step-0000000{n}" for n in (3, 6, 7)), "step-00000002"]


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


# Under a launcher


@pytest.mark.parametrize(
    ("config", "override", "parts"),
    [
        ("ddp", "train.weight_decay=0.2", ["train.weight_decay: 0.1 then, 0.2 now"]),  # found on rank 0 alone
        ("zero3", "lora.target_modules=[query]", ["query"]),  # found on every rank
        ("zero3", "lora={dtype: bfloat16, use_dora: true}", ["one dtype", "bfloat16 and float32", "zero2.yaml"]),
    ],
)
def test_an_error_under_a_launcher_ends_all_ranks(
    project: Any, finished_run: Path, tmp_path: Path, config: str, override: str, parts: list[str]
) -> None:
    run_dir = finished_run if config == "ddp" else tmp_path / "new"
    overrides = [f"train.output_dir={run_dir}", "train.per_device_train_batch_size=2", override]
    log = tmp_path / "log"
    process = project.launch(config, 2, "train", str(project.job), *overrides, log=log)
    assert project.wait(process, log, timeout=120) != 0
    text = log.read_text()
    is_one_error(text.replace("error (rank 1):", ""), *parts)
    assert "/qlora/train/" not in text  # the launcher shows a traceback of its own
    if run_dir != finished_run:
        assert not run_dir.exists()
        return
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert all(part in status["reason"] for part in parts)
