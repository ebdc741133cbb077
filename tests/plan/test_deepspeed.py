"""What is planned for two ranks, against what DeepSpeed holds and sends on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from qlora.config.load import load_config
from qlora.plan import gathers
from qlora.plan.gathers import gathered_at_once, largest_gather, max_live
from qlora.plan.memory import plan_rank
from qlora.plan.parameters import ZeroSettings, stored_parameters
from qlora.plan.shapes import read_shapes

ROOT = Path(__file__).parents[2]
TINY = ROOT / "qlora/assets/tiny"
NARROW = ["lora.r=5", "train.gradient_checkpointing=true"]
# Of the embedded base, as of a large one, only a part is gathered at one time.
SMALL = ZeroSettings(prefetch_bucket_size=60_000, max_live_parameters=1_300_000, param_persistence_threshold=1_000)


def run(folder: Path, stage: int, zero: ZeroSettings, overrides: list[str], **more: int) -> dict[str, Any]:
    """Take a step on two ranks; returns what the second one wrote down."""
    out = folder / "found.json"
    out.with_suffix(".yaml").write_text("{}\n")
    keys = ("prefetch_bucket_size", "max_live_parameters", "param_persistence_threshold")
    stage3 = {f"stage3_{key}": getattr(zero, key) for key in keys if getattr(zero, key) is not None}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", f"launch/accelerate/zero{stage}.yaml", str(Path(__file__).with_name("rank.py"))]
    command += [str(out), json.dumps(stage3 | more if stage == 3 else {}), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_keeps_what_is_planned(tmp_path: Path, stage: int) -> None:
    overrides = [*NARROW, "lora.train_norms=true"]
    found = run(tmp_path, stage, ZeroSettings(), overrides)
    job = load_config(tmp_path / "found.yaml", overrides)
    planned = plan_rank(read_shapes(TINY), job, "zero2" if stage == 2 else "zero3", 2).kept
    assert found["kept"] == {key: planned[key] for key in found["kept"]}
    if stage == 3:
        assert found["max_live"] == max_live(stored_parameters(read_shapes(TINY), job), ZeroSettings())
    assert set(planned) - set(found["kept"]) == ({"gradients"} if stage == 2 else set())


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.parametrize("recompute", [False, True])
def test_a_rank_gathers_no_more_than_is_planned_and_not_much_less(tmp_path: Path, recompute: bool) -> None:
    overrides = [f"train.gradient_checkpointing={str(recompute).lower()}"]
    found = run(tmp_path, 3, SMALL, overrides)
    job = load_config(tmp_path / "found.yaml", overrides)
    base = read_shapes(TINY)
    planned = 2 * plan_rank(base, job, "zero3", 2, SMALL).gathered  # own pieces included
    assert 0.6 * planned < found["gathered"] <= planned
    stored = stored_parameters(base, job, SMALL)
    assert largest_gather(stored) < found["at_once"] <= gathered_at_once(stored, SMALL)


@pytest.mark.long
@pytest.mark.e2e
def test_large_tensors_come_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight to where they are used; what is computed is the same."""
    zero = ZeroSettings(prefetch_bucket_size=2_000_000, param_persistence_threshold=1_000)  # a head and more
    overrides = ["train.gradient_checkpointing=false"]
    together = run(tmp_path, 3, zero, overrides)
    found = run(tmp_path, 3, zero, overrides, alone_bytes=100_000)
    stored = stored_parameters(read_shapes(TINY), load_config(tmp_path / "found.yaml", overrides), zero)
    assert found["losses"] == together["losses"]
    assert found["gathered"] == together["gathered"]
    head = max(p.num_bytes for p in stored)
    assert (together["largest_copied"], found["largest_copied"] < head) == (head, True)
    copied = gathered_at_once(stored, zero)
    monkeypatch.setattr(gathers, "ALONE_BYTES", 100_000)
    assert found["at_once"] <= gathered_at_once(stored, zero) < copied


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_lets_go_of_a_layer_before_the_next(tmp_path: Path, random_base: Path, reentrant: bool) -> None:
    """Layers larger than all else are gathered linear layer by linear layer, and hold what they gather to their end."""
    config = AutoConfig.from_pretrained(random_base)
    config.update({"num_hidden_layers": 8, "intermediate_size": 1024, "vocab_size": 320})
    base = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(random_base).save_pretrained(base)
    kind = f"train.gradient_checkpointing_kwargs.use_reentrant={str(reentrant).lower()}"
    overrides = [f"model.base={base}", "train.gradient_checkpointing=true", kind]
    found = run(tmp_path, 3, ZeroSettings(prefetch_bucket_size=0, param_persistence_threshold=1_000), overrides)
    stored = stored_parameters(read_shapes(base), load_config(tmp_path / "found.yaml", overrides))
    assert not any(p.gathered_with != p.module for p in stored)
    layer = sum(p.num_bytes for p in stored if ".layers.0." in p.module)
    assert found["at_once"] < 2 * layer
