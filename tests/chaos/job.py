"""The job that is killed, and the places where it runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from launches import World

NUM_STEPS = 20
NUM_ROWS = 90
KEEP_LAST = 2
# Packs of a rank and micro-step, and micro-steps: 10 packs a step, which three ranks and four do not divide.
SPLITS = {1: [(5, 2), (10, 1), (2, 5)], 2: [(5, 1), (1, 5)]}
# How often each is drawn: the large ones take long.
WORLDS = {
    World("single", 1): 3.0,
    World("ddp", 2): 4.0,
    World("ddp", 3): 2.0,
    World("zero1", 2): 4.0,
    World("zero2", 2): 4.0,
    World("zero2", 3): 2.0,
    World("zero3", 2): 4.0,
    World("zero3", 3): 2.0,
    World("zero3_offload", 2): 1.0,
    World("zero3", 4): 0.5,
}


def write_job(base: Path, folder: Path) -> Path:
    """Three files of conversations that all differ, and a job in fp32."""
    import yaml

    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six", "seven"]
    draw = random.Random(0)
    names = []
    for part in range(3):
        rows = []
        for row in range(NUM_ROWS // 3):
            ask, answer = (" ".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(2))
            messages = [("user", f"{part}/{row} {ask}"), ("assistant", answer)]
            rows.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}))
        names.append(folder / f"rows{part}.jsonl")
        names[-1].write_text("\n".join(rows) + "\n")
    job: dict[str, Any] = {
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"r": 3, "lora_alpha": 6},
        "data": {"train": [str(name) for name in names], "max_length": 128, "cache_dir": str(folder / "cache")},
        "train": {"max_steps": NUM_STEPS, "learning_rate": 5.0e-3, "weight_decay": 0.1, "seed": 1},
        "checkpoint": {"keep_last": KEEP_LAST},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path
