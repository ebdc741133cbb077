"""Putting a run together. The only assembler: everything else gets what it needs handed to it.

The order matters. What can be known without a model is checked first, data is tokenized before the ranks meet (so that
no collective waits for it), the run directory is locked before anything is written, and what a checkpoint holds is put
into the model before DeepSpeed copies it.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.adapter.base import load_base
from qlora.adapter.files import save_adapter
from qlora.checkpoint import resume, state
from qlora.checkpoint.save import save_checkpoint
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
from qlora.distributed.runtime import Engine, Runtime
from qlora.errors import EXIT_BUG, EXIT_DONE, EXIT_STOPPED, ConfigError, QloraError
from qlora.files import write_file
from qlora.lora.inject import LoraReport, inject_lora
from qlora.lora.layer import LoraLayer
from qlora.objective.evaluate import evaluate
from qlora.objective.train_model import LossHead, TrainModel
from qlora.quant.source import resolve_base
from qlora.train.hooks import CheckpointHook, EvaluateHook, Hook, MetricsHook, ProgressHook, StatusHook
from qlora.train.loop import Job, train
from qlora.train.model_card import model_card
from qlora.train.optim import build_optimizer
from qlora.train.preempt import StopFlag
from qlora.train.run_dir import MetricsWriter, RunDir
from qlora.train.step import Counters, StepResult, run_step


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
            outcome = _train(config, runtime, run_dir, rows, eval_rows, padding_token_id(tokenizer), force=force)
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
    rows: TokenizedDataset,
    eval_rows: TokenizedDataset | None,
    pad_token_id: int,
    *,
    force: bool,
) -> str:
    """Everything between the locked run directory and the final adapter. Collective."""
    folder = Path(config.train.output_dir)
    model, train_model, report = _build(config, runtime)
    plan = plan_packs(rows, config.data, config.train.seed)
    split = _split(config, runtime)
    loader = TrainLoader(rows, plan, split=split, rank=runtime.rank, seed=config.train.seed, pad_token_id=pad_token_id)
    identity = Identity(
        base=model.qlora_base.source.record(),
        data=rows.fingerprint,
        plan=plan.hash,
        config=config.model_dump(mode="json"),
        world_size=runtime.world_size,
        mode=runtime.mode,
        versions=state.stack_versions(),
    )
    found = runtime.from_main(lambda: _find_checkpoint(config, folder, identity, force))
    if found is not None:
        resume.load_parameters(found, model)
    engine = _prepare(config, runtime, train_model)
    if found is not None:
        resume.load_optimizer(found, model, engine)
    trainer = found.trainer if found is not None else TrainerState(0, 0, 0, 0)
    num_steps = config.train.max_steps or loader.schedule.num_steps(config.train.num_train_epochs)
    if runtime.is_main:
        _announce(config, runtime, report, rows, len(plan), num_steps, found)

    def save(result: StepResult) -> None:
        save_checkpoint(
            folder,
            model,
            engine,
            TrainerState(result.step, result.position.global_index, result.num_tokens, result.num_target_tokens),
            identity,
            write=runtime.is_main,
            keep_last=config.checkpoint.keep_last,
        )

    stop = StopFlag().listen()
    job = Job(
        config=config,
        runtime=runtime,
        engine=engine,
        loader=loader,
        hooks=_hooks(config, runtime, run_dir, engine, eval_rows, pad_token_id, num_steps, save),
        num_steps=num_steps,
        position=Position(trainer.global_index),
        counters=Counters(trainer.num_tokens, trainer.num_target_tokens),
        stop=stop,
    )
    if run_dir is not None:
        run_dir.write_config(dump_config(config, state.stack_versions()))
        run_dir.write_status("running", trainer.step, num_steps=num_steps)
    outcome = train(job)
    if outcome == "done":
        save_adapter(model, folder / "adapter", write=runtime.is_main)
    if run_dir is not None:
        step = num_steps if outcome == "done" else state.step_of(state.committed(folder)[-1])
        if outcome == "done":
            write_file(folder / "adapter" / "README.md", model_card(config, identity, report, num_steps).encode())
            print(f"adapter: {folder / 'adapter'}", flush=True)
        code = EXIT_DONE if outcome == "done" else EXIT_STOPPED
        run_dir.write_status(outcome, step, num_steps=num_steps, exit_code=code, resumable=outcome == "stopped")
    # A launcher that sees one rank end with another code than 0 ends the others at once: none may leave before the
    # main rank has written everything.
    runtime.barrier()
    return outcome


def _find_checkpoint(config: JobConfig, folder: Path, identity: Identity, force: bool) -> resume.Found | None:
    """The checkpoint to go on from, checked against this job. Main rank only."""
    found = resume.find_checkpoint(folder, config.checkpoint.resume)
    if found is not None:
        for line in resume.check_identity(found, identity, force=force):
            print(f"warning: --force: {line}; the run no longer continues exactly", file=sys.stderr, flush=True)
    return found


def _hooks(
    config: JobConfig,
    runtime: Runtime,
    run_dir: RunDir | None,
    engine: Engine,
    eval_rows: TokenizedDataset | None,
    pad_token_id: int,
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
    if eval_rows is not None:
        loader = EvalLoader(
            eval_rows,
            plan_packs(eval_rows, config.data, seed=0),
            per_device_batch_size=config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            pad_token_id=pad_token_id,
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
