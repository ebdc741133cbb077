"""Choosing a checkpoint, whatever happened to its files, and refusing those of another job."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qlora
from qlora.checkpoint import resume, state
from qlora.checkpoint.resume import changed_versions, check_identity, find_checkpoint
from qlora.checkpoint.saver import Saver
from qlora.checkpoint.state import Identity, TrainerState
from qlora.config.schema import JobConfig
from qlora.distributed.engine import PlainEngine
from qlora.errors import CheckpointError

Write = Callable[..., Path]


def step_found(run_dir: Path, asked: str = "auto") -> int | None:
    found = find_checkpoint(run_dir, asked)
    return None if found is None else found.trainer.step


def test_nothing_there_is_a_new_run(run_dir: Path, write: Write) -> None:
    assert step_found(run_dir) is None
    (run_dir / "checkpoints/step-00000003").mkdir(parents=True)  # never committed
    assert step_found(run_dir) is None
    write(1)
    assert step_found(run_dir, "none") is None
    assert step_found(run_dir) == 1


def test_a_path_means_that_checkpoint_or_an_error(run_dir: Path, write: Write) -> None:
    first, second = write(1), write(2)
    assert step_found(run_dir, str(first)) == 1
    (second / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match="not a committed checkpoint"):
        find_checkpoint(run_dir, str(second))
    (first / state.STATE_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is cut short"):
        find_checkpoint(run_dir, str(first))


def test_no_flipped_bit_and_no_cut_goes_unseen(
    run_dir: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(1)
    newest = write(2)
    whole = tmp_path / "whole"
    shutil.copytree(newest, whole)
    draw = random.Random(0)
    for path in sorted(whole.iterdir()):
        content = path.read_bytes()
        places = [draw.randrange(len(content)) for _ in range(12)] + [0, len(content) - 1]
        damaged = [content[:n] for n in places if n or path.name != "COMMITTED"] + [content + b"x"]
        for n in places:
            flipped = bytearray(content)
            flipped[n] ^= 1 << draw.randrange(8)
            damaged.append(bytes(flipped))
        for bad in damaged:
            (newest / path.name).write_bytes(bad)
            assert step_found(run_dir) == 1
            err = capsys.readouterr().err
            assert "warning:" in err
            assert str(newest) in err
        (newest / path.name).write_bytes(content)
    assert step_found(run_dir) == 2


def test_a_marker_that_lost_its_content_still_marks(run_dir: Path, write: Write) -> None:
    (write(1) / "COMMITTED").write_bytes(b"")
    assert step_found(run_dir) == 1


def test_all_damaged_is_an_error(run_dir: Path, write: Write) -> None:
    for step in (1, 2):
        (write(step) / state.OPTIMIZER_NAME).unlink()
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        find_checkpoint(run_dir, "auto")


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / state.MANIFEST_NAME).read_text())
    change(manifest)
    (folder / state.MANIFEST_NAME).write_text(json.dumps(manifest))
    (folder / "COMMITTED").write_bytes(b"")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].update({"../outside": {"size": 1, "sha256": ""}}),
        lambda manifest: manifest["files"].update({"/etc/hostname": {"size": 1, "sha256": ""}}),
        lambda manifest: manifest["files"].pop(state.OPTIMIZER_NAME),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(files={"a": 1}),
        lambda manifest: manifest.pop("identity"),
        lambda manifest: manifest["identity"].update(extra=1),
    ],
)
def test_a_manifest_that_lies_is_refused(run_dir: Path, write: Write, change: Callable[[dict[str, Any]], None]) -> None:
    folder = write(1)
    forge(folder, change)
    with pytest.raises(CheckpointError):
        find_checkpoint(run_dir, str(folder))


def test_a_link_in_a_checkpoint_is_refused(run_dir: Path, write: Write, tmp_path: Path) -> None:
    folder = write(1)
    (folder / state.OPTIMIZER_NAME).rename(tmp_path / "elsewhere")
    (folder / state.OPTIMIZER_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        find_checkpoint(run_dir, str(folder))


def test_a_moved_run_is_still_a_run(run_dir: Path, write: Write, tmp_path: Path) -> None:
    write(1)
    shutil.copytree(run_dir, tmp_path / "moved")
    shutil.rmtree(run_dir)
    assert step_found(tmp_path / "moved") == 1


# Whose it is


@pytest.fixture
def found(run_dir: Path, write: Write) -> resume.Found:
    write(3)
    chosen = find_checkpoint(run_dir, "auto")
    assert chosen is not None
    return chosen


def with_config(identity: Identity, section: str, **changes: Any) -> Identity:
    return replace(identity, config=identity.config | {section: identity.config[section] | changes})


def test_the_same_job_is_taken(found: resume.Found, identity: Identity) -> None:
    assert check_identity(found, identity, force=False) == []
    assert changed_versions(found, identity) is None


def test_ranks_may_change_while_the_global_batch_stays(found: resume.Found, identity: Identity) -> None:
    other = with_config(identity, "train", per_device_train_batch_size=2, output_dir="elsewhere")
    assert check_identity(found, replace(other, world_size=1, mode="zero3"), force=False) == []
    assert check_identity(found, replace(identity, world_size=4), force=False) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
def test_a_job_that_says_the_same_keeps_the_global_batch(found: resume.Found, world_size: int) -> None:
    job = JobConfig()
    assert resume.global_batch_of(found, job, world_size) == 2
    assert resume.global_batch_of(None, job, world_size) == world_size
    doubled = JobConfig.model_validate({"train": {"per_device_train_batch_size": 2}})
    assert resume.global_batch_of(found, doubled, world_size) == 2 * world_size


def test_another_global_batch_is_refused_and_how_to_keep_it_said(found: resume.Found, identity: Identity) -> None:
    other = with_config(identity, "train", gradient_accumulation_steps=3)
    with pytest.raises(CheckpointError) as raised:
        check_identity(found, replace(other, world_size=3, global_batch_size=9), force=False)
    said = str(raised.value)
    assert "global batch: 2 packs then (2 ranks), 9 now (3 ranks)" in said
    assert "as they were, any number of ranks keeps the 2" in said
    assert "train.gradient_accumulation_steps: 1 then, 3 now" in said


def test_every_difference_is_named_at_once_and_force_returns_them(found: resume.Found, identity: Identity) -> None:
    other = with_config(with_config(identity, "train", learning_rate=1.0, max_steps=9), "lora", r=2)
    other = replace(other, base={"name": "c", "fingerprint": "g"}, data="rows")
    with pytest.raises(CheckpointError) as raised:
        check_identity(found, other, force=False)
    names = ["base: b then, c now", "data: ", "train.learning_rate: 0.0002 then, 1.0 now", "train.max_steps", "lora.r: 16"]
    for name in names:
        assert name in str(raised.value)
    forced = check_identity(found, other, force=True)
    assert len(forced) == 5
    assert [line.split(":")[0] for line in check_identity(found, replace(identity, plan="x"), force=True)] == ["packing"]


def test_a_job_of_another_version_is_refused_in_words(found: resume.Found, identity: Identity) -> None:
    old = replace(found, identity=replace(found.identity, config={"train": {"gone": 1}}))
    with pytest.raises(CheckpointError, match="another version of qlora"):
        check_identity(old, identity, force=False)


def test_a_checkpoint_that_does_not_state_its_global_batch_had_that_of_its_job_file(found: resume.Found) -> None:
    old = replace(found, identity=replace(found.identity, global_batch_size=0))
    assert resume.global_batch_of(old, JobConfig(), 5) == 2
    assert check_identity(old, found.identity, force=False) == []


def test_a_state_of_another_version_is_no_damage_but_said(run_dir: Path, write: Write) -> None:
    folder = write(3)
    path = folder / state.STATE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    manifest = json.loads((folder / state.MANIFEST_NAME).read_text())
    manifest["files"][state.STATE_NAME] = {
        "size": path.stat().st_size, "sha256": state.sha256_of(path.read_bytes())
    }  # fmt: skip
    (folder / state.MANIFEST_NAME).write_text(json.dumps(manifest))
    (folder / state.COMMITTED).write_text("")
    with pytest.raises(CheckpointError, match="another version of qlora"):
        find_checkpoint(run_dir, str(folder))


def test_other_versions_of_the_stack_are_listed(found: resume.Found, identity: Identity) -> None:
    other = replace(identity, versions={"torch": "3", "new": "1"})
    assert changed_versions(found, other) == "new None -> 1, torch 2 -> 3"


# What it holds


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


RUNTIME: Any = SimpleNamespace(
    world_size=1,
    is_main=True,
    device=torch.device("cpu"),
    from_main=lambda work: work(),
    mode="single",
    move=lambda: None,
)


def toy(r: int = 2) -> tuple[nn.Module, PlainEngine]:
    model = Toy()
    qlora.inject_lora(model, qlora.LoraConfig(r=r))
    return model, engine_of(model)


def engine_of(model: nn.Module) -> PlainEngine:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.1)
    return PlainEngine(model, parameters, optimizer, max_grad_norm=1.0, scale_loss=False, device=RUNTIME.device)


def work(engine: PlainEngine, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        with engine.micro_step(last=True):
            engine.backward((engine.model(x) - x).square().sum())
        engine.step(0.05)


def save(run_dir: Path, identity: Identity, model: nn.Module, engine: PlainEngine, step: int) -> Path:
    return save_state(run_dir, identity, model, engine, TrainerState(step, step, 0, 0))


def save_state(run_dir: Path, identity: Identity, model: nn.Module, engine: PlainEngine, trainer: TrainerState) -> Path:
    saver = Saver(run_dir, model, engine, identity, runtime=RUNTIME, keep_last=9)
    saver.save(trainer)
    saver.wait()
    return run_dir / state.FOLDER / state.folder_name(trainer.step)


def resume_from(run_dir: Path, model: nn.Module) -> PlainEngine:
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    resume.load_parameters(found, model)
    engine = engine_of(model)
    resume.load_optimizer(found, model, engine)
    return engine


def test_a_toy_run_goes_on_to_the_last_bit(run_dir: Path, identity: Identity) -> None:
    whole, engine = toy()
    work(engine, 0, 7)
    first, engine = toy()
    work(engine, 0, 3)
    save(run_dir, identity, first, engine, 3)
    second, _ = toy()
    work(resume_from(run_dir, second), 3, 7)
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_holds_what_was_trained_and_is_an_adapter(run_dir: Path, identity: Identity) -> None:
    model, engine = toy()
    work(engine, 0, 1)
    folder = save(run_dir, identity, model, engine, 1)
    from safetensors.torch import load_file

    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{layer}.lora_{part}.weight" for layer in ("up", "down") for part in "AB"}
    moments = load_file(folder / state.OPTIMIZER_NAME)
    assert set(moments) == {f"{key}/{part}" for key in keys for part in ("exp_avg", "exp_avg_sq")}
    fresh = Toy()
    qlora.load_adapter(fresh, folder)
    x = torch.randn(3, 6)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


def test_another_rank_of_the_update_is_refused_by_names_and_shapes(run_dir: Path, identity: Identity) -> None:
    model, engine = toy()
    work(engine, 0, 1)
    save(run_dir, identity, model, engine, 1)
    other, _ = toy(r=3)
    with pytest.raises(CheckpointError, match=r"4 tensors of the adapter do not fit this job") as raised:
        resume_from(run_dir, other)
    assert "has shape (2, 9), this job trains (3, 9)" in str(raised.value)


def test_missing_and_extra_tensors_are_refused(run_dir: Path, identity: Identity) -> None:
    model, engine = toy()
    work(engine, 0, 1)
    save(run_dir, identity, model, engine, 1)
    fewer = Toy()
    qlora.inject_lora(fewer, qlora.LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(CheckpointError, match=r"down\.lora_A\.weight is not trained here"):
        resume_from(run_dir, fewer)


def test_a_checkpoint_without_optimizer_state_is_refused(run_dir: Path, identity: Identity) -> None:
    model, engine = toy()
    save(run_dir, identity, model, engine, 1)  # before the first step there is none
    with pytest.raises(CheckpointError, match="have no optimizer state"):
        resume_from(run_dir, toy()[0])


def test_trainer_state_is_plain_numbers(found: resume.Found) -> None:
    assert asdict(found.trainer) == {
        "step": 3,
        "global_index": 12,
        "num_tokens": 300,
        "num_target_tokens": 30,
        "num_skipped": 0,
        "loss_scale": None,
    }


@pytest.mark.parametrize("skipped", [(1,), (0,), (0, 1)])
def test_a_run_with_skipped_steps_goes_on_to_the_last_bit(
    run_dir: Path, identity: Identity, skipped: tuple[int, ...]
) -> None:
    """The optimizer has seen fewer steps than the run has done, which Adam's correction of its moments depends on."""

    def work_and_skip(engine: PlainEngine, first: int, last: int) -> None:
        for step in range(first, last):
            if step in skipped:
                engine.backward(engine.model(torch.ones(4, 6)).sum() * math.nan)
                assert not engine.step(0.05).isfinite()
            else:
                work(engine, step, step + 1)

    whole, engine = toy()
    work_and_skip(engine, 0, 5)
    first, engine = toy()
    work_and_skip(engine, 0, 2)
    trainer = TrainerState(2, 2, 0, 0, num_skipped=len(skipped))
    save_state(run_dir, identity, first, engine, trainer)
    second, _ = toy()
    work_and_skip(resume_from(run_dir, second), 2, 5)
    for (name, a), (_, b) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
