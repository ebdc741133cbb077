"""LoRA over convolutions, against dense kernels in float64 and against PEFT."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from qlora.adapter.files import load_adapter, save_adapter
from qlora.config.schema import LoraConfig
from qlora.errors import ConfigError
from qlora.lora.conv import LoraConv
from qlora.lora.inject import inject_lora
from qlora.lora.layer import LoraLayer, merge_adapter, unmerge_adapter
from tests.adapter.random_values import randomize

# What a convolution can be: each is tried with each variant that it allows.
BASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "1d, a stride, no bias": (nn.Conv1d, {"kernel_size": 4, "stride": 2, "bias": False}),
    "1d, groups": (nn.Conv1d, {"kernel_size": 3, "groups": 2}),
    "1d, depthwise": (nn.Conv1d, {"kernel_size": 2, "groups": 4, "out_channels": 4}),
    "1d, dilated, circular": (nn.Conv1d, {"kernel_size": 3, "dilation": 2, "padding": 2, "padding_mode": "circular"}),
    "1d, same": (nn.Conv1d, {"kernel_size": 4, "padding": "same"}),
    "2d": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    "2d, one point": (nn.Conv2d, {"kernel_size": 1}),
    "2d, groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "2d, dilated": (nn.Conv2d, {"kernel_size": 3, "dilation": (1, 2), "padding": 2}),
    "2d, reflected": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7.0},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}
CASES = [
    (base, variant)
    for base, variant in itertools.product(BASES, VARIANTS)
    if "groups" not in BASES[base][1] or variant != "dora"
]
# PEFT 0.21 leaves dilation and padding mode out of A.
SAME_IN_PEFT = [name for name, (_, options) in BASES.items() if not {"dilation", "padding_mode"} & options.keys()]


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    """A model of one convolution, and an input."""
    kind, options = BASES[name]
    torch.manual_seed(0)
    model = nn.Sequential(kind(**({"in_channels": 4, "out_channels": 6} | options))).to(dtype)
    return model, torch.randn(3, 4, *(9, 8)[: 1 if kind is nn.Conv1d else 2], dtype=dtype)


def adapt(model: nn.Module, **config: Any) -> LoraConv:
    inject_lora(model, LoraConfig(**({"r": 4, "lora_alpha": 6.0, "target_modules": ["0"]} | config)))
    randomize(model, size=0.3)
    return model[0]  # type: ignore[index, no-any-return]


def oracle(layer: LoraConv, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The formula with one dense kernel, summed channel by channel."""
    base, update = layer.base_layer, layer.updates["default"]
    A, B = parts["lora_A.weight"].double(), parts["lora_B.weight"].double()
    out, groups, r = base.out_channels, base.groups, update.r
    kernel = torch.zeros(out, base.in_channels, *base.kernel_size, dtype=torch.float64)
    rows = []
    for channel in range(out):
        group = channel // (out // groups)
        own = slice(group * base.in_channels // groups, (group + 1) * base.in_channels // groups)
        row = kernel[channel].clone()
        row[own] = base.weight[channel].double()
        for index in range(r // groups):
            row = row + update.scaling * B[channel, index].reshape(()) * A[group * (r // groups) + index]
        rows.append(row)
    kernel = torch.stack(rows)
    if "lora_magnitude_vector" in parts:
        norms = kernel.detach().flatten(1).norm(dim=1)  # held constant (DoRA, section 4.3)
        factor = parts["lora_magnitude_vector"].double().flatten() / norms
        kernel = kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))
    bias = None if base.bias is None else base.bias.double()
    if "lora_B.bias" in parts:
        bias = update.scaling * parts["lora_B.bias"].double() + (0 if bias is None else bias)
    dense = type(base)(
        base.in_channels, out, base.kernel_size, base.stride, base.padding, base.dilation,
        padding_mode=base.padding_mode, bias=bias is not None,
    ).double()  # fmt: skip
    values = {"weight": kernel} | ({} if bias is None else {"bias": bias})
    return torch.func.functional_call(dense, values, (x.double(),))


@pytest.mark.parametrize(("base", "variant"), CASES)
def test_outputs_and_gradients_are_those_of_one_dense_kernel(base: str, variant: str) -> None:
    model, x = make(base)
    layer = adapt(model, **VARIANTS[variant])
    x.requires_grad_()
    parts = layer.parts("default")
    y, want = layer(x), oracle(layer, x, parts)
    # The update's parameters are fp32, and everything else float64.
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((y * weights).sum(), [x, *parts.values()])
    wanted = torch.autograd.grad((want * weights).sum(), [x, *parts.values()])
    for name, one, other in zip(["x", *parts], found, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize(("base", "variant"), CASES)
def test_merged_outputs_agree_and_unmerging_is_exact(base: str, variant: str) -> None:
    model, x = make(base)
    layer = adapt(model, **VARIANTS[variant])
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        want, plain = model(x), layer.base_layer(x)
        merge_adapter(model)
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(want, plain, atol=0.01)
        unmerge_adapter(model)
        assert torch.equal(model(x), want)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_starts_at_the_bases_own_function(variant: str) -> None:
    model, x = make("2d", torch.float32)
    want = model(x)
    inject_lora(model, LoraConfig(r=4, target_modules=["0"], **VARIANTS[variant]))
    assert torch.equal(model(x), want)
    torch.testing.assert_close(model(x[0]), model(x)[0])  # an input without a batch


def test_dropout_draws_the_same_in_forward_and_backward() -> None:
    """Linear in x for one drawing, so that the gradient along x is the output itself."""
    model, x = make("1d, groups")
    model[0].bias = None
    layer = adapt(model, lora_dropout=0.5).train()
    x.requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    (grad,) = torch.autograd.grad((y * y.detach()).sum(), x)
    torch.testing.assert_close((grad * x).sum(), y.square().sum())
    assert not torch.allclose(layer(x), y, atol=1e-3)


@pytest.mark.parametrize(("base", "variant"), [case for case in CASES if case[0] in SAME_IN_PEFT])
def test_peft_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, base: str, variant: str) -> None:
    model, x = make(base, torch.float32)
    adapt(model, **VARIANTS[variant])
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(make(base, torch.float32)[0], tmp_path / "ours")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(theirs(x), make(base, torch.float32)[0](x), atol=0.01)

    options = {"r": 8, "lora_alpha": 5, "target_modules": ["0"]} | VARIANTS[variant]
    theirs = get_peft_model(make(base, torch.float32)[0], peft.LoraConfig(**options))
    randomize(theirs, size=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    again = make(base, torch.float32)[0]
    load_adapter(again, tmp_path / "theirs")
    assert isinstance(again[0], LoraLayer)
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_what_peft_merges_of_a_dilated_layer_is_what_we_compute(tmp_path: Path) -> None:
    """PEFT's own forward pass leaves the dilation out of A, and then has another shape."""
    model, x = make("2d, dilated", torch.float32)
    adapt(model)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make("2d, dilated", torch.float32)[0], tmp_path)
    torch.testing.assert_close(theirs.merge_and_unload()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "config", "words"),
    [
        ("1d, groups", {"r": 3}, "2 groups do not divide it"),
        ("1d, groups", {"use_dora": True}, "a convolution of 2 groups cannot have it"),
        ("2d", {"use_dora": True, "lora_bias": True}, "a DoRA layer cannot have it"),
    ],
)
def test_what_mathematics_forbids_is_refused(base: str, config: dict[str, Any], words: str) -> None:
    model, _ = make(base)
    with pytest.raises(ConfigError, match=words):
        inject_lora(model, LoraConfig(**({"r": 4, "target_modules": ["0"]} | config)))
    assert not isinstance(model[0], LoraLayer)


def test_all_linear_leaves_convolutions_alone() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(8, 8))
    report = inject_lora(model, LoraConfig(r=2))
    assert list(report.targeted) == ["1"]
    assert "not a linear layer" in report.skipped["0"]


@pytest.mark.parametrize("base", ["1d", "2d"])
def test_dora_leaves_an_output_channel_of_zeros_what_it_is(base: str) -> None:
    model, x = make(base)
    with torch.no_grad():
        model[0].weight[1] = 0  # type: ignore[union-attr, operator]
        want = model(x)
    inject_lora(model, LoraConfig(r=4, use_dora=True, target_modules=["0"]))
    y = model(x)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    merge_adapter(model)
    torch.testing.assert_close(model(x), want)
