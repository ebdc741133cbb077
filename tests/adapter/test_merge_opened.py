"""What becomes of a merged folder: its tokenizer, zero rows, experts trained as wholes, and how it is opened again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora
from qlora.adapter import merge_weight
from qlora.adapter.merge_files import run_merge
from qlora.adapter.merge_plan import plan_merge
from qlora.adapter.merge_weight import of_tensor, with_magnitude
from qlora.adapter.read import open_adapter
from qlora.cli.main import main
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.distributed import runtime as processes
from qlora.errors import AdapterError, BaseModelError
from qlora.infer.generate import open_for_inference
from qlora.lora.inject import inject_lora
from qlora.quant.fillings import Filling
from qlora.quant.load import load_model
from qlora.quant.prepare import run_prepare
from qlora.quant.shards import JoinedEntry
from qlora.quant.skeleton import read_skeleton
from qlora.quant.source import MERGED_NAME, resolve_base

MakeBase = Callable[..., Path]
NEW = ["<ping>", "<pong>"]
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_weight, "PIECE_ELEMENTS", 700)


def move(model: Any, scale: float = 0.05) -> Any:
    """Give what is trained other values."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("padded", [False, True])
def test_new_tokens_go_along(random_base: Path, tmp_path: Path, padded: bool) -> None:
    """Also where the base has rows to spare, so that the vocabulary does not grow."""
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(random_base).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(random_base)
    model.resize_token_embeddings(model.config.vocab_size + (8 if padded else 0))
    model.save_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], new_tokens=NEW)
    trained, tokenizer = qlora.load_base(str(base), dtype="float32", quantization=None, lora=config)
    inject_lora(trained, config)
    qlora.save_adapter(move(trained), tmp_path / "adapter")
    out = run_merge(tmp_path / "adapter", tmp_path / "out", onto="original")
    text = "hello <ping> what <pong>"
    ids = tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == ids
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert found.config.vocab_size == (model.config.vocab_size if padded else max(ids) + 1)
    with torch.no_grad():
        want = trained(torch.tensor([ids])).logits
        torch.testing.assert_close(found(torch.tensor([ids])).logits, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("of_columns", [False, True])
@pytest.mark.parametrize("length", [1.0, 1e4])
def test_a_row_of_zeros_stays_one(of_columns: bool, length: float) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    (weight.T if of_columns else weight)[3] = 0
    m = torch.full((30 if of_columns else 40,), length)
    found = with_magnitude(of_tensor(weight), m, of_columns=of_columns).whole(torch.float32)
    sizes = found.norm(dim=0 if of_columns else 1)
    assert sizes[3] == 0
    torch.testing.assert_close(torch.cat([sizes[:3], sizes[4:]]), torch.cat([m[:3], m[4:]]))


EXPERTS = {
    "mixtral": {},  # a tensor an expert and projection in the files
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 320, "hidden_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
        "initializer_range": 0.1,
    },
    "gpt_oss": {  # fused in the files, with biases
        "num_local_experts": 4, "intermediate_size": 64, "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "initializer_range": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts_trained_as_wholes(make_base: MakeBase, tmp_path: Path, architecture: str) -> None:
    """Every part of a fused weight gets its own run of what takes the weight's place."""
    base = make_base(architecture, dtype="float32", **EXPERTS[architecture])
    model = load_model(resolve_base(str(base)), dtype="float32")
    before = logits(model)
    inject_lora(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp.experts"]))
    qlora.save_adapter(move(model), tmp_path / "adapter")
    out = run_merge(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    want = logits(model)
    assert (want - before).abs().max() > 0.05
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(found), want, atol=2e-5, rtol=1e-5)


def test_experts_that_are_not_finite(make_base: MakeBase, tmp_path: Path) -> None:
    model = load_model(resolve_base(str(make_base("mixtral", dtype="float32"))), dtype="float32")
    inject_lora(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp.experts"]))
    qlora.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    first, _ = next(own["data_offsets"] for name, own in header.items() if name.endswith("gate_up_proj"))
    content[8 + size + first : 12 + size + first] = b"\x00\x00\xc0\x7f"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match=r"gate_up_proj.* not finite"):
        run_merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_several_tensors_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    """No architecture has one that is not of experts; parts would each get the whole update."""
    base = make_base("llama", dtype="float32")
    model = load_model(resolve_base(str(base)), dtype="float32")
    inject_lora(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    qlora.save_adapter(move(model), tmp_path / "adapter")
    skeleton = read_skeleton(resolve_base(str(base)), torch.float32, None)
    for key, filling in skeleton.fillings.items():
        if key.endswith("layers.1.self_attn.q_proj.weight"):
            parts = tuple(filling.entries * 2)
            skeleton.fillings[key] = Filling(list(parts), converter=object(), joined=JoinedEntry(parts, (128, 64)))
    with pytest.raises(AdapterError, match="only experts can be merged into") as error:
        plan_merge(skeleton, open_adapter(tmp_path / "adapter"), "original", torch.float32, torch.float32)
    assert error.value.place == "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def adapter(random_base: Path, tmp_path: Path) -> Path:
    model, _ = qlora.load_base(str(random_base), dtype="float32")
    inject_lora(model, LoraConfig(r=4))
    return qlora.save_adapter(move(model), tmp_path / "adapter")


def test_what_a_merged_folder_says_of_itself(adapter: Path, random_base: Path, tmp_path: Path) -> None:
    for form in ("dequantized", "original"):
        out = run_merge(adapter, tmp_path / form, onto=form, dtype="float16")
        record = json.loads((out / MERGED_NAME).read_text())
        assert {key: record[key] for key in ("onto", "dtype")} == {"onto": form, "dtype": "float16"}
        assert len(record["adapter"]) == 64
    assert not (run_merge(adapter, tmp_path / "quantized", onto="quantized") / MERGED_NAME).exists()
    # What is made of a merged model is none.
    prepared = run_prepare(str(tmp_path / "original"), tmp_path / "prepared")
    assert not (prepared / MERGED_NAME).exists()
    (tmp_path / "original" / MERGED_NAME).write_text('{"onto": "elsewhere", "dtype": "float16"}')
    with pytest.raises(BaseModelError, match="damaged record") as error:
        qlora.load_base(str(tmp_path / "original"))
    assert MERGED_NAME in str(error.value.next_step)


def test_quantizing_it_is_warned_of(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["merge", str(adapter), str(tmp_path / "out"), "--measure"]) == 0
    assert "warning" not in capsys.readouterr().err, "merge opens what it made, and knows"
    out = str(tmp_path / "out")
    qlora.load_base(out)
    shown = capsys.readouterr().err
    assert shown.count("warning: ") == 1
    assert out in shown
    assert "model.quantization: null" in shown
    assert "quantization=None" in shown
    qlora.load_base(out, quantization=None)
    monkeypatch.setenv("RANK", "1")
    qlora.load_base(out)
    assert "warning" not in capsys.readouterr().err


def test_it_is_opened_for_inference_as_it_was_written(adapter: Path, random_base: Path, tmp_path: Path) -> None:
    out = run_merge(adapter, tmp_path / "out", dtype="float16")
    runtime = processes.start_inference()
    try:
        merged, _ = open_for_inference(runtime, None, str(out))
        plain, _ = open_for_inference(runtime, None, str(random_base))
    finally:
        runtime.end()
    assert merged.qlora_base.quantization is None
    assert merged.dtype == torch.float16
    assert plain.qlora_base.quantization == QuantizationConfig()


def test_the_forms_that_measuring_leaves_out(random_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = qlora.load_base(str(random_base), dtype="float32", quantization=None)
    inject_lora(model, LoraConfig(r=4))
    qlora.save_adapter(move(model), tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "left out" in line] == [
        "quantized is left out: the adapter was trained on a base that was not quantized, "
        "so there is no quantization to repeat"
    ]
    assert [line.split()[0] for line in lines[2:4]] == ["dequantized", "original"]
