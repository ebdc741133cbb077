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

from qlora.checkpoint import resume, room, state
from qlora.checkpoint.choose import choose_checkpoint
from qlora.checkpoint.save import set_aside_after, tidy
from qlora.checkpoint.saver import Saver
from qlora.checkpoint.state import Identity, TrainerState
from qlora.config.load import dump_config
from qlora.config.rules import global_batch_rows
from qlora.config.schema import JobConfig
from qlora.data.loader import TrainLoader, plan_packs
from qlora.data.sampler import Position
from qlora.distributed import runtime as processes
from qlora.distributed.peers import Peers
from qlora.distributed.runtime import Runtime
from qlora.errors import EXIT_DONE, EXIT_STOPPED, QloraError, StopRequested
from qlora.quant.source import BaseSource
from qlora.train.announce import announce
from qlora.train.beside import hooks_of
from qlora.train.build import build_model, check_device, prepare_engine, split_of
from qlora.train.dry_run import dry_run as do_dry_run
from qlora.train.ending import record_early_stop, record_end, record_failure, write_adapter
from qlora.train.first_inputs import start_from_data
from qlora.train.inputs import Data, open_inputs
from qlora.train.loop import Job, train
from qlora.train.lost_ranks import collective_timeout, watched
from qlora.train.model_card import model_card
from qlora.train.nonfinite import NonFiniteHook
from qlora.train.preempt import StopFlag, stop_here
from qlora.train.run_dir import RunDir
from qlora.train.step import Counters


def run_training(config: JobConfig, *, dry_run: bool = False, force: bool = False) -> int:
    """Run a job to its end on every rank. Collective. Returns the exit code.

    Raises:
        QloraError: whatever the user can mend; nothing that was saved is lost by it.
        RankError: another rank is lost.
    """
    stop = StopFlag().listen(at_once=True)
    with watched(config, stop) as peers:
        return _run(config, stop, peers, dry_run=dry_run, force=force)


def _run(config: JobConfig, stop: StopFlag, peers: Peers, *, dry_run: bool, force: bool) -> int:
    """Everything that the other ranks watch."""
    run_dir: RunDir | None = None
    try:
        run_dir, owned = _own_run_dir(config, stop) if _is_main() and not dry_run else (None, lambda: None)
        peers.tell("opening the base and tokenizing")
        opened = open_inputs(config)
        peers.meet()
        stop.meet()
        runtime = processes.start(
            per_device_batch_size=config.train.per_device_train_batch_size,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            max_grad_norm=config.train.max_grad_norm,
            optimizer=config.train.optimizer,
            trackers=config.logging.trackers,
            logging_dir=config.train.output_dir,
            timeout=collective_timeout(config),
        )
        stop.have_met()
        runtime.stop_requested, runtime.tick, runtime.move = stop.requested, peers.tick, peers.move
        runtime.tick("comparing what the ranks hold")
        try:
            source, data = runtime.together(opened)
            check_device(config, runtime)
            if dry_run:
                return do_dry_run(config, runtime, force=force)
            runtime.together(owned)
            try:
                with peers.explaining():
                    outcome = _train(config, runtime, run_dir, source, data, stop, peers, force=force)
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
    except Exception as error:
        record_failure(run_dir, error)
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
    peers: Peers,
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
    found = choose_checkpoint(runtime, folder, config, identity, force=force)
    split = split_of(config, runtime, resume.global_batch_of(found, config, runtime.world_size))
    identity = replace(identity, global_batch_size=split.global_batch_size)
    runtime.share_out(split.per_device_batch_size, split.accumulation_steps)
    loader = TrainLoader(
        data.rows, plan, split=split, rank=runtime.rank, seed=config.train.seed, pad_token_id=data.pad_token_id
    )
    resumed = found.folder if found is not None else None
    runtime.tick("loading the base")
    model, train_model, report = build_model(config, runtime, force=force, resumed=resumed, tokenizer=data.tokenizer)
    stop_here(runtime)
    if found is None:  # otherwise it was asked before the base was loaded
        runtime.from_main(lambda: room.check_disk(folder, room.checkpoint_bytes(model), force=force))
    if config.lora.init_lora_weights == "eva" and found is None:
        start_from_data(config, runtime, train_model, data.rows, plan, data.pad_token_id, split.global_batch_size)
    if found is not None:
        resume.load_parameters(found, model)
    runtime.tick("preparing the model")
    engine = prepare_engine(config, runtime, train_model)
    stop_here(runtime)
    if found is not None:
        resume.load_optimizer(found, model, engine)
    trainer = found.trainer if found is not None else TrainerState(0, 0, 0, 0)
    num_steps = config.train.max_steps or loader.schedule.num_steps(config.train.num_train_epochs)
    if runtime.is_main:
        announce(
            config, runtime, model.qlora_base, report, data.rows, len(plan), num_steps, split, found, model.qlora_recomputed
        )

    def write_start(run_dir: RunDir) -> None:
        # Those of another line than the one that is gone on with are none of this run's.
        is_own = found is None or found.folder.resolve().parent == (folder / state.FOLDER).resolve()
        for aside in set_aside_after(folder, trainer.step if is_own else -1):
            print(f"warning: the run does not go on from this checkpoint, which is now {aside}", file=sys.stderr, flush=True)
        tidy(folder, config.checkpoint.keep_last)
        run_dir.write_config(dump_config(config, identity.versions))
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
    saver = Saver(folder, model, engine, identity, runtime=runtime, keep_last=config.checkpoint.keep_last)
    # Whatever goes wrong is told the others before this rank waits for a save.
    with saver, peers.explaining():
        if runtime.is_main:
            stop.watch(saver.failure)
        job = Job(
            config=config,
            runtime=runtime,
            engine=engine,
            loader=loader,
            hooks=hooks_of(config, runtime, run_dir, engine, data, saver, nonfinite, peers),
            num_steps=num_steps,
            position=position,
            counters=Counters(trainer.num_tokens, trainer.num_target_tokens, trainer.num_skipped),
            stop=stop,
        )
        outcome = train(job)
    if runtime.is_main and config.logging.trackers:
        runtime.accelerator.end_training()
    if outcome == "done":
        runtime.tick("writing the adapter")
        write_adapter(runtime, model, folder / "adapter", model_card(config, identity, report, num_steps))
    record_end(run_dir, outcome, num_steps, stop, config.checkpoint.resume)
    # A launcher that sees one rank end with another code than 0 ends the others at once: none may leave before the
    # main rank has written everything.
    runtime.barrier()
    return outcome
