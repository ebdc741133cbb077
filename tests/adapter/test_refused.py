"""What cannot be loaded: refused by an error that names all of it, and the model is as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.adapter.files import delete_adapter, load_adapter, open_adapter, save_adapter
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, BaseModelError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers, merge_adapter
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from tests.adapter.random_values import randomize

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


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


V = Q.replace("q_proj", "v_proj")
FILE_DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "nothing in it": (only(), "the adapter is empty"),
    "an empty tensor": (put(f"{Q}.lora_A.weight", 0), "the adapter is empty"),
    "A alone": (lambda t: t.pop(f"{Q}.lora_B.weight"), r"layers\.0\.self_attn\.q_proj has no lora_B"),
    "B alone": (lambda t: t.pop(f"{Q}.lora_A.weight"), r"layers\.0\.self_attn\.q_proj has no lora_A"),
    "a bias alone": (put(f"{Q[:-6]}z_proj.lora_B.bias", 64), r"z_proj has no lora_A and no lora_B"),
    "A of another shape": (put(f"{Q}.lora_A.weight", 4, 63), "1 tensors do not fit the model"),
    "A of other dimensions": (put(f"{Q}.lora_A.weight", 256), "1 tensors do not fit the model"),
    "B of another shape": (put(f"{Q}.lora_B.weight", 63, 4), "1 tensors do not fit the model"),
    "both of another r": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(8, 64), f"{Q}.lora_B.weight": torch.ones(64, 8)}),
        "2 tensors do not fit the model",
    ),
    "turned round": (put(f"{Q}.lora_A.weight", 64, 4), "1 tensors do not fit"),
    "a layer that is not there": (
        lambda t: [rename(f"{Q}.lora_{x}.weight", f"{Q[:-6]}z_proj.lora_{x}.weight")(t) for x in "AB"],
        r"z_proj: the model has no such module",
    ),
    "no layer that is there": (
        lambda t: [rename(key, key.replace("layers.", "blocks."))(t) for key in list(t)],
        r"none of the adapter's 14 modules is in the model",
    ),
    "a layer of another kind": (
        lambda t: [rename(f"{Q}.lora_{x}.weight", f"base_model.model.model.norm.lora_{x}.weight")(t) for x in "AB"],
        "RMSNorm cannot carry lora_A",
    ),
    "inside of a layer that is adapted": (
        lambda t: [rename(f"{V}.lora_{x}.weight", f"{V}.base_layer.lora_{x}.weight")(t) for x in "AB"],
        r"v_proj\.base_layer: the model has no such module",
    ),
    "adapted and replaced": (put(f"{Q}.weight", 64, 64), "q_proj: both adapted and trained as a whole"),
    "a whole module that is not there": (put("base_model.model.model.extra.weight", 3), "the model has no such module"),
    "a whole module of another shape": (put("base_model.model.model.norm.weight", 3), "has shape"),
    "a parameter that is not there": (put("base_model.model.model.norm.bias", 64), "cannot carry bias"),
    "the model itself": (put("base_model.model.weight", 64), "names no module"),
    "the model itself adapted": (put("base_model.model..lora_A.weight", 4, 64), "cannot be used"),
    "a path that leads up": (put("base_model.model.../../x.weight", 4), "the model has no such module"),
    "a foreign name": (put("model.norm.weight", 64), "no part of a PEFT adapter"),
    "a magnitude without DoRA": (put(f"{Q}.lora_magnitude_vector", 64), "Linear.* cannot carry lora_magnitude_vector"),
    "a bias without lora_bias": (put(f"{Q}.lora_B.bias", 64), r"Linear.* cannot carry lora_B\.bias"),
    "factors of an embedding": (put(f"{Q}.lora_embedding_A", 4, 64), "lora_embedding_A"),
    "an adapter's name inside": (put(f"{Q}.lora_A.default.weight", 4, 64), "of a kind this version cannot apply"),
    "one tensor by another of its names": (put(f"{Q}.lora_A.other.weight", 4, 64), r"lora_A\.other\.weight is of a kind"),
    "whole numbers": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}),
        r"q_proj\.lora_A\.weight is of dtype int8",
    ),
    "truths": (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 4) > 0}), "is of dtype bool"),
    "not a number": (
        lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")),
        r"1 tensors cannot be used(.|\n)*q_proj\.lora_A\.weight holds values that are not finite",
    ),
    "one infinite value": (
        lambda t: t[f"{V}.lora_B.weight"].view(-1)[7].fill_(float("-inf")),
        r"v_proj\.lora_B\.weight holds values that are not finite",
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
    # Nor does the adapter go whose place it was to take.
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, saved, "other", replace=True)
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
    "q_proj: the file has no lora_magnitude_vector": {"use_dora": True},
    "q_proj: the file has no lora_B.bias": {"lora_bias": True},
    "its magnitude scales directions": {"use_dora": True, "lora_bias": True},
    "use_dora is neither true nor false": {"use_dora": "no"},
    "use_rslora is neither true nor false": {"use_rslora": 1},
    "bias changes": {"bias": "lora_only"},
    "target_modules is not a list of names": {"target_modules": [3]},
    "exclude_modules is not a list of names": {"exclude_modules": {"q_proj": 1}},
    "layers_to_transform is not a list": {"layers_to_transform": ["all"]},
    "revision is not a text": {"revision": 3},
    "base_model_name_or_path is not a text": {"base_model_name_or_path": ["a"]},
    r"q_proj.lora_A.weight has shape \(4, 64\), this base needs \(8, 64\)": {"rank_pattern": {"q_proj": 8}},
    r"28 tensors do not fit the model(.|\n)*and 8 more": {"r": 3},
    r"this base needs \(1000000, 64\)": {"r": 1_000_000},
    "r is not a positive number (huge)": {"r": 10**40},
    "r is not a positive number (negative)": {"r": -4},
    "lora_alpha is not a positive number": {"lora_alpha": 10**400},
    "lora_alpha is not a positive number (nan)": {"lora_alpha": float("nan")},
    "rank_pattern is not a table": {"rank_pattern": ["q_proj"]},
    "rank_pattern.q_proj is not a positive number": {"rank_pattern": {"q_proj": 0}},
    "rank_pattern.q_proj is not a whole number": {"rank_pattern": {"q_proj": 2.5}},
    "alpha_pattern.q_proj is not a positive number": {"alpha_pattern": {"q_proj": None}},
    "rank_pattern holds what is not a regular expression": {"rank_pattern": {"(q_proj": 4}},
    "trainable_token_indices": {"trainable_token_indices": [1]},
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


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"x"', "[" * 100_000, "\udcff", '{"r": 4, "r": 8}', '{"a": 1' + "0" * 5000 + "}"],
    ids=lambda text: repr(text)[:8],
)
def test_a_config_that_is_none(load_llama: Callable[..., Any], saved: Path, text: str) -> None:
    (saved / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: is not (JSON|a JSON object)"):
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


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(load_llama: Callable[..., Any], saved: Path, tmp_path: Path, name: str) -> None:
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    shutil.move(saved / name, tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=rf"{name}: is a link that leads out of its folder"):
        load_adapter(load_llama(), saved)
    (saved / name).unlink()
    shutil.move(tmp_path / "elsewhere", saved / "inside")
    (saved / name).symlink_to("inside")
    load_adapter(load_llama(), saved)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_what_is_no_file_is_refused(load_llama: Callable[..., Any], saved: Path, name: str) -> None:
    (saved / name).unlink()
    os.mkfifo(saved / name)  # opening it would wait for ever
    with pytest.raises(AdapterError, match=f"no {name}"):
        load_adapter(load_llama(), saved)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_cut_short(load_llama: Callable[..., Any], saved: Path, length: int) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:length])
    model = load_llama()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_adapter(model, saved)
    assert_untouched(model, before)


GOOD = {"base": {"name": "x", "revision": None, "fingerprint": "0"}, "dtype": "bfloat16", "quantization": None}
RECORDS = {
    "nothing": "",
    "cut short": "{",
    "a list": "[]",
    "a number": "3",
    "deep": "[" * 100_000,
    "twice": '{"base": {}, "base": {}}',
    "no base": json.dumps(GOOD | {"base": 3}),
    "a base without a name": json.dumps(GOOD | {"base": {"fingerprint": "0"}}),
    "a fingerprint that is none": json.dumps(GOOD | {"base": {"name": "x", "fingerprint": 3}}),
    "an origin that is none": json.dumps(GOOD | {"base": {"name": "x", "origin": "y"}}),
    "a dtype of torch's other things": json.dumps(GOOD | {"dtype": "load"}),
    "a dtype alone": json.dumps({"dtype": "float32"}),
    "a quantization that is none": json.dumps(GOOD | {"quantization": "nf4"}),
    "a quantization of next year": json.dumps(GOOD | {"quantization": {"bits": 3}}),
}


@pytest.mark.parametrize("record", RECORDS)
def test_damaged_metadata(saved: Path, record: str) -> None:
    rewrite(saved, lambda tensors: None, qlora=RECORDS[record])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: damaged metadata"):
        open_adapter(saved)


def test_metadata_of_a_later_version_may_say_more(saved: Path) -> None:
    rewrite(saved, lambda tensors: None, qlora=json.dumps(GOOD | {"weather": "fine"}))
    assert open_adapter(saved).described["weather"] == "fine"


def test_all_that_is_wrong_is_named(load_llama: Callable[..., Any], saved: Path) -> None:
    """Up to twenty; the rest is counted."""
    rewrite(saved, lambda t: [t.update({key: torch.ones(4, 3)}) for key in t if "lora_A" in key])
    with pytest.raises(AdapterError, match="14 tensors do not fit the model") as error:
        load_adapter(load_llama(), saved)
    assert str(error.value).count("has shape (4, 3)") == 14
    rewrite(saved, lambda t: [t.update({key: torch.ones(3, 3)}) for key in t])
    with pytest.raises(AdapterError, match="28 tensors do not fit the model") as error:
        load_adapter(load_llama(), saved)
    assert str(error.value).count("has shape (3, 3)") == 20
    assert "and 8 more" in str(error.value)
    rewrite(saved, lambda t: [t.pop(key) for key in list(t) if "q_proj" not in key])
    rewrite(saved, lambda t: [t.update({k: torch.full((64, 4) if "lora_B" in k else (4, 64), torch.nan)}) for k in t])
    with pytest.raises(AdapterError, match="4 tensors cannot be used") as error:
        load_adapter(load_llama(), saved)
    assert str(error.value).count("not finite") == 4


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
