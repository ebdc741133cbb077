"""`qlora eval` against torch's cross entropy over each conversation alone, through the model's own forward."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora
from qlora.config.schema import JobConfig
from qlora.data.prepare import prepare
from qlora.infer.evaluate import run_evaluate


@pytest.fixture
def job(random_base: Path, tmp_path: Path) -> JobConfig:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for n in range(1, 8):
            turns = [
                {"role": "user", "content": "what is this " * n},
                {"role": "assistant", "content": "an answer " * (9 - n)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return JobConfig.model_validate(
        {
            "model": {"base": str(random_base), "dtype": "float32"},
            "data": {"eval": [str(rows)], "max_length": 96, "cache_dir": str(tmp_path / "cache")},
            "train": {"per_device_train_batch_size": 2},
        }
    )


def plain_loss(model: Any, tokenizer: Any, job: JobConfig) -> tuple[float, int]:
    rows = prepare(job.data.eval, tokenizer, job.data)
    total, count = 0.0, 0
    for index in range(len(rows)):
        ids, flags = (torch.tensor(part.tolist()) for part in rows.row(index))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += float(losses[flags[1:] != 0].double().sum())
        count += int(flags.sum())
    return total / count, count


@pytest.mark.parametrize("packing", [True, False])
def test_base_and_adapter_against_plain_torch(
    job: JobConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], packing: bool
) -> None:
    job = job.model_copy(update={"data": job.data.model_copy(update={"packing": packing})})
    model, tokenizer = qlora.load_base(job.model.base, dtype="float32")
    wanted = {"base": plain_loss(model, tokenizer, job)}
    qlora.inject_lora(model, qlora.LoraConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = qlora.save_adapter(model, tmp_path / "adapter")
    wanted["adapter"] = plain_loss(model, tokenizer, job)

    found = run_evaluate(job, adapter)
    for name, (loss, count) in wanted.items():
        assert found[name]["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert found[name]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found[name]["eval_num_target_tokens"] == count
    assert abs(wanted["adapter"][0] - wanted["base"][0]) > 1e-3
    shown = capsys.readouterr().out
    assert f"{wanted['adapter'][0]:.4f}" in shown
    assert set(run_evaluate(job, None)) == {"base"}
