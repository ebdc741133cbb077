"""LoRA on fused experts against transformers' own experts with W_e + s B_e A_e in their weights, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.experts import LoraExperts, LoraExpertWeight
from qlora.lora.inject import inject_lora
from qlora.lora.layer import disable_adapter, initial_A, lora_layers, merge_adapter, unmerge_adapter
from qlora.lora.mix import mix_adapters
from qlora.lora.switch import adapters_by_row, set_adapter
from qlora.ops.lora_experts import per_expert

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
# Each has something that the others have not.
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {  # transposed, with biases and a gate of its own
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 2,
    },
    "nemotron_h": {  # one weight before the activation, no gate
        "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 8,
        "mlp_hidden_act": "relu2",
    },
}
NAMES = {kind: ("up_proj" if kind == "nemotron_h" else "gate_up_proj", "down_proj") for kind in KINDS}


def make(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(COMMON | KINDS[kind] | changes)), dtype=dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.set_experts_implementation("eager")  # the other ways know no float64
    return model.eval()


def config_of(kind: str = "qwen3_moe", **changes: Any) -> LoraConfig:
    entries = [f"experts.{name}" for name in NAMES[kind]]
    return LoraConfig(**({"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": entries} | changes))


def randomize(model: nn.Module, name: str = "default") -> None:
    draw = torch.Generator().manual_seed(len(name))
    for _, layer in lora_layers(model):
        for parameter in layer.parts(name).values():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).mul_(0.3)


def expert_layers(model: nn.Module) -> dict[str, LoraExpertWeight]:
    return {path: layer for path, layer in lora_layers(model) if isinstance(layer, LoraExpertWeight)}


def dense_weights(layers: dict[str, LoraExpertWeight], name: str = "default") -> dict[str, Tensor]:
    """W_e + s B_e A_e by parameter, with a graph to A and B: expert by expert, in PEFT's layout of both."""
    found = {}
    for path, layer in layers.items():
        r, scaling, A, B = layer.updates[name].r, layer.updates[name].scaling, layer.lora_A[name], layer.lora_B[name]
        base = layer.base_layer
        num_experts = base.weight.shape[0]
        deltas = []
        for expert in range(num_experts):
            delta = scaling * B[:, expert::num_experts] @ A[expert * r : (expert + 1) * r]
            deltas.append(delta.T if base.is_transposed else delta)
        found[path] = base.weight + torch.stack(deltas)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_computes_as_with_whole_weights(kind: str) -> None:
    """Output, and gradients of tokens, routing weights, A and B; one expert is left out and one token chooses it twice."""
    model = make(kind)
    inject_lora(model, config_of(kind))
    randomize(model)
    layers = expert_layers(model)
    owner = next(iter(layers)).rpartition(".")[0]
    block: Any = model.get_submodule(owner)
    assert isinstance(block, LoraExperts)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(7, 16, generator=draw, dtype=torch.float64).requires_grad_()
    weights = torch.rand(7, 2, generator=draw, dtype=torch.float64).requires_grad_()
    index = torch.tensor([0, 1, 3])[torch.randint(0, 3, (7, 2), generator=draw)]
    own = {path: layer for path, layer in layers.items() if path.startswith(owner)}
    leaves = [tokens, weights, *(p for layer in own.values() for p in layer.parts("default").values())]
    seed = torch.randn(7, 16, generator=draw, dtype=torch.float64)

    def with_gradients(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad((y * seed).sum(), leaves)]

    changed = {path.rpartition(".")[2]: value for path, value in dense_weights(own).items()}
    want = with_gradients(functional_call(block.base_layer, changed, (tokens, index, weights)))
    found = with_gradients(block(tokens, index, weights))
    for ours, dense in zip(found, want, strict=True):
        torch.testing.assert_close(ours, dense)
    for layer, (grad_A, grad_B) in zip(own.values(), (found[3:5], found[5:7]), strict=True):
        A_ERI, B_EOR = per_expert(grad_A, grad_B, layer.base_layer.sizes[0])
        assert (
            [bool(A_ERI[e].any()) for e in range(4)] == [bool(B_EOR[e].any()) for e in range(4)] == [True, True, False, True]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_as_with_whole_weights(kind: str) -> None:
    model = make(kind)
    with torch.no_grad():
        want = model(IDS).logits
        report = inject_lora(model, config_of(kind))
        torch.testing.assert_close(model(IDS).logits, want)  # B is zero
        randomize(model)
        base = make(kind)
        for path, weight in dense_weights(expert_layers(model)).items():
            base.get_parameter(path).copy_(weight)
        found = model(IDS).logits
        torch.testing.assert_close(found, base(IDS).logits)
        assert not torch.allclose(found, want, atol=0.01)
        with disable_adapter(model):
            assert torch.equal(model(IDS).logits, want)
    assert list(report.targeted) == list(expert_layers(model))
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_of_the_two_weights(name: str) -> None:
    model, base = make("gpt_oss"), make("gpt_oss")
    report = inject_lora(model, config_of(target_parameters=[name]))
    assert set(report.targeted) == {f"model.layers.{n}.mlp.experts.{name}" for n in range(2)}
    randomize(model)
    with torch.no_grad():
        for path, weight in dense_weights(expert_layers(model)).items():
            base.get_parameter(path).copy_(weight)
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits)


def test_beside_linear_layers_in_the_models_order() -> None:
    model = make("qwen3_moe")
    report = inject_lora(model, config_of(target_modules=["o_proj"]))
    first = [path.removeprefix("model.layers.0.") for path in report.targeted if ".0." in path]
    assert first == ["self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert list(report.targeted) == [path for path, _ in lora_layers(model)]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_going_back(kind: str) -> None:
    model = make(kind)
    inject_lora(model, config_of(kind))
    randomize(model)
    with torch.no_grad():
        want, before = model(IDS).logits, {k: v.clone() for k, v in model.state_dict().items()}
        merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, want)
        assert all(layer.computes_merged for layer in expert_layers(model).values())
        with disable_adapter(model):
            torch.testing.assert_close(model(IDS).logits, make(kind)(IDS).logits)
        unmerge_adapter(model)
        assert torch.equal(model(IDS).logits, want)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for path, layer in expert_layers(model).items():
        whole = dense_weights({path: layer})[path] - layer.base_layer.weight
        torch.testing.assert_close(layer.delta("default", torch.float64), whole)


def test_two_adapters_of_different_weights() -> None:
    model, alone = make("qwen3_moe"), make("qwen3_moe")
    inject_lora(model, config_of(), "both")
    randomize(model, "both")
    with torch.no_grad():
        want = model(IDS).logits
    report = inject_lora(model, config_of(target_parameters=["down_proj"], r=2), "second")
    assert set(report.untargetable) == {f"model.layers.{n}.mlp.experts.gate_up_proj" for n in range(2)}
    for layer in expert_layers(model).values():
        if "second" in layer.updates:
            layer.lora_A["second"].data, layer.lora_B["second"].data = (
                torch.full_like(p.data, 0.1, dtype=torch.float64) for p in (layer.lora_A["second"], layer.lora_B["second"])
            )
    with torch.no_grad():
        for path, layer in expert_layers(model).items():
            if path.endswith("down_proj"):
                alone.get_parameter(path).copy_(dense_weights({path: layer}, "second")[path])
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits)
        set_adapter(model, "both")
        assert torch.equal(model(IDS).logits, want)
        set_adapter(model, None)
        torch.testing.assert_close(model(IDS).logits, make("qwen3_moe")(IDS).logits)
        mix_adapters(model, {"both": 0.5, "second": -2.0}, "mixed", method="cat")
        mixed = expert_layers(model)
        for path, layer in mixed.items():
            delta = 0.5 * layer.delta("both", torch.float64)
            if path.endswith("down_proj"):
                delta -= 2.0 * layer.delta("second", torch.float64)
            torch.testing.assert_close(layer.delta("mixed", torch.float64), delta, atol=1e-6, rtol=1e-5)  # factors in fp32
    with pytest.raises(AdapterError, match="fused experts"), adapters_by_row(model, ["both", None]):
        pass


def test_a_copy_of_a_model_is_of_its_own() -> None:
    model = make("mixtral")
    inject_lora(model, config_of())
    randomize(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = model(IDS).logits
        assert torch.equal(other(IDS).logits, want)
        for layer in expert_layers(model).values():
            layer.base_layer.weight.zero_()
        assert torch.equal(other(IDS).logits, want)
    assert len({id(p) for p in other.parameters()}) == len(list(other.parameters()))
    assert not any("base_layer.base_layer" in key for key in other.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_have_the_same_gradients(reentrant: bool) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        model = make("qwen3_moe").train()
        inject_lora(model, config_of(lora_dropout=0.3))
        randomize(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(5)
        model(IDS).logits.square().sum().backward()
        return [p.grad for _, layer in lora_layers(model) for p in layer.parts("default").values()]  # type: ignore[misc]

    for found, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, want)


def test_dropout_is_on_in_training_alone() -> None:
    model = make("mixtral")
    inject_lora(model, config_of(lora_dropout=0.5))
    randomize(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_ranks_scalings_and_starts() -> None:
    model = make("qwen3_moe")
    patterns = {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 7}}
    inject_lora(model, config_of(use_rslora=True, **patterns), seed=4)
    for path, layer in expert_layers(model).items():
        r = 5 if path.endswith("gate_up_proj") else 3
        alpha = 7 if path == "model.layers.1.mlp.experts.down_proj" else 6
        num_experts, inputs, outputs = layer.base_layer.sizes
        assert (layer.updates["default"].r, layer.updates["default"].scaling) == (r, alpha / math.sqrt(r))
        assert layer.lora_A["default"].shape == (num_experts * r, inputs)
        assert layer.lora_B["default"].shape == (outputs, r * num_experts)
        assert torch.equal(layer.lora_A["default"], initial_A((num_experts * r, inputs), path, 4))
        assert not layer.lora_B["default"].any()
    model = make("qwen3_moe", num_experts=64)
    inject_lora(model, config_of(init_lora_weights="gaussian"))
    for layer in expert_layers(model).values():
        std = layer.lora_A["default"].std().item()
        assert abs(std - 1 / 3) < 0.02  # of 64 x 3 x 12 values or more: five times the error of their deviation
        assert not layer.lora_B["default"].any()


# What is refused changes nothing.

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing of that name": ("qwen3_moe", {"target_parameters": ["experts.down"]}, "matches no parameter"),
    "a class": ("qwen3_moe", {"target_parameters": ["Qwen3MoeExperts"]}, "matches no parameter"),
    "two dimensions": ("qwen3_moe", {"target_parameters": ["q_proj.weight"]}, "has 2 dimensions"),
    "a bias": ("gpt_oss", {"target_parameters": ["experts.down_proj_bias"]}, "has 2 dimensions"),
    "dora": ("qwen3_moe", {"use_dora": True}, "no adapter format has a place for a magnitude"),
    "a bias of B": ("qwen3_moe", {"lora_bias": True}, "no adapter format has a place for a bias"),
    "a rank too large": ("qwen3_moe", {"r": 13}, "the rank exceeds the smaller dimension"),
    "a start from weights": ("qwen3_moe", {"init_lora_weights": "pissa"}, "cannot start from their weights or inputs"),
    "a start from inputs": ("qwen3_moe", {"init_lora_weights": "eva"}, "cannot start from their weights or inputs"),
    "no such block": ("qwen3_moe", {"layers_to_transform": [5]}, "in one of these blocks"),
    "a pattern of nothing": ("qwen3_moe", {"rank_pattern": {"experts.up": 2}}, "matches no targeted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    kind, changes, message = REFUSED[case]
    model = make(kind)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ConfigError) as error:
        inject_lora(model, config_of(kind, **changes))
    assert message in str(error.value)
    assert {name: id(p) for name, p in model.named_parameters()} == before


class SortedExperts(nn.Module):
    """Experts with a call of their own: they are given the tokens of each already (as in Llama 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))
        self.up = nn.Linear(4, 4)


def test_experts_of_another_call_are_refused_and_listed() -> None:
    model = nn.ModuleDict({"experts": SortedExperts()})
    reason = "SortedExperts is not written for transformers' experts interface, so its call is not known"
    with pytest.raises(ConfigError, match="can carry no update") as error:
        inject_lora(model, config_of(target_parameters=["experts.down_proj"]))
    assert error.value.found == f"experts.down_proj: {reason}"
    assert inject_lora(model, LoraConfig(r=2)).untargetable == {"experts.down_proj": f"3-D weight: {reason}"}


def test_all_linear_leaves_experts_and_says_how_to_adapt_them() -> None:
    report = inject_lora(make("qwen3_moe"), LoraConfig(r=2))
    assert set(report.untargetable) == {
        f"model.layers.{n}.mlp.experts.{name}" for n in range(2) for name in NAMES["qwen3_moe"]
    }
    assert set(report.untargetable.values()) == {"fused experts, adapted by lora.target_parameters alone"}
    assert inject_lora(make("qwen3_moe"), config_of(target_modules="all-linear")).untargetable == {}


def test_blocks_are_chosen_by_number() -> None:
    report = inject_lora(make("qwen3_moe"), config_of(layers_to_transform=[1]))
    assert set(report.targeted) == {f"model.layers.1.mlp.experts.{name}" for name in NAMES["qwen3_moe"]}


def test_the_frozen_weights_are_not_saved_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps of a block is smaller than one of its weights."""
    model = make("mixtral", hidden_size=64, intermediate_size=64)
    inject_lora(model, config_of())
    path = "model.layers.0.mlp.experts"
    block: Any = model.get_submodule(path)
    held: list[Tensor] = []
    keep: Callable[[Tensor], Tensor] = lambda tensor: (held.append(tensor), tensor)[1]  # noqa: E731
    tokens = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(tokens, torch.tensor([[0, 1], [1, 2], [0, 2]]), torch.rand(3, 2, dtype=torch.float64))
    weights = {layer.base_layer.weight.untyped_storage().data_ptr() for layer in expert_layers(model).values()}
    assert held
    assert not {tensor.untyped_storage().data_ptr() for tensor in held} & weights
    assert max(tensor.numel() for tensor in held) <= 6 * 128
