"""Loading a base against transformers' own loading: equal weights, equal bytes, equal logits."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.config.schema import QuantizationConfig
from qlora.errors import BaseModelError, ConfigError
from qlora.model_files import find_weight_files
from qlora.ops import nf4, nf4_format
from qlora.quant import fillings, shards
from qlora.quant.fillings import match_by_rules, match_tensors
from qlora.quant.linear import Linear4bit
from qlora.quant.load import load_model
from qlora.quant.skeleton import read_skeleton
from qlora.quant.source import resolve_base

MakeBase = Callable[..., Path]
IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **kwargs: Any) -> Any:
    return load_model(resolve_base(str(folder)), **kwargs)


def transformers_4bit(folder: Path, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        **({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | kwargs),
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def layers_4bit(model: Any) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def assert_same_4bit_model(ours: Any, theirs: Any) -> None:
    """Every quantized layer has equal bytes, statistics and shape; every other tensor is equal, type included."""
    mine = layers_4bit(ours)
    want = {name: m for name, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert mine.keys() == want.keys()
    for name, layer in mine.items():
        packed, statistics, spec, shape = nf4_format.from_linear4bit(want[name], name)
        assert torch.equal(layer.weight.view(torch.uint8), packed.view(torch.uint8)), name
        assert torch.equal(layer.statistics, statistics), name
        assert (layer.spec, (layer.out_features, layer.in_features)) == (spec, shape)
    rest = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.rpartition(".")[0] in mine and not name.endswith(".bias"):
            continue
        assert torch.equal(parameter, rest[name]), name
        assert parameter.dtype == rest[name].dtype, name
    theirs_buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, theirs_buffers[name]), name


def test_unquantized_logits_are_those_of_transformers(make_base: MakeBase, architecture: str) -> None:
    folder = make_base(architecture)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = load(folder)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert ours.qlora_base.quantized == ours.qlora_base.unexpected == ()


def test_files_that_name_tensors_as_the_model_does_need_no_rules(make_base: MakeBase, architecture: str) -> None:
    """Names alone give what transformers' rules give, for the files of every architecture that has all names in common."""
    model = read_skeleton(resolve_base(str(make_base(architecture))), torch.bfloat16, None).model
    entries = shards.read_entries(make_base(architecture))
    found, unexpected = match_tensors(model, entries)
    by_rules, also_unexpected = match_by_rules(model, entries, model.state_dict())
    assert list(found) == list(by_rules)
    assert {key: filling.entries for key, filling in found.items()} == {
        key: filling.entries for key, filling in by_rules.items()
    }
    assert unexpected == also_unexpected == []


def test_a_base_of_usual_names_is_read_without_rules(make_base: MakeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fillings, "match_by_rules", None)
    assert load(make_base("llama")).qlora_base.unexpected == ()


def test_4bit_layers_are_those_of_transformers(make_base: MakeBase, architecture: str, tmp_path: Path) -> None:
    folder = make_base(architecture)
    theirs = transformers_4bit(folder)
    ours = load(folder, quantization=QuantizationConfig())
    assert_same_4bit_model(ours, theirs)
    record = ours.qlora_base
    assert record.quantized == tuple(layers_4bit(ours))
    assert record.unexpected == ()
    # Every linear layer or expert weight that stays as it is has a reason.
    left = {name for name, module in ours.named_modules() if type(module) is torch.nn.Linear}
    left |= {name for name, parameter in ours.named_parameters() if parameter.ndim == 3}
    assert left <= record.unquantized.keys()
    assert all(record.unquantized.values())
    # The rest of the model is the same, so in training mode, where bitsandbytes does not repack, the outputs are too.
    with torch.no_grad():
        torch.testing.assert_close(ours.train()(IDS).logits, theirs.train()(IDS).logits)

    # What transformers saves of the quantized model loads as the same model again, whatever is asked for.
    theirs.save_pretrained(tmp_path)
    again = load(tmp_path, quantization=QuantizationConfig(quant_type="fp4"))
    assert_same_4bit_model(again, theirs)
    assert again.qlora_base.quantization.quant_type == "nf4"
    assert again.qlora_base.unexpected == ()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_kind_of_4bit(make_base: MakeBase, quant_type: str, double_quant: bool, tmp_path: Path) -> None:
    folder = make_base("llama")
    theirs = transformers_4bit(folder, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant)
    config = QuantizationConfig(quant_type=quant_type, double_quant=double_quant)
    assert_same_4bit_model(load(folder, quantization=config), theirs)
    theirs.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_4bit_model(again, theirs)
    assert again.qlora_base.quantization == config


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_storage_types(make_base: MakeBase, storage: str, tmp_path: Path) -> None:
    folder = make_base("llama")
    theirs = transformers_4bit(folder, bnb_4bit_quant_storage=storage)
    ours = load(folder, quantization=QuantizationConfig(quant_storage=storage))
    assert_same_4bit_model(ours, theirs)
    assert {layer.weight.dtype for layer in layers_4bit(ours).values()} == {getattr(torch, storage)}
    theirs.save_pretrained(tmp_path)
    assert_same_4bit_model(load(tmp_path), theirs)


@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_block_sizes(make_base: MakeBase, block_size: int) -> None:
    folder = make_base("llama")
    plain, ours = load(folder), load(folder, quantization=QuantizationConfig(block_size=block_size))
    for name, layer in layers_4bit(ours).items():
        packed, statistics = nf4.quantize(plain.get_submodule(name).weight, nf4.QuantSpec(block_size=block_size))
        assert torch.equal(layer.weight, packed)
        assert torch.equal(layer.statistics, statistics)


@pytest.mark.parametrize("quantization", [None, QuantizationConfig()])
def test_an_fp32_base_in_bf16(make_base: MakeBase, quantization: QuantizationConfig | None) -> None:
    """Rounded to bf16 first and quantized then, as transformers does."""
    folder = make_base("qwen2", dtype="float32")
    ours = load(folder, dtype="bfloat16", quantization=quantization)
    if quantization is None:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert all(torch.equal(p, theirs.get_parameter(name)) for name, p in ours.named_parameters())
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    else:
        assert_same_4bit_model(ours, transformers_4bit(folder))


def test_fp32_compute(make_base: MakeBase) -> None:
    folder = make_base("llama", dtype="float32")
    ours = load(folder, dtype=torch.float32, quantization=QuantizationConfig())
    theirs = transformers_4bit(folder, torch.float32)
    assert_same_4bit_model(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs.train()(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", [None, QuantizationConfig()])
def test_shards_load_as_one_file_does(make_base: MakeBase, quantization: QuantizationConfig | None) -> None:
    sharded = make_base("llama", max_shard_size="60KB")
    assert len(find_weight_files(sharded)) > 2
    ours, want = load(sharded, quantization=quantization), load(make_base("llama"), quantization=quantization)
    assert all(torch.equal(p, want.get_parameter(name)) for name, p in ours.named_parameters())


def test_a_tied_head_is_one_tensor(make_base: MakeBase) -> None:
    ours = load(make_base("llama", tie_word_embeddings=True), quantization=QuantizationConfig())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert "lm_head" in ours.qlora_base.unquantized


@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_head_that_the_files_hold_too(make_base: MakeBase, tmp_path: Path, differ: bool) -> None:
    """As transformers has it: equal tensors are tied, different ones are not."""
    folder = copy_of(make_base("llama", tie_word_embeddings=True), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][0, 0] += float(differ)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ours, theirs = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (not differ)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (not differ)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs.eval()(IDS).logits)


def test_skipped_modules_stay_and_say_so(make_base: MakeBase) -> None:
    config = QuantizationConfig(skip_modules=["down_proj", "layers.1.self_attn.q_proj"])
    folder = make_base("llama")
    ours, plain = load(folder, quantization=config), load(folder)
    assert len(layers_4bit(ours)) == 14 - 3
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        assert ours.qlora_base.unquantized[name].startswith("skip_modules")
        assert torch.equal(ours.get_submodule(name).weight, plain.get_submodule(name).weight)
    # The same layers, chosen transformers' way.
    names = ["down_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    assert_same_4bit_model(ours, transformers_4bit(folder, llm_int8_skip_modules=names))


@pytest.mark.parametrize("quantization", [QuantizationConfig(), None])
def test_what_tensors_are_read_in(
    make_base: MakeBase, monkeypatch: pytest.MonkeyPatch, quantization: QuantizationConfig | None
) -> None:
    """However large a tensor, one piece of it at a time is in host memory on its way to its place, quantized or not."""
    folder = make_base("llama")
    piece = 1024
    assert max(entry.num_elements for entry in shards.read_entries(folder).values()) > 4 * piece
    monkeypatch.setattr(nf4, "CHUNK_ELEMENTS", piece)
    alive: list[weakref.ref[torch.Tensor]] = []
    read = shards.TensorEntry.read

    def read_and_note(self: shards.TensorEntry, start: int = 0, stop: int | None = None) -> torch.Tensor:
        assert stop is not None
        assert stop - start <= piece
        assert sum(ref() is not None for ref in alive) <= 1, "more than the piece before is still there"
        out = read(self, start, stop)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(shards.TensorEntry, "read", read_and_note)
    ours = load(folder, quantization=quantization)
    assert alive
    monkeypatch.undo()
    if quantization is not None:
        assert_same_4bit_model(ours, transformers_4bit(folder))


def test_progress_is_told(make_base: MakeBase) -> None:
    seen: list[tuple[int, int]] = []
    load(make_base("llama"), progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_buffers_that_no_file_holds_are_computed(make_base: MakeBase, make_model: Callable[..., Any]) -> None:
    ours = load(make_base("gemma3_text"), dtype="bfloat16")
    built = make_model("gemma3_text", "bfloat16")
    buffers = dict(ours.named_buffers())
    assert buffers
    for name, buffer in built.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_the_generation_config_comes_along(make_base: MakeBase, tmp_path: Path) -> None:
    folder = copy_of(make_base("llama"), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    assert load(folder).generation_config.temperature == 0.25


# Bases that cannot be loaded.


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "base"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def base(make_base: MakeBase, tmp_path: Path) -> Path:
    """A llama folder of the test's own."""
    return copy_of(make_base("llama"), tmp_path)


@pytest.mark.parametrize("quantization", [None, QuantizationConfig()])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor(base: Path, name: str, quantization: QuantizationConfig | None) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors[name]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match="1 tensors of the model are in none of its files") as error:
        load(base, quantization=quantization)
    assert error.value.place == str(base)
    assert error.value.found == name


@pytest.mark.parametrize("quantization", [None, QuantizationConfig()])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.up_proj.weight", (64, 64)),
        ("model.layers.0.mlp.up_proj.weight", (64, 128)),
        ("model.norm.weight", (63,)),
    ],
)
def test_another_shape(base: Path, name: str, shape: tuple[int, ...], quantization: QuantizationConfig | None) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.safetensors.*has another shape") as error:
        load(base, quantization=quantization)
    assert error.value.found == shape


def test_a_tensor_without_a_place_is_reported(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = torch.zeros(3)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert load(base).qlora_base.unexpected == ("model.layers.0.extra.weight",)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_architecture"},
        {"model_type": "custom", "auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}},
        {"model_type": "vit", "architectures": ["ViTModel"]},
    ],
    ids=["unknown", "remote code", "no language model"],
)
def test_an_architecture_that_cannot_be_built(base: Path, changes: dict[str, Any]) -> None:
    change_config(base, **changes)
    with pytest.raises(BaseModelError, match=r"config\.json: transformers cannot build"):
        load(base)


def test_an_attention_that_cannot_be_had_is_named(base: Path) -> None:
    """Here: a package that is not installed. An architecture that cannot be built without it is still what is named."""
    with pytest.raises(ConfigError, match="FlashAttention2") as error:
        load(base, attention="flash_attention_2")
    assert (error.value.place, error.value.found) == ("model.attention", "flash_attention_2")
    change_config(base, model_type="no_such_architecture")
    with pytest.raises(BaseModelError, match="cannot build"):
        load(base, attention="flash_attention_2")


@pytest.mark.parametrize(
    "stated",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    ],
    ids=lambda stated: stated["quant_method"],
)
def test_other_ways_of_quantizing_are_refused(base: Path, stated: dict[str, Any]) -> None:
    change_config(base, quantization_config=stated)
    with pytest.raises(BaseModelError, match=r"config\.json: the base comes quantized in a way that is not supported"):
        load(base)


def test_a_damaged_4bit_base(make_base: MakeBase, tmp_path: Path) -> None:
    transformers_4bit(make_base("llama")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][:-1].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match=rf"{name}: the 4-bit weight's scales do not fit"):
        load(tmp_path)


# Pickle files.


@pytest.fixture
def pickled(base: Path) -> Path:
    """The same base with its weights in pytorch_model.bin, both names of the tied head included, and another *.bin file."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    torch.save({"args": print}, base / "training_args.bin")
    (base / "model.safetensors").unlink()
    return base


def test_pickle_is_refused_unless_asked_for(pickled: Path, make_base: MakeBase) -> None:
    with pytest.raises(BaseModelError, match="no safetensors files") as error:
        resolve_base(str(pickled))
    assert error.value.found == "pytorch_model.bin"
    assert "allow_pickle" in str(error.value)
    source = resolve_base(str(pickled), allow_pickle=True)
    assert source.fingerprint is None
    for quantization in (None, QuantizationConfig()):
        ours = load_model(source, quantization=quantization)
        want = load(make_base("llama"), quantization=quantization)
        assert all(torch.equal(p, want.get_parameter(name)) for name, p in ours.named_parameters())


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm-was-done"),)


def test_a_pickle_that_would_execute_something_does_not(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.embed_tokens.weight": Harmful()}, pickled / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin: the weights cannot be read without executing"):
        load_model(resolve_base(str(pickled), allow_pickle=True))
    assert not (tmp_path / "harm-was-done").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut short"])
def test_a_damaged_pickle(pickled: Path, content: bytes) -> None:
    (pickled / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin"):
        load_model(resolve_base(str(pickled), allow_pickle=True))


# Finding a base.


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(BaseModelError, match=r"model\.base: no such folder"):
        resolve_base(name)


def test_a_name_the_hub_cannot_have() -> None:
    with pytest.raises(BaseModelError, match="neither a folder here nor to be had from the hub"):
        resolve_base("no such model!")


def test_a_folder_without_config(base: Path) -> None:
    (base / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        resolve_base(str(base))


def test_a_folder_without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no safetensors files") as error:
        resolve_base(str(base))
    assert error.value.found == "no weights at all"


def test_what_is_recorded_of_a_base(base: Path) -> None:
    source = resolve_base(str(base))
    assert source.record() == {"name": str(base), "revision": None, "fingerprint": source.fingerprint}
    assert len(source.fingerprint or "") == 64
