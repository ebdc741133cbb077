"""What a run says of itself before its first step."""

from __future__ import annotations

import sys

from qlora.checkpoint.resume import Found
from qlora.config.schema import JobConfig
from qlora.data.sampler import Split
from qlora.data.token_store import TokenizedDataset
from qlora.distributed.runtime import Runtime
from qlora.lora.report import LoraReport
from qlora.quant.load import BaseRecord
from qlora.train.recompute import Recomputed


def announce(
    config: JobConfig,
    runtime: Runtime,
    base: BaseRecord,
    report: LoraReport,
    rows: TokenizedDataset,
    num_packs: int,
    num_steps: int,
    split: Split,
    found: Found | None,
    recomputed: Recomputed,
) -> None:
    """Print the base, the processes, the data, the steps and where they start. Main rank only."""
    held, origin = base.quantization, base.source.origin
    print(f"base      {config.model.base}, {held.kind if held else 'not quantized'}, computing in {config.model.dtype}")
    if origin is not None:
        print(f"          prepared from {origin.name}, rounded to {origin.dtype} before it was quantized")
    if held is not None and held != config.model.quantization:
        print(f"          it came in {held.bits} bits ({held}), and model.quantization, which differs, is not applied")
    print(f"processes {runtime.world_size}, {runtime.mode}, on {runtime.device.type}")
    tokens = int(rows.lengths.sum())
    print(f"data      {len(rows)} rows, {tokens:,} tokens, {rows.num_target_tokens:,} of them targets, {num_packs} packs")
    for count, what in (
        (rows.statistics.num_without_target, "rows left out, with nothing to learn in them"),
        (rows.statistics.num_truncated, f"rows cut to {config.data.max_length} tokens"),
        (rows.statistics.num_split, f"rows split at {config.data.max_length} tokens"),
        (rows.statistics.num_dropped, f"rows left out, over {config.data.max_length} tokens"),
        (rows.statistics.num_unstable, "rows with turns that only serve as context (the template shows them otherwise)"),
    ):
        if count:
            print(f"          {count} {what}")
    print(f"training  {num_steps} steps of {split.global_batch_size} packs")
    stated = Split(split.world_size, config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps)
    if found is not None and split != stated:
        empty = split.num_places - split.global_batch_size
        print(
            f"          as with {found.identity.world_size} ranks before: now {split}"
            + (f", of whose {split.num_places} places {empty} stay empty" if empty else "")
        )
    print(f"backward  {recomputed}")
    print(report)
    if found is not None:
        print(f"resuming  {found.folder} after step {found.trainer.step}")
        if found.trainer.step >= num_steps:
            print("          the run is complete: nothing is left to train")
    sys.stdout.flush()
