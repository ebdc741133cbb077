"""Putting a run together. The only assembler: everything else gets what it needs handed to it.

The order matters. The run directory is locked first of all, so that a job can be stopped from its first second. What can
be known without a model is checked, and data is tokenized, before the ranks meet (so that no collective waits for it);
what a checkpoint holds is put into the model before DeepSpeed copies it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qlora.checkpoint import resume, state
from qlora.checkpoint.save import set_aside_after
from qlora.checkpoint.saver import Saver
from qlora.checkpoint.state import Identity, TrainerState
from qlora.config.load import dump_config
from qlora.config.rules import global_batch_rows
from qlora.config.schema import JobConfig
from qlora.data.loader import EvalLoader, TrainLoader, plan_packs
from qlora.data.sampler import Position
from qlora.distributed import runtime as processes
from qlora.distributed.engine import Engine
from qlora.distributed.runtime import Runtime
from qlora.errors import EXIT_DONE, EXIT_STOPPED, QloraError, StopRequested
from qlora.objective.evaluate import evaluate
from qlora.quant.source import BaseSource
from qlora.train.announce import announce
from qlora.train.build import build_model, check_device, peak_memory_bytes, prepare_engine, split_of
from qlora.train.dry_run import dry_run as do_dry_run
from qlora.train.ending import record_early_stop, record_end, record_failure, write_adapter
from qlora.train.first_inputs import start_from_data
from qlora.train.hooks import CheckpointHook, EvaluateHook, Hook, MetricsHook, ProgressHook, StatusHook
from qlora.train.inputs import Data, open_inputs
from qlora.train.loop import Job, train
from qlora.train.model_card import model_card
from qlora.train.nonfinite import NonFiniteHook
from qlora.train.preempt import StopFlag, stop_here, until_stopped
from qlora.train.run_dir import MetricsWriter, RunDir, start_trackers
from qlora.train.step import Counters, StepResult


def run_training(config: JobConfig, *, dry_run: bool = False, force: bool = False) -> int:
    """Run a job to its end on every rank. Collective. Returns the exit code.

    Raises:
        QloraError: whatever the user can mend; nothing that was saved is lost by it.
    """
    stop = StopFlag().listen(at_once=True)
    run_dir: RunDir | None = None
    try:
        run_dir, owned = _own_run_dir(config, stop) if _is_main() and not dry_run else (None, lambda: None)
        opened = open_inputs(config)
        stop.meet()
        runtime = processes.start(
            per_device_batch_size=config.train.per_device_train_batch_size,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            max_grad_norm=config.train.max_grad_norm,
            optimizer=config.train.optimizer,
            trackers=config.logging.trackers,
            logging_dir=config.train.output_dir,
        )
        stop.have_met()
        runtime.stop_requested = stop.requested
        try:
            source, data = runtime.together(opened)
            check_device(config, runtime)
            if dry_run:
                return do_dry_run(config, runtime, force=force)
            runtime.together(owned)
            try:
                outcome = _train(config, runtime, run_dir, source, data, stop, force=force)
            except StopRequested:
                raise
            except BaseException as error:
                record_failure(run_dir, error)
                raise
        except StopRequested:
            outcome = "stopped"
            record_early_stop(run_dir, stop)
            runtime.barrier()  # as at the end of training: none leaves before the main rank has written
        finally:
            runtime.end()
        return EXIT_STOPPED if outcome == "stopped" else EXIT_DONE
    except StopRequested:
        # Before the ranks have met. The launcher sees this one end, and asks the others.
        record_early_stop(run_dir, stop)
        return EXIT_STOPPED
    except QloraError:
        if run_dir is not None:
            run_dir.discard()
        raise
    finally:
        # Not before: where a rank fails, the launcher's signal to the others must not cut the record short.
        stop.release()
        if run_dir is not None:
            run_dir.close()


def _is_main() -> bool:
    """Whether this will be the main rank, as far as the launcher has said so by now. Every launcher of ours does."""
    return int(os.environ.get("RANK", "0")) == 0


def _own_run_dir(config: JobConfig, stop: StopFlag) -> tuple[RunDir | None, Callable[[], None]]:
    """Lock the run directory, and look for a stop file there from now on. Main rank only, before the ranks meet.

    Returns:
        the run directory, and what raises the QloraError that came up, when the other ranks can be told.
    """
    try:
        run_dir = RunDir(Path(config.train.output_dir))
    except QloraError as error:
        refusal = error

        def refuse() -> None:
            raise refusal

        return None, refuse
    stop.watch(run_dir.stop_asked)
    stop.on_end = run_dir.write_end_at_once
    return run_dir, lambda: None


def _train(
    config: JobConfig,
    runtime: Runtime,
    run_dir: RunDir | None,
    source: BaseSource,
    data: Data,
    stop: StopFlag,
    *,
    force: bool,
) -> str:
    """Everything between the locked run directory and the final adapter. Collective."""
    folder = Path(config.train.output_dir)
    plan = plan_packs(data.rows, config.data, config.train.seed)
    identity = Identity(
        base=source.record(),
        data=data.rows.fingerprint,
        plan=plan.hash,
        config=config.model_dump(mode="json"),
        world_size=runtime.world_size,
        mode=runtime.mode,
        versions=state.stack_versions(),
        global_batch_size=global_batch_rows(config, runtime.world_size),
    )
    runtime.refuse_differences(
        {
            "base": str(identity.base.get("fingerprint")),
            "data": identity.data,
            "packing plan": identity.plan,
            "job": dump_config(config),
        }
    )
    # Before the base is read, which may take minutes.
    found = runtime.from_main(lambda: _find_checkpoint(config, folder, identity, force))
    split = split_of(config, runtime, resume.global_batch_of(found, config, runtime.world_size))
    identity = replace(identity, global_batch_size=split.global_batch_size)
    runtime.share_out(split.per_device_batch_size, split.accumulation_steps)
    loader = TrainLoader(
        data.rows, plan, split=split, rank=runtime.rank, seed=config.train.seed, pad_token_id=data.pad_token_id
    )
    resumed = found.folder if found is not None else None
    model, train_model, report = build_model(config, runtime, force=force, resumed=resumed)
    stop_here(runtime)
    if config.lora.init_lora_weights == "eva" and found is None:
        start_from_data(config, runtime, train_model, data.rows, plan, data.pad_token_id, split.global_batch_size)
    if found is not None:
        resume.load_parameters(found, model)
    engine = prepare_engine(config, runtime, train_model)
    stop_here(runtime)
    if found is not None:
        resume.load_optimizer(found, model, engine)
    trainer = found.trainer if found is not None else TrainerState(0, 0, 0, 0)
    num_steps = config.train.max_steps or loader.schedule.num_steps(config.train.num_train_epochs)
    if runtime.is_main:
        announce(config, runtime, model.qlora_base, report, data.rows, len(plan), num_steps, split, found)

    def write_start(run_dir: RunDir) -> None:
        for aside in set_aside_after(folder, trainer.step):
            print(f"warning: the run does not go on from this checkpoint, which is now {aside}", file=sys.stderr, flush=True)
        run_dir.write_config(dump_config(config, state.stack_versions()))
        run_dir.write_status("running", trainer.step, num_steps=num_steps, num_skipped=trainer.num_skipped)

    runtime.from_main(lambda: write_start(run_dir) if run_dir is not None else None)
    # Under --force the global batch may be another one: steps go on counting, and the data starts where they stand.
    position = loader.schedule.position_of_step(trainer.step) if force else Position(trainer.global_index)
    nonfinite = NonFiniteHook(
        folder,
        runtime,
        loader,
        most_in_a_row=config.train.max_nonfinite_steps,
        position=position,
        num_micro_steps=split.accumulation_steps,
        skips_overflow=engine.skips_overflow,
        decode=data.tokenizer.decode,
    )
    with Saver(folder, model, engine, identity, runtime=runtime, keep_last=config.checkpoint.keep_last) as saver:
        if runtime.is_main:
            stop.watch(saver.failure)
        job = Job(
            config=config,
            runtime=runtime,
            engine=engine,
            loader=loader,
            hooks=_hooks(config, runtime, run_dir, engine, data, saver, nonfinite),
            num_steps=num_steps,
            position=position,
            counters=Counters(trainer.num_tokens, trainer.num_target_tokens, trainer.num_skipped),
            stop=stop,
        )
        outcome = train(job)
    if runtime.is_main and config.logging.trackers:
        runtime.accelerator.end_training()
    if outcome == "done":
        write_adapter(runtime, model, folder / "adapter", model_card(config, identity, report, num_steps))
    record_end(run_dir, outcome, num_steps, stop)
    # A launcher that sees one rank end with another code than 0 ends the others at once: none may leave before the
    # main rank has written everything.
    runtime.barrier()
    return outcome


def _find_checkpoint(config: JobConfig, folder: Path, identity: Identity, force: bool) -> resume.Found | None:
    """The checkpoint to go on from, checked against this job. Main rank only."""
    found = resume.find_checkpoint(folder, config.checkpoint.resume)
    if found is not None:
        job = replace(identity, global_batch_size=resume.global_batch_of(found, config, identity.world_size))
        for line in resume.check_identity(found, job, force=force):
            print(f"warning: --force: {line}; the run no longer continues exactly", file=sys.stderr, flush=True)
        if changed := resume.changed_versions(found, job):
            print(f"warning: {changed}: the run may not continue to the last bit", file=sys.stderr, flush=True)
    return found


def _state_of(result: StepResult, engine: Engine) -> TrainerState:
    """What a checkpoint says of where training stands after a step."""
    return TrainerState(
        result.step,
        result.position.global_index,
        result.num_tokens,
        result.num_target_tokens,
        result.num_skipped,
        engine.loss_scale(),
    )


def _hooks(
    config: JobConfig,
    runtime: Runtime,
    run_dir: RunDir | None,
    engine: Engine,
    data: Data,
    saver: Saver,
    nonfinite: NonFiniteHook,
) -> list[Hook]:
    """What runs beside training on this rank."""
    hooks: list[Hook] = []
    writer = None
    every = config.logging.log_every_steps
    if run_dir is not None:
        if config.logging.trackers:
            start_trackers(runtime.accelerator, config)
        writer = MetricsWriter(run_dir.path / "metrics.jsonl", runtime.accelerator)
        hooks += [
            ProgressHook(every, lambda: peak_memory_bytes(runtime.device)),
            MetricsHook(writer, every, lambda: peak_memory_bytes(runtime.device)),
            StatusHook(lambda result: run_dir.write_status("running", result.step, num_skipped=result.num_skipped)),
        ]
    # What is not to be saved is found before it is.
    hooks.append(nonfinite)
    # Before the evaluation, which may be long: a step that was trained is not lost to it.
    hooks.append(
        CheckpointHook(config.checkpoint.every_steps, lambda result: saver.save(_state_of(result, engine)), saver.wait)
    )
    if data.eval_rows is not None:
        loader = EvalLoader(
            data.eval_rows,
            plan_packs(data.eval_rows, config.data, seed=0),
            per_device_batch_size=config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            pad_token_id=data.pad_token_id,
        )
        hooks.append(
            EvaluateHook(
                config.eval.every_steps,
                lambda: evaluate(engine.model, until_stopped(loader, runtime), runtime.device, runtime),
                writer,
            )
        )
    return hooks
