"""The frozen 8-bit layer and LoRA over it.

Its bytes are bitsandbytes'. What it computes is a linear function of one weight, which is held against plain torch, and
against bitsandbytes' own layer where that computes the same: in training mode on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.config.schema import LoraConfig
from qlora.errors import BaseModelError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import merge_adapter, unmerge_adapter
from qlora.lora.linear import LoraLinear
from qlora.lora.report import count_parameters
from qlora.quant.linear8bit import Linear8bit

IN, OUT = 48, 65  # a row is no multiple of a float's size away from the next in every way
IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def make_layer(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Linear8bit:
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN, dtype=dtype)
    return Linear8bit.from_weight(weight, torch.randn(OUT, dtype=dtype) if bias else None)


def make_bitsandbytes(dtype: torch.dtype, bias: bool = True, *, moved: bool = True, **kwargs: Any) -> Any:
    """A bitsandbytes layer of the same weight as `make_layer`'s."""
    torch.manual_seed(0)
    weight, own_bias = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    layer = bitsandbytes.nn.Linear8bitLt(IN, OUT, bias, **({"has_fp16_weights": False, "threshold": 6.0} | kwargs))
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=layer.state.has_fp16_weights)
    if bias:
        layer.bias = nn.Parameter(own_bias, requires_grad=False)
    return layer.to("cpu") if moved else layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_input_gradient_are_those_of_one_weight(bias: bool, dtype: torch.dtype) -> None:
    """Whatever the mode, and however large an input: nothing of it is quantized."""
    layer = make_layer(dtype, bias)
    x = torch.randn(3, 5, IN, dtype=dtype)
    x[0, 0, 0] = 100  # far beyond the outliers that LLM.int8() treats on their own
    x.requires_grad_()
    want = nn.functional.linear(x, layer.dequantize(), layer.bias)
    dy = torch.randn_like(want)
    for training in (True, False):
        y = layer.train(training)(x)
        assert torch.equal(y, want)
        assert torch.equal(*(torch.autograd.grad(out, x, dy, retain_graph=True)[0] for out in (y, want)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", ["never", "in training", "in evaluation"])
def test_it_equals_bitsandbytes_own_layer_in_training_mode(dtype: torch.dtype, used: str) -> None:
    """Also one whose bytes a forward pass has moved from the weight to the layer's state."""
    theirs, ours = make_bitsandbytes(dtype), make_layer(dtype)
    if used != "never":
        theirs.train(used == "in training")(torch.randn(4, IN, dtype=dtype))
        assert theirs.weight.CB is None
    taken = Linear8bit.from_bitsandbytes(theirs, dtype)
    assert taken.training == theirs.training
    assert taken.weight.data_ptr() == theirs.weight.data_ptr()
    assert torch.equal(ours.weight, taken.weight)
    assert torch.equal(ours.statistics, taken.statistics)
    x = torch.randn(7, IN, dtype=dtype, requires_grad=True)
    want = theirs.train()(x)
    dy = torch.randn_like(want)
    for layer in (ours, taken):
        assert torch.equal(layer(x), want)
        assert torch.equal(*(torch.autograd.grad(out, x, dy, retain_graph=True)[0] for out in (layer(x), want)))


def test_nothing_trains_and_scales_are_sharded_with_the_weight() -> None:
    layer = make_layer()
    kinds = {name: (p.dtype, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()}
    assert kinds == {
        "weight": (torch.int8, (OUT, IN), False),
        "statistics": (torch.uint8, (4 * OUT,), False),
        "bias": (torch.bfloat16, (OUT,), False),
    }


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float32),
    "inside a parent": lambda m: nn.Sequential(nn.Sequential(m)).half(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_touches_the_bytes(cast: str) -> None:
    """bitsandbytes keeps its scales as a plain attribute, which no move and no cast finds once the layer has been used."""
    layer = make_layer()
    weight, packed, statistics, parameter = layer.dequantize(), layer.weight.clone(), layer.statistics.clone(), layer.weight
    CASTS[cast](layer)
    assert layer.weight is parameter
    assert (layer.weight.dtype, layer.statistics.dtype) == (torch.int8, torch.uint8)
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer.statistics, statistics)
    assert torch.equal(layer.dequantize(), weight)


def test_deepcopy_and_state_dict() -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    assert torch.equal(twin(x), layer(x))
    other = Linear8bit(IN, OUT, True, torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert sorted(layer.state_dict()) == ["bias", "statistics", "weight"]


# LoRA over it.


def adapted(dtype: torch.dtype, *, use_dora: bool) -> LoraLinear:
    layer = LoraLinear(make_layer(dtype))
    layer.add_adapter("default", LoraConfig(r=4, lora_alpha=6, use_dora=use_dora), "a", seed=0)
    torch.manual_seed(1)
    nn.init.normal_(layer.lora_B["default"])
    if use_dora:
        layer.lora_magnitude_vector["default"].data += torch.rand(OUT)
    return layer


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_over_it_is_the_formula_in_float64(use_dora: bool) -> None:
    """Hu et al. 2021, equation 3, and Liu et al. 2024, equation 5, of the dense weight; row norms are held constant."""
    layer = adapted(torch.float32, use_dora=use_dora)
    x = torch.randn(9, IN, requires_grad=True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    trained = [layer.get_parameter(name) for name in names]
    assert len(trained) == 2 + use_dora
    y = layer(x)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *trained], dy)
    wide = {name: p.detach().double().requires_grad_() for name, p in zip(names, trained, strict=True)}
    x64 = x.detach().double().requires_grad_()
    A, B = wide["lora_A.default"], wide["lora_B.default"]
    weight = layer.base_layer.dequantize(torch.float32).double() + 1.5 * B @ A  # type: ignore[operator]
    if use_dora:
        weight = weight * (wide["lora_magnitude_vector.default"] / weight.detach().norm(dim=1)).unsqueeze(1)
    want = nn.functional.linear(x64, weight, layer.bias.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)
    for got, expected in zip(found, torch.autograd.grad(want, [x64, *wide.values()], dy.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)


def test_nothing_but_the_input_is_saved_for_backward() -> None:
    layer = adapted(torch.float32, use_dora=True)
    x = torch.randn(9, IN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    assert all(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved)
    assert saved


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_and_back(use_dora: bool) -> None:
    layer = adapted(torch.float32, use_dora=use_dora)
    x = torch.randn(9, IN)
    packed, statistics = layer.base_layer.weight.clone(), layer.base_layer.statistics.clone()  # type: ignore[operator, union-attr]
    beside = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), beside, rtol=1e-5, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer(x), beside)
    assert torch.equal(layer.base_layer.weight, packed)  # type: ignore[arg-type]
    assert torch.equal(layer.base_layer.statistics, statistics)  # type: ignore[arg-type]


# Taking over a model of bitsandbytes.


def test_a_model_of_transformers_is_taken_over(make_base: Callable[..., Any]) -> None:
    """Without copying a weight; what it then computes is what it computed in training mode, adapters or not."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(make_base("qwen2"), dtype=torch.bfloat16, quantization_config=config)
    want = model.train()(IDS).logits
    theirs = {path: m for path, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    pointers = {path: m.weight.data_ptr() for path, m in theirs.items()}
    count = count_parameters(model)
    report = inject_lora(model, LoraConfig(r=4, target_modules=["q_proj"]))
    ours = {path.replace(".base_layer", ""): m for path, m in model.named_modules() if isinstance(m, Linear8bit)}
    assert ours.keys() == theirs.keys()
    assert {path: m.weight.data_ptr() for path, m in ours.items()} == pointers
    assert {m.compute_dtype for m in ours.values()} == {torch.bfloat16}
    assert report.num_total == count + report.num_trainable
    assert count == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(make_base("qwen2")).parameters())
    with torch.no_grad():
        for training in (True, False):
            assert torch.equal(model.train(training)(IDS).logits, want)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        beside = model(IDS).logits
        assert not torch.allclose(beside, want, atol=0.1)
        merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, beside, rtol=0.05, atol=0.2)  # W + s B A is rounded to bf16
        unmerge_adapter(model)
        assert torch.equal(model(IDS).logits, beside)


def test_a_layer_without_a_bias_computes_in_what_the_model_is_in() -> None:
    half, norm = nn.Linear(IN, IN, dtype=torch.float16), nn.LayerNorm(IN)
    model = nn.Sequential(half, norm, make_bitsandbytes(torch.float32, bias=False))
    inject_lora(model, LoraConfig(r=4, target_modules=["2"]))
    assert model[2].base_layer.compute_dtype == torch.float16  # type: ignore[union-attr]
    alone = nn.Sequential(make_bitsandbytes(torch.bfloat16, bias=False))
    inject_lora(alone, LoraConfig(r=4))
    assert alone[0].base_layer.compute_dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"moved": False}, "not quantized yet"), ({"has_fp16_weights": True}, "keeps its weight in 16 bits")],
)
def test_layers_that_are_not_quantized_are_refused_before_anything_changes(changes: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(IN, IN), make_bitsandbytes(torch.float16, **changes))
    modules = list(model.modules())
    with pytest.raises(BaseModelError, match=f"^1: .*{message}"):
        inject_lora(model, LoraConfig(r=4))
    assert list(model.modules()) == modules
    with pytest.raises(BaseModelError, match=f"^here: .*{message}"):
        Linear8bit.from_bitsandbytes(model[1], torch.float16, "here")
