"""Adapters of fused experts, PEFT's files and ours: equal logits both ways, and the same tensors again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.adapter.files import load_adapter, open_adapter, save_adapter
from qlora.adapter.hotswap import hotswap_adapter
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
}
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
CASES: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": [UP, DOWN]},
    "the other order": {"target_parameters": [DOWN, UP]},
    "up": {"target_parameters": [UP]},
    "down": {"target_parameters": [DOWN]},
    "with attention": {"target_modules": ["q_proj", "o_proj"], "target_parameters": [UP, DOWN]},
    "one block": {"target_parameters": [f"layers.1.{UP}", DOWN]},
    "patterns": {
        "target_parameters": [UP, DOWN],
        "rank_pattern": {"gate_up_proj": 5},
        "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 7},
        "use_rslora": True,
    },
}


def make(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | KINDS[kind])), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def randomize(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_like(found: torch.Tensor, want: torch.Tensor) -> None:
    """fp32 sums in another order, through the exponentials of two blocks."""
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5 * max(1.0, want.abs().max().item()))


def ours_of(kind: str, case: str = "both", **changes: Any) -> Any:
    model = make(kind)
    inject_lora(model, LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": []} | CASES[case] | changes)))
    randomize(model)
    return model


def theirs_of(kind: str, case: str = "both", **changes: Any) -> Any:
    options = {"r": 3, "lora_alpha": 6, "target_modules": [], "task_type": "CAUSAL_LM"} | CASES[case] | changes
    model = get_peft_model(make(kind), peft.LoraConfig(**options))
    randomize(model)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_gives_peft_the_same_logits(tmp_path: Path, kind: str, case: str) -> None:
    ours = ours_of(kind, case)
    save_adapter(ours, tmp_path)
    want = logits(ours)
    assert not torch.allclose(want, logits(make(kind)), atol=0.1)
    theirs = PeftModel.from_pretrained(make(kind), tmp_path)
    assert len([name for name, _ in theirs.named_parameters() if "lora_A" in name]) == len(list(lora_layers(ours)))
    assert_like(logits(theirs), want)
    # And back again, into our own.
    again = make(kind)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_writes_gives_us_the_same_logits_and_the_same_file_again(tmp_path: Path, kind: str, case: str) -> None:
    theirs = theirs_of(kind, case)
    theirs.save_pretrained(tmp_path / "theirs")
    want = logits(theirs)
    ours = make(kind)
    load_adapter(ours, tmp_path / "theirs")
    assert_like(logits(ours), want)
    # What was loaded trains on: exactly what PEFT would train.
    theirs_trains = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs_trains
    save_adapter(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert sorted(before) == sorted(after)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sorted(written["target_parameters"]) == sorted(CASES[case]["target_parameters"])
    assert sorted(written["target_modules"]) == sorted(CASES[case].get("target_modules", []))


def test_a_selection_that_peft_would_not_make_is_written_path_by_path(tmp_path: Path) -> None:
    """PEFT takes no notice of blocks where it looks for parameters."""
    ours = ours_of("qwen3_moe", "both", layers_to_transform=[1])
    save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_parameters"] == [f"1.{DOWN}", f"1.{UP}"]
    assert_like(logits(PeftModel.from_pretrained(make("qwen3_moe"), tmp_path)), logits(ours))


def test_dropout_is_left_out_of_the_file(tmp_path: Path) -> None:
    """PEFT, which cannot drop inputs of fused experts, would refuse to load it; it changes nothing of what is computed."""
    ours = ours_of("mixtral", lora_dropout=0.1)
    save_adapter(ours, tmp_path)
    assert_like(logits(PeftModel.from_pretrained(make("mixtral"), tmp_path)), logits(ours))


def test_two_adapters_of_one_model_are_each_a_file(tmp_path: Path) -> None:
    """The place of a weight in a file depends on what else that adapter adapts, not on what the model has."""
    model = ours_of("qwen3_moe")
    inject_lora(model, LoraConfig(r=2, target_modules=[], target_parameters=[UP]), "up")
    randomize(model)
    for name, depths in (("default", ["base_layer.lora_A", "lora_A"]), ("up", ["lora_A"])):
        save_adapter(model, tmp_path / name, name)
        held = load_file(tmp_path / name / "adapter_model.safetensors")
        found = [key for key in held if ".layers.0." in key and "lora_A" in key]
        assert found == [f"base_model.model.model.layers.0.mlp.experts.{depth}.weight" for depth in depths]
    assert_like(logits(PeftModel.from_pretrained(make("qwen3_moe"), tmp_path / "up")), logits(model))


def test_other_values_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    theirs = theirs_of("gpt_oss")
    theirs.save_pretrained(tmp_path)
    model = ours_of("gpt_oss", lora_alpha=3)
    assert not torch.allclose(logits(model), logits(theirs), atol=0.1)
    hotswap_adapter(model, tmp_path)
    assert_like(logits(model), logits(theirs))


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([UP], "the model has no such module"),  # the other update's place is nobody's then
        ([], "the model has no such module"),
        ([UP, DOWN, "mlp.experts.other_proj"], "the model has no parameter mlp.experts.other_proj"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(tmp_path: Path, entries: list[str], message: str) -> None:
    save_adapter(ours_of("qwen3_moe"), tmp_path)
    rewrite(tmp_path, target_parameters=entries)
    model = make("qwen3_moe")
    before = sorted(name for name, _ in model.named_parameters())
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, tmp_path)
    assert sorted(name for name, _ in model.named_parameters()) == before


def test_a_file_without_an_update_that_its_config_names_is_refused(tmp_path: Path) -> None:
    save_adapter(ours_of("qwen3_moe", "up"), tmp_path)
    rewrite(tmp_path, target_parameters=[UP, DOWN])
    with pytest.raises(AdapterError, match=r"no update of model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        load_adapter(make("qwen3_moe"), tmp_path)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    save_adapter(ours_of("qwen3_moe"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    tensors[key] = tensors[key][:-3].contiguous()  # one expert less
    save_file(tensors, file, {"format": "pt"})
    assert len(open_adapter(tmp_path).entries) == len(tensors)
    with pytest.raises(AdapterError, match=r"has shape \(9, 12\), this base needs \(12, 12\)"):
        load_adapter(make("qwen3_moe"), tmp_path)
