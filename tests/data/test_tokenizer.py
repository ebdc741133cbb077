"""Loading tokenizers from folders, and refusing those that do not fit the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.data.tokenizer import check_vocabulary, load_tokenizer, padding_token_id
from qlora.errors import BaseModelError


def test_a_saved_tokenizer_comes_back_with_padding_that_adds_no_token(make_tokenizer, tmp_path: Path) -> None:
    saved = make_tokenizer("chatml")
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert len(loaded) == len(saved)
    assert loaded("hello world")["input_ids"] == saved("hello world")["input_ids"]
    assert loaded.chat_template == saved.chat_template
    assert loaded.pad_token == "<|im_end|>"
    assert padding_token_id(loaded) == saved.eos_token_id


def test_a_padding_token_of_its_own_is_kept(make_tokenizer, tmp_path: Path) -> None:
    saved = make_tokenizer("chatml")
    saved.pad_token = "<|endoftext|>"
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert padding_token_id(loaded) == saved.convert_tokens_to_ids("<|endoftext|>") != saved.eos_token_id


def test_a_folder_without_a_tokenizer_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert "model.safetensors" in str(caught.value.found)


def test_code_that_comes_with_a_tokenizer_is_not_run(make_tokenizer, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = tmp_path / "tokenizer"
    make_tokenizer("chatml").save_pretrained(folder)
    (folder / "tokenization_evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="custom code"):
        load_tokenizer(str(folder))
    assert not canary.exists()


def test_tokens_beyond_the_embedding_are_named(make_tokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    num_rows = len(tokenizer)
    check_vocabulary(tokenizer, num_rows)
    tokenizer.add_tokens(["<new>", "<newer>"])
    check_vocabulary(tokenizer, num_rows + 2)
    with pytest.raises(BaseModelError, match=f"'<newer>' = {num_rows + 1}") as caught:
        check_vocabulary(tokenizer, num_rows + 1)
    assert "<new>'" not in str(caught.value.found)
    with pytest.raises(BaseModelError, match="'<new>'"):
        check_vocabulary(tokenizer, num_rows)


def test_many_tokens_beyond_the_embedding_are_counted(make_tokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    with pytest.raises(BaseModelError, match=f"and {len(tokenizer) - 15} more"):
        check_vocabulary(tokenizer, 10)
