"""Rows of an embedding trained for some tokens, against whole tables in float64 and against PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.adapter.files import delete_adapter, load_adapter, save_adapter
from qlora.config.schema import LoraConfig
from qlora.data.batch import collate_packed
from qlora.errors import AdapterError, ConfigError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import LoraLayer, disable_adapter, merge_adapter, unmerge_adapter
from qlora.lora.token_rows import TiedTokenRows, TokenRows
from qlora.objective.train_model import TrainModel
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from tests.adapter.random_values import randomize

MakeBase = Callable[..., Path]
TOKENS = [7, 300, 4]  # in this order, which is not the ids'
IDS = torch.tensor([[3, 7, 300, 9, 7], [300, 4, 12, 50, 5]])
BASES = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "scaled, tied": ("gemma3_text", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
}


def load_ours(folder: Path, dtype: str = "float32") -> Any:
    return load_model(resolve_base(str(folder)), dtype=dtype)


def load_theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_like(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


def rows_of(model: Any) -> TokenRows:
    return model.get_input_embeddings()  # type: ignore[no-any-return]


def with_whole_tables(folder: Path, model: Any) -> Any:
    """The base with the rows written into its embedding, in float64: what a user of the rows has in mind."""
    plain = load_theirs(folder).double()
    with torch.no_grad():
        plain.get_input_embeddings().weight[TOKENS] = rows_of(model).trainable_tokens["default"].double()
    return plain


@pytest.mark.parametrize("case", BASES)
def test_logits_and_gradients_are_those_of_a_changed_table(make_base: MakeBase, case: str) -> None:
    name, options = BASES[case]
    folder = make_base(name, dtype="float32", **options)
    ours = load_ours(folder)
    plain = logits(ours)
    report = inject_lora(ours, LoraConfig(target_modules=[], trainable_token_indices=TOKENS))
    assert_like(logits(ours), plain)  # training starts at the base's own function
    hidden = rows_of(ours).weight.shape[1]
    assert report.num_trainable == 3 * hidden
    randomize(ours)
    want = with_whole_tables(folder, ours)
    assert_like(logits(ours).double(), logits(want))
    assert not torch.allclose(logits(ours), plain, atol=0.01)
    # The gradient: of the rows alone, also by way of a tied head, and of their own size.
    targets = torch.tensor([[7, 300, 9, 7, 1], [4, 12, 50, 5, 2]])
    loss = nn.functional.cross_entropy(ours(IDS).logits.double().flatten(0, 1), targets.flatten())
    loss.backward()
    table = want.get_input_embeddings().weight.requires_grad_()
    nn.functional.cross_entropy(want(IDS).logits.flatten(0, 1), targets.flatten()).backward()
    grad = rows_of(ours).trainable_tokens["default"].grad
    assert grad.shape == (3, hidden)
    torch.testing.assert_close(grad.double(), table.grad[TOKENS], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    assert [type(m) for m in ours.modules() if isinstance(m, LoraLayer)] == [TokenRows] + (
        [TiedTokenRows] if "tied" in case.split(", ") or case == "gpt2" else []
    )


@pytest.mark.parametrize("case", ["untied", "tied", "scaled, tied"])
def test_the_training_loss_and_its_gradients_are_the_models_own(make_base: MakeBase, case: str) -> None:
    """Through the head with the loss behind it, piece by piece."""
    name, options = BASES[case]
    ours = load_ours(make_base(name, dtype="float32", **options))
    inject_lora(ours, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    randomize(ours)
    rng = np.random.default_rng(0)
    rows = [(np.array(ids.tolist() * 2), rng.integers(0, 2, 10).astype(np.uint8)) for ids in IDS]
    batch = collate_packed(rows)
    train_model = TrainModel(ours)
    loss, num_targets = train_model(batch)
    assert train_model.loss_head is not None
    assert num_targets > 4
    trained = [p for p in ours.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained)
    both = [(ids.repeat(2), learned) for ids, (_, learned) in zip(IDS, rows, strict=True)]
    want = torch.zeros(())
    for ids, learned in both:
        shifted = ours(ids[None]).logits[0, :-1]
        chosen = torch.from_numpy(learned[1:]).bool()
        want = want + nn.functional.cross_entropy(shifted[chosen], ids[1:][chosen], reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(want, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("case", BASES)
def test_peft_reads_what_we_write_and_we_what_it_writes(make_base: MakeBase, tmp_path: Path, case: str) -> None:
    name, options = BASES[case]
    target = "c_attn" if name == "gpt2" else "q_proj"
    folder = make_base(name, dtype="float32", **options)
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, target_modules=[target], trainable_token_indices=TOKENS))
    randomize(ours)
    save_adapter(ours, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["trainable_token_indices"] == TOKENS
    held = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    rows = {key: tuple(value.shape) for key, value in held.items() if "lora" not in key}
    path = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
    assert rows == {f"base_model.model.{path}.token_adapter.trainable_tokens_delta": (3, rows_of(ours).weight.shape[1])}
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder), tmp_path / "ours")), logits(ours))
    again = load_ours(folder)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))
    assert [p.shape for p in again.parameters() if p.requires_grad] == [
        p.shape for p in ours.parameters() if p.requires_grad
    ]

    config = peft.LoraConfig(r=4, target_modules=[target], trainable_token_indices={path.rpartition(".")[2]: [9, 300]})
    theirs = get_peft_model(load_theirs(folder), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_ours(folder)
    load_adapter(again, tmp_path / "theirs")
    assert_like(logits(again), logits(theirs))
    assert not torch.allclose(logits(again), logits(load_ours(folder)), atol=0.01)


def test_rows_of_an_untied_head_as_in_peft(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32")
    rows = {"embed_tokens": [9, 300], "lm_head": [11]}
    theirs = get_peft_model(
        load_theirs(folder), peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=rows)
    )
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_ours(folder)
    load_adapter(ours, tmp_path / "theirs")
    assert_like(logits(ours), logits(theirs))
    save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["trainable_token_indices"] == rows
    assert_like(logits(PeftModel.from_pretrained(load_theirs(folder), tmp_path / "ours")), logits(theirs))


def test_merging_disabling_deleting(make_base: MakeBase) -> None:
    ours = load_ours(make_base("llama", dtype="float32", tie_word_embeddings=True))
    plain = logits(ours)
    inject_lora(ours, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    randomize(ours)
    want = logits(ours)
    with disable_adapter(ours):
        assert torch.equal(logits(ours), plain)
    merge_adapter(ours)
    assert_like(logits(ours), want)
    with disable_adapter(ours):
        assert torch.equal(logits(ours), plain)
    unmerge_adapter(ours)
    assert torch.equal(logits(ours), want)
    inject_lora(ours, LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[7, 8]), "other")
    assert_like(logits(ours), plain)  # each adapter has rows of its own
    delete_adapter(ours, "default")
    randomize(ours)
    assert not torch.allclose(logits(ours), plain, atol=0.01)
    delete_adapter(ours, "other")
    assert torch.equal(logits(ours), plain)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_in_bfloat16_the_rows_are_fp32_and_start_at_the_bases_function(make_base: MakeBase) -> None:
    ours = load_ours(make_base("llama", tie_word_embeddings=True), "bfloat16")
    plain = logits(ours)
    inject_lora(ours, LoraConfig(target_modules=[], trainable_token_indices=TOKENS))
    assert rows_of(ours).trainable_tokens["default"].dtype == torch.float32
    assert torch.equal(logits(ours), plain)


@pytest.mark.parametrize(
    ("tied", "config", "words"),
    [
        (False, {"trainable_token_indices": [5, 320]}, "token ids are out of range"),
        (False, {"trainable_token_indices": [5, 9, 5]}, "token ids are given twice"),
        (False, {"trainable_token_indices": [5], "target_modules": ["embed_tokens"]}, "it carries a low-rank update"),
        (True, {"trainable_token_indices": [5], "target_modules": ["lm_head"]}, "it carries a low-rank update"),
        (False, {"trainable_token_indices": [5], "train_embeddings": True}, "it is trained as a whole"),
        (False, {"new_tokens": ["<a>"]}, "the new tokens were not added when the base was loaded"),
    ],
)
def test_what_cannot_be_is_refused(make_base: MakeBase, tied: bool, config: dict[str, Any], words: str) -> None:
    ours = load_ours(make_base("llama", dtype="float32", tie_word_embeddings=tied))
    with pytest.raises(ConfigError, match=words):
        inject_lora(ours, LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | config)))
    assert not any(isinstance(module, LoraLayer) for module in ours.modules())


def test_a_low_rank_update_beside_rows_of_another_adapter_is_refused(make_base: MakeBase) -> None:
    ours = load_ours(make_base("llama", dtype="float32"))
    inject_lora(ours, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5]))
    with pytest.raises(ConfigError, match="rows of this module are trained for some tokens"):
        inject_lora(ours, LoraConfig(r=4, target_modules=["embed_tokens"]), "other")


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([7, 300, 320], "token ids are out of range"),
        ([7, 7, 4], "token ids are given twice"),
        ([7, 300], r"has shape \(3, 64\), this base needs \(2, 64\)"),
        (None, "does not say which tokens have the rows"),
        ([], "does not say which tokens have the rows"),
        ("all", "is no list of token ids"),
        ([True, 1, 2], "is no list of token ids"),
        ({"lm_head": TOKENS}, "does not say which tokens have the rows"),
    ],
)
def test_damaged_files_are_refused(make_base: MakeBase, tmp_path: Path, indices: Any, words: str) -> None:
    folder = make_base("llama", dtype="float32")
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    save_adapter(ours, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trainable_token_indices": indices}))
    again = load_ours(folder)
    with pytest.raises(AdapterError, match=words) as error:
        load_adapter(again, tmp_path)
    assert not any(isinstance(module, LoraLayer) for module in again.modules()), error


def test_in_an_fp32_base_bfloat16_adapters_keep_fp32_rows(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32", tie_word_embeddings=True)
    ours = load_ours(folder)
    plain = logits(ours)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS, dtype="bfloat16")
    inject_lora(ours, config)
    assert_like(logits(ours), plain)
    assert torch.equal(rows_of(ours).trainable_tokens["default"], rows_of(ours).weight[TOKENS])
    randomize(ours)
    save_adapter(ours, tmp_path)
    again = load_ours(folder)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(ours))


KINDS_OF_USE: dict[str, dict[str, Any]] = {
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    "low rank": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole": {"target_modules": ["q_proj"], "train_embeddings": True, "train_head": True},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["inject", "load", "replace"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("rows", "low rank"), ("low rank", "rows"), ("rows", "whole"), ("low rank", "whole"), ("rows", "rows")],
)
def test_another_kind_takes_the_place_of_what_is_gone(
    make_base: MakeBase, tmp_path: Path, first: str, second: str, how: str, tied: bool
) -> None:
    folder = make_base("llama", dtype="float32", tie_word_embeddings=tied)
    theirs = load_ours(folder)
    inject_lora(theirs, LoraConfig(r=4, **KINDS_OF_USE[second]))
    randomize(theirs)
    save_adapter(theirs, tmp_path)
    ours = load_ours(folder)
    plain = logits(ours)
    inject_lora(ours, LoraConfig(r=4, **KINDS_OF_USE[first]))
    randomize(ours)
    if how == "replace":
        load_adapter(ours, tmp_path, replace=True)
    else:
        delete_adapter(ours, "default")
        assert torch.equal(logits(ours), plain)
        assert not any(isinstance(module, LoraLayer) for module in ours.modules())
    if how == "load":
        load_adapter(ours, tmp_path)
    if how == "inject":
        inject_lora(ours, LoraConfig(r=4, **KINDS_OF_USE[second]))
        assert_like(logits(ours), plain)
        return
    assert torch.equal(logits(ours), logits(theirs))


def test_a_failed_replacement_leaves_the_layers(make_base: MakeBase, tmp_path: Path) -> None:
    folder = make_base("llama", dtype="float32")
    theirs = load_ours(folder)
    inject_lora(theirs, LoraConfig(r=4, **KINDS_OF_USE["low rank"]))
    save_adapter(theirs, tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()) | {"r": 5})
    )
    ours = load_ours(folder)
    inject_lora(ours, LoraConfig(r=4, **KINDS_OF_USE["rows"]))
    randomize(ours)
    before, want = dict(ours.named_modules()), logits(ours)
    with pytest.raises(AdapterError, match="do not fit"):
        load_adapter(ours, tmp_path, replace=True)
    assert dict(ours.named_modules()) == before
    assert torch.equal(logits(ours), want)
