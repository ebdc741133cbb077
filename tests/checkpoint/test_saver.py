"""Saving beside the training: what is written is what was, errors come where ranks meet, nothing is left half done."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlora
from qlora.checkpoint import resume, saver, state
from qlora.checkpoint.resume import find_checkpoint
from qlora.checkpoint.saver import Saver
from qlora.checkpoint.state import Identity, TrainerState
from qlora.distributed.engine import PlainEngine
from qlora.errors import CheckpointError

RUNTIME: Any = SimpleNamespace(world_size=1, is_main=True, from_main=lambda work: work(), move=lambda: None)


class Job:
    """A few layers, their engine, and steps that always learn something."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, scale_loss: bool = False, width: int = 6) -> None:
        torch.manual_seed(0)
        self.width = width
        self.model = nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, width))
        qlora.inject_lora(self.model, qlora.LoraConfig(r=2, target_modules=["0", "2"]))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.scale_loss = scale_loss
        self.engine = self.new_engine()

    def new_engine(self) -> PlainEngine:
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.1)
        device = torch.device("cpu")
        return PlainEngine(self.model, parameters, optimizer, 1.0, self.scale_loss, device)

    def work(self, first: int, last: int, *, overflow_at: int | None = None) -> None:
        for step in range(first, last):
            x = torch.randn(4, self.width, generator=torch.Generator().manual_seed(step))
            loss = (self.engine.model(x) - x).square().sum()
            self.engine.backward(loss * (1e38 if step == overflow_at else 1.0))
            self.engine.step(1e-3)

    def saver(self, run_dir: Path, identity: Identity) -> Saver:
        return Saver(run_dir, self.model, self.engine, identity, runtime=RUNTIME, keep_last=9)

    def resume(self, run_dir: Path) -> Job:
        found = find_checkpoint(run_dir, "auto")
        assert found is not None
        resume.load_parameters(found, self.model)
        self.engine = self.new_engine()
        resume.load_optimizer(found, self.model, self.engine)
        return self

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.engine.parameters.items()}

    def trainer(self, step: int) -> TrainerState:
        return TrainerState(step, step, 0, 0, 0, self.engine.loss_scale())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this is set."""
    event, write = threading.Event(), saver.write_checkpoint

    def wait_and_write(*arguments: Any) -> None:
        assert event.wait(20)
        write(*arguments)

    monkeypatch.setattr(saver, "write_checkpoint", wait_and_write)
    return event


def test_training_goes_on_while_it_is_written_and_what_is_written_is_what_was(
    run_dir: Path, identity: Identity, held: threading.Event
) -> None:
    job = Job()
    job.work(0, 2)
    before = job.values()
    own = job.saver(run_dir, identity)
    own.save(job.trainer(2))
    job.work(2, 5)
    assert not list(run_dir.rglob("*.safetensors"))
    held.set()
    own.wait()
    found = find_checkpoint(run_dir, "auto")
    assert found is not None
    assert found.trainer.step == 2
    again = Job().resume(run_dir)
    for name, value in again.values().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, job.values()[name])


def test_the_next_save_waits_for_the_one_before(run_dir: Path, identity: Identity, held: threading.Event) -> None:
    job = Job()
    job.work(0, 1)
    own = job.saver(run_dir, identity)
    own.save(job.trainer(1))
    threading.Timer(0.2, held.set).start()
    own.save(job.trainer(2))
    assert [state.step_of(folder) for folder in state.committed(run_dir)][:1] == [1]
    own.wait()
    assert [state.step_of(folder) for folder in state.committed(run_dir)] == [1, 2]


def test_an_error_is_seen_at_once_and_raised_where_ranks_meet(
    run_dir: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = Job()
    job.work(0, 1)
    own = job.saver(run_dir, identity)
    own.save(job.trainer(1))
    own.wait()
    assert own.failure() is None
    monkeypatch.setattr("qlora.checkpoint.save._commit", full)
    own.save(job.trainer(2))
    own._writer.join()  # type: ignore[union-attr]
    assert own.failure() == "a checkpoint cannot be written"
    with pytest.raises(CheckpointError, match="No space left on device") as raised:
        own.wait()
    assert "step-00000002" in str(raised.value)
    assert "bytes to write" in str(raised.value)
    assert own.failure() is None
    assert [state.step_of(folder) for folder in state.committed(run_dir)] == [1]


@pytest.mark.parametrize("error", [None, ValueError])
def test_leaving_finishes_what_is_being_written(
    run_dir: Path, identity: Identity, held: threading.Event, error: type[Exception] | None
) -> None:
    job = Job()
    job.work(0, 1)

    def leave() -> None:
        with job.saver(run_dir, identity) as own:
            own.save(job.trainer(1))
            threading.Timer(0.2, held.set).start()
            if error is not None:
                raise error

    if error is None:
        leave()
    else:
        with pytest.raises(error):
            leave()
    assert [state.step_of(folder) for folder in state.committed(run_dir)] == [1]


def test_bfloat16_adapters_go_on_from_their_fp32_copies_to_the_last_bit(run_dir: Path, identity: Identity) -> None:
    whole = Job(torch.bfloat16)
    whole.work(0, 9)
    first = Job(torch.bfloat16)
    first.work(0, 4)
    saved(first, run_dir, identity, 4)
    stored = load_file(run_dir / "checkpoints/step-00000004/optimizer.safetensors")
    masters = {key: value for key, value in stored.items() if key.endswith("/master")}
    assert len(masters) == 4
    assert all(value.dtype == torch.float32 for value in stored.values())
    # What rounding takes away is in them: steps of 1e-3 are lost on weights of bf16.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())
    second = Job(torch.bfloat16).resume(run_dir)
    second.work(4, 9)
    for name, value in whole.values().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, second.values()[name])


def test_bfloat16_adapters_learn_what_fp32_ones_learn() -> None:
    """Without fp32 copies most of a hundred small steps would be rounded away."""
    exact, rounded = Job(), Job(torch.bfloat16)
    start = exact.values()
    exact.work(0, 100)
    rounded.work(0, 100)
    for name, value in exact.values().items():
        moved = (value - start[name]).norm()
        assert (rounded.values()[name].float() - value).norm() < 0.1 * moved


def test_the_loss_scale_of_fp16_goes_on(run_dir: Path, identity: Identity) -> None:
    """An overflow halves it; a resumed run must not start from the first scale again."""
    whole = Job(scale_loss=True)
    whole.work(0, 8, overflow_at=2)
    first = Job(scale_loss=True)
    start = first.engine.loss_scale()
    first.work(0, 4, overflow_at=2)
    scale = first.engine.loss_scale()
    assert start is not None
    assert scale is not None
    assert scale["scale"] == start["scale"] / 2
    saved(first, run_dir, identity, 4, num_skipped=1)
    second = Job(scale_loss=True).resume(run_dir)
    assert second.engine.loss_scale() == scale
    second.work(4, 8)
    assert second.engine.loss_scale() == whole.engine.loss_scale()
    for name, value in whole.values().items():
        assert torch.equal(value, second.values()[name])


@pytest.mark.parametrize(("dtype", "per_parameter"), [(torch.float32, 12), (torch.bfloat16, 14)])
def test_a_checkpoint_is_as_large_as_what_trains(
    run_dir: Path, identity: Identity, dtype: torch.dtype, per_parameter: int
) -> None:
    """At most 16 bytes a trainable parameter and a megabyte, nothing of the base."""
    job = Job(dtype, width=100_000)
    job.work(0, 1)
    folder = saved(job, run_dir, identity, 1)
    trained = sum(parameter.numel() for parameter in job.engine.parameters.values())
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert per_parameter * trained < size < per_parameter * trained + 100_000
    assert size < 16 * trained + 1_000_000
    assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ""}  # no pickle


def saved(job: Job, run_dir: Path, identity: Identity, step: int, **fields: Any) -> Path:
    own = job.saver(run_dir, identity)
    trainer = TrainerState(step, step, 0, 0, loss_scale=job.engine.loss_scale(), **fields)
    own.save(trainer)
    own.wait()
    return run_dir / state.FOLDER / state.folder_name(step)
