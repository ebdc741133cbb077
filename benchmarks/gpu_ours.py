"""What the children of `gpu.py` do with this project: ceilings, steps, kernels, the longest document.

A step is the product's own: `train.build` makes the model and the engine, `train.step` does the step. Every row is written
as soon as it is there, through `say`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora.config.schema import JobConfig
from qlora.data.batch import Batch, collate_packed
from qlora.data.loader import StepBatches
from qlora.data.sampler import Position
from qlora.distributed import runtime as processes
from qlora.distributed.engine import Engine
from qlora.distributed.runtime import Runtime
from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec
from qlora.plan.shapes import read_shapes, shapes_from_config
from qlora.plan.speed import flop_per_token
from qlora.train.build import build_model, peak_memory_bytes, prepare_engine
from qlora.train.step import Counters, run_step

Say = Callable[[dict[str, Any]], None]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of single runs, each waited for, after two that do not count."""
    seconds = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))


# What the device can do


def ceilings(spec: dict[str, Any], say: Say) -> None:
    """bf16 products of the shapes that a step has, a copy, and NF4 dequantization of the largest layer."""
    device = torch.device(spec["device"])
    config, tokens, repeats = spec["config"], spec["tokens"], spec["repeats"]
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    rates = {}
    for m, k, n in ((tokens, hidden, hidden), (tokens, hidden, ffn), (tokens, ffn, hidden), (2 * tokens, hidden, ffn)):
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        seconds = median_seconds(lambda x=x, w=weight, o=out: torch.mm(x, w.t(), out=o), device, repeats)
        rates[f"{m} x {k} x {n}"] = 2 * m * k * n / seconds
    source = torch.empty(spec["copy_bytes"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = median_seconds(lambda: target.copy_(source), device, repeats)
    packed, statistics = nf4.quantize(torch.randn(ffn, hidden, device=device, dtype=torch.bfloat16), QuantSpec())
    made = median_seconds(
        lambda: nf4.dequantize_borrowed(packed, statistics, QuantSpec(), (ffn, hidden), torch.bfloat16), device, repeats
    )
    say({
        "products": rates, "product_flop_per_second": max(rates.values()),
        "copy_bytes_per_second": 2 * spec["copy_bytes"] / copied, "dequantized_weights_per_second": ffn * hidden / made,
    })  # fmt: skip


# Steps


def open_job(spec: dict[str, Any]) -> tuple[JobConfig, Runtime, Engine]:
    """The base with its LoRA layers, prepared. `spec["set"]` adds keys of the job file."""
    values: dict[str, Any] = {
        "model": {"base": spec["base"], "quantization": {} if spec.get("quantized", True) else None},
        "lora": {"r": spec["r"], "lora_alpha": 2 * spec["r"]},
        "data": {"max_length": spec.get("length", 4096)},
        "train": {"gradient_checkpointing": spec["recompute"], "per_device_train_batch_size": spec.get("rows", 1)},
    }
    for key, value in spec.get("set", {}).items():
        section, _, own = key.partition(".")
        values[section][own] = value
    job = JobConfig.model_validate(values)
    runtime = processes.start(
        per_device_batch_size=job.train.per_device_train_batch_size,
        gradient_accumulation_steps=1,
        max_grad_norm=job.train.max_grad_norm,
    )
    _, train_model, _ = build_model(job, runtime)
    engine = prepare_engine(job, runtime, train_model)
    synchronize(runtime.device)
    return job, runtime, engine


def recomputed_layers(engine: Engine) -> int:
    """How many layers are computed again in backward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = (m for m in engine.model.modules() if isinstance(m, GradientCheckpointingLayer))
    return sum(bool(layer.gradient_checkpointing) for layer in layers)


def random_batch(rows: int, length: int, vocabulary: int) -> Batch:
    """Packed documents of random tokens, all of them targets but the last's."""
    rng = np.random.default_rng(0)
    flags = np.ones(length, dtype=np.uint8)
    return collate_packed([(rng.integers(3, vocabulary, length), flags) for _ in range(rows)])


def do_step(engine: Engine, runtime: Runtime, batch: Batch, number: int) -> tuple[float, float]:
    """One optimizer step: loss and gradient norm."""
    batches = StepBatches(
        step=number, epoch=0.0, micro_batches=(batch,), position_after=Position(0),
        global_num_tokens=batch.num_tokens, global_num_target_tokens=batch.num_target_tokens,
    )  # fmt: skip
    result = run_step(engine, runtime, batches, Counters(), learning_rate=2e-4, seed=0)
    return float(result.loss), float(result.grad_norm)


def time_steps(engine: Engine, runtime: Runtime, batch: Batch, warmup: int, steps: int) -> dict[str, Any]:
    """Seconds a step, peak memory, losses; or that it does not fit."""
    device = runtime.device
    try:
        losses = [do_step(engine, runtime, batch, 0)]
        synchronize(device)
        first = time.time()
        losses += [do_step(engine, runtime, batch, number) for number in range(1, warmup)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        losses += [do_step(engine, runtime, batch, warmup + number) for number in range(steps)]
        synchronize(device)
        seconds = (time.perf_counter() - start) / steps
    except torch.OutOfMemoryError:
        recover(engine)
        return {"out_of_memory": True}
    return {
        "step_seconds": seconds, "tokens_per_second": batch.num_tokens / seconds, "losses": [loss for loss, _ in losses],
        "smallest_norm": min(norm for _, norm in losses), "first_step_at": first, **memory(device),
    }  # fmt: skip


def memory(device: torch.device) -> dict[str, int | None]:
    """Peak bytes; on a CPU the resident ones of the whole process."""
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {"max_allocated_bytes": peak_memory_bytes(device), "max_reserved_bytes": reserved}


def recover(engine: Engine) -> None:
    """Give back what a step that did not fit has left."""
    for parameter in engine.parameters.values():
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()


def sweep(spec: dict[str, Any], say: Say) -> None:
    """Steps of every point (rows, length), and of the last one that fits its kernels where `spec` asks for them."""
    job, runtime, engine = open_job(spec)
    load_seconds = time.time() - spec["started"]
    shapes = read_or_state(spec)
    loaded = torch.cuda.memory_allocated(runtime.device) if runtime.device.type == "cuda" else None
    for rows, length in spec["points"]:
        batch = random_batch(rows, length, spec["config"]["vocab_size"])
        row = {
            "rows": rows, "length": length, "r": spec["r"], "recompute": spec["recompute"],
            "recomputed_layers": recomputed_layers(engine), "quantized": spec.get("quantized", True),
            "load_seconds": load_seconds, "loaded_bytes": loaded,
            **time_steps(engine, runtime, batch, spec["warmup"], spec["steps"]),
        }  # fmt: skip
        if "tokens_per_second" in row:
            flop = flop_per_token(shapes, job, length, recompute=False)
            row["model_flop_per_second"] = flop * row["tokens_per_second"]
        say(row)
    if spec.get("kernels"):
        rows, length = spec["kernels"]
        say({"kernels": kernels(engine, runtime, random_batch(rows, length, spec["config"]["vocab_size"]))})


def read_or_state(spec: dict[str, Any]) -> Any:
    """The base's shapes as files that are not quantized would have them."""
    return shapes_from_config(spec["config"]) if spec.get("quantized", True) else read_shapes(Path(spec["base"]))


def kernels(engine: Engine, runtime: Runtime, batch: Batch, top: int = 20) -> dict[str, Any]:
    """Where one step's time goes, by kernel; on a CPU by operation."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = runtime.device.type == "cuda"
    do_step(engine, runtime, batch, 0)
    synchronize(runtime.device)
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        do_step(engine, runtime, batch, 1)
        synchronize(runtime.device)
    wall = time.perf_counter() - start
    events = found.key_averages()
    if on_gpu:
        rows = [(e.key, e.count, e.self_device_time_total) for e in events if e.device_type == DeviceType.CUDA]
    else:
        rows = [(e.key, e.count, e.self_cpu_time_total) for e in events]
    rows.sort(key=lambda row: -row[2])
    busy = sum(row[2] for row in rows)
    return {
        "wall_seconds": wall, "busy_seconds": busy / 1e6, "launches": sum(row[1] for row in rows),
        "top": [{"name": name, "calls": calls, "seconds": us / 1e6, "share": us / busy} for name, calls, us in rows[:top]],
    }  # fmt: skip
