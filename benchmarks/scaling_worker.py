"""What one process of `scaling.py --check` does: steps by itself, steps under ZeRO-3, or gathers alone.

python benchmarks/scaling_worker.py KIND FOLDER SAID RANKS [NUMBER]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.config.schema import JobConfig

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 26)  # bytes of a gather, all ranks' together
WARMUP, ROUNDS = 2, 6
# The shape of a base of 135M weights, but for the number of layers.
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
VOCABULARY = 49152


def make_base(folder: Path, tokens: int, layers: int) -> JobConfig:
    """A Llama of random weights and its tokenizer in `folder/base`, and the job, in `folder/job.json`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qlora.assets import tiny_path

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=True, dtype="bfloat16"
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder / "base")
    job = {
        "model": {"base": str(folder / "base")},
        "data": {"max_length": tokens},
        "train": {"gradient_checkpointing": False},
    }
    (folder / "job.json").write_text(json.dumps(job))
    return JobConfig.model_validate(job)


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of rounds: `alone_seconds`, `step_seconds`; medians of gathers by size; bytes a second of copying."""
    from qlora.distributed import runtime as processes

    job = JobConfig.model_validate(json.loads((folder / "job.json").read_text()))
    runtime = processes.start(per_device_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=job.train.max_grad_norm)
    # The same process by itself: a whole base, no collective.
    apart = replace(runtime, rank=0, world_size=1, mode="single")
    alone, together = make_step(job, apart, runtime.rank), make_step(job, runtime, runtime.rank)
    seconds: dict[str, list[float]] = {"alone": [], "step": [], "copy": [], **{str(size): [] for size in SIZES}}
    for number in range(WARMUP + ROUNDS):
        work = {"alone": lambda n=number: alone(n), "step": lambda n=number: together(n), "copy": copy_once()}
        work |= {str(size): gather_once(size, runtime.world_size) for size in SIZES}
        for name, do in work.items():
            runtime.barrier()
            start = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: times[WARMUP:] for name, times in seconds.items()}
    return {
        "rank": runtime.rank, "alone_seconds": seconds["alone"], "step_seconds": seconds["step"],
        "gather_seconds": {str(size): statistics.median(seconds[str(size)]) for size in SIZES},
        "copy_bytes_per_second": SIZES[-1] / statistics.median(seconds["copy"]),
    }  # fmt: skip


def make_step(job: JobConfig, runtime: Any, seed: int) -> Callable[[int], None]:
    """What does whole optimizer steps on one document of random tokens. SystemExit where there is no gradient."""
    import numpy as np

    from qlora.data.batch import collate_packed
    from qlora.data.loader import StepBatches
    from qlora.data.sampler import Position
    from qlora.distributed.engine import Engine, PlainEngine
    from qlora.train.build import build_model, prepare_engine
    from qlora.train.optim import build_optimizer
    from qlora.train.step import Counters, run_step

    _, train_model, _ = build_model(job, runtime)
    engine: Engine
    if runtime.is_zero:
        engine = prepare_engine(job, runtime, train_model)
    else:
        parameters = {name: p for name, p in train_model.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(parameters.values(), job.train, runtime.device, sharded=False)
        engine = PlainEngine(train_model, parameters, optimizer, job.train.max_grad_norm, False, runtime.device)
    length = job.data.max_length
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, length)
    batch = collate_packed([(ids, np.ones(length, dtype=np.uint8))])

    def step(number: int) -> None:
        batches = StepBatches(
            step=number, epoch=0.0, micro_batches=(batch,), position_after=Position(0),
            global_num_tokens=batch.num_tokens * runtime.world_size,
            global_num_target_tokens=batch.num_target_tokens * runtime.world_size,
        )  # fmt: skip
        result = run_step(engine, runtime, batches, Counters(), learning_rate=1e-4, seed=0)
        if result.grad_norm <= 0:
            raise SystemExit("a gradient norm is zero: this step trains nothing")

    return step


def gather_once(size: int, ranks: int) -> Callable[[], Any]:
    """One gather of so many bytes, all ranks' together."""
    import torch

    own = torch.zeros(size // ranks, dtype=torch.uint8)
    whole = torch.empty(own.numel() * ranks, dtype=torch.uint8)
    return lambda: torch.distributed.all_gather_into_tensor(whole, own)


def copy_once() -> Callable[[], Any]:
    """One copy of the largest gather's bytes."""
    import torch

    source, target = torch.zeros(2, SIZES[-1], dtype=torch.uint8)
    return lambda: target.copy_(source)


def main() -> None:
    """One rank; its answer goes into a file."""
    import torch

    from qlora.distributed.leave import leave

    torch.set_num_threads(1)
    answer = measure(Path(sys.argv[1]))
    (Path(sys.argv[2]) / f"{answer['rank']}.json").write_text(json.dumps(answer))
    leave(0)


if __name__ == "__main__":
    assert os.environ.get("OMP_NUM_THREADS") == "1", "started by scaling.py"
    main()
