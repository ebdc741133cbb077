"""What several benchmarks start from: a base of random weights, and the files of a small job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make_llama(folder: Path, *, max_shard_size: str = "50GB", **shape: Any) -> int:
    """Write a Llama of random weights in bf16, always the same ones, with the embedded base's tokenizer.

    Args:
        shape: what transformers' LlamaConfig is given; where it names no vocab_size, the tokenizer's.

    Returns:
        The number of weights.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qlora.assets import tiny_path

    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    torch.manual_seed(0)
    config = LlamaConfig(**({"vocab_size": len(tokenizer)} | shape))
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def write_job(folder: Path, num_rows: int, completion: str = "A short answer.") -> None:
    """Write train.jsonl, the same row so many times, and a job file that leaves everything to the command line."""
    row = {"prompt": "What is it?", "completion": completion}
    (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * num_rows)
    (folder / "job.yaml").write_text("{}\n")
