"""LoRA over embeddings, against dense tables in float64 and against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from qlora.adapter.files import load_adapter, save_adapter
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.embedding import LoraEmbedding
from qlora.lora.inject import inject_lora
from qlora.lora.layer import LoraLayer, merge_adapter, unmerge_adapter
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from tests.adapter.random_values import randomize

VOCABULARY, HIDDEN = 11, 6
IDS = torch.tensor([[3, 0, 10, 3], [7, 1, 1, 2]])
KINDS = ["plain", "padding", "by frequency", "scaled"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7.0},
    "dora": {"use_dora": True},
}
CASES = [(kind, variant) for kind in KINDS for variant in VARIANTS]
MakeBase = Callable[..., Path]


def make(kind: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "scaled":
        return nn.Sequential(Gemma3TextScaledWordEmbedding(VOCABULARY, HIDDEN, 1, embed_scale=2.5)).to(dtype)
    options = {"padding": {"padding_idx": 1}, "by frequency": {"scale_grad_by_freq": True}}.get(kind, {})
    return nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN, **options)).to(dtype)


def adapt(model: nn.Module, **config: Any) -> LoraEmbedding:
    inject_lora(model, LoraConfig(**({"r": 3, "lora_alpha": 6.0, "target_modules": ["0"]} | config)))
    randomize(model, size=0.3)
    return model[0]  # type: ignore[index, no-any-return]


def oracle(layer: LoraEmbedding, parts: dict[str, Tensor]) -> Tensor:
    """The formula with one dense table, looked up by torch's own embedding where that has a say in the gradient."""
    base: Any = layer.base_layer
    A, B = parts["lora_embedding_A"].double(), parts["lora_embedding_B"].double()
    options = {"padding_idx": base.padding_idx, "scale_grad_by_freq": base.scale_grad_by_freq}
    low = nn.functional.embedding(IDS, A.T, **options) @ B.T
    y = base.weight[IDS] + layer.updates["default"].scaling * low
    if "lora_magnitude_vector" in parts:
        V = base.weight.T + layer.updates["default"].scaling * B @ A
        y = y * parts["lora_magnitude_vector"].double() / V.detach().norm(dim=1)
    return y * (2.5 if isinstance(base, Gemma3TextScaledWordEmbedding) else 1.0)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_outputs_and_gradients_are_those_of_a_dense_table(kind: str, variant: str) -> None:
    layer = adapt(make(kind), **VARIANTS[variant])
    parts = layer.parts("default")
    y, want = layer(IDS), oracle(layer, parts)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((y * weights).sum(), [*parts.values()])
    wanted = torch.autograd.grad((want * weights).sum(), [*parts.values()])
    for name, one, other in zip(parts, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_merged_outputs_agree_and_unmerging_is_exact(kind: str, variant: str) -> None:
    model = make(kind)
    layer = adapt(model, **VARIANTS[variant])
    with torch.no_grad():
        want, plain = model(IDS), layer.base_layer(IDS)
        merge_adapter(model)
        torch.testing.assert_close(model(IDS), want, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(want, plain, atol=0.01)
        unmerge_adapter(model)
        assert torch.equal(model(IDS), want)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_training_starts_at_the_bases_own_function(kind: str, variant: str) -> None:
    model = make(kind, torch.bfloat16)
    want = model(IDS)
    inject_lora(model, LoraConfig(r=3, target_modules=["0"], **VARIANTS[variant]))
    assert torch.equal(model(IDS), want)
    assert not model[0].lora_embedding_A["default"].any()
    assert model[0].lora_embedding_B["default"].std() > 0.5, "PEFT draws B from a normal distribution"


def test_nothing_of_the_tables_size_is_kept_for_backward() -> None:
    layer = adapt(make("plain"), use_dora=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(IDS)
    assert [tensor.shape for tensor in kept] == [IDS.shape]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_peft_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, kind: str, variant: str) -> None:
    model = make(kind, torch.float32)
    adapt(model, **VARIANTS[variant])
    save_adapter(model, tmp_path / "ours")
    held = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    shapes = {key.removeprefix("base_model.model.0."): tuple(value.shape) for key, value in held.items()}
    want = {"lora_embedding_A": (3, VOCABULARY), "lora_embedding_B": (HIDDEN, 3)}
    assert shapes == want | ({"lora_magnitude_vector": (HIDDEN,)} if variant == "dora" else {})
    theirs = PeftModel.from_pretrained(make(kind, torch.float32), tmp_path / "ours")
    torch.testing.assert_close(theirs(IDS), model(IDS))

    options = {"r": 4, "lora_alpha": 5, "target_modules": ["0"]} | VARIANTS[variant]
    theirs = get_peft_model(make(kind, torch.float32), peft.LoraConfig(**options))
    randomize(theirs, size=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    again = make(kind, torch.float32)
    load_adapter(again, tmp_path / "theirs")
    assert isinstance(again[0], LoraEmbedding)
    torch.testing.assert_close(again(IDS), theirs(IDS))
    assert not torch.allclose(again(IDS), make(kind, torch.float32)(IDS), atol=0.01)


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gemma3_text", True)])
def test_in_a_model_as_in_peft(make_base: MakeBase, tmp_path: Path, name: str, tied: bool) -> None:
    """A tied head goes on with the frozen weight alone, there and here."""
    folder = make_base(name, dtype="float32", tie_word_embeddings=tied)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    )
    randomize(theirs, size=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(resolve_base(str(folder)), dtype="float32")
    plain = ours(ids).logits
    load_adapter(ours, tmp_path / "theirs")
    want = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert not torch.allclose(want, plain, atol=0.01)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    hidden = torch.randn(3, 64)
    head = nn.functional.linear(hidden, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).lm_head.weight)
    assert torch.equal(ours.lm_head(hidden), head), "the head is the base's"
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_the_weight_beside_an_adapted_embedding_must_be_the_bases(make_base: MakeBase, tmp_path: Path) -> None:
    """PEFT writes it into the file."""
    folder = make_base("llama", dtype="float32")
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    )
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.base_layer.weight[3, 3] += 1.0
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="the base weight beside the adapter is not this base's"):
        load_adapter(load_model(resolve_base(str(folder)), dtype="float32"), tmp_path)


def test_what_cannot_be_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN, max_norm=1.0))
    with pytest.raises(ConfigError, match="max_norm writes to its weight"):
        inject_lora(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="an embedding cannot have it"):
        inject_lora(make("plain"), LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    positions = nn.Sequential(OPTLearnedPositionalEmbedding(VOCABULARY, HIDDEN))
    with pytest.raises(AdapterError, match="cannot carry a LoRA layer"):
        inject_lora(positions, LoraConfig(r=2, target_modules=["0"]))
    assert not isinstance(model[0], LoraLayer)


def test_dora_leaves_a_feature_of_zeros_what_it_is() -> None:
    model = make("plain", torch.float32)
    with torch.no_grad():
        model[0].weight[:, 2] = 0  # type: ignore[union-attr, operator]
        want = model(IDS)
    inject_lora(model, LoraConfig(r=3, use_dora=True, target_modules=["0"]))
    y = model(IDS)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    merge_adapter(model)
    torch.testing.assert_close(model(IDS), want)
