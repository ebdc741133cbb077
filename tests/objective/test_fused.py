"""Norms and gated MLPs computed by our operations: which are taken, that they give the same, what is kept for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.data.batch import collate_packed
from qlora.lora.inject import inject_lora
from qlora.objective.fused import Fused, FusedMLP, FusedNorm, FusedRotary, fuse
from qlora.objective.train_model import TrainModel
from tests.objective.test_train_model import make_rows, with_lora

# Norms, of two layers and the last one; MLPs; attention layers.
TAKEN = {
    "llama": (5, 2, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2), "mistral": (5, 2, 2), "gemma2": (9, 2, 2),
    "gemma3_text": (13, 2, 2), "phi3": (5, 0, 2), "gpt2": (0, 0, 0), "granite": (5, 2, 2), "cohere": (0, 2, 0),
    "mixtral": (5, 0, 2), "qwen2_moe": (5, 2, 2), "gpt_neox": (0, 0, 2), "opt": (0, 0, 0),
}  # fmt: skip


def test_what_is_taken(make_model: Callable[..., Any], architecture: str) -> None:
    model = make_model(architecture)
    fused = fuse(model)
    assert (fused.num_norms, fused.num_mlps, fused.num_rotaries) == TAKEN[architecture]
    assert fuse(model) == fused


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_logits_are_the_models_own(make_model: Callable[..., Any], architecture: str, dtype: str) -> None:
    model = make_model(architecture, dtype=dtype)
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    own = model(input_ids=ids, use_cache=False).logits
    fuse(model)
    ours = model(input_ids=ids, use_cache=False).logits
    # Norms and MLPs are the same bit for bit; queries and keys are rounded once where transformers rounds three times.
    allowed = 0.03 if dtype == "bfloat16" else 2e-6
    torch.testing.assert_close(ours, own, rtol=0, atol=allowed * own.abs().max().item())


def test_classes_names_and_parameters_stay(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    before = {path: type(module) for path, module in model.named_modules()}
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    for path, module in model.named_modules():
        assert isinstance(module, before[path])
        assert type(module).__name__ == before[path].__name__
    assert isinstance(model.model.norm, FusedNorm)
    assert isinstance(model.model.layers[0].self_attn, FusedRotary)
    assert isinstance(copy.deepcopy(model).model.layers[0].mlp, FusedMLP)


class OtherNorm(nn.Module):
    """Looks like one of the norms and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class OtherMLP(nn.Module):
    """Has the layers of a gated MLP and something in between."""

    def __init__(self, dropout: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.factor = factor
        if dropout:
            self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x) * self.factor
        return self.down_proj(self.dropout(y) if hasattr(self, "dropout") else y)


def test_other_models_of_the_same_class_stay_what_they_are(make_model: Callable[..., Any]) -> None:
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    fuse(make_model("llama"))
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward) == before
    assert not any(isinstance(m, (FusedNorm, FusedMLP, FusedRotary)) for m in make_model("llama").modules())


def test_what_only_looks_like_one_stays() -> None:
    modules = nn.ModuleList([OtherNorm(), OtherMLP(factor=2.0), OtherMLP(dropout=0.5)])
    assert fuse(modules) == Fused()
    assert fuse(nn.ModuleList([OtherMLP()])).num_mlps == 1


def saved_storages(run: Callable[[], Any]) -> dict[int, int]:
    """Bytes of each piece of memory that is kept for backward, by its address."""
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return {address: size for address, (size, _) in found.items()}


def test_a_layer_keeps_what_it_must_and_no_more(make_model: Callable[..., Any]) -> None:
    """Of each token: the residual before both norms, q, k, v, the attention's output, gate and up."""

    def bytes_of(num_layers: int) -> int:
        model = make_model("llama", dtype="bfloat16", num_hidden_layers=num_layers)
        inject_lora(model, LoraConfig(r=4))
        train_model = TrainModel(model).train()
        batch = collate_packed(make_rows([64]))
        train_model.settle()
        return sum(saved_storages(lambda: train_model(batch)).values())

    config = make_model("llama").config
    width, kv = config.hidden_size, config.hidden_size // 2
    numbers = 2 * width + (width + 2 * kv) + width + 2 * config.intermediate_size
    a_layer = bytes_of(3) - bytes_of(2)
    rstd = 2 * 4
    at_most = 64 * (2 * numbers + rstd)
    attention_statistics = 64 * config.num_attention_heads * 4
    assert at_most <= a_layer <= at_most + attention_statistics


@pytest.mark.parametrize("architecture_", ["llama", "gemma2", "qwen3"])
def test_gradients_are_the_unfused_ones(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, architecture_: str
) -> None:
    """Norms are trained too."""
    batch = collate_packed(make_rows())
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("qlora.objective.train_model.fuse", lambda model: None)
        model = with_lora(make_model(architecture_), train_norms=True)
        train_model = TrainModel(model).train()
        loss, _ = train_model(batch)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"loss": loss.detach()})
    assert any("norm" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5 * found[1][name].abs().max().item())
