"""Saving what was trained and nothing else; loading only where it fits, and changing nothing where it does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.adapter.files import (
    adapter_parameters,
    delete_adapter,
    load_adapter,
    open_adapter,
    render_files,
    save_adapter,
)
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import AdapterError, BaseModelError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers, merge_adapter
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def randomize(model: nn.Module, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def load_llama(make_base: Callable[..., Path]) -> Callable[..., Any]:
    def load(*, in_4bit: bool = False, **changes: Any) -> Any:
        source = resolve_base(str(make_base("llama", **changes)))
        return load_model(source, quantization=QuantizationConfig() if in_4bit else None)

    return load


@pytest.fixture
def saved(load_llama: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of a good adapter of the llama base."""
    model = load_llama()
    inject_lora(model, LoraConfig(r=4))
    return save_adapter(randomize(model), tmp_path / "saved")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], **metadata: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt", **metadata})


def reconfigure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def snapshot(model: nn.Module) -> Any:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    trains = [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    active = [layer.active_adapter for _, layer in lora_layers(model)]
    return state, modules, trains, hooks, active, dict(getattr(model, "qlora_adapters", {}))


def assert_untouched(model: nn.Module, before: Any) -> None:
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


# Saving.


def test_the_file_holds_what_was_trained_and_nothing_else(load_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = load_llama(in_4bit=True)
    inject_lora(model, LoraConfig(r=4, train_norms=True))
    randomize(model)
    folder = save_adapter(model, tmp_path / "a" / "b")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    held = load_file(folder / WEIGHTS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(held) == len(trained)
    assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in trained.values())
    for name, parameter in trained.items():
        key = "base_model.model." + name.replace(".lora_A.default", ".lora_A.weight").replace(
            ".lora_B.default", ".lora_B.weight"
        )
        assert held[key].dtype == torch.float32
        assert torch.equal(held[key], parameter)
    # A file of a few factors is a few factors large.
    size = (folder / WEIGHTS).stat().st_size
    assert size < 4 * sum(p.numel() for p in trained.values()) + 200 * len(trained)


def test_metadata_and_config(load_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = load_llama(in_4bit=True)
    inject_lora(model, LoraConfig(r=4, lora_alpha=6.5, target_modules=["q_proj", "v_proj"]))
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["qlora"])
    assert metadata["format"] == "pt"
    assert described["base"]["fingerprint"] == model.qlora_base.source.fingerprint
    assert described["quantization"] == QuantizationConfig().model_dump()
    assert described["dtype"] == "bfloat16"
    text = (tmp_path / CONFIG).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 6.5, None)
    assert config["base_model_name_or_path"] == model.qlora_base.source.name


def test_the_same_state_gives_the_same_bytes(load_llama: Callable[..., Any], tmp_path: Path) -> None:
    contents = set()
    for number in range(16):  # the order of the metadata, where it is random, is right by chance once in two
        model = load_llama()
        inject_lora(model, LoraConfig(r=4, train_norms=True))
        randomize(model)
        folder = save_adapter(model, tmp_path / str(number))
        contents.add((folder / WEIGHTS).read_bytes() + (folder / CONFIG).read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_not_saved(load_llama: Callable[..., Any], saved: Path, value: float) -> None:
    model = load_llama()
    load_adapter(model, saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B["default"][3, 2] = value
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight holds values that are not finite"):
        save_adapter(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_empty_tensor_is_not_saved(load_llama: Callable[..., Any]) -> None:
    """What a state dict gives under ZeRO-3: adapters of 40 bytes have been published that way."""
    model = load_llama()
    inject_lora(model, LoraConfig(r=4))
    state = {key: p.detach() for key, p in adapter_parameters(model).items()}
    state[f"{Q}.lora_A.weight"] = torch.empty(0)
    with pytest.raises(AdapterError, match="is empty: it was not gathered"):
        render_files(model, state)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    load_llama: Callable[..., Any], saved: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_llama()
    load_adapter(model, saved)
    randomize(model, seed=2)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_adapter_that_is_not_there(load_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = load_llama()
    with pytest.raises(AdapterError, match="no adapter 'default'"):
        save_adapter(model, tmp_path / "x")
    inject_lora(model, LoraConfig(r=4), "a")
    for action in (lambda: save_adapter(model, tmp_path / "x", "b"), lambda: delete_adapter(model, "b")):
        with pytest.raises(AdapterError, match="no adapter 'b'") as error:
            action()
        assert error.value.found == ["a"]
    assert not (tmp_path / "x").exists()


def test_writing_is_for_one_rank(load_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = load_llama()
    inject_lora(model, LoraConfig(r=4))
    save_adapter(model, tmp_path / "x", write=False)
    assert not (tmp_path / "x").exists()


# Loading.


@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "dtype": "bfloat16"}, {"train_norms": True, "train_head": True}]
)
def test_what_is_saved_loads_as_it_was(
    load_llama: Callable[..., Any], tmp_path: Path, config: dict[str, Any], in_4bit: bool
) -> None:
    model = load_llama(in_4bit=in_4bit)
    inject_lora(model, LoraConfig(r=4, **config))
    save_adapter(randomize(model), tmp_path)
    again = load_llama(in_4bit=in_4bit)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    trains = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert {name: p.dtype for name, p in again.named_parameters() if p.requires_grad} == trains
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_adapter(again, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first


def test_two_adapters_from_files(load_llama: Callable[..., Any], tmp_path: Path) -> None:
    outputs = {}
    for seed, name in enumerate(("a", "b")):
        model = load_llama()
        inject_lora(model, LoraConfig(r=2 + seed, target_modules=["q_proj", "o_proj"][: 1 + seed]))
        save_adapter(randomize(model, seed), tmp_path / name)
        with torch.no_grad():
            outputs[name] = model(IDS).logits
    both = load_llama()
    for name in ("a", "b"):
        load_adapter(both, tmp_path / name, name)
        with torch.no_grad():
            assert torch.equal(both(IDS).logits, outputs[name])
    with pytest.raises(AdapterError, match="'a' already"):
        load_adapter(both, tmp_path / "b", "a")
    load_adapter(both, tmp_path / "b", "a", replace=True)
    with torch.no_grad():
        assert torch.equal(both(IDS).logits, outputs["b"])
    delete_adapter(both, "a")
    with torch.no_grad():
        assert torch.equal(both(IDS).logits, load_llama()(IDS).logits)
    assert list(both.qlora_adapters) == ["b"]
    assert all(list(layer.lora_A) == ["b"] for _, layer in lora_layers(both))


def test_another_base_is_refused(load_llama: Callable[..., Any], saved: Path) -> None:
    other = load_llama(initializer_range=0.2)
    before = snapshot(other)
    with pytest.raises(AdapterError, match="trained on another base") as error:
        load_adapter(other, saved)
    assert_untouched(other, before)
    assert other.qlora_base.source.fingerprint[:12] in str(error.value)
    load_adapter(other, saved, other_base=True)
    # The same base in 4 bits is the same base.
    load_adapter(load_llama(in_4bit=True), saved)


def only(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key not in names]


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(key: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


FILE_DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "nothing in it": (only(), "the adapter is empty"),
    "an empty tensor": (put(f"{Q}.lora_A.weight", 0), "the adapter is empty"),
    "A alone": (lambda t: t.pop(f"{Q}.lora_B.weight"), "1 layers have only one of A and B"),
    "B alone": (lambda t: t.pop(f"{Q}.lora_A.weight"), "1 layers have only one of A and B"),
    "A of another shape": (put(f"{Q}.lora_A.weight", 4, 63), "1 tensors do not fit the model"),
    "B of another shape": (put(f"{Q}.lora_B.weight", 63, 4), "1 tensors do not fit the model"),
    "both of another r": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(8, 64), f"{Q}.lora_B.weight": torch.ones(64, 8)}),
        "2 tensors do not fit the model",
    ),
    "turned round": (put(f"{Q}.lora_A.weight", 64, 4), "1 tensors do not fit"),
    "a layer that is not there": (
        lambda t: [rename(f"{Q}.lora_{x}.weight", f"{Q[:-6]}z_proj.lora_{x}.weight")(t) for x in "AB"],
        "2 tensors do not fit the model",
    ),
    "a layer of another kind": (
        lambda t: [rename(f"{Q}.lora_{x}.weight", f"base_model.model.model.norm.lora_{x}.weight")(t) for x in "AB"],
        "RMSNorm cannot carry lora_A",
    ),
    "a whole module that is not there": (put("base_model.model.model.extra.weight", 3), "the model has no such module"),
    "a whole module of another shape": (put("base_model.model.model.norm.weight", 3), "has shape"),
    "a parameter that is not there": (put("base_model.model.model.norm.bias", 64), "cannot carry bias"),
    "a foreign name": (put("model.norm.weight", 64), "no part of a PEFT adapter"),
    "a magnitude": (put(f"{Q}.lora_magnitude_vector", 64), "of a kind this version cannot apply"),
    "an adapter's name inside": (put(f"{Q}.lora_A.default.weight", 4, 64), "of a kind this version cannot apply"),
    "trained tokens": (
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 64),
        "of a kind this version cannot apply",
    ),
    "one layer of the other base's size": (put(f"{Q}.base_layer.weight", 64, 64), "is not this base's"),
}


@pytest.mark.parametrize("damage", FILE_DAMAGES)
@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_file_that_does_not_fit_changes_nothing(
    load_llama: Callable[..., Any], saved: Path, damage: str, in_4bit: bool
) -> None:
    change, message = FILE_DAMAGES[damage]
    rewrite(saved, change)
    model = load_llama(in_4bit=in_4bit)
    inject_lora(model, LoraConfig(r=2, target_modules=["v_proj"]), "other")
    before = snapshot(model)
    if in_4bit and damage.startswith("one layer of the other base"):
        message = "do not fit the model"  # a packed weight has another shape
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(model, saved)
    assert WEIGHTS in str(error.value)
    assert_untouched(model, before)


CONFIG_DAMAGES: dict[str, dict[str, Any]] = {
    "r": {"r": 0},
    "r is not a whole number": {"r": 4.5},
    "r is not a positive number": {"r": "four"},
    "r is not a positive number (true)": {"r": True},
    "lora_alpha": {"lora_alpha": -1},
    "lora_alpha is not": {"lora_alpha": float("inf")},
    "lora_alpha is not a": {"lora_alpha": None},
    "lora_dropout": {"lora_dropout": 1.0},
    "lora_dropout is not": {"lora_dropout": "x"},
    "modules_to_save": {"modules_to_save": "lm_head"},
    "modules_to_save names modules of which the file holds nothing": {"modules_to_save": ["lm_head"]},
    "not a LoRA adapter": {"peft_type": "IA3"},
    "not a LoRA adapter (none)": {"peft_type": None},
    "use_dora changes": {"use_dora": True},
    "lora_bias changes": {"lora_bias": True},
    "bias changes": {"bias": "lora_only"},
    "init_lora_weights changes": {"init_lora_weights": "pissa_niter_4"},
    "rank_pattern changes": {"rank_pattern": {"q_proj": 8}},
    "alpha_pattern changes": {"alpha_pattern": {"q_proj": 8}},
    "target_parameters changes": {"target_parameters": ["experts.down_proj"]},
    "trainable_token_indices changes": {"trainable_token_indices": [1]},
    "a_field_of_next_year changes": {"a_field_of_next_year": 0.5},
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES)
def test_a_config_that_cannot_be_kept_to_is_refused(load_llama: Callable[..., Any], saved: Path, damage: str) -> None:
    reconfigure(saved, **CONFIG_DAMAGES[damage])
    model = load_llama()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=damage.split(" (")[0]):
        load_adapter(model, saved)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "off",
    [
        {"use_dora": False},
        {"rank_pattern": {}},
        {"bias": "none"},
        {"a_field_of_next_year": None},
        {"init_lora_weights": "eva"},
    ],
    ids=str,
)
def test_a_field_that_is_off_is_let_through(load_llama: Callable[..., Any], saved: Path, off: dict[str, Any]) -> None:
    reconfigure(saved, **off)
    load_adapter(load_llama(), saved)


def test_a_config_needs_no_more_than_peft_needs(load_llama: Callable[..., Any], saved: Path) -> None:
    model = load_llama()
    load_adapter(model, saved)
    (saved / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["anything, for names decide"]})
    )
    again = load_llama()
    load_adapter(again, saved)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000, "\udcff"], ids=lambda text: repr(text)[:8])
def test_a_config_that_is_none(load_llama: Callable[..., Any], saved: Path, text: str) -> None:
    (saved / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: not JSON"):
        load_adapter(load_llama(), saved)


def test_missing_files(load_llama: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    model = load_llama()
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load_adapter(model, tmp_path)
    (saved / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        load_adapter(model, saved)


def test_pickle_is_never_opened(load_llama: Callable[..., Any], saved: Path) -> None:
    torch.save(load_file(saved / WEIGHTS), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, a pickle file, which is never opened"):
        load_adapter(load_llama(), saved)


def test_a_link_out_of_the_folder_is_refused(load_llama: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    shutil.move(saved / WEIGHTS, tmp_path / "elsewhere.safetensors")
    (saved / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(AdapterError, match="a link out of the adapter's folder"):
        load_adapter(load_llama(), saved)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_cut_short(load_llama: Callable[..., Any], saved: Path, length: int) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:length])
    model = load_llama()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_adapter(model, saved)
    assert_untouched(model, before)


@pytest.mark.parametrize("described", ["", "{", "[]", "3"])
def test_damaged_metadata(saved: Path, described: str) -> None:
    rewrite(saved, lambda tensors: None, qlora=described)
    with pytest.raises(AdapterError, match="damaged metadata"):
        open_adapter(saved)


def test_a_name_that_is_none(load_llama: Callable[..., Any], saved: Path) -> None:
    model = load_llama()
    before = snapshot(model)
    for name in ("", "a.b", "keys"):
        with pytest.raises(AdapterError, match="cannot have this name"):
            load_adapter(model, saved, name)
    assert_untouched(model, before)


def test_beside_a_merged_adapter_nothing_is_loaded(load_llama: Callable[..., Any], saved: Path) -> None:
    model = load_llama()
    load_adapter(model, saved)
    merge_adapter(model)
    with pytest.raises(AdapterError, match="merged already"):
        load_adapter(model, saved, "other")


def test_a_layer_with_arithmetic_of_its_own_is_not_replaced(saved: Path, load_llama: Callable[..., Any]) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3.0 * super().forward(x)

    model = load_llama()
    model.set_submodule("model.layers.0.self_attn.q_proj", Scaled(64, 64, bias=False))
    with pytest.raises(AdapterError, match="Scaled cannot carry lora_A"):
        load_adapter(model, saved)


def test_wholly_trained_values_cannot_be_taken_back(load_llama: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    """They have replaced the base's: neither deleting nor replacing the adapter would give these back."""
    model = load_llama()
    inject_lora(model, LoraConfig(r=4, train_norms=True))
    save_adapter(randomize(model), tmp_path / "norms")
    for action, message in (
        (lambda: delete_adapter(model, "default"), "their old values are gone"),
        (lambda: load_adapter(model, saved, replace=True), "their old values are gone"),
        (lambda: load_adapter(model, saved, "other"), "no other adapter can be beside them"),
    ):
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message):
            action()
        assert_untouched(model, before)
    want = model(IDS).logits
    load_adapter(model, tmp_path / "norms", replace=True)
    assert torch.equal(model(IDS).logits, want)


def test_a_repacked_model_of_transformers_is_left_as_it_was(make_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_base("llama", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    model = load_model(resolve_base(str(folder)))
    inject_lora(model, LoraConfig(r=4))
    save_adapter(model, tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    last = theirs.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.eval()(torch.randn(4, 256, dtype=torch.bfloat16))
    if not getattr(last.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")
    with pytest.raises(BaseModelError, match="has repacked"):
        load_adapter(theirs, tmp_path)
    assert not list(lora_layers(theirs))
