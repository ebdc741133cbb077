"""Tokens that the base's tokenizer did not have: added, trained, saved, and added again wherever the adapter is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.adapter.base import load_base
from qlora.adapter.export import run_export
from qlora.adapter.files import delete_adapter, load_adapter, open_adapter, save_adapter
from qlora.adapter.tensor_file import weights_file
from qlora.config.schema import LoraConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora.inject import inject_lora

NEW = ["<ping>", "<pong>"]
CONFIG = LoraConfig(r=4, target_modules=["q_proj"], new_tokens=NEW, trainable_token_indices=[11])


@pytest.fixture(params=["tied", "untied", "with room"])
def base(request: pytest.FixtureRequest, random_base: Path, tmp_path: Path) -> Path:
    """A base whose vocabulary is full, or one with padded rows."""
    if request.param == "tied":
        return random_base
    folder = tmp_path / "base"
    shutil.copytree(random_base, folder)
    model = AutoModelForCausalLM.from_pretrained(random_base)
    if request.param == "untied":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach() * 0.5)
    else:
        model.resize_token_embeddings(model.config.vocab_size + 5)
    model.save_pretrained(folder)
    return folder


def train_a_little(base: Path) -> tuple[Any, Any]:
    """The base with an adapter whose values have moved, and the tokenizer."""
    model, tokenizer = load_base(str(base), dtype="float32", quantization=None, lora=CONFIG)
    inject_lora(model, CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), tokenizer


def test_saved_and_opened_again_here_and_in_peft(base: Path, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(base)
    num_rows = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().num_embeddings
    model, tokenizer = train_a_little(base)
    ids = tokenizer("hello <ping> what <pong><ping>", return_tensors="pt")["input_ids"]
    first = len(plain)
    assert [i for i in ids[0].tolist() if i >= first] == [first, first + 1, first]
    assert model.config.vocab_size == max(num_rows, first + 2), "no row more than is needed"
    save_adapter(model, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tuple(value.shape) for key, value in held.items() if "trainable_tokens" in key} <= {(3, 64), (2, 64)}
    assert sum(value.numel() for value in held.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        want = model(ids).logits
        again, other = load_base(str(base), dtype="float32", quantization=None, adapter=tmp_path / "adapter")
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(ids).logits, want)
        assert other.get_vocab() == tokenizer.get_vocab()
        # Saved again it is the same folder.
        save_adapter(again, tmp_path / "again")
        for file in (tmp_path / "adapter").iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
        # PEFT, where a user gives the base rows for the tokenizer beside the adapter.
        beside = AutoTokenizer.from_pretrained(tmp_path / "adapter")
        assert beside("hello <ping> what <pong><ping>")["input_ids"] == ids[0].tolist()
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if len(beside) > num_rows:
            theirs.resize_token_embeddings(len(beside))
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(ids).logits[..., : len(beside)], want[..., : len(beside)], rtol=0, atol=1e-4)


def test_a_base_without_the_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    """Also one whose padded rows would hold them; and one that somebody else opened, unless it has the rows."""
    model, _ = train_a_little(base)
    save_adapter(model, tmp_path / "adapter")
    plain, _ = load_base(str(base), dtype="float32", quantization=None)
    with pytest.raises(AdapterError, match="other new tokens") as raised:
        load_adapter(plain, tmp_path / "adapter")
    assert "load_base(BASE, adapter=" in str(raised.value.next_step)
    assert "load_adapter(model, " in str(raised.value.next_step)
    foreign: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if foreign.config.vocab_size < model.config.vocab_size:
        with pytest.raises(AdapterError, match="no rows for the adapter's new tokens") as raised:
            load_adapter(foreign, tmp_path / "adapter")
        assert "load_base(BASE, adapter=" in str(raised.value.next_step)
        foreign.resize_token_embeddings(model.config.vocab_size)
    load_adapter(foreign, tmp_path / "adapter")
    save_adapter(foreign, tmp_path / "again")
    held, again = (describe(tmp_path / name) for name in ("adapter", "again"))
    assert again["new_tokens"] == held["new_tokens"] == {"tokens": NEW, "ids": held["new_tokens"]["ids"]}
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "adapter" / "tokenizer.json").read_bytes()


def describe(folder: Path) -> dict[str, Any]:
    return open_adapter(folder).described


@pytest.mark.parametrize("others", [["<a>", "<b>"], ["<pong>", "<ping>"], ["<ping>", "<pong>", "<c>"], ["<ping>"]])
def test_other_tokens_at_the_same_ids_are_refused(random_base: Path, tmp_path: Path, others: list[str]) -> None:
    model, _ = train_a_little(random_base)
    save_adapter(model, tmp_path)
    lora = LoraConfig(new_tokens=others)
    other, _ = load_base(str(random_base), dtype="float32", quantization=None, lora=lora)
    before = list(other.state_dict())
    with pytest.raises(AdapterError, match="other new tokens") as raised:
        load_adapter(other, tmp_path)
    assert "'<ping>' is " in str(raised.value.found)
    assert repr(others[0]) in str(raised.value.wanted)
    assert list(other.state_dict()) == before


def test_rows_at_the_ids_of_new_tokens_are_refused(random_base: Path, tmp_path: Path) -> None:
    """They were trained for what the base has there, and here another token has the id."""
    padded: Any = AutoModelForCausalLM.from_pretrained(random_base)
    first = len(AutoTokenizer.from_pretrained(random_base))
    padded.resize_token_embeddings(max(padded.config.vocab_size, first + 2))
    shutil.copytree(random_base, tmp_path / "base")
    padded.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[first])
    model, _ = load_base(str(tmp_path / "base"), dtype="float32", quantization=None)
    inject_lora(model, config)
    save_adapter(model, tmp_path / "adapter")
    grown, _ = load_base(str(tmp_path / "base"), dtype="float32", quantization=None, lora=LoraConfig(new_tokens=NEW))
    with pytest.raises(AdapterError, match="ids that are new tokens in this model"):
        load_adapter(grown, tmp_path / "adapter")


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head", "q_proj"]])
def test_tokens_are_recorded_also_where_their_rows_are_not_trained(base: Path, tmp_path: Path, targets: list[str]) -> None:
    lora = LoraConfig(r=4, target_modules=targets)
    model, tokenizer = load_base(str(base), dtype="float32", quantization=None, lora=LoraConfig(new_tokens=NEW))
    inject_lora(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.ones_like(parameter)
    save_adapter(model, tmp_path / "adapter")
    again, other = load_base(str(base), dtype="float32", quantization=None, adapter=tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert other.get_vocab() == tokenizer.get_vocab()
    ids = tokenizer("hello <ping>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_adapter_without_new_tokens_stays_one(random_base: Path, tmp_path: Path) -> None:
    """Beside one that has some; saved again it fits its own base."""
    plain, _ = load_base(str(random_base), dtype="float32", quantization=None)
    inject_lora(plain, LoraConfig(r=4, target_modules=["q_proj"]))
    save_adapter(plain, tmp_path / "plain")
    model, _ = train_a_little(random_base)
    load_adapter(model, tmp_path / "plain", "plain")
    save_adapter(model, tmp_path / "again", "plain")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    save_adapter(model, tmp_path / "own")
    assert describe(tmp_path / "own")["new_tokens"]["tokens"] == NEW
    # A name that is given again is another adapter's.
    delete_adapter(model, "plain")
    inject_lora(model, LoraConfig(r=4, target_modules=["q_proj"]), "plain")
    save_adapter(model, tmp_path / "new", "plain")
    assert describe(tmp_path / "new")["new_tokens"]["tokens"] == NEW


@pytest.mark.parametrize("reader", ["peft", "vllm"])
def test_export_takes_the_tokenizer_along(random_base: Path, tmp_path: Path, reader: Any) -> None:
    model, tokenizer = load_base(str(random_base), dtype="float32", quantization=None, lora=LoraConfig(new_tokens=NEW))
    inject_lora(model, LoraConfig(r=4, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "training_args.bin").touch()
    run_export(tmp_path / "adapter", tmp_path / "out", reader)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in (tmp_path / "adapter").iterdir()} - {"training_args.bin"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    again, _ = load_base(str(random_base), dtype="float32", quantization=None, adapter=tmp_path / "out")
    load_adapter(again, tmp_path / "out")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"tokens": NEW, "ids": [3, 4]}, "other ids than in training"),
        ({"tokens": NEW, "ids": [3]}, "damaged metadata: new_tokens"),
        ({"tokens": "<ping>", "ids": [3]}, "damaged metadata: new_tokens"),
        (["<ping>"], "damaged metadata: new_tokens"),
    ],
)
def test_a_damaged_record_is_refused(random_base: Path, tmp_path: Path, record: Any, words: str) -> None:
    model, _ = train_a_little(random_base)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(weights_file(load_file(file), {"qlora": json.dumps({"new_tokens": record})}))
    with pytest.raises(AdapterError, match=words):
        load_base(str(random_base), dtype="float32", quantization=None, adapter=tmp_path)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["<|im_end|>"], "is in the tokenizer already"),
        (["<a>", "<a>"], "is given twice"),
        (["<a>", ""], "does not read"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(random_base: Path, tokens: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_base(str(random_base), dtype="float32", quantization=None, lora=LoraConfig(new_tokens=tokens))
