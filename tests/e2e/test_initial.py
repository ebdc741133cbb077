"""Training that starts from the base's weights or from the data, in shares: begun, stopped, gone on with, and used.

That other launches start and train alike is in `test_variants.py`; the bytes in every world are in `test_sharded_load.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora.adapter.files import load_adapter, open_adapter
from qlora.adapter.residual import INITIAL_NAME
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.lora.from_weights import FromWeights
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

pytestmark = [pytest.mark.e2e, pytest.mark.long]


@pytest.mark.parametrize("method", ["loftq", "eva"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(project: Any, method: str) -> None:
    """It rebuilds the base from the checkpoint's factors: with others, or with none, losses would differ at once."""
    whole, resumed = project.result(f"initial.{method}"), project.result(f"initial.{method}_resumed")
    assert "after step 3" in resumed.logs[0]
    for key in ("loss", "grad_norm"):
        assert resumed.values(key) == whole.values(key)
    names = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    names += [f"checkpoints/step-0000000{step}/optimizer.safetensors" for step in (3, 6, 7)]
    if method != "eva":
        names += [f"adapter/{INITIAL_NAME}", f"checkpoints/step-00000006/{INITIAL_NAME}"]
    for name in names:
        assert (resumed.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes(), name


def test_two_ranks_record_the_factors_of_one(project: Any) -> None:
    """And the checkpoint's manifest lists them; ranks share the decompositions out among themselves."""
    run_dir: Path = project.result("initial.loftq").run_dir
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="loftq", loftq_iterations=2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    source = resolve_base(str(project.base))
    alone = load_model(
        source, dtype="float32", quantization=QuantizationConfig(), initial=FromWeights(config, seed=1)
    ).qlora_initial
    torch.set_num_threads(before)
    found = open_adapter(run_dir / "adapter")
    assert found.initial is not None
    recorded = found.initial.read()
    assert (recorded.method, recorded.seed, list(recorded.factors)) == ("loftq", 1, list(alone.factors))
    for path, own in recorded.factors.items():
        for pair, wanted in ((own.start, alone.factors[path].start), (own.subtracted, alone.factors[path].subtracted)):
            assert pair is not None
            assert wanted is not None
            for part, other in zip(pair, wanted, strict=True):
                torch.testing.assert_close(part, other, atol=1e-5, rtol=1e-5)
    manifest = json.loads((run_dir / "checkpoints/step-00000006/manifest.json").read_text())
    assert INITIAL_NAME in manifest["files"]
    log = project.result("initial.loftq").logs[0]
    assert "quantization error |W - (Q + s B A)| / |W| of 14 layers" in log


def test_eva_starts_at_other_directions_than_the_default(project: Any) -> None:
    """Orthonormal ones, which seven small steps leave nearly so; the base is the plain one."""
    run_dir: Path = project.result("initial.eva").run_dir
    tensors = load_file(run_dir / "checkpoints/step-00000003/adapter_model.safetensors")
    factors = {key: value for key, value in tensors.items() if "lora_A" in key}
    assert len(factors) == 14
    for key, A in factors.items():
        assert (A @ A.T - torch.eye(3)).abs().max() < 0.5, key
    assert not open_adapter(run_dir / "adapter").changes_base
    assert json.loads((run_dir / "adapter/adapter_config.json").read_text())["init_lora_weights"] == "eva"


def test_the_adapter_is_evaluated_beside_the_base_itself(project: Any, tmp_path: Path) -> None:
    """Two loads under ZeRO-3: `base` is the plain base, and `adapter` the model that was trained."""
    found = project.result("initial.loftq")
    log = tmp_path / "eval.log"
    adapter = found.run_dir / "adapter"
    overrides = [f"data.eval=[{project.eval}]", "--adapter", str(adapter), "--json"]
    process = project.launch("sharded", 2, "eval", str(project.job), *overrides, log=log)
    assert project.wait(process, log) == 0, log.read_text()[-4000:]
    line = next(line for line in log.read_text().splitlines() if line.startswith("{"))
    results = json.loads(line)
    assert results["base"]["eval_loss"] > results["adapter"]["eval_loss"] + 0.1
    source, losses = resolve_base(str(project.base)), {}
    for name, initial in (("base", None), ("adapter", open_adapter(adapter).initial)):
        model = load_model(
            source,
            dtype="float32",
            quantization=QuantizationConfig(),
            initial=initial.read() if initial is not None else None,
        )
        if initial is not None:
            load_adapter(model, adapter)
        losses[name] = loss_of(model, project)
    for name, loss in losses.items():
        assert results[name]["eval_loss"] == pytest.approx(loss, rel=1e-3)


def loss_of(model: Any, project: Any) -> float:
    """Loss over the answers of the evaluation data, row by row by transformers' own forward."""
    from qlora.config.schema import DataConfig
    from qlora.data.prepare import prepare
    from qlora.data.tokenizer import load_tokenizer

    config = DataConfig(max_length=128, cache_dir=str(project.folder / "cache"))
    rows = prepare([str(project.eval)], load_tokenizer(str(project.base)), config)
    total = count = 0.0
    for index in range(len(rows)):
        tokens, flags = (torch.from_numpy(part.astype("int64")) for part in rows.row(index))
        labels = torch.where(flags.bool(), tokens, -100)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count
