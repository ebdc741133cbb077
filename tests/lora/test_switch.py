"""Several adapters on one base: switching, rows of one batch, what inactive ones cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.adapter.files import delete_adapter
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import disable_adapter, lora_layers, merge_adapter, unmerge_adapter
from qlora.lora.mix import mix_adapters
from qlora.lora.switch import adapters_by_row, set_adapter

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "bias": {"r": 3, "lora_bias": True, "use_rslora": True},
    "dora": {"r": 2, "use_dora": True},
}
IDS = torch.randint(3, 300, (5, 9), generator=torch.Generator().manual_seed(0))


def add(model: nn.Module, *names: str, **config: Any) -> None:
    for name in names:
        inject_lora(model, LoraConfig(**(VARIANTS[name] | config)), name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for name in names:
                for part, parameter in layer.parts(name).items():
                    if part != "lora_magnitude_vector":
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    made = make_model("llama").eval()
    add(made, *VARIANTS)
    return made


def test_each_adapter_alone_is_what_it_would_be_without_the_others(make_model: Callable[..., Any], model: Any) -> None:
    for name in VARIANTS:
        alone = make_model("llama").eval()
        inject_lora(alone, LoraConfig(**VARIANTS[name]), name)
        values = {path: layer.parts(name) for path, layer in lora_layers(model)}
        with torch.no_grad():
            for path, layer in lora_layers(alone):
                for part, parameter in layer.parts(name).items():
                    parameter.copy_(values[path][part])
        set_adapter(model, name)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, alone(IDS).logits)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {
            id(p) for _, layer in lora_layers(model) for p in layer.parts(name).values()
        }


def test_without_an_active_adapter_the_base_is_left(make_model: Callable[..., Any], model: Any) -> None:
    set_adapter(model, None)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, make_model("llama").eval()(IDS).logits)
        with disable_adapter(model):
            assert torch.equal(model(IDS).logits, make_model("llama").eval()(IDS).logits)


class Counting(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_one_active_adapter_costs_what_it_would_cost_alone(make_model: Callable[..., Any], model: Any) -> None:
    """The same operations, forward and backward, whatever else is loaded."""
    alone = make_model("llama").eval()
    add(alone, "plain")
    counts = []
    for own in (alone, model):
        set_adapter(own, "plain")
        with Counting() as counting:
            own(IDS).logits.sum().backward()
        counts.append(counting.found)
    assert counts[0] == counts[1]
    assert counts[0]["aten.addmm_.default"] > 0


@pytest.mark.parametrize(
    "rows", [["plain", "bias", None, "bias", "plain"], ["dora", "plain", None, "dora", "bias"], ["bias"] * 5, [None] * 5]
)
def test_every_row_has_its_own_adapter(model: Any, rows: list[str | None]) -> None:
    set_adapter(model, "plain")
    with torch.no_grad():
        with adapters_by_row(model, rows):
            found = model(IDS).logits
        for i, name in enumerate(rows):
            set_adapter(model, name)
            torch.testing.assert_close(found[i : i + 1], model(IDS[i : i + 1]).logits, rtol=0, atol=1e-5)


def test_generation_with_an_adapter_a_row(model: Any) -> None:
    rows: list[str | None] = ["plain", None, "dora"]
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), adapters_by_row(model, rows):
        found = model.generate(IDS[:3], attention_mask=torch.ones_like(IDS[:3]), **arguments)
    for i, name in enumerate(rows):
        set_adapter(model, name)
        row = IDS[i : i + 1]
        assert torch.equal(found[i : i + 1], model.generate(row, attention_mask=torch.ones_like(row), **arguments))


def test_afterwards_everything_is_as_before(model: Any) -> None:
    set_adapter(model, "bias")
    with torch.no_grad():
        want = model(IDS).logits
        with adapters_by_row(model, ["plain"] * 5):
            model(IDS)
        assert torch.equal(model(IDS).logits, want)
    assert all("forward" not in vars(layer) for _, layer in lora_layers(model))


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        set_adapter(model, "x")
    with pytest.raises(AdapterError, match="no adapter 'x'"), adapters_by_row(model, ["x"]):
        pass
    with pytest.raises(AdapterError, match="another number of rows"), torch.no_grad(), adapters_by_row(model, ["plain"]):
        model(IDS)
    with pytest.raises(AdapterError, match="for inference"), adapters_by_row(model, ["plain"] * 5):
        model(IDS)
    set_adapter(model, "plain")
    merge_adapter(model)
    with pytest.raises(AdapterError, match="merged already"):
        set_adapter(model, "bias")
    unmerge_adapter(model)
    set_adapter(model, "bias")


def test_merging_each_in_turn(model: Any) -> None:
    with torch.no_grad():
        for name in VARIANTS:
            set_adapter(model, name)
            want: Tensor = model(IDS).logits
            merge_adapter(model)
            torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=1e-4)
            unmerge_adapter(model)
            assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("third", ["bias", "dora"])
def test_disabled_every_row_is_the_bases(make_model: Callable[..., Any], model: Any, inside: bool, third: str) -> None:
    want = make_model("llama").eval()
    by_row, disabled = adapters_by_row(model, ["plain", "bias", third, None, "plain"]), disable_adapter(model)
    outer, inner = (by_row, disabled) if inside else (disabled, by_row)
    with torch.no_grad(), outer, inner:
        assert torch.equal(model(IDS).logits, want(IDS).logits)


@pytest.mark.parametrize(
    "work",
    [
        merge_adapter,
        lambda model: set_adapter(model, "bias"),
        lambda model: delete_adapter(model, "bias"),
        lambda model: inject_lora(model, LoraConfig(r=2), "new"),
        lambda model: mix_adapters(model, {"plain": 1.0}, "new"),
        lambda model: adapters_by_row(model, ["plain"] * 5).__enter__(),
    ],
    ids=["merge", "set", "delete", "inject", "mix", "nest"],
)
def test_what_is_refused_inside_and_changes_nothing(model: Any, work: Callable[[Any], object]) -> None:
    set_adapter(model, "plain")
    with torch.no_grad(), adapters_by_row(model, ["bias", "plain", None, "dora", "bias"]):
        want = model(IDS).logits
        with pytest.raises(AdapterError, match="inside adapters_by_row"):
            work(model)
        assert torch.equal(model(IDS).logits, want)
    assert all("forward" not in vars(layer) for _, layer in lora_layers(model))
    merge_adapter(model)


def test_names_by_row_are_a_list(model: Any) -> None:
    with pytest.raises(AdapterError, match="are a list"), adapters_by_row(model, "plain"):
        pass
