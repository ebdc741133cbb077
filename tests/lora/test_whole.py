"""Modules trained as wholes by name: which they are, what they compute, what is refused. Norms, embeddings and head by
their keys: test_inject.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import ConfigError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers
from qlora.lora.whole import modules_to_train
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


class Router(nn.Module):
    """A weight of its own, an input by keyword, and an output of several tensors, as routers of experts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16))

    def forward(self, x: Tensor, *, bias: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        scores = nn.functional.linear(x, self.weight) + bias
        return scores, {"scores": scores}, scores.argmax(-1)


class Classifier(nn.Module):
    """A body, and a head of two layers with parameters around one without."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.score = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        self.router = Router()
        self.pool = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        x = self.pool(self.body(x))
        return self.score(nn.functional.pad(x, (0, 2))), self.router(nn.functional.pad(x, (0, 2)), bias=x.new_ones(3))


def make_classifier(dtype: torch.dtype = torch.float32) -> Classifier:
    torch.manual_seed(0)
    return Classifier().to(dtype)


def trained_by_name(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["score"], {"score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"}),
        (["score.2"], {"score.2.weight", "score.2.bias"}),
        (["2", "router"], {"score.2.weight", "score.2.bias", "router.weight"}),
    ],
    ids=lambda names: " ".join(sorted(names)),  # a set's own order differs from process to process
)
def test_all_parameters_of_a_named_module_train(names: list[str], want: set[str]) -> None:
    model = make_classifier()
    report = inject_lora(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=names))
    assert trained_by_name(model) == want
    assert report.num_trainable == 2 * 32 + sum(p.numel() for n, p in model.named_parameters() if n in want)
    assert set(report.trained) == {name.rpartition(".")[0] for name in want}
    assert model.qlora_adapters["default"].trained == report.trained  # type: ignore[operator, index, union-attr]


def test_what_all_linear_finds_in_them_is_left_to_them() -> None:
    model = make_classifier()
    report = inject_lora(model, LoraConfig(r=2, modules_to_save=["score"]))
    assert list(report.targeted) == ["body"]
    assert {p for p, why in report.skipped.items() if why == "trained as a whole"} == {"score.0", "score.2"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_fp32_they_compute_what_they_computed_and_give_out_the_dtype_they_gave_out(dtype: torch.dtype) -> None:
    model, x = make_classifier(dtype), torch.randn(2, 4, 16).to(dtype)
    wide = make_classifier(dtype).float()
    inject_lora(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["score", "router", "pool"]))
    (scores, (first, table, index)), (want, (want_first, _, want_index)) = model(x), wide(x.float())
    assert {t.dtype for t in (scores, first, table["scores"])} == {dtype}
    assert index.dtype == torch.int64
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    # Each of the few layers in between rounds its output once, by 2**-9.
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(scores.float(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.float(), want_first, rtol=tolerance, atol=2 * tolerance)
    assert (index == want_index).float().mean() > 0.8
    (scores.float().sum() + first.float().square().sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_nothing_but_them_may_train() -> None:
    model = make_classifier()
    report = inject_lora(model, LoraConfig(target_modules=[], modules_to_save=["score.2"]))
    assert report.targeted == {}
    assert not list(lora_layers(model))
    assert report.num_trainable == 8 * 2 + 2
    assert "LoRA on 0 layers" in str(report)
    norms = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert inject_lora(norms, LoraConfig(target_modules=[], train_norms=True)).num_trainable == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["scores"]}, "the entry 'scores' matches no module(.|\n)*for example body, score"),
        ({"modules_to_save": ["score.1"]}, r"score\.1 has no parameters to train"),
        ({"modules_to_save": ["body"]}, "both targeted and trained as a whole(.|\n)*found: body"),
        ({"modules_to_save": ["score"], "target_modules": ["score.0"]}, r"both targeted and trained(.|\n)*score\.0"),
        ({"modules_to_save": ["body", "score"], "target_modules": "all-linear"}, "all that target_modules finds is trained"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_changes_nothing(config: dict[str, Any], message: str) -> None:
    model = make_classifier()
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=message):
        inject_lora(model, LoraConfig(**({"r": 2, "target_modules": ["body"]} | config)))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n].requires_grad == asks and torch.equal(after[n], value) for n, (asks, value) in before.items())


def test_a_quantized_module_is_refused_with_the_way_to_have_it(make_base: Callable[..., Path]) -> None:
    source = resolve_base(str(make_base("llama")))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp.down_proj"])
    with pytest.raises(ConfigError, match="a quantized weight cannot be trained") as error:
        inject_lora(load_model(source, quantization=QuantizationConfig()), config)
    assert error.value.place == "lora.modules_to_save"
    assert error.value.found == "model.layers.1.mlp.down_proj (Linear4bit)"
    assert "add down_proj to model.quantization.skip_modules" in str(error.value)
    # As it says.
    model = load_model(source, quantization=QuantizationConfig(skip_modules=["down_proj"]))
    assert inject_lora(model, config).trained == ("model.layers.1.mlp.down_proj",)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad.any()


@pytest.mark.parametrize(
    "keys", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"], "train_head": False}]
)
def test_one_side_of_a_tied_pair_cannot_be_named_alone(make_model: Callable[..., Any], keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="ties its embeddings to its head"):
        inject_lora(make_model("llama", tie_word_embeddings=True), LoraConfig(r=2, **keys))


@pytest.mark.parametrize(
    "keys", [{"modules_to_save": ["lm_head", "embed_tokens"]}, {"modules_to_save": ["lm_head"], "train_embeddings": True}]
)
def test_both_sides_of_a_tied_pair_stay_one_weight(make_model: Callable[..., Any], keys: dict[str, Any]) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    report = inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], **keys))
    assert set(report.trained) == {"model.embed_tokens", "lm_head"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert report.num_trainable == model.lm_head.weight.numel() + lora


def test_other_modules_that_share_a_weight_are_trained_together() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    with pytest.raises(ConfigError, match=r"share a weight(.|\n)*1, without 2"):
        modules_to_train(model, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    assert modules_to_train(model, LoraConfig(target_modules=["0"], modules_to_save=["1", "2"])) == ["1", "2"]


def test_a_key_and_a_name_for_the_same_module_are_one(make_model: Callable[..., Any]) -> None:
    config = LoraConfig(r=2, train_head=True, train_norms=True, modules_to_save=["lm_head", "norm"])
    trained = modules_to_train(make_model("llama"), config)
    assert len(trained) == len(set(trained))
    assert {"lm_head", "model.norm", "model.layers.0.input_layernorm"} <= set(trained)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
        ({"modules_to_save": ["embed_tokens"]}, "lora.modules_to_save"),
        ({"train_head": True}, "lora.train_embeddings, lora.train_head"),
    ],
)
def test_half_of_a_tied_pair_is_refused_by_the_key_that_asks_for_it(
    make_model: Callable[..., Any], config: dict[str, Any], place: str
) -> None:
    with pytest.raises(ConfigError, match="can only be trained together") as error:
        inject_lora(make_model("llama", tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"], **config))
    assert error.value.place == place
