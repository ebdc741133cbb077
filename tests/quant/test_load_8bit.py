"""Bases in 8 bits against transformers' own: quantized while they are read, read as they come, prepared, merged into.

transformers and bitsandbytes do all of this on a CPU; in training mode their layers compute with the weight alone, as ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qlora
from qlora.adapter.files import open_adapter
from qlora.adapter.merge_files import run_merge
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError, ConfigError
from qlora.lora.inject import inject_lora
from qlora.ops import int8
from qlora.quant.linear8bit import Linear8bit
from qlora.quant.load import load_model
from qlora.quant.prepare import run_prepare
from qlora.quant.room import share_bytes
from qlora.quant.skeleton import read_skeleton
from qlora.quant.source import resolve_base

MakeBase = Callable[..., Path]
EIGHT = QuantizationConfig(bits=8)
IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
# Biases and a tied head; Conv1D; a fused weight; experts that stay as they are; norms on queries.
ARCHITECTURES = ("qwen2", "gpt2", "phi3", "mixtral", "qwen3")
ODD = {"intermediate_size": 129, "vocab_size": 319}


def load(folder: Path, **kwargs: Any) -> Any:
    return load_model(resolve_base(str(folder)), **kwargs)


def transformers_8bit(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def layers_8bit(model: Any) -> dict[str, Linear8bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear8bit)}


def assert_same_model(ours: Any, theirs: Any) -> None:
    """Every quantized layer has equal bytes and scales; every other tensor is equal; so are the logits, in training mode."""
    mine = layers_8bit(ours)
    want = {name: m for name, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    assert mine
    assert mine.keys() == want.keys() == set(ours.qlora_base.quantized)
    for name, layer in mine.items():
        packed, statistics = int8.from_linear8bit(want[name], name)
        assert torch.equal(layer.weight, packed), name
        assert torch.equal(layer.statistics, statistics), name
    rest = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.rpartition(".")[0] not in mine or name.endswith(".bias"):
            assert torch.equal(parameter, rest[name]), name
            assert parameter.dtype == rest[name].dtype, name
    assert ours.qlora_base.quantization.bits == 8
    assert ours.qlora_base.unexpected == ()
    with torch.no_grad():
        assert torch.equal(ours.train()(IDS).logits, theirs.train()(IDS).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_those_of_transformers(make_base: MakeBase, tmp_path: Path, name: str) -> None:
    """Also of what transformers saves of them, whatever is asked for, and of what `qlora prepare` writes."""
    folder = make_base(name)
    theirs = transformers_8bit(folder)
    assert_same_model(load(folder, quantization=EIGHT), theirs)
    theirs.save_pretrained(tmp_path / "saved")
    assert_same_model(load(tmp_path / "saved", quantization=QuantizationConfig(quant_type="fp4")), theirs)
    prepared = run_prepare(str(folder), tmp_path / "prepared", quantization=EIGHT)
    assert_same_model(load(prepared), theirs)
    opened, info = AutoModelForCausalLM.from_pretrained(prepared, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(opened.train()(IDS).logits, theirs(IDS).logits)


def test_an_fp32_base_in_bf16(make_base: MakeBase) -> None:
    """Rounded to bf16 first and to fp16 then, as transformers and bitsandbytes do between them."""
    folder = make_base("llama", dtype="float32")
    assert_same_model(load(folder, dtype="bfloat16", quantization=EIGHT), transformers_8bit(folder))
    assert_same_model(load(folder, dtype="float32", quantization=EIGHT), transformers_8bit(folder, torch.float32))


def test_skipped_modules_stay(make_base: MakeBase) -> None:
    config = QuantizationConfig(bits=8, skip_modules=["down_proj"])
    ours = load(make_base("llama"), quantization=config)
    assert len(layers_8bit(ours)) == 12
    assert ours.qlora_base.unquantized["model.layers.0.mlp.down_proj"] == "skip_modules: down_proj"


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_what_a_rank_is_to_keep(make_base: MakeBase, world_size: int) -> None:
    """Counted before a weight is read, as what is there after a whole load, cut into equal lengths."""
    folder = make_base("llama", **ODD)
    skeleton = read_skeleton(resolve_base(str(folder)), torch.bfloat16, EIGHT)
    kept, _ = share_bytes(skeleton, Sharding(0, world_size))
    parameters = load(folder, quantization=EIGHT).parameters()
    assert kept == sum(-(-p.numel() // world_size) * p.element_size() for p in parameters)


# Prepared and merged.


@pytest.mark.parametrize("changes", [{}, ODD])
def test_every_tensor_of_a_prepared_base_begins_at_a_multiple_of_its_size(
    make_base: MakeBase, tmp_path: Path, changes: dict[str, int]
) -> None:
    """Also where a row has an odd number of bytes, so that the scales of all layers have to come first."""
    prepared = run_prepare(str(make_base("llama", **changes)), tmp_path / "prepared", quantization=EIGHT)
    raw = (prepared / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    sizes = {"F32": 4, "BF16": 2, "I8": 1}
    begins = {name: facts["data_offsets"][0] % sizes[facts["dtype"]] for name, facts in header.items() if name[0] != "_"}
    assert set(begins.values()) == {0}
    with safe_open(prepared / "model.safetensors", "pt") as file:
        scales = [name for name in file.keys() if name.endswith(".SCB")]  # noqa: SIM118
    assert len(scales) == 14
    ours, found = load(make_base("llama", **changes), quantization=EIGHT), load(prepared)
    assert all(torch.equal(p, found.get_parameter(name)) for name, p in ours.named_parameters())
    assert resolve_base(str(prepared)).origin.quantization == EIGHT  # type: ignore[union-attr]


def adapted(folder: Path, tmp_path: Path, **kwargs: Any) -> tuple[Any, Path]:
    """A model with an adapter that is no longer at its start, and the adapter's folder."""
    model, _ = qlora.load_base(str(folder), dtype="float32", **kwargs)
    inject_lora(model, LoraConfig(r=3, use_dora=True))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    qlora.save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("came", [False, True])
def test_merging_onto_the_weights_that_were_trained_on(random_base: Path, tmp_path: Path, came: bool) -> None:
    """Dequantized: the very function of base and adapter, in transformers. Quantized: 8 bits again."""
    folder = random_base
    if came:
        folder = run_prepare(str(random_base), tmp_path / "prepared", dtype="float32", quantization=EIGHT)
    own, adapter = adapted(folder, tmp_path, quantization=EIGHT)
    assert open_adapter(adapter).described["quantization"] == EIGHT.model_dump()
    ids = IDS % own.config.vocab_size
    merged = run_merge(adapter, tmp_path / "merged", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, own(ids).logits, atol=2e-5, rtol=1e-5)
    again = run_merge(adapter, tmp_path / "again", onto="quantized", dtype="float32")
    opened = AutoModelForCausalLM.from_pretrained(again)
    assert {m.weight.dtype for m in opened.modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)} == {torch.int8}
    with torch.no_grad():
        torch.testing.assert_close(opened.train()(ids).logits, theirs(ids).logits, atol=0.3, rtol=0.1)
    if came:
        with pytest.raises(qlora.QloraError, match="so there are no original weights"):
            run_merge(adapter, tmp_path / "original", onto="original")


# What cannot be.


@pytest.mark.parametrize(
    "changes", [{"quant_type": "fp4"}, {"double_quant": False}, {"block_size": 32}, {"quant_storage": "bfloat16"}], ids=str
)
def test_keys_of_4_bits_are_refused(make_base: MakeBase, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = QuantizationConfig.model_validate({"bits": 8} | changes)
    (name,) = changes
    for ask in (
        lambda: load(make_base("llama"), quantization=config),
        lambda: run_prepare(str(make_base("llama")), tmp_path / "out", quantization=config),
    ):
        with pytest.raises(ConfigError, match="in 8 bits a row has one scale") as error:
            ask()
        assert error.value.place == f"model.quantization.{name}"
    assert not (tmp_path / "out").exists()


def test_a_base_that_only_says_so(make_base: MakeBase, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_base("llama"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="says that the base is quantized, and none of its weights is"):
        load(folder)


WEIGHT = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{WEIGHT}.SCB": None}, "q_proj.weight: the 8-bit weight has no scales"),
        ({f"{WEIGHT}.SCB": torch.ones(63)}, "q_proj.weight: the 8-bit weight's scales do not fit"),
        ({f"{WEIGHT}.weight_format": torch.tensor(2, dtype=torch.uint8)}, "q_proj.weight: .* laid out for a GPU"),
        ({f"{WEIGHT}.weight": torch.ones((63, 64), dtype=torch.int8), f"{WEIGHT}.SCB": torch.ones(63)}, "another shape"),
        ({f"{WEIGHT}.weight": torch.ones((64, 64))}, "q_proj.weight: the 8-bit weight is not one"),
    ],
)
def test_a_damaged_base(make_base: MakeBase, tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    transformers_8bit(make_base("llama")).save_pretrained(tmp_path)
    tensors: dict[str, Any] = load_file(tmp_path / "model.safetensors") | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=message):
        load(tmp_path)


def test_a_weight_that_fp16_cannot_hold(make_base: MakeBase, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_base("llama"), tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{WEIGHT}.weight"][3, 4] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for ask in (
        lambda: load(folder, quantization=EIGHT),
        lambda: run_prepare(str(folder), tmp_path / "out", quantization=EIGHT),
    ):
        with pytest.raises(BaseModelError, match=rf"{WEIGHT}.*that fp16 cannot hold"):
            ask()
    assert not (tmp_path / "out").exists()


def test_a_prepared_base_is_not_prepared_again(make_base: MakeBase, tmp_path: Path) -> None:
    prepared = run_prepare(str(make_base("llama")), tmp_path / "prepared", quantization=EIGHT)
    with pytest.raises(BaseModelError, match="is in 8 bits already, prepared from"):
        run_prepare(str(prepared), tmp_path / "again")
