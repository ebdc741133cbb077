"""The longest document that fits one device, found in seconds instead of hours.

A step of 340,000 tokens through 32 layers takes minutes. What it holds at its peak does not depend on how long it computes:
the input of every recomputed layer, and what one layer works with. So two real layers are trained, and what the missing ones
would keep (weights, adapters with gradients and moments, inputs) is allocated and not touched. The figure says that it was
found so. Where inputs are kept in the host's memory, whether that has room for all layers' is not looked at.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_ours import Say, do_step, open_job, random_batch, recover

from qlora.plan.memory import plan_rank
from qlora.plan.shapes import shapes_from_config

LAYERS = 2
ROUND_TO = 1024


def longest(spec: dict[str, Any], say: Say) -> None:
    """Bisect between a length that fits and one that does not, until `spec["seconds"]` are over; every try is a row."""
    job, runtime, engine = open_job(spec | {"recompute": True})
    config = spec["config"]
    whole, part = (plan_rank(shapes_from_config(c), job, "single", 1).kept_bytes for c in (config, short(config)))
    missing = config["num_hidden_layers"] - LAYERS
    # Of the missing layers' inputs, a token, in bfloat16; none where they are kept in the host's memory.
    input_bytes = 0 if job.train.offload_activations else 2 * missing * config["hidden_size"]
    end = time.monotonic() + spec["seconds"]
    fits, fails = 0, spec["most"]
    length = spec["first"]
    while time.monotonic() < end:
        start = time.perf_counter()
        peak = attempt(engine, runtime, length, config["vocab_size"], whole - part + input_bytes * length)
        say({
            "length": length, "fits": peak is not None, "peak_bytes": peak, "r": spec["r"], "layers_computed": LAYERS,
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        fits, fails = (length, fails) if peak is not None else (fits, length)
        if fails - fits <= max(ROUND_TO, fits // 50):
            break
        # The peak grows in a straight line: go where it meets the device's memory, then between what fits and what does not.
        total = spec["total_bytes"]
        guess = (
            int(length * total / max(peak, 1) * 0.98) if peak is not None and fails == spec["most"] else (fits + fails) // 2
        )
        length = max(fits + ROUND_TO, min(guess, fails - ROUND_TO)) // ROUND_TO * ROUND_TO
        if not fits < length < fails:
            break


def short(config: dict[str, Any]) -> dict[str, Any]:
    """The same base with the layers that are computed alone."""
    return config | {"num_hidden_layers": LAYERS}


def attempt(engine: Any, runtime: Any, length: int, vocabulary: int, ballast_bytes: int) -> int | None:
    """Peak bytes of a step beside the ballast, or None where it does not fit."""
    on_gpu = runtime.device.type == "cuda"
    ballast = None
    try:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(runtime.device)
            ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device=runtime.device)
        do_step(engine, runtime, random_batch(1, length, vocabulary), 0)
        return torch.cuda.max_memory_allocated(runtime.device) if on_gpu else ballast_bytes
    except torch.OutOfMemoryError:
        recover(engine)
        return None
    finally:
        del ballast
