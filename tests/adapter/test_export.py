"""`qlora export`: what servers read computes what was trained, and what they would leave out is refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.adapter.export import SERVED_RANKS, run_export
from qlora.adapter.files import load_adapter, save_adapter
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("llama", dtype="float32")


def load_ours(base: Path) -> Any:
    return load_model(resolve_base(str(base)), dtype="float32")


def load_theirs(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def train(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def saved(base: Path, folder: Path, **config: Any) -> Any:
    """A trained adapter on disk, and the model it is of."""
    model = load_ours(base)
    inject_lora(model, LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"]} | config)))
    train(model)
    save_adapter(model, folder)
    return model


def serve(base: Path, folder: Path) -> Any:
    """The base with what a server applies: of the config r, lora_alpha and target_modules, of the tensors A and B."""
    config = json.loads((folder / CONFIG).read_text())
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["bias"] == "none"
    assert isinstance(config["target_modules"], list)
    assert config["r"] in SERVED_RANKS
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    tensors = load_file(folder / WEIGHTS)
    model = load_theirs(base)
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            B = tensors[key.replace("lora_A", "lora_B")]
            path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            assert any(path == name or path.endswith(f".{name}") for name in config["target_modules"])
            assert A.shape[0] == B.shape[1] == config["r"]
            weight = model.get_submodule(path).weight
            delta = config["lora_alpha"] / config["r"] * (B.double() @ A.double())
            weight.data = (weight.double() + delta).to(weight.dtype)
        else:
            assert key.endswith(".lora_B.weight")
    return model


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "r that is served": {"r": 8},
    "r of 1": {"r": 1},
    "r above a served one": {"r": 17},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 7},
    "alpha that is no multiple": {"r": 3, "lora_alpha": 7.5},
    "ranks": {"rank_pattern": {"q_proj": 2, r"1\.mlp\.down_proj": 12}},
    "alphas": {"alpha_pattern": {"q_proj": 5}},
    "ranks, alphas and rsLoRA": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
    "a regular expression": {"target_modules": r".*\.1\..*(q|up)_proj"},
    "some blocks": {"layers_to_transform": [1]},
    "without some": {"exclude_modules": ["layers.0.mlp.down_proj"]},
    "with the head": {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 6}},
    "all linear": {"target_modules": "all-linear"},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
@pytest.mark.parametrize("case", CASES)
def test_servers_and_peft_compute_what_was_trained(base: Path, tmp_path: Path, case: str, reader: Any) -> None:
    trained = saved(base, tmp_path / "a", **CASES[case])
    exported = run_export(tmp_path / "a", tmp_path / "out", reader)
    want = logits(trained)
    tolerance = {"rtol": 0, "atol": 1e-5 * want.abs().max().item()}
    torch.testing.assert_close(logits(serve(base, tmp_path / "out")), want, **tolerance)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load_theirs(base), tmp_path / "out")), want, **tolerance)
    again = load_ours(base)
    load_adapter(again, tmp_path / "out")
    torch.testing.assert_close(logits(again), want, **tolerance)
    assert exported.folder == tmp_path / "out"
    largest = max(layer.updates["default"].r for _, layer in lora_layers(trained))
    assert exported.r == min(rank for rank in SERVED_RANKS if rank >= largest)
    assert not exported.approximate


def test_a_peft_adapter_with_weights_beside_its_head(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_theirs(base), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_rslora=True))
    train(model)
    model.save_pretrained(tmp_path / "a")
    assert any("base_layer" in key for key in load_file(tmp_path / "a" / WEIGHTS))
    run_export(tmp_path / "a", tmp_path / "out", "vllm")
    want = logits(model)
    torch.testing.assert_close(logits(serve(base, tmp_path / "out")), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_values_are_kept(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """B is touched only where its scaling is another one: A and most of B keep every bit, beside zeros."""
    saved(base, tmp_path / "a", r=4, lora_alpha=8, alpha_pattern={r"0\.mlp\.down_proj": 3})
    held = {key: value.to(dtype) for key, value in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(held, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    run_export(tmp_path / "a", tmp_path / "out", "vllm")
    out = load_file(tmp_path / "out" / WEIGHTS)
    assert out.keys() == held.keys()
    for key, value in out.items():
        assert value.dtype == dtype
        own, rest = value.split([4, 4], dim=0 if "lora_A" in key else 1)
        assert not rest.any()
        if "layers.0.mlp.down_proj.lora_B" in key:
            assert torch.equal(own, (held[key].float() * (3 / 8)).to(dtype))
        else:
            assert torch.equal(own, held[key])
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "DoRA": ({"use_dora": True}, ["use_dora"]),
    "lora_bias": ({"lora_bias": True}, ["lora_bias"]),
    "norms": ({"train_norms": True}, ["modules_to_save"]),
    "two of them": ({"use_dora": True, "train_head": True}, ["use_dora", "modules_to_save"]),
}


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_would_leave_out_is_refused(base: Path, tmp_path: Path, case: str, reader: Any) -> None:
    config, names = REFUSED[case]
    saved(base, tmp_path / "a", **config)
    with pytest.raises(AdapterError, match=f"{reader} does not apply") as error:
        run_export(tmp_path / "a", tmp_path / "out" / "deep", reader)
    assert all(name in str(error.value) for name in names)
    assert "qlora merge" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_kinds_are_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    moe = make_base("mixtral", dtype="float32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(load_theirs(moe), config).save_pretrained(tmp_path / "experts")
    with pytest.raises(AdapterError, match="target_parameters: fused expert weights"):
        run_export(tmp_path / "experts", tmp_path / "out", "vllm")
    llama = make_base("llama", dtype="float32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4])
    get_peft_model(load_theirs(llama), config).save_pretrained(tmp_path / "rows")
    with pytest.raises(AdapterError, match="trainable_token"):
        run_export(tmp_path / "rows", tmp_path / "out", "vllm")
    net = nn.Sequential(nn.Conv1d(8, 8, 3))
    get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path / "conv")
    with pytest.raises(AdapterError, match="layers that are no matrices"):
        run_export(tmp_path / "conv", tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


def test_a_rank_above_what_is_served(tmp_path: Path) -> None:
    big = nn.Sequential(nn.Linear(600, 600))
    inject_lora(big, LoraConfig(r=513, target_modules=["0"]))
    save_adapter(big, tmp_path / "a")
    with pytest.raises(AdapterError, match="rank is above what servers take") as error:
        run_export(tmp_path / "a", tmp_path / "out", "vllm")
    assert error.value.found == 513
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    held = load_file(tmp_path / "a" / WEIGHTS)
    next(iter(held.values())).fill_(math.nan)
    save_file(held, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match="not finite"):
        run_export(tmp_path / "a", tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["vllm", "peft"])
def test_nothing_is_left_where_writing_fails(
    base: Path, tmp_path: Path, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(base, tmp_path / "a")
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(AdapterError, match="No space left on device"):
        run_export(tmp_path / "a", tmp_path / "out", reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(AdapterError, match="something is there already"):
        run_export(tmp_path / "a", tmp_path / "out", reader)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_for_peft_is_a_copy(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", use_dora=True, rank_pattern={"q_proj": 2}, train_norms=True)
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    exported = run_export(tmp_path / "a", tmp_path / "out", "peft")
    assert exported.r is None
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes() for name in names)
