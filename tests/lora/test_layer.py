"""The LoRA layer: counts, outputs, merging, names, seeds."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import (
    disable_adapter,
    initial_A,
    lora_layers,
    merge_adapter,
    unmerge_adapter,
)
from qlora.lora.linear import LoraLinear
from qlora.lora.report import count_parameters
from qlora.ops.nf4 import QuantSpec
from qlora.quant.linear import Linear4bit


def make_layer(base: nn.Module | None = None, name: str = "default", **config: Any) -> LoraLinear:
    layer = LoraLinear(base or nn.Linear(24, 16))  # type: ignore[arg-type]
    layer.add_adapter(name, LoraConfig(**({"r": 4} | config)), "some.path", seed=0)
    return layer


def set_B(layer: LoraLinear, name: str = "default", std: float = 0.1, seed: int = 0) -> LoraLinear:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_B[name].copy_(torch.randn(layer.lora_B[name].shape, generator=generator) * std)
    return layer


def make_4bit(dtype: torch.dtype = torch.float32) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit.from_weight(torch.randn(16, 64, dtype=dtype), torch.randn(16, dtype=dtype), QuantSpec())


def make_conv1d() -> nn.Module:
    """transformers' Conv1D, whose weight is (in, out); its bias starts at zero, behind which mistakes would hide."""
    layer = Conv1D(16, 64)
    nn.init.normal_(layer.bias)
    return layer


# Counts, as they follow from r (in + out).


def test_a_layer_of_64_to_10_at_rank_4_has_296_parameters() -> None:
    model = nn.Sequential(nn.Linear(64, 10))
    report = inject_lora(model, LoraConfig(r=4, target_modules=["Linear"]))
    assert report.num_trainable == 4 * (64 + 10) == 296


def test_a_small_classifier_trains_681_hundredths_of_a_percent() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    report = inject_lora(model, LoraConfig(r=4, target_modules=["Linear"]))
    assert report.num_trainable == 4 * (128 + 256) + 4 * (256 + 10) == 2600
    assert report.num_total == (128 * 256 + 256) + (256 * 10 + 10) + 2600 == 38194
    assert round(report.percent, 2) == 6.81


@pytest.mark.parametrize(("r", "num_parameters"), [(4, 32_768), (8, 65_536), (16, 131_072), (32, 262_144), (64, 524_288)])
def test_a_square_layer_of_4096(r: int, num_parameters: int) -> None:
    with torch.device("meta"):
        base = nn.Linear(4096, 4096, bias=False)
    assert base.weight.numel() == 16_777_216
    layer = LoraLinear(base)
    layer.add_adapter("default", LoraConfig(r=r), "x", seed=0)
    assert layer.lora_A["default"].numel() + layer.lora_B["default"].numel() == r * (4096 + 4096) == num_parameters
    share = 100 * num_parameters / 16_777_216
    assert share == {4: 0.1953125, 8: 0.390625, 16: 0.78125, 32: 1.5625, 64: 3.125}[r]


# Outputs.


@pytest.mark.parametrize("kind", ["linear", "4bit"])
def test_before_the_first_step_the_output_is_the_bases_own(kind: str) -> None:
    base = nn.Linear(64, 16) if kind == "linear" else make_4bit()
    x = torch.randn(5, 64)
    assert torch.equal(make_layer(base)(x), base(x))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_output_is_the_formula(use_rslora: bool) -> None:
    layer = set_B(make_layer(lora_alpha=12.0, use_rslora=use_rslora))
    x = torch.randn(7, 24)
    scaling = 12.0 / (math.sqrt(4) if use_rslora else 4)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    want = layer.base_layer(x) + scaling * (x @ A.T @ B.T)
    torch.testing.assert_close(layer(x), want)


def test_dropout_is_of_training_alone() -> None:
    layer = set_B(make_layer(lora_dropout=0.5))
    x = torch.randn(7, 24)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_have_the_type_asked_for(dtype: str) -> None:
    layer = make_layer(dtype=dtype)
    assert {p.dtype for p in (*layer.lora_A.values(), *layer.lora_B.values())} == {getattr(torch, dtype)}
    assert layer.lora_A["default"].shape == (4, 24)
    assert layer.lora_B["default"].shape == (16, 4)


# Merging. A default layer's weights are within 1/sqrt(in), so its outputs are of size one, and fp32 errs by 1e-7 of that.


@pytest.mark.parametrize("kind", ["linear", "4bit"])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_merged_and_unmerged_outputs_agree(kind: str, r: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 16) if kind == "linear" else make_4bit()
    layer = set_B(make_layer(base, r=r, lora_alpha=16.0), std=0.02).eval()
    x = torch.randn(32, 64)
    with torch.no_grad():
        unmerged = layer(x)
        assert not torch.allclose(unmerged, base(x), atol=1e-3), "the update has an effect"
        layer.merge()
        torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=1e-5)
        layer.unmerge()
        assert torch.equal(layer(x), unmerged)


def test_a_model_merges_and_unmerges_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    inject_lora(model, LoraConfig(r=4, target_modules=["Linear"]))
    for index, (_, layer) in enumerate(lora_layers(model)):
        set_B(layer, std=0.01, seed=index)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(64, 128)
    with torch.no_grad():
        want = model(x)
        merge_adapter(model)
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)
        # Nothing that is saved depends on the merge, and the frozen weights are not written to.
        assert_same_state(model, before)
        unmerge_adapter(model)
        assert torch.equal(model(x), want)
    assert_same_state(model, before)


def assert_same_state(model: nn.Module, want: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_merging_twice_is_an_error_and_changes_nothing() -> None:
    model = nn.Sequential(make_layer(), make_layer(nn.Linear(16, 16)))
    merge_adapter(model)
    merged = [layer._merged_weight.clone() for layer in model]  # type: ignore[union-attr, operator]
    for merge in (lambda: merge_adapter(model), model[0].merge):
        with pytest.raises(AdapterError, match="'default' is merged already"):
            merge()
    assert all(torch.equal(layer._merged_weight, weight) for layer, weight in zip(model, merged, strict=True))


def test_a_model_that_is_merged_in_part_is_merged_no_further() -> None:
    model = nn.Sequential(make_layer(), make_layer(nn.Linear(16, 16)))
    model[1].merge()
    with pytest.raises(AdapterError, match="'default' is merged already"):
        merge_adapter(model)
    assert [layer.merged_adapter for layer in model] == [None, "default"]


def test_unmerging_what_is_not_merged_is_an_error() -> None:
    model = nn.Sequential(make_layer())
    for unmerge in (lambda: unmerge_adapter(model), model[0].unmerge):
        with pytest.raises(AdapterError, match="no adapter is merged"):
            unmerge()


def test_merging_without_an_adapter_is_an_error() -> None:
    with pytest.raises(AdapterError, match="no LoRA layers"):
        merge_adapter(nn.Sequential(nn.Linear(3, 3)))
    layer = make_layer()
    layer.set_active(None)
    with pytest.raises(AdapterError, match="no active adapter"):
        layer.merge()


def test_an_adapter_of_some_layers_merges_where_it_is() -> None:
    """Layers that only another adapter has are left as they are; none is merged half way."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject_lora(model, LoraConfig(r=2, target_modules=["0", "1"]), "both")
    inject_lora(model, LoraConfig(r=2, target_modules=["1"]), "second")
    set_B(model[1], "second")
    x = torch.randn(3, 8)
    want = model(x)
    merge_adapter(model)
    assert [layer.merged_adapter for layer in model] == [None, "second"]
    torch.testing.assert_close(model(x), want)
    unmerge_adapter(model)
    assert torch.equal(model(x), want)


def test_a_merged_layer_moves_as_a_whole() -> None:
    layer = set_B(make_layer())
    layer.merge()
    layer.to(torch.float64)
    assert layer(torch.randn(2, 24, dtype=torch.float64)).dtype == torch.float64
    assert layer._merged_weight is not None
    assert layer._merged_weight.dtype == torch.float64
    assert not any("merged" in name for name in layer.state_dict())


def test_a_merged_base_is_of_the_bases_own_type() -> None:
    layer = set_B(make_layer(make_4bit(torch.bfloat16)))
    layer.merge()
    assert layer._merged_weight is not None
    want = layer.base_weight().float() + layer.updates["default"].scaling * (
        layer.lora_B["default"] @ layer.lora_A["default"]
    )
    assert torch.equal(layer._merged_weight, want.bfloat16())


@pytest.mark.parametrize("merged", [False, True])
def test_disabling_gives_the_base_and_ends_with_the_context(merged: bool) -> None:
    model = nn.Sequential(set_B(make_layer()), nn.ReLU(), set_B(make_layer(nn.Linear(16, 16))))
    if merged:
        merge_adapter(model)
    x = torch.randn(5, 24)
    base = nn.Sequential(model[0].base_layer, nn.ReLU(), model[2].base_layer)  # type: ignore[arg-type]
    with_adapter = model(x)
    with disable_adapter(model) as same:
        assert same is model
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), with_adapter)
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(model(x), with_adapter)
    with disable_adapter(model):
        with disable_adapter(model):
            pass
        assert torch.equal(model(x), base(x))


# Variants: DoRA and a bias of B, over every kind of linear layer. x is (5, 64) and gives (5, 16) in all of them.

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 16),
    "without bias": lambda: nn.Linear(64, 16, bias=False),
    "4bit": make_4bit,
    "conv1d": make_conv1d,
}
VARIANTS: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}


def make_variant(kind: str, seed: int = 0, **config: Any) -> LoraLinear:
    """A layer all of whose parameters are as if they had been trained."""
    torch.manual_seed(0)
    layer = set_B(make_layer(BASES[kind](), **config), seed=seed)
    with torch.no_grad():
        for table in (layer.lora_bias, layer.lora_magnitude_vector):
            for parameter in table.values():
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return layer


def plain_output(layer: LoraLinear, x: Tensor) -> Tensor:
    """The formula by plain autograd over the whole weight."""
    weight, scaling = layer.base_weight(), layer.updates["default"].scaling
    bias = 0.0 if layer.bias is None else layer.bias
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    direction = weight + scaling * B @ A
    if "default" in layer.lora_magnitude_vector:
        norms = direction.detach().norm(dim=1, keepdim=True)
        return x @ (layer.lora_magnitude_vector["default"].unsqueeze(1) * direction / norms).T + bias
    return x @ direction.T + bias + scaling * layer.lora_bias["default"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", BASES)
def test_a_variant_starts_at_the_bases_own_output(kind: str, variant: str) -> None:
    torch.manual_seed(0)
    base = BASES[kind]()
    x = torch.randn(5, 64)
    # DoRA adds the bias by itself, so that the last bit may be another one.
    torch.testing.assert_close(make_layer(base, **VARIANTS[variant])(x), base(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", BASES)
def test_a_variant_is_its_formula_in_value_and_gradient(kind: str, variant: str) -> None:
    layer = make_variant(kind, **VARIANTS[variant])
    parameters = list(layer.parts("default").values())
    assert len(parameters) == 3
    assert all(parameter.requires_grad for parameter in parameters)
    x = torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 16)
    found, want = layer(x), plain_output(layer, x)
    torch.testing.assert_close(found, want)
    ours, plain = (torch.autograd.grad(y, [x, *parameters], dy) for y in (found, want))
    for gradient, right in zip(ours, plain, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", BASES)
def test_a_variant_merges_and_unmerges(kind: str, variant: str) -> None:
    layer = make_variant(kind, **VARIANTS[variant]).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(5, 64)
    with torch.no_grad():
        unmerged = layer(x)
        assert not torch.allclose(unmerged, layer.base_layer(x), atol=1e-2)
        layer.merge()
        torch.testing.assert_close(layer(x), unmerged, rtol=1e-5, atol=1e-5)
        layer.unmerge()
        assert torch.equal(layer(x), unmerged)
    assert_same_state(layer, before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
def test_a_variant_computes_what_peft_computes(kind: str, variant: str) -> None:
    layer = make_variant(kind, **VARIANTS[variant])
    settings = {"r": 4, "lora_alpha": 32.0, "target_modules": ["0"], "fan_in_fan_out": kind == "conv1d"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that such a bias of B cannot be merged there
        theirs = peft.get_peft_model(
            nn.Sequential(copy.deepcopy(layer.base_layer)), peft.LoraConfig(**settings, **VARIANTS[variant])
        )
    peer = theirs.base_model.model[0]
    peer.load_state_dict({part.replace(".", ".default."): p for part, p in as_peft_names(layer).items()}, strict=False)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), theirs(x))
    dy = torch.randn(5, 16)
    named = dict(peer.named_parameters())
    theirs(x).backward(dy)
    layer(x).backward(dy)
    for name, parameter in as_peft_names(layer).items():
        torch.testing.assert_close(parameter.grad, named[name.replace(".", ".default.")].grad, rtol=1e-4, atol=1e-5)


def as_peft_names(layer: LoraLinear) -> dict[str, nn.Parameter]:
    parts = layer.parts("default")
    return {f"{part}.weight" if part == "lora_magnitude_vector" else part: p for part, p in parts.items()}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_magnitude_starts_as_the_norms_of_the_rows_in_fp32(kind: str, dtype: str) -> None:
    layer = make_layer(BASES[kind](), use_dora=True, dtype=dtype)
    magnitude = layer.lora_magnitude_vector["default"]
    assert magnitude.dtype == torch.float32
    assert layer.lora_A["default"].dtype == getattr(torch, dtype)
    torch.testing.assert_close(magnitude.detach(), layer.base_weight().norm(dim=1))


def test_doras_dropout_is_of_the_input_of_A_alone() -> None:
    layer = make_variant("linear", use_dora=True, lora_dropout=0.5)
    x = torch.randn(5, 64)
    with torch.no_grad():
        layer.train()
        torch.manual_seed(1)
        dropped = layer(x)
        layer.lora_B["default"].zero_()
        assert torch.equal(layer.train()(x), layer.eval()(x)), "with B at zero nothing of what is dropped is left"
    assert not torch.equal(dropped, layer(x))


@pytest.mark.parametrize("merged", [False, True])
def test_a_variant_can_be_left_out(merged: bool) -> None:
    for variant in VARIANTS.values():
        model = nn.Sequential(make_variant("linear", **variant))
        if merged:
            merge_adapter(model)
        x = torch.randn(5, 64)
        with disable_adapter(model):
            assert torch.equal(model(x), model[0].base_layer(x))  # type: ignore[operator, union-attr]


def test_adapters_of_different_variants_share_a_layer() -> None:
    torch.manual_seed(0)
    layer = make_layer(nn.Linear(64, 16), "plain")
    layer.add_adapter("dora", LoraConfig(r=2, use_dora=True), "some.path", seed=0)
    layer.add_adapter("bias", LoraConfig(r=2, lora_bias=True), "some.path", seed=0)
    for name, parts in {
        "plain": {"lora_A.weight", "lora_B.weight"},
        "dora": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
        "bias": {"lora_A.weight", "lora_B.weight", "lora_B.bias"},
    }.items():
        assert set(layer.parts(name)) == parts
        layer.set_active(name)
        assert {id(p) for p in layer.parameters() if p.requires_grad} - {id(p) for p in layer.base_layer.parameters()} == {
            id(p) for p in layer.parts(name).values()
        }
    layer.remove_adapter("dora")
    assert not layer.lora_magnitude_vector


def test_dora_with_a_bias_of_B_is_refused() -> None:
    layer = LoraLinear(nn.Linear(64, 16))
    with pytest.raises(ConfigError, match=r"lora\.lora_bias: a DoRA layer cannot have it"):
        layer.add_adapter("default", LoraConfig(use_dora=True, lora_bias=True), "x", seed=0)
    assert not layer.updates


# Names.


def test_two_named_adapters_at_once() -> None:
    layer = make_layer(name="a", r=4)
    layer.add_adapter("b", LoraConfig(r=2, lora_alpha=3.0), "some.path", seed=1)
    set_B(layer, "a", seed=1)
    set_B(layer, "b", seed=2)
    x = torch.randn(3, 24)
    outputs = {}
    for name in ("a", "b", None):
        layer.set_active(name)
        outputs[name] = layer(x)
        trainable = {own for own, p in layer.named_parameters() if p.requires_grad and "lora" in own}
        assert trainable == ({f"lora_A.{name}", f"lora_B.{name}"} if name else set())
    for name in ("a", "b"):
        torch.testing.assert_close(outputs[name], outputs[None] + x @ layer.delta(name).T)
    assert torch.equal(outputs[None], layer.base_layer(x))


def test_a_name_is_given_once() -> None:
    layer = make_layer()
    with pytest.raises(AdapterError, match=r"some\.path: the layer has an adapter 'default' already"):
        layer.add_adapter("default", LoraConfig(r=4), "some.path", seed=0)


def test_removing_the_active_adapter_leaves_the_base() -> None:
    layer = set_B(make_layer(name="a"), "a")
    layer.add_adapter("b", LoraConfig(r=2), "some.path", seed=1)
    layer.merge()
    layer.remove_adapter("b")
    x = torch.randn(3, 24)
    assert layer.active_adapter is None
    assert layer.merged_adapter is None
    assert torch.equal(layer(x), layer.base_layer(x))
    assert list(layer.lora_A) == list(layer.lora_B) == list(layer.updates) == ["a"]
    layer.set_active("a")
    assert not torch.equal(layer(x), layer.base_layer(x))


# Seeds.


def test_A_depends_on_seed_and_path_alone() -> None:
    want = initial_A((4, 24), "model.q", 3)
    torch.manual_seed(99)
    torch.rand(17)
    before = torch.get_rng_state()
    assert torch.equal(initial_A((4, 24), "model.q", 3), want)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(initial_A((4, 24), "model.q", 4), want)
    assert not torch.equal(initial_A((4, 24), "model.k", 3), want)


def test_A_is_uniform_within_one_over_the_root_of_in() -> None:
    """torch's Kaiming-uniform with a = sqrt(5), which nn.Linear and PEFT use."""
    A = initial_A((64, 4096), "x", 0)
    bound = 1 / 64
    reference = torch.empty(64, 4096)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.999 * bound
    assert reference.abs().max() <= bound
    # 262,144 draws: five standard deviations of a mean.
    assert abs(A.mean().item()) < 5 * bound / math.sqrt(3 * A.numel())
    torch.testing.assert_close(A.std().item(), bound / math.sqrt(3), rtol=0.01, atol=0)


# Copies.


def test_deepcopy_is_independent_and_state_dict_round_trips() -> None:
    model = nn.Sequential(set_B(make_layer(make_4bit(), lora_dropout=0.1)))
    twin = copy.deepcopy(model)
    x = torch.randn(3, 64)
    model.eval()
    twin.eval()
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        twin[0].lora_B["default"].zero_()
    assert not torch.equal(model(x), twin(x))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(x), twin(x))
    assert set(model.state_dict()) == {
        "0.base_layer.weight",
        "0.base_layer.statistics",
        "0.base_layer.bias",
        "0.lora_A.default",
        "0.lora_B.default",
    }


def test_other_code_finds_weight_and_bias() -> None:
    layer = make_layer()
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert count_parameters(layer) == 24 * 16 + 16 + 4 * (24 + 16)
