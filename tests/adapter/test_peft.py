"""Files we write, opened by PEFT; files PEFT writes, opened here: equal logits, and the same file again.

Kinds of layers and variants of LoRA are two tables, and every pair of them is tested both ways.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer as PeftLayer
from safetensors.torch import load_file, save_file
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
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MakeBase = Callable[..., Path]


@dataclass(frozen=True)
class Kind:
    """A kind of layer: the base it is in, and what to target."""

    architecture: str
    target_modules: list[str]
    changes: dict[str, Any] = field(default_factory=dict)
    in_4bit: bool = False


KINDS = {
    "linear": Kind("llama", ["q_proj", "down_proj"]),
    "linear with a bias": Kind("qwen2", ["q_proj", "down_proj"], {"tie_word_embeddings": False}),
    "4-bit linear": Kind("llama", ["q_proj", "down_proj"], in_4bit=True),
    "Conv1D": Kind("gpt2", ["c_attn", "mlp.c_proj"]),
    "head": Kind("llama", ["q_proj", "lm_head"]),
    "tied head": Kind("llama", ["q_proj", "lm_head"], {"tie_word_embeddings": True}),
}
# Keys that PEFT's config and ours share. {0} is the first of a kind's targets, {h} what holds the blocks.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 7},
    "lora_bias": {"lora_bias": True},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True},
    "bf16": {"dtype": "bfloat16"},
    "patterns": {"rank_pattern": {"{0}": 2, r"{h}\.1\..*": 3}, "alpha_pattern": {"{0}": 5, r"^.*{h}\.[0]\..*": 12}},
    "patterns and rsLoRA": {"rank_pattern": {"{0}": 2}, "alpha_pattern": {"{0}": 5}, "use_rslora": True},
    "patterns and DoRA": {"rank_pattern": {"{0}": 2}, "alpha_pattern": {"{0}": 5}, "use_dora": True},
    "some blocks": {"layers_to_transform": [1]},
    "some blocks of a list": {"layers_to_transform": [0], "layers_pattern": ["{h}"]},
    "exclude_modules": {"exclude_modules": ["{h}.1.{full}"]},
    "a regular expression": {"target_modules": r".*{h}\.\d+.*\.{0}", "rank_pattern": {"1.*": 6}},
}
PAIRS = list(itertools.product(KINDS, VARIANTS))
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's own remarks on ties, biases and Conv1D
]


def config_of(kind: Kind, variant: str) -> dict[str, Any]:
    """The shared keys with a kind's own names in them."""
    blocks = {"gpt2": "h"}.get(kind.architecture, "layers")
    full = {"c_attn": "attn.c_attn", "q_proj": "self_attn.q_proj"}[kind.target_modules[0]]

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{0}", kind.target_modules[0]).replace("{h}", blocks).replace("{full}", full)
        if isinstance(value, list):
            return [named(item) for item in value]
        return {named(key): named(item) for key, item in value.items()} if isinstance(value, dict) else value

    shared = {"r": 4, "lora_alpha": 8, "target_modules": kind.target_modules} | named(VARIANTS[variant])
    if "rank_pattern" in shared:  # in the order that PEFT writes: see the test of another order below
        shared["rank_pattern"] = dict(sorted(shared["rank_pattern"].items()))
    return shared


@cache
def read_ours(folder: Path, in_4bit: bool) -> Any:
    quantization = QuantizationConfig() if in_4bit else None
    return load_model(resolve_base(str(folder)), dtype="float32", quantization=quantization)


@cache
def read_theirs(folder: Path, in_4bit: bool) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    kwargs = {"quantization_config": config} if in_4bit else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def load_ours(folder: Path, *, in_4bit: bool = False) -> Any:
    return copy.deepcopy(read_ours(folder, in_4bit))


def load_theirs(folder: Path, *, in_4bit: bool = False) -> Any:
    return copy.deepcopy(read_theirs(folder, in_4bit))


@cache
def base_logits(folder: Path, in_4bit: bool = False) -> torch.Tensor:
    return logits(load_ours(folder, in_4bit=in_4bit))


def randomize(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Move everything that trains (B from zero, and norms, embeddings and heads a little), to values of a dtype."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter.to(dtype))


def logits(model: nn.Module) -> torch.Tensor:
    # In training mode, without dropout: in eval mode bitsandbytes repacks its weights on some CPUs.
    with torch.no_grad():
        return model.train()(IDS).logits


def assert_like(found: torch.Tensor, want: torch.Tensor) -> None:
    """fp32 sums in another order: 1e-5 of the logits' size."""
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


def assert_effect(found: torch.Tensor, folder: Path, in_4bit: bool = False) -> None:
    assert not torch.allclose(found, base_logits(folder, in_4bit), atol=0.01)


def updates_of_theirs(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, PeftLayer)
    }


def updates_of_ours(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {path: (layer.updates["default"].r, layer.updates["default"].scaling) for path, layer in lora_layers(model)}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """What a file holds of the adapter, without PEFT's copies of the base's weights."""
    return {key: value for key, value in load_file(folder / WEIGHTS).items() if ".base_layer." not in key}


def assert_same_tensors(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    assert all(found[key].dtype == want[key].dtype and torch.equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize(("kind_name", "variant"), PAIRS)
def test_ours_in_peft(make_base: MakeBase, tmp_path: Path, kind_name: str, variant: str) -> None:
    kind = KINDS[kind_name]
    folder = make_base(kind.architecture, dtype="float32", **kind.changes)
    ours = load_ours(folder, in_4bit=kind.in_4bit)
    inject_lora(ours, LoraConfig(**config_of(kind, variant)))
    randomize(ours)
    save_adapter(ours, tmp_path)
    want = logits(ours)
    trains = [p for p in ours.parameters() if p.requires_grad]
    held = load_file(tmp_path / WEIGHTS)
    assert len(held) == len(trains)
    assert sum(value.numel() for value in held.values()) == sum(p.numel() for p in trains)

    theirs = PeftModel.from_pretrained(load_theirs(folder, in_4bit=kind.in_4bit), tmp_path)
    assert updates_of_theirs(theirs) == updates_of_ours(ours)
    assert_like(logits(theirs), want)
    assert_effect(want, folder, kind.in_4bit)
    again = load_ours(folder, in_4bit=kind.in_4bit)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), want)
    save_adapter(again, tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG))


@pytest.mark.parametrize(("kind_name", "variant"), PAIRS)
def test_peft_in_ours(make_base: MakeBase, tmp_path: Path, kind_name: str, variant: str) -> None:
    kind = KINDS[kind_name]
    folder = make_base(kind.architecture, dtype="float32", **kind.changes)
    shared = config_of(kind, variant)
    dtype = getattr(torch, shared.pop("dtype", "float32"))
    model = get_peft_model(load_theirs(folder, in_4bit=kind.in_4bit), peft.LoraConfig(task_type="CAUSAL_LM", **shared))
    randomize(model, dtype)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    save_file(
        {key: v if "base_layer" in key else v.to(dtype) for key, v in held.items()}, tmp_path / WEIGHTS, {"format": "pt"}
    )
    # The order that patterns have in the file is the alphabet's, so PEFT itself may understand the file otherwise.
    theirs = PeftModel.from_pretrained(load_theirs(folder, in_4bit=kind.in_4bit), tmp_path)
    want = logits(theirs)

    ours = load_ours(folder, in_4bit=kind.in_4bit)
    load_adapter(ours, tmp_path)
    assert updates_of_ours(ours) == updates_of_theirs(theirs)
    assert_like(logits(ours), want)
    assert_effect(want, folder, kind.in_4bit)
    # What was loaded trains on: exactly what PEFT would train.
    theirs_trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs_trains
    save_adapter(ours, tmp_path / "again")
    assert_same_tensors(tensors_in(tmp_path / "again"), tensors_in(tmp_path))
    before, after = (peft.LoraConfig.from_pretrained(path) for path in (tmp_path, tmp_path / "again"))
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "lora_dropout", "task_type", "fan_in_fan_out"):
        assert getattr(after, key) == getattr(before, key), key
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        assert getattr(after, key) == getattr(before, key), key
    for key in ("rank_pattern", "alpha_pattern"):
        assert list(getattr(after, key).items()) == list(getattr(before, key).items())
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder, in_4bit=kind.in_4bit), tmp_path / "again")), want)


def test_the_first_pattern_counts_also_out_of_the_alphabets_order(make_base: MakeBase, tmp_path: Path) -> None:
    """PEFT sorts what it writes, so that its own file of these patterns asks for other ranks than its tensors have."""
    folder = make_base("llama", dtype="float32")
    patterns = {"q_proj": 2, "layers.0.self_attn.q_proj": 6}
    config = {
        "target_modules": ["q_proj"],
        "rank_pattern": patterns,
        "alpha_pattern": {key: 3 * r for key, r in patterns.items()},
    }
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(**config))
    assert set(updates_of_ours(ours).values()) == {(2, 3.0)}
    randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(load_theirs(folder), tmp_path / "ours")
    assert updates_of_theirs(theirs) == updates_of_ours(ours)
    assert_like(logits(theirs), logits(ours))

    get_peft_model(load_theirs(folder), peft.LoraConfig(**config)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(load_theirs(folder), tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj.* has shape \(2, 64\), this base needs \(6, 64\)"):
        load_adapter(load_ours(folder), tmp_path / "theirs")


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "gpt_neox", "mixtral", "opt", "phi3"])
def test_other_architectures(make_base: MakeBase, tmp_path: Path, name: str) -> None:
    folder = make_base(name, dtype="float32")
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, train_norms=True))
    randomize(ours)
    save_adapter(ours, tmp_path)
    assert_effect(logits(ours), folder)
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder), tmp_path)), logits(ours))
    again = load_ours(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_conv1d_in_4_bits_is_a_linear_layer_both_ways(make_base: MakeBase, tmp_path: Path) -> None:
    """gpt2 keeps its weights the other way round in its files; in 4 bits PEFT and we see the same linear layer."""
    folder = make_base("gpt2", dtype="float32")
    ours = load_ours(folder, in_4bit=True)
    inject_lora(ours, LoraConfig(r=4))
    randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder, in_4bit=True), tmp_path / "ours")), logits(ours))
    # The same adapter on the base as it is in the files.
    theirs = PeftModel.from_pretrained(load_theirs(folder), tmp_path / "ours")
    plain = load_ours(folder)
    load_adapter(plain, tmp_path / "ours")
    assert_like(logits(plain), logits(theirs))


WHOLE: dict[str, dict[str, Any]] = {
    "norms": {"train_norms": True},
    "trained head": {"train_head": True},
    "trained embeddings": {"train_embeddings": True},
    "all of it": {"train_norms": True, "train_head": True, "train_embeddings": True, "use_rslora": True},
}


@pytest.mark.parametrize("case", WHOLE)
def test_modules_that_we_train_as_wholes(make_base: MakeBase, tmp_path: Path, case: str) -> None:
    folder = make_base("llama", dtype="float32")
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, **WHOLE[case]))
    randomize(ours)
    save_adapter(ours, tmp_path)
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder), tmp_path)), logits(ours))
    again = load_ours(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


SAVED_BY_PEFT = [
    ["lm_head"],
    ["embed_tokens"],
    ["model.norm"],  # whose last part is the end of others' names
    ["norm", "input_layernorm"],
    ["layers.1.input_layernorm", "lm_head"],
    ["layers.0.self_attn"],  # a module of modules, of which nothing is targeted
]


@pytest.mark.parametrize("saved", SAVED_BY_PEFT, ids=str)
def test_modules_that_peft_trains_as_wholes(make_base: MakeBase, tmp_path: Path, saved: list[str]) -> None:
    folder = make_base("llama", dtype="float32")
    theirs = get_peft_model(load_theirs(folder), peft.LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=saved))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_ours(folder)
    load_adapter(ours, tmp_path)
    assert_like(logits(ours), logits(theirs))
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    save_adapter(ours, tmp_path / "again")
    assert_same_tensors(tensors_in(tmp_path / "again"), tensors_in(tmp_path))
    again = PeftModel.from_pretrained(load_theirs(folder), tmp_path / "again")
    assert_like(logits(again), logits(theirs))
    # Exactly these, and no more, are modules of their own in PEFT.
    wrapped = {name for name, _ in again.named_parameters() if "modules_to_save" in name}
    assert len(wrapped) == len([key for key in tensors_in(tmp_path) if "lora_" not in key])


def test_on_a_base_that_ties_its_head(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32", tie_word_embeddings=True)
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, train_embeddings=True, train_head=True))
    randomize(ours)
    save_adapter(ours, tmp_path)
    held = load_file(tmp_path / WEIGHTS)
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
    held = load_file(tmp_path / "a" / WEIGHTS)
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


def test_what_we_write_are_fields_of_peft(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32")
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4))
    save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    default = peft.LoraConfig().to_dict()
    assert written.keys() <= default.keys() | {"peft_type"}
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert (read.r, read.lora_alpha, read.use_rslora, read.lora_dropout) == (4, 32, False, 0.0)
    assert read.inference_mode
    assert read.task_type == "CAUSAL_LM"
    assert sorted(read.target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    )
