"""What both sides train on: bases of random weights, rows of text, and the packs of each step, made once in a cache folder.

Speed and memory do not depend on what the weights are, so they are random, drawn from one seed. The tokenizer is the
embedded base's: its ids are the lower part of the vocabulary. The packs of a row are those that this project's own loader
makes of it, written down; the other side is handed them as they are, so that both compute the same tokens at every step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# SmolLM2-135M's shape, a Llama.
SHAPE: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
}  # fmt: skip
LARGE_VOCABULARY = 150_000
RANK, ALPHA, LEARNING_RATE, SEED = 16, 32, 2e-4, 0
NUM_LONG, LONG_CHARACTERS = 16, 48_000
IGNORE = -100


def cache_folder() -> Path:
    """Where bases and data are kept: $QLORA_BENCH_CACHE, or a folder in the user's cache."""
    return Path(os.environ.get("QLORA_BENCH_CACHE") or Path.home() / ".cache" / "qlora-bench")


def shape_of(layers: int) -> dict[str, Any]:
    """The shape with so many layers."""
    return SHAPE | {"num_hidden_layers": layers}


def make_base(folder: Path, layers: int) -> Path:
    """Write the base in bfloat16, unless it is there already. Returns its folder."""
    base = folder / f"llama_{layers}_layers"
    if (base / "made").is_file():
        return base
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qlora.assets import tiny_path

    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(SEED)
    LlamaForCausalLM._from_config(LlamaConfig(**shape_of(layers), **ids), dtype=torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "made").touch()
    return base


def make_data(folder: Path) -> dict[str, Path]:
    """Write the standard library's questions, and long documents of its texts. Returns the files by name."""
    files = {"questions": folder / "train.jsonl", "long": folder / "long.jsonl"}
    if not files["questions"].is_file():
        from qlora.assets.quickstart import write_data

        write_data(folder)
    if not files["long"].is_file():
        from qlora.assets.corpus import prose

        text = "\n\n".join(prose())
        rows = [text[n * LONG_CHARACTERS : (n + 1) * LONG_CHARACTERS] for n in range(NUM_LONG)]
        files["long"].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return files


def overrides(base: Path, settings: dict[str, Any], out: Path, cache: Path) -> list[str]:
    """The job of a row, as the command line of `qlora train` takes it."""
    return [
        f"model.base={base}", f"data.train=[{settings['data']}]", f"data.max_length={settings['length']}",
        f"data.train_on={settings['train_on']}", f"data.cache_dir={cache}", f"lora.r={RANK}", f"lora.lora_alpha={ALPHA}",
        f"train.output_dir={out}", f"train.max_steps={settings['steps']}", f"train.learning_rate={LEARNING_RATE}",
        f"train.per_device_train_batch_size={settings['packs']}", "train.warmup_steps=0", f"train.seed={SEED}",
        "train.lr_scheduler_type=constant", "train.gradient_checkpointing=false", "checkpoint.every_steps=null",
    ]  # fmt: skip


def write_steps(base: Path, settings: dict[str, Any], folder: Path, path: Path) -> None:
    """Write what each step trains on: {"packs": [{"input_ids", "labels", "seq_lengths"}]} a line, labels not shifted.

    Tokens and packs are made by the functions that a run calls, from the same job.
    """
    from qlora.config.load import load_config
    from qlora.data.loader import TrainLoader, plan_packs
    from qlora.data.sampler import Position, Split
    from qlora.train.inputs import open_inputs

    job = folder / "job.yaml"
    job.write_text("{}\n")
    config = load_config(job, overrides(base, settings, folder / "run", folder / "cache"))
    _, data = open_inputs(config)()
    plan = plan_packs(data.rows, config.data, SEED)
    split = Split(1, settings["packs"], 1)
    loader = TrainLoader(data.rows, plan, split=split, rank=0, seed=SEED, pad_token_id=data.pad_token_id)
    lines = []
    for batches in loader.batches(Position(0)):
        (batch,) = batches.micro_batches
        assert batch.document_lengths is not None
        targets = batch.targets_BT[0].tolist()
        step = {
            "input_ids": batch.input_ids_BT[0].tolist(),
            "labels": [IGNORE, *targets[:-1]],
            "seq_lengths": list(batch.document_lengths),
        }
        lines.append(json.dumps(step))
        if batches.step + 1 == settings["steps"]:
            break
    path.write_text("\n".join(lines) + "\n")


def read_steps(path: Path) -> list[dict[str, list[int]]]:
    """What `write_steps` wrote: one row of tokens a step."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def documents(steps: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The single documents of packs, in their order: `input_ids` and `labels`."""
    found = []
    for step in steps:
        start = 0
        for length in step["seq_lengths"]:
            piece = slice(start, start + length)
            found.append({"input_ids": step["input_ids"][piece], "labels": step["labels"][piece]})
            start += length
    return found


def step_flop(step: dict[str, list[int]], shape: dict[str, Any]) -> float:
    """Operations that a training step over a frozen base needs, nothing computed twice.

    A token multiplies with every frozen weight once in forward and once in backward (4 N), with A and B three times (6 P);
    attention is causal within a document of T tokens (2 T D in forward, twice that in backward, a layer and token). The
    head is counted for targets alone, as the frozen weight that it is.
    """
    width, layers, ffn = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    kept = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    shapes = [(width, width), (width, kept), (width, kept), (width, width), (width, ffn), (width, ffn), (ffn, width)]
    frozen = layers * sum(a * b for a, b in shapes)
    trained = layers * sum(RANK * (a + b) for a, b in shapes)
    tokens = len(step["input_ids"])
    targets = sum(label != IGNORE for label in step["labels"])
    attention = 3 * 2 * width * layers * sum(length**2 for length in step["seq_lengths"])
    return float(tokens * (4 * frozen + 6 * trained) + targets * 4 * width * shape["vocab_size"] + attention)
