"""Injection into whole models: what is frozen, what trains, what is refused, and what the report says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import AdapterError, BaseModelError, ConfigError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import initial_A, lora_layers, merge_adapter
from qlora.lora.linear import LoraLinear
from qlora.lora.report import count_parameters
from qlora.lora.whole import is_norm
from qlora.quant.linear import Linear4bit
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

IDS = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def make_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8))


def randomize_B(model: nn.Module, std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        for lora_B in layer.lora_B.values():
            with torch.no_grad():
                lora_B.copy_(torch.randn(lora_B.shape, generator=generator) * std)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# On any module.


def test_only_the_factors_train() -> None:
    model = make_mlp()
    report = inject_lora(model, LoraConfig(r=4))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{index}.{part}.default" for index in (0, 3) for part in ("lora_A", "lora_B")
    }
    assert report.num_trainable == count_parameters(model, trainable_only=True) == 4 * (16 + 32) + 4 * (32 + 8)
    assert report.num_total == sum(p.numel() for p in model.parameters())
    assert report.targeted == {"0": "all-linear", "3": "all-linear"}


def test_the_output_before_the_first_step_is_exactly_the_bases(architecture: str, make_model: Callable[..., Any]) -> None:
    model = make_model(architecture)
    with torch.no_grad():
        want = model(IDS).logits
        inject_lora(model, LoraConfig(r=4))
        assert torch.equal(model(IDS).logits, want)
        randomize_B(model)
        assert not torch.allclose(model(IDS).logits, want, atol=1e-3)


def test_all_linear_is_what_is_quantized(architecture: str, make_base: Callable[..., Path]) -> None:
    """In 4 bits: every layer that is quantized gets an adapter, the head gets none, and what cannot carry one is listed."""
    model = load_model(resolve_base(str(make_base(architecture))), quantization=QuantizationConfig())
    report = inject_lora(model, LoraConfig(r=4))
    narrow = {path for path, why in report.skipped.items() if "below r" in why}
    assert narrow == {p for p in report.skipped if p.endswith("shared_expert_gate")}
    assert set(report.targeted) == set(model.qlora_base.quantized) - narrow
    assert {path for path, _ in lora_layers(model)} == set(report.targeted)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert report.skipped[head] == "output head"
    experts = {name for name, p in model.named_parameters() if p.ndim == 3}
    assert experts == set(report.untargetable)
    assert bool(experts) == (architecture in ("mixtral", "qwen2_moe"))


def test_counts_under_4bit_are_of_weights(make_base: Callable[..., Path]) -> None:
    source = resolve_base(str(make_base("llama")))
    plain, packed = load_model(source), load_model(source, quantization=QuantizationConfig())
    theirs = transformers_4bit(source.folder)
    want = sum(parameter.numel() for parameter in plain.parameters())
    assert count_parameters(plain) == count_parameters(packed) == count_parameters(theirs) == want
    reports = [inject_lora(model, LoraConfig(r=8)) for model in (plain, packed, theirs)]
    assert len({(report.num_trainable, report.num_total) for report in reports}) == 1
    assert reports[0].num_trainable == sum(8 * (layer.in_features + layer.out_features) for _, layer in lora_layers(plain))
    assert reports[0].num_total == want + reports[0].num_trainable


def test_a_tied_weight_counts_once(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    assert count_parameters(model) == sum(p.numel() for p in model.parameters())


def test_the_mode_of_a_layer_stays() -> None:
    for training in (True, False):
        model = make_mlp().train(training)
        inject_lora(model, LoraConfig(r=4))
        assert all(module.training == training for module in model.modules())


def test_the_report_in_words(make_model: Callable[..., Any]) -> None:
    report = inject_lora(make_model("mixtral"), LoraConfig(r=4, exclude_modules=["o_proj"], train_norms=True))
    text = str(report)
    assert "LoRA on 6 layers" in text
    assert "q_proj: 2 x, by all-linear" in text
    assert "left without: o_proj, 2 x (excluded by o_proj)" in text
    assert "left without: lm_head, 1 x (output head)" in text
    assert "cannot carry one: gate_up_proj, 2 x (fused experts, adapted by lora.target_parameters alone)" in text
    assert "trained as a whole: model.layers.0.input_layernorm" in text
    assert f"trainable {report.num_trainable:,} of {report.num_total:,} parameters" in text


def test_the_report_says_what_patterns_matched_and_why_others_were_left(make_model: Callable[..., Any]) -> None:
    config = LoraConfig(r=4, rank_pattern={"q_proj": 2, r".*[qk]_proj": 3}, alpha_pattern={r"layers\.1\..*": 8.5})
    report = inject_lora(make_model("qwen2_moe"), config)
    assert report.patterns == {
        "rank_pattern q_proj: 2": 2,
        r"rank_pattern .*[qk]_proj: 3": 2,
        r"alpha_pattern layers\.1\..*: 8.5": 7,
    }
    text = str(report)
    assert "  rank_pattern q_proj: 2, in 2 x" in text
    assert "left without: embed_tokens, 1 x (Embedding, not a linear layer)" in text
    assert "left without: lm_head, 1 x (output head)" in text
    assert "left without: shared_expert_gate, 2 x (a side of 1, below r = 4)" in text
    assert "cannot carry one: gate_up_proj, 2 x (fused experts" in text


def test_a_convolution_is_left_by_all_linear_and_named() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "out": nn.Linear(8, 8)})
    assert inject_lora(model, LoraConfig(r=2)).skipped == {"conv": "Conv1d, not a linear layer"}


def test_counts_of_shares_are_of_whole_weights() -> None:
    """ZeRO-3 leaves a parameter without elements and its number in `ds_numel`."""
    model = make_mlp()
    inject_lora(model, LoraConfig(r=4, train_norms=True))
    want = count_parameters(model), count_parameters(model, trainable_only=True)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert (count_parameters(model), count_parameters(model, trainable_only=True)) == want


# Ranks and scalings of single layers.


def test_patterns_give_layers_ranks_and_scalings_of_their_own(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"mlp.up_proj": 2, r"layers\.1\..*": 3}, alpha_pattern={"q_proj": 6}, use_rslora=True
    )
    report = inject_lora(model, config)
    want: dict[str, tuple[int, float]] = {}
    for path in report.targeted:
        r = 2 if path.endswith("mlp.up_proj") else 3 if ".layers.1." in path else 4
        want[path] = r, (6 if path.endswith("q_proj") else 8) / r**0.5
    found = {path: (len(layer.lora_A["default"]), layer.updates["default"].scaling) for path, layer in lora_layers(model)}
    assert found == want
    assert all(layer.lora_B["default"].shape[1] == want[path][0] for path, layer in lora_layers(model))
    assert report.num_trainable == sum(
        want[path][0] * (layer.in_features + layer.out_features) for path, layer in lora_layers(model)
    )


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"r": 9, "target_modules": ["3"]}, "lora.r"),
        ({"rank_pattern": {"3": 9}, "target_modules": ["3"]}, "lora.rank_pattern"),
        ({"r": 9, "rank_pattern": {"3": 9}, "target_modules": ["3"]}, "lora.rank_pattern"),
    ],
    ids=str,
)
def test_a_rank_that_does_not_fit_names_the_key_that_says_it(config: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match="exceeds the smaller dimension of 3") as error:
        inject_lora(make_mlp(), LoraConfig(**config))
    assert (error.value.place, error.value.found, error.value.wanted) == (place, 9, "at most 8")


def test_all_linear_leaves_out_what_a_pattern_does_not_fit() -> None:
    report = inject_lora(make_mlp(), LoraConfig(r=4, rank_pattern={"3": 9}))
    assert report.skipped == {"3": "a side of 8, below r = 9"}


def test_blocks_by_number_in_a_model(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    report = inject_lora(model, LoraConfig(r=4, layers_to_transform=[1], layers_pattern=["layers"]))
    assert len(report.targeted) == 7
    assert all(path.startswith("model.layers.1.") for path in report.targeted)
    assert "left without: q_proj, 1 x (not in layers_to_transform)" in str(report)


def test_a_factor_is_the_same_whatever_else_is_targeted() -> None:
    """And so on any number of ranks and in any order of injection."""
    one, other = make_mlp(), make_mlp()
    inject_lora(one, LoraConfig(r=4), seed=5)
    torch.rand(3)
    inject_lora(other, LoraConfig(r=4, target_modules=["3"]), seed=5)
    assert torch.equal(one[3].lora_A["default"], other[3].lora_A["default"])  # type: ignore[index, union-attr]
    assert torch.equal(one[3].lora_A["default"], initial_A((4, 32), "3", 5))  # type: ignore[index, union-attr]


# Refusals change nothing.


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ({"target_modules": ["nowhere"]}, "default", "matches no module"),
        ({"target_modules": ["1"]}, "default", "cannot carry a LoRA layer"),
        ({"r": 9, "target_modules": ["3"]}, "default", "rank exceeds the smaller dimension of 3"),
        ({"r": 64}, "default", "rank exceeds"),
        ({"train_embeddings": True}, "default", "does not say which module that is"),
        ({"train_head": True}, "default", "does not say which module that is"),
        ({"rank_pattern": {"4": 2}}, "default", "entry '4' matches no targeted module"),
        ({"alpha_pattern": {"3": 2, "0|1": 2, "x": 2}}, "default", "entry 'x' matches no targeted module"),
        ({"rank_pattern": {"(": 2}}, "default", "not a regular expression"),
        ({"layers_to_transform": [0]}, "default", "in a block of the number 0"),
        ({"use_dora": True, "lora_bias": True}, "default", "a DoRA layer cannot have it"),
        ({}, "", "cannot have this name"),
        ({}, "a.b", "cannot have this name"),
        ({}, "keys", "cannot have this name"),
        ({}, "first", "has an adapter 'first' already"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(config: dict[str, Any], name: str, message: str) -> None:
    model = make_mlp()
    inject_lora(model, LoraConfig(r=2, target_modules=["0"]), "first")
    before, modules = state_of(model), [type(m) for m in model.modules()]
    with pytest.raises((ConfigError, AdapterError), match=message):
        inject_lora(model, LoraConfig(**({"r": 4} | config)), name)
    assert_untouched(model, before)
    assert [type(m) for m in model.modules()] == modules
    assert list(model.qlora_adapters) == ["first"]
    assert [layer.active_adapter for _, layer in lora_layers(model)] == ["first"]


def test_norms_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match=r"lora\.train_norms: the model has no normalisation"):
        inject_lora(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, train_norms=True))


def test_all_linear_leaves_out_what_is_narrower_than_r() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 1))
    report = inject_lora(model, LoraConfig(r=4))
    assert list(report.targeted) == ["0"]
    assert report.skipped == {"1": "a side of 1, below r = 4"}


def test_a_layer_that_is_never_called_gets_no_adapter() -> None:
    """torch's own attention reads the weight of its output layer and never calls the layer: an update would do nothing."""
    report = inject_lora(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), LoraConfig(r=4))
    assert list(report.targeted) == ["linear1", "linear2"]
    assert list(report.untargetable) == ["self_attn.out_proj"]


def test_beside_a_merged_adapter_nothing_is_added() -> None:
    model = make_mlp()
    inject_lora(model, LoraConfig(r=4), "a")
    merge_adapter(model)
    with pytest.raises(AdapterError, match="'a' is merged already"):
        inject_lora(model, LoraConfig(r=4), "b")


# Several adapters.


def test_a_second_adapter_shares_layers_and_becomes_the_active_one() -> None:
    model = make_mlp()
    inject_lora(model, LoraConfig(r=4), "a")
    inject_lora(model, LoraConfig(r=2, target_modules=["3"]), "b", seed=1)
    assert list(model.qlora_adapters) == ["a", "b"]
    assert isinstance(model[0], LoraLinear)
    assert isinstance(model[0].base_layer, nn.Linear)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"3.lora_A.b", "3.lora_B.b"}
    assert (model[0].active_adapter, model[3].active_adapter) == (None, "b")  # type: ignore[union-attr]


@pytest.mark.parametrize("first_trains", [True, False])
def test_a_module_trained_as_a_whole_belongs_to_one_adapter(first_trains: bool) -> None:
    model = make_mlp()
    inject_lora(model, LoraConfig(r=4, train_norms=first_trains), "a")
    with pytest.raises(AdapterError, match="no other adapter can be beside them"):
        inject_lora(model, LoraConfig(r=4, train_norms=not first_trains), "b")


def test_a_copied_model_keeps_its_adapters_apart() -> None:
    model = make_mlp()
    inject_lora(model, LoraConfig(r=4), "a")
    twin = copy.deepcopy(model)
    inject_lora(twin, LoraConfig(r=4), "b")
    assert list(model.qlora_adapters) == ["a"]
    assert list(twin.qlora_adapters) == ["a", "b"]
    twin.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 16)
    for own in (model, twin):
        for _, layer in lora_layers(own):
            layer.set_active("a")
    assert torch.equal(model(x), twin(x))


# Models that transformers loaded in 4 bits.


def transformers_4bit(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def test_bitsandbytes_layers_are_taken_over(make_base: Callable[..., Path]) -> None:
    folder = make_base("llama", dtype="float32")
    theirs = transformers_4bit(folder, torch.float32)
    weights = {n: m.weight.data_ptr() for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    with torch.no_grad():
        want = theirs.train()(IDS).logits
    report = inject_lora(theirs, LoraConfig(r=4))
    assert set(report.targeted) == set(weights)
    for name, layer in lora_layers(theirs):
        assert isinstance(layer.base_layer, Linear4bit)
        assert layer.base_layer.weight.data_ptr() == weights[name]
    ours = load_model(resolve_base(str(folder)), dtype="float32", quantization=QuantizationConfig())
    inject_lora(ours, LoraConfig(r=4))
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
        theirs.eval()(IDS)  # what would have repacked the weights
    theirs.train()(IDS, labels=IDS).loss.backward()
    assert all(layer.lora_B["default"].grad.abs().sum() > 0 for _, layer in lora_layers(theirs))


def test_layers_without_an_adapter_are_taken_over_too(make_base: Callable[..., Path]) -> None:
    """An evaluation would otherwise cut the gradient off for every layer before the first one that was repacked."""
    theirs = transformers_4bit(make_base("llama", hidden_size=128, intermediate_size=256, num_key_value_heads=4))
    inject_lora(theirs, LoraConfig(r=4, target_modules=["layers.0.self_attn.q_proj"]))
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in theirs.modules())
    factor = theirs.model.layers[0].self_attn.q_proj.lora_B["default"]

    def gradient() -> Tensor:
        return torch.autograd.grad(theirs.train()(IDS, labels=IDS).loss, factor)[0]

    before = gradient()
    with torch.no_grad():
        theirs.eval()(IDS)
    assert before.any()
    assert torch.equal(gradient(), before)


def test_a_model_that_was_evaluated_before_is_refused_and_left_as_it_was(make_base: Callable[..., Path]) -> None:
    # Wide enough for the kernel that repacks.
    theirs = transformers_4bit(make_base("llama", hidden_size=128, intermediate_size=256, num_key_value_heads=4))
    last = theirs.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.eval()(torch.randn(4, 256, dtype=torch.bfloat16))
    if not getattr(last.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.down_proj: bitsandbytes has repacked"):
        inject_lora(theirs, LoraConfig(r=4))
    assert not list(lora_layers(theirs))


# Modules trained as wholes.


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad and "lora_" not in name}


def test_norms_train_in_fp32_and_give_out_what_they_gave_out(architecture: str, make_model: Callable[..., Any]) -> None:
    model = make_model(architecture, "bfloat16")
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    with torch.no_grad():
        want = model(IDS).logits
    target = {"opt": ["q_proj"]}.get(architecture, "all-linear")
    report = inject_lora(model, LoraConfig(r=4, target_modules=target, train_norms=True))
    assert set(report.trained) == norms
    assert {name.rpartition(".")[0] for name in trained_names(model)} == norms
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        found = model(IDS).logits
    assert found.dtype == want.dtype == torch.bfloat16
    # A norm multiplies in bf16 or in fp32 and rounds then: at most one more rounding, of 2**-8, in each.
    torch.testing.assert_close(found, want, rtol=0.02, atol=0.02 * want.abs().max().item())
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad and p.ndim == 1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_embeddings_and_head_train(make_model: Callable[..., Any], tied: bool, dtype: str) -> None:
    model = make_model("llama", dtype, tie_word_embeddings=tied)
    with torch.no_grad():
        want = model(IDS).logits
    report = inject_lora(model, LoraConfig(r=4, train_embeddings=True, train_head=True))
    assert report.trained == ("model.embed_tokens", "lm_head")
    assert trained_names(model) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        found = model(IDS).logits
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=0.01, atol=0.02)
    model(IDS, labels=IDS).loss.backward()
    for module in (model.lm_head, model.model.embed_tokens):
        assert module.weight.grad.any()
        assert module.weight.grad.dtype == torch.float32
    num_trained = model.lm_head.weight.numel() * (1 if tied else 2)
    num_lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert report.num_trainable == num_trained + num_lora


@pytest.mark.parametrize("key", ["train_embeddings", "train_head"])
def test_one_side_of_a_tied_pair_cannot_train_alone(make_model: Callable[..., Any], key: str) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    before = state_of(model)
    with pytest.raises(ConfigError, match="ties its embeddings to its head"):
        inject_lora(model, LoraConfig(r=4, **{key: True}))
    assert_untouched(model, before)
    # Untied, it can.
    report = inject_lora(make_model("llama"), LoraConfig(r=4, **{key: True}))
    assert len(report.trained) == 1


def test_a_module_is_not_both_adapted_and_trained(make_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="both targeted and trained as a whole") as error:
        inject_lora(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], train_head=True))
    assert error.value.found == "lm_head"


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_variant_on_the_head_leaves_the_embedding_alone(
    make_model: Callable[..., Any], tied: bool, variant: dict[str, Any]
) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    with torch.no_grad():
        want = model(IDS).logits
    inject_lora(model, LoraConfig(r=4, target_modules=["lm_head"], **variant))
    assert (model.lm_head.base_layer.weight is model.model.embed_tokens.weight) == tied
    embedding = model.model.embed_tokens.weight.clone()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want)
        randomize_B(model)
        found = model(IDS).logits
        assert not torch.allclose(found, want, atol=1e-3)
        merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, found, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_an_adapter_on_the_head(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    report = inject_lora(model, LoraConfig(r=4, target_modules=["lm_head"]))
    assert list(report.targeted) == ["lm_head"]
    assert isinstance(model.get_output_embeddings(), LoraLinear)
    # The head is still known as one, so that all-linear leaves it out for another adapter.
    assert "lm_head" not in inject_lora(model, LoraConfig(r=4), "other").targeted
