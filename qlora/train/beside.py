"""What runs beside the training of a job: which hooks, with what, in which order."""

from __future__ import annotations

from qlora.checkpoint.saver import Saver
from qlora.checkpoint.state import TrainerState
from qlora.config.schema import JobConfig
from qlora.data.loader import EvalLoader, plan_packs
from qlora.distributed.engine import Engine
from qlora.distributed.peers import Peers
from qlora.distributed.runtime import Runtime
from qlora.objective.evaluate import evaluate
from qlora.train.build import peak_memory_bytes
from qlora.train.hooks import CheckpointHook, EvaluateHook, Hook, MetricsHook, ProgressHook, StatusHook
from qlora.train.inputs import Data
from qlora.train.nonfinite import NonFiniteHook
from qlora.train.preempt import until_stopped
from qlora.train.run_dir import MetricsWriter, RunDir, start_trackers
from qlora.train.slow_rank import SlowRankHook
from qlora.train.step import StepResult


def hooks_of(
    config: JobConfig,
    runtime: Runtime,
    run_dir: RunDir | None,
    engine: Engine,
    data: Data,
    saver: Saver,
    nonfinite: NonFiniteHook,
    peers: Peers,
) -> list[Hook]:
    """The hooks of a job on this rank, in the order in which they are called; those that are collective are on all ranks."""

    def save(result: StepResult) -> None:
        runtime.tick(f"saving step {result.step}")
        saver.save(_state_of(result, engine))

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
            SlowRankHook(peers.name_of),
        ]
    # What is not to be saved is found before it is.
    hooks.append(nonfinite)
    # Before the evaluation, which may be long: a step that was trained is not lost to it.
    hooks.append(CheckpointHook(config.checkpoint.every_steps, save, saver.wait))
    if data.eval_rows is not None:
        loader = EvalLoader(
            data.eval_rows,
            plan_packs(data.eval_rows, config.data, seed=0),
            per_device_batch_size=config.eval.per_device_eval_batch_size or config.train.per_device_train_batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            pad_token_id=data.pad_token_id,
        )

        def evaluate_all() -> dict[str, float]:
            runtime.tick("evaluating")
            return evaluate(engine.model, until_stopped(loader, runtime), runtime.device, runtime)

        hooks.append(EvaluateHook(config.eval.every_steps, evaluate_all, writer))
    return hooks


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
