"""Opening a base with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import qlora
from qlora.errors import BaseModelError
from qlora.quant.linear import Linear4bit


def test_a_base_opens_in_4_bits_frozen_and_in_eval_mode(random_base: Path) -> None:
    model, tokenizer = qlora.load_base(str(random_base))
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("<|im_start|>assistant\n")


def test_it_may_stay_unquantized(random_base: Path) -> None:
    model, _ = qlora.load_base(str(random_base), dtype="float32", quantization=None)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_tokenizer_that_knows_more_than_the_embedding(random_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_base, tmp_path / "base")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        tokenizer["added_tokens"][0] | {"id": len(tokenizer["model"]["vocab"]), "content": "<one_too_many>"}
    )
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BaseModelError):
        qlora.load_base(str(folder))
