"""The shipped base loads with plain transformers, is small enough, and its tokenizer and template agree with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.assets import tiny_path

CONVERSATION = [
    {"role": "user", "content": "What is math.cosh?"},
    {"role": "assistant", "content": "Return the hyperbolic cosine of x."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path())


def test_folder_is_small_and_complete() -> None:
    names = {path.name for path in tiny_path().iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert (tiny_path() / "model.safetensors").stat().st_size <= 12_000_000
    assert sum(path.stat().st_size for path in tiny_path().iterdir()) <= 12_500_000
    assert "auto_map" not in json.loads((tiny_path() / "config.json").read_text())


def test_weights_are_bfloat16_and_tied(model: Any) -> None:
    with safe_open(tiny_path() / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_embedding_has_a_row_for_every_token(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]


def test_marks_have_the_same_ids_everywhere(model: Any, tokenizer: Any) -> None:
    wanted = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    assert len(set(wanted)) == 3
    for holder in (tokenizer, model.config, model.generation_config):
        assert [holder.bos_token_id, holder.eos_token_id, holder.pad_token_id] == wanted


@pytest.mark.parametrize("text", ["def f(x):\n    return x ** 2  # ok\n", " math.cosh\t", "naïve 東京 🙂", "a  b\n\n\n c"])
def test_text_survives_and_nothing_is_added(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_assistant_tokens_are_the_answer_and_the_end_of_turn(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(CONVERSATION * 2, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Return the hyperbolic cosine of x.<|im_end|>" * 2


def test_generation_prompt_is_what_training_puts_before_the_answer(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert whole == prompt + CONVERSATION[1]["content"] + "<|im_end|>\n"


def test_base_learned_something(model: Any, tokenizer: Any) -> None:
    """Library text costs it far less than the uniform guess, log(4096) = 8.3 nats a token."""
    text = "<|im_start|>math.cosh\nReturn the hyperbolic cosine of x.<|im_end|>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() < 4
