"""Memory that runs out in a step: the run ends with numbers and cures, and what was saved is a run that goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.cli.main import main
from qlora.config.schema import JobConfig
from qlora.train import out_of_memory
from qlora.train.out_of_memory import OutOfMemory, cures, explained, what_was_asked
from tests.faults.children import EVERY_TWO, Ended, Jobs, two_ranks, wait_for_checkpoint

ACC2 = ("train.gradient_accumulation_steps=2", "train.max_steps=6", *EVERY_TWO)
OF_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2 GiB is free."
)


def ask_for_too_much() -> None:
    """A petabyte, which a CPU's allocator refuses."""
    torch.empty(1 << 50)


def raise_as_a_gpu() -> None:
    raise torch.OutOfMemoryError(OF_A_GPU)


def in_micro_step(step: int, micro_step: int, do: Callable[[], object], *, backward: bool) -> None:
    """Do something in a forward or backward pass of this process; steps counted from 1, of two micro-steps each."""
    from qlora.objective.train_model import TrainModel

    forward, calls = TrainModel.forward, iter(range(1_000_000))

    def forward_and_do(self: Any, batch: Any) -> Any:
        loss_sum, num_targets = forward(self, batch)
        if loss_sum.requires_grad and divmod(next(calls), 2) == (step - 1, micro_step):
            if backward:
                loss_sum.register_hook(lambda gradient: do())
            else:
                do()
        return loss_sum, num_targets

    TrainModel.forward = forward_and_do  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def accumulated(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The job that meets no fault."""
    ended = jobs.train(tmp_path_factory.mktemp("accumulated") / "run", *ACC2)
    assert ended.code == 0, ended.log
    return ended


@pytest.mark.parametrize(
    ("do", "backward", "asked"),
    [
        (ask_for_too_much, False, "can't allocate memory: you tried to allocate 4503599627370496 bytes"),
        (raise_as_a_gpu, True, "tried to allocate 2.50 GiB"),
    ],
)
def test_no_half_step_is_saved_and_the_run_goes_on(
    jobs: Jobs, accumulated: Ended, tmp_path: Path, do: Callable[[], object], backward: bool, asked: str
) -> None:
    """One micro-step's gradients are there when memory runs out in the next."""
    run_dir = tmp_path / "run"
    ended = jobs.train(run_dir, *ACC2, fault=lambda: in_micro_step(5, 1, do, backward=backward))
    ended.is_one_error(
        "rank 0 of 1, cpu: out of memory in step 5", asked, "1 row of at most 128 tokens a micro-step", "zero3.yaml"
    )
    status = ended.status
    assert (status["state"], status["step"], status["exit_code"], status["resumable"]) == ("failed", 4, 2, True)
    assert "out of memory in step 5" in status["reason"]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert len(ended.losses) == 4
    resumed = jobs.train(run_dir, *ACC2)
    assert resumed.code == 0, resumed.log
    assert resumed.losses == accumulated.losses
    assert resumed.adapter == accumulated.adapter


def test_on_one_rank_of_two_it_is_the_reason_on_both(jobs: Jobs, tmp_path: Path) -> None:
    """The numbers and the cures are in that rank's own words; the other does not wait for it."""
    run_dir = tmp_path / "run"

    def work(rank: int) -> int:
        if rank == 1:
            in_micro_step(5, 1, lambda: (wait_for_checkpoint(run_dir, 4), ask_for_too_much()), backward=False)
        return main(jobs.argv(run_dir, *ACC2))

    other, own = two_ranks(work, tmp_path / "log")
    assert (other.code, own.code) == (1, 2), other.log + own.log
    for part in ("error (rank 1): rank 1 of 2, cpu: out of memory in step 5", "tried to allocate", "next: nothing that was"):
        assert part in own.log
    assert re.search(r"error: rank 1 \(host \S+, pid \d+\) failed: OutOfMemory: .*out of memory in step 5", other.log)
    assert "Traceback" not in own.log + other.log
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["resumable"]) == ("failed", 4, True)
    assert re.match(r"RankError: rank 1 \(.*\) failed: OutOfMemory: .*out of memory in step 5", status["reason"])
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_dry_run_says_that_it_does_not_fit(jobs: Jobs, tmp_path: Path) -> None:
    more = ("train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=4", "--dry-run")
    ended = jobs.train(tmp_path / "run", *more, fault=lambda: in_micro_step(1, 1, ask_for_too_much, backward=False))
    ended.is_one_error("out of memory in the step of the dry run", "train.per_device_train_batch_size: 2 with")
    assert not (tmp_path / "run").exists()


def test_it_may_run_out_beside_training_too(jobs: Jobs, tmp_path: Path) -> None:
    def fault() -> None:
        from qlora.train import hooks

        hooks.EvaluateHook.after_step = lambda *_, **__: ask_for_too_much()  # type: ignore[method-assign]

    more = (f"data.eval=[{jobs.project.eval}]", "eval.every_steps=3")
    ended = jobs.train(tmp_path / "run", *more, *EVERY_TWO, fault=fault)
    ended.is_one_error("out of memory after step 1")


# What is said


def runtime(kind: str, *, sharded: bool = False) -> Any:
    return SimpleNamespace(rank=3, world_size=4, device=torch.device(kind, 0), is_sharded=sharded)


def job(**train: Any) -> JobConfig:
    return JobConfig.model_validate({"train": train, "data": {"max_length": 2048}})


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int, allocated: int, reserved: int) -> None:
    """As torch would answer of an 80 GiB card, in GiB. There is none here."""
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (allocated + 1) * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * gib)


def test_the_numbers_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, free=1, allocated=66, reserved=79)
    with (
        pytest.raises(OutOfMemory) as raised,
        explained(job(per_device_train_batch_size=4), runtime("cuda"), "in step 9"),
    ):
        raise_as_a_gpu()
    error = raised.value
    assert error.exit_code == 2
    assert error.place == "rank 3 of 4, cuda:0"
    for part in ("tried to allocate 2.50 GiB", "66.00 GiB allocated (at most 67.00)", "13.00 GiB kept", "1.00 of 80.00 GiB"):
        assert part in str(error.found)
    assert "4 rows of at most 2048 tokens" in str(error.found)


def test_cures_come_in_the_order_of_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, free=1, allocated=66, reserved=79)
    found = cures(job(per_device_train_batch_size=6, gradient_checkpointing=False), runtime("cuda"), 24)
    begins = [
        "set PYTORCH_CUDA_ALLOC_CONF",
        "train.per_device_train_batch_size: 3",
        "train.gradient_ch",
        "launch with",
        "data.",
    ]
    assert [cure for cure, begin in zip(found, begins, strict=True) if not cure.startswith(begin)] == []
    assert "train.gradient_accumulation_steps: 2" in found[1]
    # What does not apply is not said.
    on_a_gpu(monkeypatch, free=1, allocated=79, reserved=79)
    found = cures(job(gradient_checkpointing=True), runtime("cuda", sharded=True), 4)
    assert [cure.split()[0] for cure in found] == ["train.offload_activations:", "launch", "data.max_length"]
    assert "zero3_offload.yaml" in found[1]
    found = cures(job(gradient_checkpointing=True, offload_activations=True), runtime("cuda", sharded=True), 4)
    assert [cure.split()[0] for cure in found] == ["launch", "data.max_length"]


@pytest.mark.parametrize(("rows", "global_batch"), [(2, 8), (3, 12), (4, 80), (5, 100), (7, 28), (9, 72), (12, 240), (6, 8)])
def test_the_smaller_batch_is_the_same_batch(rows: int, global_batch: int) -> None:
    """Also where the run has kept the batch of a launch with another number of ranks."""
    train = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 5}
    words = cures(job(**train), runtime("cpu"), global_batch)[0].split()
    fewer, steps = int(words[1]), int(words[4].rstrip(","))
    assert fewer <= rows / 2
    assert fewer * steps * 4 == global_batch


def test_a_batch_that_no_smaller_one_makes_is_not_advised() -> None:
    assert "batch" not in " ".join(cures(job(per_device_train_batch_size=2), runtime("cpu"), 7))


def test_other_errors_are_left_alone() -> None:
    for error in (RuntimeError("Connection closed by peer"), RuntimeError("CUDA error: an illegal memory access")):
        assert what_was_asked(error) is None
        with pytest.raises(RuntimeError) as raised, explained(job(), runtime("cpu"), "in step 1"):
            raise error
        assert raised.value is error
    assert what_was_asked(MemoryError()) == "no memory"
    assert out_of_memory.memory_facts(torch.device("cpu")) == []
