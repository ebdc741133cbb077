"""Putting a run together. The only assembler: everything else gets what it needs handed to it.

The order matters. What can be known without a model is checked first, data is tokenized before the ranks meet (so that
no collective waits for it), the run directory is locked before anything is written, and what a checkpoint holds is put
into the model before DeepSpeed copies it.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.adapter.base import load_base
from qlora.adapter.files import adapter_parameters, render_files
from qlora.checkpoint import resume, state
from qlora.checkpoint.save import save_checkpoint, set_aside_after
from qlora.checkpoint.state import Identity, TrainerState
from qlora.config.load import dump_config
from qlora.config.schema import JobConfig
from qlora.data.batch import collate_packed
from qlora.data.loader import EvalLoader, StepBatches, TrainLoader, plan_packs
from qlora.data.prepare import prepare as tokenize
from qlora.data.sampler import Position, Split
from qlora.data.token_store import TokenizedDataset
from qlora.data.tokenizer import load_tokenizer, padding_token_id
from qlora.distributed import runtime as processes
from qlora.distributed.collectives import whole_parameters
from qlora.distributed.runtime import Engine, Runtime
from qlora.errors import EXIT_BUG, EXIT_DONE, EXIT_STOPPED, CheckpointError, ConfigError, QloraError
from qlora.files import write_file
from qlora.lora.inject import LoraReport, inject_lora
from qlora.lora.layer import LoraLayer
from qlora.objective.evaluate import evaluate
from qlora.objective.train_model import LossHead, TrainModel
from qlora.quant.source import BaseSource, resolve_base
from qlora.train.hooks import CheckpointHook, EvaluateHook, Hook, MetricsHook, ProgressHook, StatusHook
from qlora.train.loop import Job, train
from qlora.train.model_card import model_card
from qlora.train.optim import build_optimizer
from qlora.train.preempt import StopFlag
from qlora.train.run_dir import MetricsWriter, RunDir
from qlora.train.step import Counters, StepResult, run_step


@dataclass(frozen=True)
class Data:
    """What a run learns from and is evaluated on."""

    rows: TokenizedDataset
    eval_rows: TokenizedDataset | None
    pad_token_id: int


def run_training(config: JobConfig, *, dry_run: bool = False, force: bool = False) -> int:
    """Run a job to its end on every rank. Collective. Returns the exit code.

    Raises:
        QloraError: whatever the user can mend; nothing that was saved is lost by it.
    """
    source = resolve_base(config.model.base, config.model.revision, allow_pickle=config.model.allow_pickle)
    tokenizer = load_tokenizer(str(source.folder))
    rows = tokenize(config.data.train, tokenizer, config.data)
    eval_rows = tokenize(config.data.eval, tokenizer, config.data) if config.data.eval else None
    runtime = processes.start(
        per_device_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        max_grad_norm=config.train.max_grad_norm,
        trackers=config.logging.trackers,
        logging_dir=config.train.output_dir,
    )
    try:
        _check_device(config, runtime)
        if dry_run:
            return _dry_run(config, runtime)
        run_dir = _own_run_dir(config, runtime)
        try:
            data = Data(rows, eval_rows, padding_token_id(tokenizer))
            outcome = _train(config, runtime, run_dir, source, data, force=force)
        except BaseException as error:
            _record_failure(run_dir, error)
            raise
        finally:
            if run_dir is not None:
                run_dir.close()
        return EXIT_STOPPED if outcome == "stopped" else EXIT_DONE
    finally:
        runtime.end()


def _check_device(config: JobConfig, runtime: Runtime) -> None:
    """Refuse dtypes that the device or the sharding cannot train in."""
    if config.model.dtype == "float16" and (runtime.device.type != "cuda" or runtime.is_zero):
        raise ConfigError(
            "float16 needs a GPU and its loss scale, which is not applied under DeepSpeed",
            place="model.dtype",
            found=f"{runtime.device.type}, {runtime.mode}",
            wanted="bfloat16 or float32",
        )


def _own_run_dir(config: JobConfig, runtime: Runtime) -> RunDir | None:
    """Lock the run directory on the main rank. Collective: a refusal there is raised on every rank."""
    opened: list[RunDir] = []
    runtime.from_main(lambda: opened.append(RunDir(Path(config.train.output_dir))))
    return opened[0] if opened else None


def _record_failure(run_dir: RunDir | None, error: BaseException) -> None:
    if run_dir is None:
        return
    done = state.committed(run_dir.path)
    run_dir.write_status(
        "failed",
        state.step_of(done[-1]) if done else 0,
        exit_code=error.exit_code if isinstance(error, QloraError) else EXIT_BUG,
        reason=f"{type(error).__name__}: {error}",
        resumable=bool(done),
    )


def _build(config: JobConfig, runtime: Runtime) -> tuple[Any, TrainModel, LoraReport]:
    """The base with its LoRA layers, and the module that is to be prepared. Rank-local."""
    model, _ = load_base(
        config.model.base,
        revision=config.model.revision,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=runtime.device,
        attention="auto" if config.model.attention in ("auto", "documents") else config.model.attention,
        allow_pickle=config.model.allow_pickle,
    )
    report = inject_lora(model, config.lora, seed=config.train.seed)
    recompute = config.train.gradient_checkpointing
    if recompute is True or (recompute == "auto" and runtime.device.type == "cuda"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, TrainModel(model, config.model.attention).train(), report


def _prepare(config: JobConfig, runtime: Runtime, train_model: TrainModel) -> Engine:
    """Hand the module to Accelerate and DeepSpeed. Collective."""
    parameters = [p for p in train_model.parameters() if p.requires_grad]
    return processes.prepare(
        runtime,
        train_model,
        build_optimizer(parameters, config.train, runtime.device, sharded=runtime.is_zero),
        max_grad_norm=config.train.max_grad_norm,
        scale_loss=config.model.dtype == "float16",
        leaves=(LoraLayer, LossHead),
    )


def _split(config: JobConfig, runtime: Runtime) -> Split:
    return Split(runtime.world_size, config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps)


def _train(
    config: JobConfig,
    runtime: Runtime,
    run_dir: RunDir | None,
    source: BaseSource,
    data: Data,
    *,
    force: bool,
) -> str:
    """Everything between the locked run directory and the final adapter. Collective."""
    folder = Path(config.train.output_dir)
    plan = plan_packs(data.rows, config.data, config.train.seed)
    loader = TrainLoader(
        data.rows,
        plan,
        split=_split(config, runtime),
        rank=runtime.rank,
        seed=config.train.seed,
        pad_token_id=data.pad_token_id,
    )
    identity = Identity(
        base=source.record(),
        data=data.rows.fingerprint,
        plan=plan.hash,
        config=config.model_dump(mode="json"),
        world_size=runtime.world_size,
        mode=runtime.mode,
        versions=state.stack_versions(),
    )
    # Before the base is read, which may take minutes.
    found = runtime.from_main(lambda: _find_checkpoint(config, folder, identity, force))
    model, train_model, report = _build(config, runtime)
    if found is not None:
        resume.load_parameters(found, model)
    engine = _prepare(config, runtime, train_model)
    if found is not None:
        resume.load_optimizer(found, model, engine)
    trainer = found.trainer if found is not None else TrainerState(0, 0, 0, 0)
    num_steps = config.train.max_steps or loader.schedule.num_steps(config.train.num_train_epochs)
    if runtime.is_main:
        _announce(config, runtime, report, data.rows, len(plan), num_steps, found)

    def save(result: StepResult) -> None:
        save_checkpoint(
            folder,
            model,
            engine,
            TrainerState(result.step, result.position.global_index, result.num_tokens, result.num_target_tokens),
            identity,
            runtime=runtime,
            keep_last=config.checkpoint.keep_last,
        )

    def write_start(run_dir: RunDir) -> None:
        for aside in set_aside_after(folder, trainer.step):
            print(f"warning: the run does not go on from this checkpoint, which is now {aside}", file=sys.stderr, flush=True)
        run_dir.write_config(dump_config(config, state.stack_versions()))
        run_dir.write_status("running", trainer.step, num_steps=num_steps)

    runtime.from_main(lambda: write_start(run_dir) if run_dir is not None else None)
    # Under --force the global batch may be another one: steps go on counting, and the data starts where they stand.
    position = loader.schedule.position_of_step(trainer.step) if force else Position(trainer.global_index)
    stop = StopFlag()
    job = Job(
        config=config,
        runtime=runtime,
        engine=engine,
        loader=loader,
        hooks=_hooks(config, runtime, run_dir, engine, data, num_steps, save),
        num_steps=num_steps,
        position=position,
        counters=Counters(trainer.num_tokens, trainer.num_target_tokens),
        stop=stop,
    )
    stop.listen()
    try:
        outcome = train(job)
        if outcome == "done":
            _write_adapter(runtime, model, folder / "adapter", model_card(config, identity, report, num_steps))
    finally:
        stop.release()
    if run_dir is not None:
        step = num_steps if outcome == "done" else state.step_of(state.committed(folder)[-1])
        code = EXIT_DONE if outcome == "done" else EXIT_STOPPED
        run_dir.write_status(outcome, step, num_steps=num_steps, exit_code=code, resumable=outcome == "stopped")
    # A launcher that sees one rank end with another code than 0 ends the others at once: none may leave before the
    # main rank has written everything.
    runtime.barrier()
    return outcome


def _write_adapter(runtime: Runtime, model: Any, folder: Path, card: str) -> None:
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


def _find_checkpoint(config: JobConfig, folder: Path, identity: Identity, force: bool) -> resume.Found | None:
    """The checkpoint to go on from, checked against this job. Main rank only."""
    found = resume.find_checkpoint(folder, config.checkpoint.resume)
    if found is not None:
        for line in resume.check_identity(found, identity, force=force):
            print(f"warning: --force: {line}; the run no longer continues exactly", file=sys.stderr, flush=True)
        if changed := resume.changed_versions(found, identity):
            print(f"warning: {changed}: the run may not continue to the last bit", file=sys.stderr, flush=True)
    return found


def _hooks(
    config: JobConfig,
    runtime: Runtime,
    run_dir: RunDir | None,
    engine: Engine,
    data: Data,
    num_steps: int,
    save: Callable[[StepResult], None],
) -> list[Hook]:
    """What runs beside training on this rank."""
    hooks: list[Hook] = []
    writer = None
    every = config.logging.log_every_steps
    if run_dir is not None:
        if config.logging.trackers:
            runtime.accelerator.init_trackers("qlora")
        writer = MetricsWriter(run_dir.path / "metrics.jsonl", runtime.accelerator)
        hooks += [
            ProgressHook(every, lambda: peak_memory_bytes(runtime.device)),
            MetricsHook(writer, every, lambda: peak_memory_bytes(runtime.device)),
            StatusHook(lambda step: run_dir.write_status("running", step, num_steps=num_steps)),
        ]
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
            EvaluateHook(config.eval.every_steps, lambda: evaluate(engine.model, loader, runtime.device, runtime), writer)
        )
    hooks.append(CheckpointHook(config.checkpoint.every_steps, save))
    return hooks


def _announce(
    config: JobConfig,
    runtime: Runtime,
    report: LoraReport,
    rows: TokenizedDataset,
    num_packs: int,
    num_steps: int,
    found: resume.Found | None,
) -> None:
    """Say what is about to run."""
    bits = config.model.quantization.quant_type if config.model.quantization else "not quantized"
    print(f"base      {config.model.base}, {bits}, computing in {config.model.dtype}")
    print(f"processes {runtime.world_size}, {runtime.mode}, on {runtime.device.type}")
    tokens = int(rows.lengths.sum())
    print(f"data      {len(rows)} rows, {tokens:,} tokens, {rows.num_target_tokens:,} of them targets, {num_packs} packs")
    print(f"training  {num_steps} steps of {_split(config, runtime).global_batch_size} packs")
    print(report)
    if found is not None:
        print(f"resuming  {found.folder} after step {found.trainer.step}")
    sys.stdout.flush()


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: of the GPU's memory, or resident where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count what the launcher held when it forked this process.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _dry_run(config: JobConfig, runtime: Runtime) -> int:
    """One real step at full length on every rank, nothing kept."""
    _, train_model, report = _build(config, runtime)
    vocabulary = train_model.model.get_input_embeddings().weight.shape[0]
    engine = _prepare(config, runtime, train_model)
    rows = _split(config, runtime).per_device_batch_size
    length = config.data.max_length
    tokens = np.random.default_rng(config.train.seed).integers(0, vocabulary, (rows, length))
    batch = collate_packed([(row, np.ones(length, dtype=np.uint8)) for row in tokens])
    accumulation = config.train.gradient_accumulation_steps
    batches = StepBatches(
        step=0,
        epoch=0.0,
        micro_batches=(batch,) * accumulation,
        position_after=Position(0),
        global_num_tokens=batch.num_tokens * accumulation * runtime.world_size,
        global_num_target_tokens=batch.num_target_tokens * accumulation * runtime.world_size,
    )
    result = run_step(engine, runtime, batches, Counters(), learning_rate=config.train.learning_rate, seed=config.train.seed)
    peak = runtime.max(torch.tensor(float(peak_memory_bytes(runtime.device)), device=runtime.device)).item()
    if runtime.is_main:
        print(report)
        print(
            f"dry run: one step of {result.step_tokens:,} tokens in {result.step_seconds:.1f} s, loss {result.loss:.3f}, "
            f"peak memory of the fullest rank {peak / 2**30:.2f} GiB"
        )
    return EXIT_DONE
