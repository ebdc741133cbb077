"""New tokens from the command line: the built-in base, whose vocabulary is full, learns to say one and is asked for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def test_a_new_token_is_learned_and_said(project: Any, tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": f"say <ping> number {i}"}, {"role": "assistant", "content": "<pong> <pong>"}]
        for i in range(24)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: {base: builtin:tiny, dtype: float32}\n"
        "lora: {r: 4, new_tokens: [<ping>, <pong>]}\n"
        f"data: {{train: [{rows}], max_length: 128, cache_dir: {tmp_path / 'cache'}}}\n"
        f"train: {{max_steps: 12, learning_rate: 1.0e-2, output_dir: {tmp_path / 'run'}}}\n"
    )
    log = tmp_path / "log"
    assert project.wait(project.start(["-m", "qlora", "train", str(job)], log), log) == 0, log.read_text()[-3000:]
    adapter = tmp_path / "run" / "adapter"
    held = load_file(adapter / "adapter_model.safetensors")
    beside_lora = {key: tuple(value.shape) for key, value in held.items() if ".lora_" not in key}
    assert beside_lora == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 256)}
    ask = ["-m", "qlora", "generate", "--adapter", str(adapter), "--prompt", "say <ping> number 3", "--max-new-tokens", "8"]
    assert project.wait(project.start(ask, log), log) == 0, log.read_text()[-3000:]
    assert "<pong>" in log.read_text().splitlines()[-1]
