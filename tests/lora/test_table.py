"""Every kind of layer x every variant x every quantization, merged and not, saved and loaded: one generated table.

The oracle is the module of the base itself in float64, with W + s B A (for DoRA rescaled) in the place of its weight. What
mathematics forbids must be refused by name, and changes nothing; `FORBIDDEN` says why.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora.adapter.files import load_adapter, save_adapter
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import ConfigError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers, merge_adapter, unmerge_adapter
from qlora.ops.nf4 import QuantSpec
from qlora.quant.linear import Linear4bit
from qlora.quant.linear8bit import Linear8bit

R, ALPHA = 4, 6.0
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"layer.*": 2}, "alpha_pattern": {"layer.*": 5.0}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dora, rslora, patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {".*": 3}},
    "bf16": {"dtype": "bfloat16"},
    "dropout in eval": {"lora_dropout": 0.5},
}
KINDS = ("linear", "linear with bias", "conv1d of transformers", "embedding", "conv1d", "conv2d", "experts")
QUANTIZATIONS = ("none", "nf4", "nf4, double", "fp4", "int8")
# (kind, variant) that there can be none of.
FORBIDDEN = {
    ("embedding", "lora_bias"): "a row of the embedding is looked up, there is no sum to add it to",
    ("experts", "lora_bias"): "no file format has one for each expert",
    ("experts", "dora"): "no file format has a magnitude for each expert",
    ("experts", "dora, rslora, patterns"): "no file format has a magnitude for each expert",
}
CASES = [
    (kind, variant, quantization)
    for kind, variant, quantization in itertools.product(KINDS, VARIANTS, QUANTIZATIONS)
    if quantization == "none" or kind.startswith("linear")  # what is quantized is linear
]


class Model(nn.Module):
    """One layer under a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        return self.layer(*args)  # type: ignore[no-any-return]


def make(kind: str, quantization: str = "none") -> tuple[Model, tuple[Tensor, ...]]:
    """A model of one random layer, and an input for it."""
    torch.manual_seed(0)
    layer: Any
    x: tuple[Tensor, ...] = (torch.randn(5, 64),)
    if kind.startswith("linear"):
        layer = nn.Linear(64, 24, bias=kind.endswith("bias"))
    elif kind == "conv1d of transformers":
        layer = Conv1D(24, 64)
    elif kind == "embedding":
        layer, x = nn.Embedding(40, 16), (torch.randint(0, 40, (3, 7)),)
    elif kind == "conv1d":
        layer, x = nn.Conv1d(6, 8, 3, padding=1, dilation=2), (torch.randn(2, 6, 11),)
    elif kind == "conv2d":
        layer, x = nn.Conv2d(5, 7, (3, 2), stride=2, bias=False), (torch.randn(2, 5, 8, 9),)
    else:
        config = transformers.Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=12, num_experts=3)
        config._experts_implementation = "eager"
        layer = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts(config)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = (torch.randn(9, 16), torch.rand(9, 3).topk(2).indices, torch.rand(9, 2))
    if quantization == "int8":
        layer = Linear8bit.from_weight(layer.weight.data, layer.bias)
    elif quantization != "none":
        spec = QuantSpec(quantization[:3], 64, quantization.endswith("double"))
        layer = Linear4bit.from_weight(layer.weight.data, layer.bias, spec)
    return Model(layer).eval(), x


def config_of(kind: str, variant: str) -> LoraConfig:
    target: dict[str, Any] = {"target_modules": ["layer"]}
    if kind == "experts":
        target = {"target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"]}
    return LoraConfig(**({"r": R, "lora_alpha": ALPHA} | target | VARIANTS[variant]))


def with_adapter(kind: str, variant: str, quantization: str) -> tuple[Model, tuple[Tensor, ...]]:
    model, x = make(kind, quantization)
    inject_lora(model, config_of(kind, variant))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, x


def plain_module(layer: Any) -> Any:
    """The base's module in float64; what is quantized becomes a linear layer of what it stands for."""
    if not isinstance(layer, (Linear4bit, Linear8bit)):
        return copy.deepcopy(layer).double()
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).double()
    with torch.no_grad():
        plain.weight.copy_(layer.dequantize())
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def scaling_of(kind: str, variant: str) -> tuple[int, float]:
    """(r, s), from the definitions in the papers."""
    r = {"patterns": 2, "dora, rslora, patterns": 3}.get(variant, R)
    alpha = 5.0 if variant == "patterns" else ALPHA
    return r, alpha / (r**0.5 if "rslora" in variant else r)


def oracle(model: Model, kind: str, variant: str, x: tuple[Tensor, ...]) -> Tensor:
    """The output with the changed weights, float64."""
    x = tuple(part.double() if part.is_floating_point() else part for part in x)
    r, s = scaling_of(kind, variant)
    layers: dict[str, Any] = dict(lora_layers(model))
    first: Any = model.layer
    plain = plain_module(first.base_layer)
    with torch.no_grad():
        for path, layer in layers.items():
            parts = {part: value.detach().double() for part, value in layer.parts("default").items()}
            A, B = (next(value for part, value in parts.items() if f"{letter}" in part.split(".")[0][-1]) for letter in "AB")
            weight = plain.get_parameter("weight" if kind != "experts" else path.rpartition(".")[2])
            m = parts.get("lora_magnitude_vector")
            if kind == "experts":
                num_experts = weight.shape[0]
                delta = torch.einsum("ore,eri->eoi", B.reshape(B.shape[0], r, num_experts), A.reshape(num_experts, r, -1))
            elif kind == "embedding":
                delta = (B @ A).T
            elif kind in ("conv1d", "conv2d"):
                delta = torch.einsum("or,r...->o...", B.flatten(1), A)
            else:
                delta = B @ A
            delta = delta.T if kind == "conv1d of transformers" else delta
            weight += s * delta
            if m is not None:
                outputs = {"embedding": 1, "conv1d of transformers": 1}.get(kind, 0)
                others = tuple(dim for dim in range(weight.ndim) if dim != outputs)
                shape = [-1 if dim == outputs else 1 for dim in range(weight.ndim)]
                weight *= m.reshape(shape) / torch.linalg.vector_norm(weight, dim=others, keepdim=True)
            bias = parts.get("lora_B.bias")
            if bias is not None:
                plain.bias = nn.Parameter(s * bias + (0 if plain.bias is None else plain.bias))
        return plain(*x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "variant", "quantization"), CASES)
def test_it_is_the_dense_weight(kind: str, variant: str, quantization: str, tmp_path: Path) -> None:
    if (kind, variant) in FORBIDDEN:
        model, _ = make(kind, quantization)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ConfigError, match=r"lora_bias|use_dora"):
            inject_lora(model, config_of(kind, variant))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not list(lora_layers(model))
        return
    model, x = with_adapter(kind, variant, quantization)
    with torch.no_grad():
        want, found = oracle(model, kind, variant, x), model(*x)
        base, _ = make(kind, quantization)
        assert not torch.allclose(found, base(*x), atol=0.01)
        # fp32 against float64: 1e-5 of the largest output.
        size = want.abs().max().item()
        assert (found - want).abs().max() < 1e-5 * size
        merge_adapter(model)
        assert (model(*x) - want).abs().max() < 1e-5 * size
        unmerge_adapter(model)
        assert torch.equal(model(*x), found)
        save_adapter(model, tmp_path)
        again, _ = make(kind, quantization)
        load_adapter(again, tmp_path)
        assert torch.equal(again(*x), found)
        save_adapter(again, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_quantizations_are_those_of_the_job_file() -> None:
    """Every type and width that a job can ask for is in the table."""
    fields = QuantizationConfig.model_fields
    asked = {*fields["quant_type"].annotation.__args__} | {f"int{n}" for n in fields["bits"].annotation.__args__ if n == 8}  # type: ignore[union-attr]
    assert asked == {name[:4].strip(",") for name in QUANTIZATIONS} - {"none"}
