"""`qlora train --dry-run`: does it fit, and how long does a step take? One real step at full length, nothing kept."""

from __future__ import annotations

import numpy as np
import torch

from qlora.config.schema import JobConfig
from qlora.data.batch import collate_packed, collate_padded
from qlora.data.loader import StepBatches
from qlora.data.sampler import Position
from qlora.distributed.collectives import whole_shape
from qlora.distributed.runtime import Runtime
from qlora.errors import EXIT_DONE
from qlora.train import out_of_memory
from qlora.train.build import build_model, peak_memory_bytes, prepare_engine, split_of
from qlora.train.step import Counters, run_step


def dry_run(config: JobConfig, runtime: Runtime, *, force: bool = False) -> int:
    """Do one step on rows of random tokens, all of them targets, on every rank, and print what it took. Collective."""
    _, train_model, report = build_model(config, runtime, force=force)
    vocabulary = whole_shape(train_model.model.get_input_embeddings().weight)[0]
    engine = prepare_engine(config, runtime, train_model)
    rows = split_of(config, runtime).per_device_batch_size
    length = config.data.max_length
    tokens = np.random.default_rng(config.train.seed).integers(0, vocabulary, (rows, length))
    full = [(row, np.ones(length, dtype=np.uint8)) for row in tokens]
    batch = collate_packed(full) if config.data.packing else collate_padded(full, pad_token_id=0)
    accumulation = config.train.gradient_accumulation_steps
    batches = StepBatches(
        step=0,
        epoch=0.0,
        micro_batches=(batch,) * accumulation,
        position_after=Position(0),
        global_num_tokens=batch.num_tokens * accumulation * runtime.world_size,
        global_num_target_tokens=batch.num_target_tokens * accumulation * runtime.world_size,
    )
    with out_of_memory.explained(config, runtime, "in the step of the dry run"):
        result = run_step(
            engine,
            runtime,
            batches.to(runtime.device),
            Counters(),
            learning_rate=config.train.learning_rate,
            seed=config.train.seed,
        )
    peak = runtime.max(torch.tensor(float(peak_memory_bytes(runtime.device)), device=runtime.device)).item()
    if runtime.is_main:
        print(f"backward  {train_model.model.qlora_recomputed}")
        print(report)
        print(
            f"dry run: one step of {result.step_tokens:,} tokens in {result.step_seconds:.1f} s, loss {result.loss:.3f}, "
            f"peak memory of the fullest rank {peak / 2**30:.2f} GiB"
        )
    return EXIT_DONE
