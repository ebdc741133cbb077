"""Saving what was trained and nothing else; loading only where it fits, and changing nothing where it does not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora.adapter.files import (
    adapter_parameters,
    delete_adapter,
    load_adapter,
    render_files,
    save_adapter,
)
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import AdapterError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers
from tests.adapter.random_values import randomize

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


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
