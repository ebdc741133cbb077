"""Started by a launcher: takes the embedded base through a step as training does, and writes down what rank 1 holds.

    rank.py OUT.json DEEPSPEED.json KEY=VALUE...        DEEPSPEED.json goes over the launch file's zero_optimization;
                                                        alone_bytes in it over what a tensor may have that comes with others

Gathers are counted where they leave the process, in torch's collective. What is gathered at one time is looked up there.
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qlora.config.load import load_config
from qlora.data.batch import collate_packed
from qlora.distributed.leave import leave
from qlora.quant.linear import Linear4bit

counted = {"gathered": 0, "at_once": 0, "largest_copied": 0}
watched: list[Any] = []
handles: weakref.WeakSet[Any] = weakref.WeakSet()
plain_gather, plain_cat = dist.all_gather_into_tensor, torch.cat


def gather(*args: Any, **kwargs: Any) -> Any:
    output = args[0] if args else kwargs["output_tensor"]
    counted["gathered"] += output.numel() * output.element_size()
    count_at_once()
    return plain_gather(*args, **kwargs)


def count_at_once() -> None:
    """Gathered parameters, and the buffers of those that came together, on their way or not let go of yet."""
    there = num_bytes(p.data for p in watched if not p.ds_persist)
    there += sum(handle.partitions[0].untyped_storage().nbytes() for handle in handles)
    counted["at_once"] = max(counted["at_once"], there)


def copy(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """By which DeepSpeed unpacks what came together."""
    output = plain_cat(tensors, *args, **kwargs)
    counted["largest_copied"] = max(counted["largest_copied"], num_bytes([output]))
    count_at_once()
    return output


def num_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    out, stated, *overrides = sys.argv[1:]
    changes = json.loads(stated)
    dist.all_gather_into_tensor, torch.cat = gather, copy  # before DeepSpeed looks them up
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle

    from qlora.distributed import runtime as processes
    from qlora.train.build import build_model, prepare_engine

    begin = AllGatherCoalescedHandle.__init__

    def watch(handle: Any, *args: Any, **kwargs: Any) -> None:
        begin(handle, *args, **kwargs)
        handles.add(handle)

    AllGatherCoalescedHandle.__init__ = watch
    job = load_config(Path(out).with_suffix(".yaml"), overrides)
    if "alone_bytes" in changes:
        from qlora.distributed import zero

        zero.ALONE_BYTES = changes.pop("alone_bytes")
    runtime = processes.start(per_device_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=1.0)
    plugin = runtime.accelerator.state.deepspeed_plugin
    plugin.deepspeed_config["zero_optimization"] |= changes
    plugin.states_prefetch = "stage3_prefetch_bucket_size" in changes
    _, train_model, _ = build_model(job, runtime)
    fours = [m for m in train_model.modules() if isinstance(m, Linear4bit)]
    parts = {id(m.weight): "packed weights" for m in fours} | {id(m.statistics): "statistics" for m in fours}
    engine: Any = prepare_engine(job, runtime, train_model)
    row = np.random.default_rng(0).integers(0, 300, 64)
    batch = collate_packed([(row, np.ones(64, dtype=np.uint8))])
    parameters = list(train_model.parameters())
    watched.extend(p for p in parameters if hasattr(p, "ds_id"))
    losses = []
    for _ in range(3):  # the first records the order of modules, the second is the first to gather ahead
        counted.update(gathered=0, at_once=0, largest_copied=0)
        with engine.micro_step(last=True):
            loss, num_targets = engine.model(batch)
            engine.backward(loss / num_targets)
        seen: dict[str, Any] = dict(counted)
        losses.append(loss.item())
        engine.step(1e-4)
    kept: dict[str, int] = {}
    for p in parameters:
        part = "trained" if p.requires_grad else parts.get(id(p), "unquantized")
        kept[part] = kept.get(part, 0) + num_bytes([getattr(p, "ds_tensor", p)])
    sharded = engine.model.optimizer
    stage3 = hasattr(sharded, "fp32_partitioned_groups_flat")
    masters = sharded.fp32_partitioned_groups_flat if stage3 else sharded.single_partition_of_fp32_groups
    kept["fp32 master copy"] = num_bytes(masters)
    states = [value for state in sharded.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept["optimizer"] = num_bytes(t for t in states if t.numel() > 1)  # but for the counter of steps
    used = runtime.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    seen["losses"] = losses
    seen["max_live"] = used.get("stage3_max_live_parameters")
    if stage3:
        kept["gradients"] = num_bytes([sharded.grad_partitions_flat_buffer])
        kept["kept whole as well"] = num_bytes(p.data for p in watched if p.ds_persist)
        same = {t.data_ptr() for t in masters} & {p.ds_tensor.data_ptr() for p in watched if p.requires_grad}
        assert not same, "the master copy is a copy"
    if runtime.rank == 1:
        Path(out).write_text(json.dumps({"kept": kept, **seen}))
    runtime.end()


if __name__ == "__main__":
    main()
    leave(0)
