"""How a run ends: what status.json says of it, and the adapter that it leaves."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qlora.adapter.files import adapter_parameters, render_files
from qlora.checkpoint import state
from qlora.distributed.collectives import whole_parameters
from qlora.distributed.runtime import Runtime
from qlora.errors import EXIT_BUG, EXIT_DONE, EXIT_STOPPED, CheckpointError, QloraError, RankError
from qlora.files import write_file
from qlora.train.preempt import StopFlag
from qlora.train.run_dir import RunDir


def reason_of(stop: StopFlag) -> str:
    """Why the run was stopped, in words."""
    return stop.look_now() or "another rank was asked to stop"


def record_early_stop(run_dir: RunDir | None, stop: StopFlag) -> None:
    """Say that the job was stopped before it had done a step. For any rank; does nothing but on the main one."""
    if run_dir is None:
        return
    step = last_saved_step(run_dir.path)
    print(f"stopped on request ({reason_of(stop)}) before the first step; start the job again", flush=True)
    run_dir.write_status(
        "stopped",
        step or 0,
        exit_code=EXIT_STOPPED,
        reason=f"{reason_of(stop)}, before the first step of this start",
        resumable=step is not None,
    )


def record_failure(run_dir: RunDir | None, error: BaseException) -> None:
    """Say how it failed; a job refused before its first step leaves nothing behind. As `record_early_stop`."""
    if run_dir is None:
        return
    if isinstance(error, QloraError) and not isinstance(error, RankError) and run_dir.discard():
        return
    step = last_saved_step(run_dir.path)
    run_dir.write_status(
        "failed",
        step or 0,
        exit_code=error.exit_code if isinstance(error, QloraError) else EXIT_BUG,
        reason=f"{type(error).__name__}: {error}",
        resumable=step is not None,
    )


def record_end(run_dir: RunDir | None, outcome: str, num_steps: int, stop: StopFlag, resume: str) -> None:
    """Say that training is done, or was stopped and saved. As `record_early_stop`.

    Args:
        resume: the job's `checkpoint.resume`.
    """
    if run_dir is None:
        return
    if outcome == "done":
        run_dir.write_status("done", num_steps, num_steps=num_steps, exit_code=EXIT_DONE)
        return
    step = last_saved_step(run_dir.path) or 0
    how = "" if resume == "auto" else " with checkpoint.resume=auto"
    print(f"stopped on request ({reason_of(stop)}) after step {step}, saved; start the job again{how} to go on", flush=True)
    run_dir.write_status(
        "stopped", step, num_steps=num_steps, exit_code=EXIT_STOPPED, reason=reason_of(stop), resumable=True
    )


def last_saved_step(run_dir: Path) -> int | None:
    """The step of the run's newest committed checkpoint; None where there is none."""
    done = state.committed(run_dir)
    return state.step_of(done[-1]) if done else None


def write_adapter(runtime: Runtime, model: nn.Module, folder: Path, card: str) -> None:
    """Gather the final adapter and write it beside its card. Collective. Raises CheckpointError on every rank."""
    values = whole_parameters(adapter_parameters(model), keep=runtime.is_main)

    def write() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in {**render_files(model, values), "README.md": card.encode()}.items():
                write_file(folder / name, content)
        except OSError as error:
            raise CheckpointError(
                f"the adapter cannot be written ({error.strerror})",
                place=str(folder),
                next_step="make room and start the job again: it goes on from its last checkpoint",
            ) from error
        print(f"adapter: {folder}", flush=True)

    runtime.from_main(write)
