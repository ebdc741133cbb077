"""The frozen 4-bit layer: its bytes are bitsandbytes', and what befalls a module in training leaves them alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from qlora.errors import BaseModelError
from qlora.lora.linear import LoraLinear
from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec
from qlora.quant.linear import Linear4bit

IN, OUT = 64, 128


def make_layer(storage: torch.dtype = torch.uint8, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Linear4bit:
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN, dtype=dtype)
    return Linear4bit.from_weight(weight, torch.randn(OUT, dtype=dtype) if bias else None, QuantSpec(storage=storage))


def make_bitsandbytes(dtype: torch.dtype, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Any:
    layer = bitsandbytes.nn.Linear4bit(IN, OUT, bias is not None, compute_dtype=dtype, **({"quant_type": "nf4"} | kwargs))
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        compress_statistics=kwargs.get("compress_statistics", True),
        quant_type=kwargs.get("quant_type", "nf4"),
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_input_gradient_are_those_of_the_dequantized_weight(bias: bool, dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype, bias=bias)
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    y = layer(x)
    want = nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, want)))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [True, False])
def test_it_equals_bitsandbytes_own_layer_in_training_mode(quant_type: str, compress_statistics: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    theirs = make_bitsandbytes(torch.float32, weight, bias, quant_type=quant_type, compress_statistics=compress_statistics)
    ours = Linear4bit.from_weight(weight, bias, QuantSpec(quant_type, 64, compress_statistics))
    taken = Linear4bit.from_bitsandbytes(theirs, torch.float32)
    x = torch.randn(7, IN, requires_grad=True)
    want = theirs.train()(x)
    for layer in (ours, taken):
        torch.testing.assert_close(layer(x), want)
    assert torch.equal(ours.weight, taken.weight)
    assert torch.equal(ours.statistics, taken.statistics)
    assert ours.spec == taken.spec
    assert taken.weight.data_ptr() == theirs.weight.data_ptr()


def test_nothing_trains() -> None:
    assert not any(parameter.requires_grad for parameter in make_layer().parameters())


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "twice": lambda m: m.half().to(torch.bfloat16).float(),
    "inside a parent": lambda m: nn.Sequential(nn.Sequential(m)).half(),
}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_touches_the_bytes(cast: str, storage: torch.dtype) -> None:
    """bitsandbytes' own layer, stored as bf16, converts its bytes as if they were numbers."""
    layer = make_layer(storage)
    weight, statistics = layer.dequantize(), layer.statistics.clone()
    packed = layer.weight.clone()
    parameter = layer.weight
    CASTS[cast](layer)
    assert layer.weight is parameter
    assert layer.weight.dtype == storage
    assert torch.equal(layer.weight.view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(layer.statistics, statistics)
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_an_evaluation_in_between_changes_nothing_of_the_training(storage: torch.dtype) -> None:
    """On a CPU with AVX512-BF16 one forward of bitsandbytes' own layer in eval mode repacks its weight for good: after it
    no gradient passes, and the bytes read as another weight."""
    layer = LoraLinear(make_layer(storage))
    from qlora.config.schema import LoraConfig

    layer.add_adapter("default", LoraConfig(r=4), "a", seed=0)
    nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(5, IN, dtype=torch.bfloat16, requires_grad=True)
    inputs = (x, layer.lora_A["default"], layer.lora_B["default"])
    weight = layer.base_weight()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.train()(x).float().square().sum(), inputs)

    before = gradients()
    layer.eval()
    with torch.no_grad():
        layer(x.detach())
    with torch.enable_grad():
        layer(x.detach())  # gradients on, but no input needs one: a first layer over a frozen embedding
    layer.base_layer.eval()(x.detach())
    after = gradients()
    assert torch.equal(layer.base_weight(), weight)
    assert all(gradient.any() for gradient in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_repacked_bitsandbytes_layer_is_refused() -> None:
    torch.manual_seed(0)
    theirs = make_bitsandbytes(torch.bfloat16, torch.randn(OUT, IN, dtype=torch.bfloat16), None)
    with torch.no_grad():
        theirs.eval()(torch.randn(4, IN, dtype=torch.bfloat16))
    if not getattr(theirs.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")
    with pytest.raises(BaseModelError, match=r"a\.path: bitsandbytes has repacked"):
        Linear4bit.from_bitsandbytes(theirs, torch.bfloat16, "a.path")


def test_deepcopy_and_state_dict() -> None:
    layer = make_layer(torch.bfloat16)
    twin = copy.deepcopy(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    assert torch.equal(twin(x), layer(x))
    other = Linear4bit(IN, OUT, True, layer.spec, torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert sorted(layer.state_dict()) == ["bias", "statistics", "weight"]


@pytest.mark.parametrize("shape", [(48, 64), (40, 96), (7, 10), (3, 4097)])
def test_any_shape(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    layer = Linear4bit.from_weight(weight, None, QuantSpec())
    assert layer.weight.shape == ((weight.numel() + 1) // 2, 1)
    assert layer.statistics.shape == (QuantSpec().statistics_bytes(weight.numel()),)
    scale = weight.abs().max()
    # Half of nf4's widest gap is 0.152; the scales' own 8 bits add a little.
    assert (layer.dequantize() - weight).abs().max() < 0.17 * scale


def test_statistics_are_a_parameter_so_that_they_are_sharded_with_the_weight() -> None:
    layer = make_layer()
    assert {name for name, _ in layer.named_parameters()} == {"weight", "statistics", "bias"}
    assert isinstance(layer.statistics, nn.Parameter)
    assert nf4.QuantSpec().statistics_bytes(IN * OUT) == layer.statistics.numel()
