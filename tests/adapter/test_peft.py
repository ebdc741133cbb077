"""Files we write, opened by PEFT; files PEFT writes, opened here: equal logits both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.adapter.files import load_adapter, save_adapter
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import AdapterError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
MakeBase = Callable[..., Path]


def load_ours(folder: Path, *, in_4bit: bool = False) -> Any:
    quantization = QuantizationConfig() if in_4bit else None
    return load_model(resolve_base(str(folder)), dtype="float32", quantization=quantization)


def load_theirs(folder: Path, *, in_4bit: bool = False) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    kwargs = {"quantization_config": config} if in_4bit else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def randomize(model: nn.Module) -> None:
    """Move everything that trains: B from zero, and norms, embeddings and heads a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def logits(model: nn.Module) -> torch.Tensor:
    # In training mode, without dropout: in eval mode bitsandbytes repacks its weights on some CPUs.
    with torch.no_grad():
        return model.train()(IDS).logits


def assert_like(found: torch.Tensor, want: torch.Tensor) -> None:
    """fp32 sums in another order: 1e-5 of the logits' size."""
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


def assert_effect(model: nn.Module, base: nn.Module) -> None:
    assert not torch.allclose(logits(model), logits(base), atol=0.01)


OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7.5},
    "some layers": {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]},
    "one layer of a name": {"target_modules": ["layers.0.self_attn.v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "norms": {"train_norms": True},
    "trained head": {"train_head": True},
    "trained embeddings": {"train_embeddings": True},
    "all of it": {"train_norms": True, "train_head": True, "train_embeddings": True, "use_rslora": True},
    "bf16 factors": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_gives_peft_the_same_logits(make_base: MakeBase, tmp_path: Path, case: str) -> None:
    folder = make_base("llama", dtype="float32")
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(**({"r": 4, "lora_dropout": 0.0} | OURS[case])))
    randomize(ours)
    save_adapter(ours, tmp_path)
    assert_effect(ours, load_ours(folder))
    theirs = PeftModel.from_pretrained(load_theirs(folder), tmp_path)
    loaded = [name for name, _ in theirs.named_parameters() if "lora_A" in name or "modules_to_save" in name]
    assert len([name for name in loaded if "lora_A" in name]) == len(list(lora_layers(ours)))
    if case == "bf16 factors":  # products of bf16 factors, in another order
        torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=0.02 * logits(ours).abs().max().item())
    else:
        assert_like(logits(theirs), logits(ours))
    # And back again, into our own.
    again = load_ours(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "gpt_neox", "mixtral", "opt", "phi3"])
def test_other_architectures(make_base: MakeBase, tmp_path: Path, name: str) -> None:
    folder = make_base(name, dtype="float32")
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, train_norms=True))
    randomize(ours)
    save_adapter(ours, tmp_path)
    assert_effect(ours, load_ours(folder))
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder), tmp_path)), logits(ours))
    again = load_ours(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_4bit_base_both_ways(make_base: MakeBase, tmp_path: Path, name: str) -> None:
    """gpt2 keeps its weights the other way round in its files; in 4 bits PEFT and we see the same linear layer."""
    folder = make_base(name, dtype="float32")
    ours = load_ours(folder, in_4bit=True)
    inject_lora(ours, LoraConfig(r=4))
    randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    assert_effect(ours, load_ours(folder, in_4bit=True))
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder, in_4bit=True), tmp_path / "ours")), logits(ours))

    theirs = get_peft_model(load_theirs(folder, in_4bit=True), peft.LoraConfig(r=3, target_modules="all-linear"))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_ours(folder, in_4bit=True)
    load_adapter(again, tmp_path / "theirs")
    assert_like(logits(again), logits(theirs))


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear", "lora_alpha": 5},
    "a pattern": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "r above a dimension": {"target_modules": ["q_proj"], "r": 80},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_writes_gives_us_the_same_logits(make_base: MakeBase, tmp_path: Path, case: str) -> None:
    folder = make_base("llama", dtype="float32")
    theirs = get_peft_model(load_theirs(folder), peft.LoraConfig(**({"r": 4} | THEIRS[case])))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    want = logits(theirs)
    ours = load_ours(folder)
    found = load_adapter(ours, tmp_path)
    assert_like(logits(ours), want)
    assert_effect(ours, load_ours(folder))
    assert set(found.targeted) == {path for path, _ in lora_layers(ours)}
    # What was loaded trains on: exactly what PEFT would train.
    theirs_trains = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs_trains
    # And saves again as a file that PEFT reads as the same.
    save_adapter(ours, tmp_path / "again")
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder), tmp_path / "again")), want)


def test_on_a_base_that_ties_its_head(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32", tie_word_embeddings=True)
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, train_embeddings=True, train_head=True))
    randomize(ours)
    save_adapter(ours, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    head, embedding = (held[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embedding)
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder), tmp_path)), logits(ours))
    again = load_ours(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_peft_with_its_tie_kept(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32", tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    theirs = get_peft_model(load_theirs(folder), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(folder)
    load_adapter(ours, tmp_path)
    assert_like(logits(ours), logits(theirs))


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_peft_that_broke_the_tie_is_refused(make_base: MakeBase, tmp_path: Path, saved: list[str]) -> None:
    """PEFT trains copies of its own, after which embedding and head differ: one tensor here cannot be both."""
    folder = make_base("llama", dtype="float32", tie_word_embeddings=True)
    theirs = get_peft_model(load_theirs(folder), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(folder)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(AdapterError, match="this base ties it to"):
        load_adapter(ours, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_a_layer_whose_name_ends_anothers(make_base: MakeBase, tmp_path: Path) -> None:
    """No list of suffixes selects `0` without `1.0`: the config then holds a pattern, which PEFT reads the same way."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    ours = make()
    inject_lora(ours, LoraConfig(r=2, target_modules="0"))
    randomize(ours)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs(x), ours(x))
    again = make()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), ours(x))


REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "rank_pattern": {"rank_pattern": {"q_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32}},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [5, 7]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_peft_can_do_and_we_do_not_is_refused_by_name(make_base: MakeBase, tmp_path: Path, field: str) -> None:
    folder = make_base("llama", dtype="float32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **REFUSED[field])
    theirs = get_peft_model(load_theirs(folder), config)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(folder)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {field} changes what the adapter computes"):
        load_adapter(ours, tmp_path)
    assert not list(lora_layers(ours))


def test_an_adapted_embedding_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32")
    get_peft_model(load_theirs(folder), peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(AdapterError, match="lora_embedding_A is of a kind this version cannot apply"):
        load_adapter(load_ours(folder), tmp_path)


def test_another_method_of_peft_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32")
    get_peft_model(load_theirs(folder), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="not a LoRA adapter") as error:
        load_adapter(load_ours(folder), tmp_path)
    assert error.value.found == "IA3"


def test_the_weights_beside_an_adapted_head_must_be_the_bases(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32")
    theirs = get_peft_model(load_theirs(folder), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "a")
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in held
    # On a base in another type it is compared in that type.
    load_adapter(load_model(resolve_base(str(folder)), dtype="bfloat16"), tmp_path / "a")
    ours = load_ours(folder)
    load_adapter(ours, tmp_path / "a", "one")
    load_adapter(ours, tmp_path / "a", "two")  # the head is a LoRA layer by now
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight[3, 3] += 1.0
    theirs.save_pretrained(tmp_path / "b")
    with pytest.raises(AdapterError, match="the base weight beside the adapter is not this base's"):
        load_adapter(load_ours(folder), tmp_path / "b")


def test_every_field_of_a_default_config_of_peft_is_known(make_base: MakeBase, tmp_path: Path) -> None:
    """And each of ours is a field of PEFT's, with PEFT's type."""
    folder = make_base("llama", dtype="float32")
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4))
    save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    default = peft.LoraConfig().to_dict()
    assert written.keys() <= default.keys() | {"peft_type"}
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora, read.lora_dropout) == (4, 32, False, 0.0)
    assert read.inference_mode
    assert read.task_type == "CAUSAL_LM"
    assert sorted(read.target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    )
