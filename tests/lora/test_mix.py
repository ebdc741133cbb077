"""Mixing adapters: against the weighted sum of the deltas in float64."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from qlora.adapter.files import load_adapter, save_adapter
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import LoraLayer, lora_layers
from qlora.lora.mix import mix_adapters

WEIGHTS = {"a": 0.7, "b": -1.3, "c": 0.25}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20, bias=False))


def with_adapters(**configs: dict[str, Any]) -> nn.Sequential:
    model = make_model()
    for name, config in configs.items():
        inject_lora(model, LoraConfig(**({"target_modules": ["Linear"]} | config)), name)
    with torch.no_grad():
        for parameter in (p for _, layer in lora_layers(model) for name in configs for p in own(layer, name)):
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def own(layer: LoraLayer, name: str) -> list[nn.Parameter]:
    return list(layer.parts(name).values()) if name in layer.updates else []


def delta(layer: LoraLayer, name: str) -> Tensor:
    A, B = (layer.table(part)[name].detach().double() for part in ("lora_A.weight", "lora_B.weight"))
    return layer.updates[name].scaling * B @ A


def wanted_delta(layer: LoraLayer, weights: dict[str, float]) -> Tensor:
    return sum((weight * delta(layer, name) for name, weight in weights.items() if name in layer.updates), torch.tensor(0.0))  # type: ignore[return-value]


THREE = {"a": {"r": 2, "lora_alpha": 3.0}, "b": {"r": 4, "use_rslora": True}, "c": {"r": 3, "lora_bias": True}}


def test_cat_is_exactly_the_sum() -> None:
    model = with_adapters(**THREE)
    mix_adapters(model, WEIGHTS, "m", method="cat")
    for _, layer in lora_layers(model):
        assert layer.updates["m"].r == 9
        torch.testing.assert_close(delta(layer, "m"), wanted_delta(layer, WEIGHTS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("r", [1, 3, 9])
def test_svd_is_the_nearest_of_its_rank(r: int) -> None:
    model = with_adapters(**THREE)
    mix_adapters(model, WEIGHTS, "m", method="svd", r=r)
    for _, layer in lora_layers(model):
        U, S, Vh = torch.linalg.svd(wanted_delta(layer, WEIGHTS))
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        torch.testing.assert_close(delta(layer, "m"), best, rtol=1e-5, atol=1e-5)


def test_svd_takes_the_largest_rank_by_itself() -> None:
    model = with_adapters(**THREE)
    mix_adapters(model, WEIGHTS, "m")
    assert {layer.updates["m"].r for _, layer in lora_layers(model)} == {4}


def test_linear_is_pefts_formula() -> None:
    """peft's task arithmetic: factors weighted by the root of weight times scaling, the sign on A's side."""
    model = with_adapters(a={"r": 4}, b={"r": 4, "lora_alpha": 2.0})
    weights = {"a": 0.5, "b": -2.0}
    mix_adapters(model, weights, "m", method="linear")
    for _, layer in lora_layers(model):
        want = {"lora_A": torch.tensor(0.0), "lora_B": torch.tensor(0.0)}
        for name, weight in weights.items():
            scale = weight * layer.updates[name].scaling
            for table in want:
                sign = -1.0 if scale < 0 and table == "lora_A" else 1.0
                want[table] = want[table] + sign * abs(scale) ** 0.5 * getattr(layer, table)[name].detach()
        torch.testing.assert_close(layer.lora_A["m"].detach(), want["lora_A"])  # type: ignore[index]
        torch.testing.assert_close(layer.lora_B["m"].detach(), want["lora_B"])  # type: ignore[index]


def test_adapters_of_different_layers_are_mixed_layer_by_layer(tmp_path: Any) -> None:
    """And the result is an adapter like any other: saved, loaded, the same function."""
    model = with_adapters(a={"r": 2, "target_modules": ["0"]}, b={"r": 4})
    weights = {"a": 1.0, "b": 0.5}
    record = mix_adapters(model, weights, "m", method="cat")
    assert record.targeted == ("0", "2")
    ranks = [layer.updates["m"].r for _, layer in lora_layers(model)]
    assert ranks == [6, 4]
    for _, layer in lora_layers(model):
        torch.testing.assert_close(delta(layer, "m"), wanted_delta(layer, weights), rtol=1e-6, atol=1e-6)
    x = torch.randn(5, 24)
    save_adapter(model, tmp_path / "m", "m")
    again = make_model()
    load_adapter(again, tmp_path / "m")
    assert torch.equal(again(x), model(x))


def test_a_bias_of_b_is_mixed_too() -> None:
    model = with_adapters(**THREE)
    x = torch.randn(5, 24)
    layer: Any = model[0]
    outputs = {}
    for name in THREE:
        layer.set_active(name)
        outputs[name] = layer(x) - layer.base_layer(x)
    mix_adapters(model, WEIGHTS, "m", method="cat")
    want = sum(weight * outputs[name] for name, weight in WEIGHTS.items())
    torch.testing.assert_close(layer(x) - layer.base_layer(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "name", "arguments", "message"),
    [
        ({}, "m", {}, "no adapter to mix"),
        ({"x": 1.0}, "m", {}, "no adapter 'x'"),
        ({"a": 1.0}, "b", {}, "'b' already"),
        ({"a": float("nan")}, "m", {}, "not a finite number"),
        ({"a": 1.0}, "m", {"method": "ties"}, "no such way"),
        ({"a": 1.0}, "m", {"method": "cat", "r": 3}, "chosen for svd alone"),
        ({"a": 1.0, "b": 1.0}, "m", {"method": "linear"}, "different ranks"),
        ({"a": 1.0, "d": 1.0}, "m", {}, "is DoRA"),
    ],
)
def test_what_cannot_be_mixed(weights: dict[str, float], name: str, arguments: dict[str, Any], message: str) -> None:
    model = with_adapters(a={"r": 2}, b={"r": 4}, d={"r": 2, "use_dora": True})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        mix_adapters(model, weights, name, **arguments)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.qlora_adapters.keys() == {"a", "b", "d"}


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_grouped_convolutions_are_mixed_group_by_group(method: Any, tmp_path: Any) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.Conv2d(6, 6, 1))

    model, weights = make(), {"a": 0.5, "b": 2.0}
    for name in weights:
        r = 2 if name == "a" and method != "linear" else 4
        inject_lora(model, LoraConfig(r=r, target_modules=["0"], lora_alpha=3.0), name)
        layer: Any = model[0]
        with torch.no_grad():
            for parameter in own(layer, name):
                parameter.copy_(torch.randn(parameter.shape))
    deltas = {name: layer.delta(name, torch.float64) for name in weights}
    mix_adapters(model, weights, "m", method=method)
    found, want = layer.delta("m", torch.float64), sum(weight * deltas[name] for name, weight in weights.items())
    if method == "svd":  # the nearest of each group: 3 outputs of 2 directions
        groups = [torch.linalg.svd(group.flatten(1), full_matrices=False) for group in want.chunk(2)]
        want = torch.cat([(U[:, :2] * S[:2]) @ Vh[:2] for U, S, Vh in groups]).reshape(want.shape)
    if method == "linear":
        pairs = [layer.to_factors(name) for name in weights]
        A, B = (
            sum((weight * 0.75) ** 0.5 * p[i] for p, weight in zip(pairs, weights.values(), strict=True)) for i in (0, 1)
        )
        want = (B @ A).reshape(want.shape).double()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 4, 7)
    save_adapter(model, tmp_path / "m", "m")
    again = make()
    load_adapter(again, tmp_path / "m")
    assert torch.equal(again[0](x), layer(x))


def test_a_rank_that_groups_do_not_divide_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2))
    inject_lora(model, LoraConfig(r=2, target_modules=["0"]), "a")
    with pytest.raises(AdapterError, match="the groups do not divide it"):
        mix_adapters(model, {"a": 1.0}, "m", r=3)
    assert model.qlora_adapters.keys() == {"a"}


def test_a_path_that_is_the_end_of_another_keeps_its_rank(tmp_path: Any) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 9), nn.Sequential(nn.Linear(9, 10)), nn.Linear(10, 11), nn.Linear(11, 12))

    model = make()
    inject_lora(model, LoraConfig(r=2, target_modules=["Linear"]), "a")
    inject_lora(model, LoraConfig(r=1, target_modules="0"), "b")  # a regular expression for the whole path
    record = mix_adapters(model, {"a": 1.0, "b": 1.0}, "m", method="cat")
    ranks = {path: layer.updates["m"].r for path, layer in lora_layers(model)}
    assert ranks == {"0": 3, "1.0": 2, "2": 2, "3": 2}
    theirs = peft.LoraConfig(rank_pattern=record.config.rank_pattern, r=record.config.r)
    assert [theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, path), theirs.r) for path in ranks] == [3, 2, 2, 2]
    save_adapter(model, tmp_path / "m", "m")
    again = make()
    load_adapter(again, tmp_path / "m")
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("weights", [{"a": "x"}, {"a": None}, {"a": True}, ["a", "b"], "a"])
def test_weights_are_numbers_by_name(weights: Any) -> None:
    model = with_adapters(a={"r": 2}, b={"r": 2})
    with pytest.raises(AdapterError, match=r"is not a number|by adapter name"):
        mix_adapters(model, weights, "m")
