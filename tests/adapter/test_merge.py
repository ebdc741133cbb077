"""Merged files against float64 and PEFT: every kind of layer, variant, quantization and form; ties; what is refused."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.adapter import merge_files, merge_weight
from qlora.adapter.files import load_adapter, save_adapter
from qlora.adapter.merge_files import run_merge
from qlora.adapter.merge_weight import LowRank, of_tensor, plus, with_magnitude
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import AdapterError, QloraError
from qlora.lora.from_weights import FromWeights
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers, merge_adapter
from qlora.ops import int8
from qlora.quant import write
from qlora.quant.linear import QuantizedLinear
from qlora.quant.load import load_model
from qlora.quant.prepare import run_prepare
from qlora.quant.shards import INDEX_NAME
from qlora.quant.source import resolve_base
from tests.adapter.merge_cases import (
    PREFIX,
    Kind,
    Variant,
    expect,
    make_tensors,
    random,
    read_base,
    through_4_bits,
    write_adapter,
)

MakeBase = Callable[..., Path]
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = {"num_hidden_layers": 1}
LLAMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
SIDES = ("model.embed_tokens", "lm_head")
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
KINDS = {
    "linear": Kind("llama", (Q, DOWN), SMALL),
    "linear with a bias": Kind("qwen2", (Q,), SMALL | {"tie_word_embeddings": False}),
    "Conv1D": Kind(
        "gpt2",
        ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"),
        {"n_layer": 1},
        quantized=("attn.weight", "c_proj.weight", "c_fc.weight"),
        transposed=True,
    ),
    "embedding": Kind("llama", ("model.embed_tokens",), SMALL, embedding=True),
    "head": Kind("llama", ("lm_head", Q), SMALL),
    "tied head": Kind("llama", ("lm_head", Q), SMALL | {"tie_word_embeddings": True}),
}
VARIANTS = {
    "plain": Variant(),
    "rsLoRA": Variant({"use_rslora": True}),
    "DoRA": Variant({"use_dora": True}),
    "bias": Variant({"lora_bias": True}),
    "patterns": Variant({"rank_pattern": {"q_proj": 2, "c_attn": 3}, "alpha_pattern": {"q_proj": 5, "lm_head": 1}}),
}
QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "nf4": {"quant_type": "nf4", "double_quant": True},
    "fp4": {"quant_type": "fp4", "double_quant": False, "block_size": 128},
}
EIGHT_BITS = QuantizationConfig(bits=8)
FORMS = ("dequantized", "original", "quantized")


def can_be(kind: str, variant: str, quantization: str, onto: str) -> bool:
    """Every kind with every variant in every form; what does not meet otherwise, with two variants."""
    if variant == "bias" and kind not in ("linear with a bias", "Conv1D"):
        return False
    usual = {"dequantized": "nf4", "original": "none", "quantized": "nf4"}
    if quantization != usual[onto] and variant not in ("plain", "DoRA"):
        return False
    return onto != "quantized" or quantization != "none"


TABLE = [row for row in itertools.product(KINDS, VARIANTS, QUANTIZATIONS, FORMS) if can_be(*row)]


@pytest.fixture(autouse=True)
def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights here are small; so are the pieces then, and of no round number of rows."""
    monkeypatch.setattr(merge_weight, "PIECE_ELEMENTS", 700)


def quantized_values(folder: Path) -> dict[str, Tensor]:
    """What our own load holds of a folder, by parameter."""
    model = load_model(resolve_base(str(folder)), dtype="float32")
    values = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            values[f"{path}.weight"] = module.dequantize(torch.float32)
    return values


@pytest.mark.parametrize(("kind", "variant", "quantization", "onto"), TABLE)
def test_against_float64(make_base: MakeBase, tmp_path: Path, kind: str, variant: str, quantization: str, onto: str) -> None:
    case, how, bits = KINDS[kind], VARIANTS[variant], QUANTIZATIONS[quantization]
    base = make_base(case.architecture, **case.changes)
    files = read_base(base)
    tensors = make_tensors(case, how, files)
    adapter = write_adapter(tmp_path / "adapter", base, tensors, quantization=bits, **how.fields)
    out = run_merge(adapter, tmp_path / "out", onto=onto)
    want = expect(case, how, files, tensors, bits, onto)
    config = json.loads((out / "config.json").read_text())
    if onto == "quantized":
        found = quantized_values(out)
        assert config["quantization_config"]["load_in_4bit"]
    else:
        found = read_base(out)
        assert found.keys() == want.keys()
        assert "quantization_config" not in config
    for name, value in want.items():
        torch.testing.assert_close(
            found[name].double(), value, atol=2e-6, rtol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert config["tie_word_embeddings"] == (kind == "Conv1D")


def test_a_convolution_in_rows() -> None:
    """No causal language model has one of a single group in its files; the arithmetic is the same for all."""
    W, A, B, m = random((6, 5, 3), 0), random((2, 5, 3), 1), random((6, 2, 1), 2), random((1, 6, 1), 3)
    rows = plus(of_tensor(W), LowRank.of_parts({"lora_A.weight": A, "lora_B.weight": B}, 0.7))
    want = W.double() + 0.7 * torch.einsum("or,rik->oik", B[:, :, 0].double(), A.double())
    torch.testing.assert_close(rows.whole(torch.float32).double(), want, atol=1e-6, rtol=1e-6)
    want = want / want.flatten(1).norm(dim=1)[:, None, None] * m.double().reshape(6, 1, 1)
    found = with_magnitude(rows, m).whole(torch.float32)
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-6)
    assert torch.equal(
        torch.cat([piece.flatten() for piece in rows.pieces(torch.bfloat16)]), rows.whole(torch.bfloat16).flatten()
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_rows(transposed: bool) -> None:
    """A (E r, in), expert after expert; B (out, r E), read as (out, r, E)."""
    E, r, num_in, num_out = 3, 2, 5, 4
    A, B = random((E * r, num_in), 0), random((num_out, r * E), 1)
    delta = torch.einsum("ore,eri->eoi", B.double().reshape(num_out, r, E), A.double().reshape(E, r, num_in)) * 0.5
    W = random((E, num_in, num_out) if transposed else (E, num_out, num_in), 2)
    want = W.double() + (delta.mT if transposed else delta)
    update = LowRank.of_experts(A, B, E, 0.5, transposed=transposed)
    rows = plus(merge_weight.as_matrix(of_tensor(W)), update)
    torch.testing.assert_close(rows.whole(torch.float32).double(), want.flatten(0, 1), atol=1e-6, rtol=1e-6)
    # The second half of the second expert, as files that hold gate and up apart have it.
    half = W.shape[1] // 2
    part = plus(of_tensor(W[1, half:]), update, offset=W.shape[1] + half)
    torch.testing.assert_close(part.whole(torch.float32).double(), want[1, half:], atol=1e-6, rtol=1e-6)


def trained_by_us(base: Path, folder: Path, **config: Any) -> Any:
    """A model with a random adapter that is saved in the folder. The model's own logits are the oracle."""
    quantization = config.pop("quantization", None)
    model = load_model(resolve_base(str(base)), dtype="float32", quantization=quantization)
    inject_lora(model, LoraConfig(r=4, **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def open_with_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


EXPERTS = {
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],  # a tensor an expert and projection on disk
    "qwen2_moe": ["mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],  # fused on disk, (in, out)
}


@pytest.mark.parametrize("architecture", EXPERTS)
def test_fused_experts(make_base: MakeBase, tmp_path: Path, architecture: str) -> None:
    changes = {"gpt_oss": {"head_dim": 16, "intermediate_size": 64, "num_local_experts": 4, **LLAMA}}.get(architecture, {})
    base = make_base(architecture, dtype="float32", **changes)
    model = trained_by_us(
        base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=EXPERTS[architecture], lora_alpha=9
    )
    out = run_merge(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert {name: value.shape for name, value in read_base(out).items()} == {
        name: value.shape for name, value in read_base(base).items()
    }
    want = logits(model)
    assert (want - logits(load_model(resolve_base(str(base)), dtype="float32"))).abs().max() > 0.05
    torch.testing.assert_close(logits(open_with_transformers(out)), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "DoRA"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_peft_merges(make_base: MakeBase, tmp_path: Path, architecture: str, variant: str) -> None:
    """PEFT writes the adapter and merges it; we merge its file. The base ties its weights, as GPT-2 does."""
    base = make_base(architecture, **({"tie_word_embeddings": True} if architecture == "llama" else {}))
    targets = {"llama": ["q_proj", "embed_tokens", "lm_head"], "gpt2": ["c_attn", "wte", "lm_head"]}[architecture]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=variant == "DoRA", init_lora_weights=False)
    theirs = peft.get_peft_model(open_with_transformers(base), config)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    want = logits(theirs)
    for onto in ("original", "quantized"):
        out = run_merge(tmp_path / "adapter", tmp_path / onto, onto=onto, dtype="float32", base=str(base))
        merged = open_with_transformers(out)
        assert merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight
        if onto == "original":
            torch.testing.assert_close(logits(merged), want, atol=5e-5, rtol=1e-4)
        else:
            merged.dequantize()  # on some CPUs bitsandbytes' layers compute in bfloat16, whatever they are told
        ours = load_model(resolve_base(str(out)), dtype="float32")
        torch.testing.assert_close(logits(ours), logits(merged), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_rows_of_tokens(make_base: MakeBase, tmp_path: Path, tied: bool, onto: str) -> None:
    """A tied head has the rows too, and stays tied."""
    base = make_base("llama", dtype="float32", tie_word_embeddings=tied)
    quantization = QuantizationConfig() if onto == "quantized" else None
    model = trained_by_us(
        base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[7, 3], quantization=quantization
    )
    out = run_merge(tmp_path / "adapter", tmp_path / "out", onto=onto, dtype="float32")
    name = "model.embed_tokens.weight"
    changed = (read_base(out)[name] != read_base(base)[name]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3, 7]
    assert ("lm_head.weight" in read_base(out)) == (not tied)
    if onto == "original":
        torch.testing.assert_close(logits(open_with_transformers(out)), logits(model), atol=2e-5, rtol=1e-5)


def test_new_rows_behind_the_last(make_base: MakeBase, tmp_path: Path) -> None:
    """Tokens that were added: the vocabulary grows by their rows, of embedding and head."""
    base = make_base("llama", dtype="float32", **SMALL)
    ids, own = (5, 321, 320), random((3, 64), 1)
    tensors = {f"{PREFIX}{path}.token_adapter.trainable_tokens_delta": own + n for n, path in enumerate(SIDES)}
    stated = {path: list(ids) for path in SIDES}
    adapter = write_adapter(tmp_path / "adapter", base, tensors, trainable_token_indices=stated)
    out = run_merge(adapter, tmp_path / "out", onto="original")
    for n, path in enumerate(SIDES):
        found, before = read_base(out)[f"{path}.weight"], read_base(base)[f"{path}.weight"]
        assert found.shape == (322, 64)
        assert torch.equal(found[list(ids)], own + n)
        assert torch.equal(found[:5], before[:5])
        assert torch.equal(found[6:320], before[6:])
    assert open_with_transformers(out).config.vocab_size == 322
    tensors = {f"{PREFIX}{path}.token_adapter.trainable_tokens_delta": own[:1] + n for n, path in enumerate(SIDES)}
    stated = {path: [400] for path in SIDES}
    adapter = write_adapter(tmp_path / "other", base, tensors, trainable_token_indices=stated)
    with pytest.raises(AdapterError, match="do not fit") as error:
        run_merge(adapter, tmp_path / "never", onto="original")
    assert "leave rows out behind the base's 320" in str(error.value.found)


@pytest.mark.parametrize("onto", FORMS)
def test_a_base_in_8_bits(make_base: MakeBase, tmp_path: Path, onto: str) -> None:
    base = make_base("llama", dtype="float32")
    model = trained_by_us(base, tmp_path / "adapter", quantization=EIGHT_BITS)
    out = run_merge(tmp_path / "adapter", tmp_path / "out", onto=onto, dtype="float32")
    found = logits(load_model(resolve_base(str(out)), dtype="float32"))
    if onto == "dequantized":
        torch.testing.assert_close(found, logits(model), atol=2e-5, rtol=1e-5)
        return
    whole = load_model(resolve_base(str(base)), dtype="float32")
    load_adapter(whole, tmp_path / "adapter", other_base=True)
    if onto == "original":
        torch.testing.assert_close(found, logits(whole), atol=2e-5, rtol=1e-5)
        return
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    merge_adapter(whole)
    for path, layer in lora_layers(whole):
        want = int8.dequantize(*int8.quantize(layer._merged_weight), torch.float32)
        torch.testing.assert_close(quantized_values(out)[f"{path}.weight"], want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_a_start_from_the_weights(make_base: MakeBase, tmp_path: Path, method: str) -> None:
    """dequantized: what was trained. original: W - s B' A' + s B A."""
    base = make_base("llama", dtype="float32")
    config = LoraConfig(r=4, init_lora_weights=method, loftq_iterations=2)
    how = FromWeights(config, seed=0)
    model = load_model(resolve_base(str(base)), dtype="float32", quantization=QuantizationConfig(), initial=how)
    inject_lora(model, config)
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data += random(tuple(parameter.shape), seed, 0.02)
    save_adapter(model, tmp_path / "adapter")
    out = run_merge(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(open_with_transformers(out)), logits(model), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("which", ["both", "head"])
def test_tied_modules_that_were_trained_as_wholes(make_base: MakeBase, tmp_path: Path, which: str) -> None:
    """Equal on both sides they stay tied; one side alone gets a tensor of its own."""
    base = make_base("qwen2", dtype="float32", **SMALL)
    own = random((320, 64), 1)
    keys = SIDES if which == "both" else SIDES[1:]
    tensors = {f"{PREFIX}{path}.weight": own.clone() for path in keys}
    tensors |= make_tensors(KINDS["linear"], Variant(), read_base(base))
    saved = [path.rpartition(".")[2] for path in keys]
    adapter = write_adapter(tmp_path / "adapter", base, tensors, modules_to_save=saved)
    merged = open_with_transformers(run_merge(adapter, tmp_path / "out", onto="original"))
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert torch.equal(head, own)
    assert (embedding is head) == (which == "both")
    if which == "head":
        assert torch.equal(embedding, read_base(base)["model.embed_tokens.weight"])


def test_files_of_a_bounded_size(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama")
    tensors = make_tensors(KINDS["linear"], Variant(), read_base(base))
    adapter = write_adapter(tmp_path / "adapter", base, tensors, dtype="bfloat16")
    out = run_merge(adapter, tmp_path / "out", shard_bytes=60_000)
    whole = run_merge(adapter, tmp_path / "whole")
    files = sorted(out.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    assert all(sum(v.nbytes for v in load_file(file).values()) <= 60_000 for file in files)
    index = json.loads((out / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in read_base(whole).values())
    assert torch.equal(logits(open_with_transformers(out)), logits(open_with_transformers(whole)))


# What is refused leaves nothing behind.


@pytest.fixture
def good(make_base: MakeBase, tmp_path: Path) -> Path:
    base = make_base("llama", dtype="float32", **SMALL)
    tensors = make_tensors(KINDS["linear"], Variant(), read_base(base))
    return write_adapter(tmp_path / "adapter", base, tensors, quantization=QUANTIZATIONS["nf4"])


def assert_refused(adapter: Path, message: str, **arguments: Any) -> QloraError:
    beside = sorted(path.name for path in adapter.parent.iterdir())
    with pytest.raises(QloraError, match=message) as error:
        run_merge(adapter, adapter.parent / "new/out", **arguments)
    assert sorted(path.name for path in adapter.parent.iterdir()) == beside
    return error.value


def rewrite(adapter: Path, change: Callable[[dict[str, Tensor]], Any], **fields: Any) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | fields))


def test_a_bias_where_the_base_has_none(good: Path) -> None:
    rewrite(good, lambda t: t.update({f"{PREFIX}{path}.lora_B.bias": torch.ones(64) for path in (Q, DOWN)}), lora_bias=True)
    error = assert_refused(good, "no place for one")
    assert str(error.place).endswith((Q, DOWN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 65)}), "do not fit the base"),
        (lambda t: t.update({f"{PREFIX}{Q}.lora_A.weight": torch.full((4, 64), torch.nan)}), "not finite"),
        (lambda t: t.update({f"{PREFIX}gone.lora_{s}.weight": torch.ones(4, 4) for s in "AB"}), "do not fit the base"),
        (lambda t: t.update({f"{PREFIX}{Q}.base_layer.weight": torch.ones(64, 64)}), "is not this base's"),
        (lambda t: t.update({f"{PREFIX}model.norm.bias": torch.ones(64)}), "do not fit the base"),
    ],
    ids=["another shape", "not a number", "no such layer", "another base's weight", "no such parameter"],
)  # fmt: skip
def test_an_adapter_that_does_not_fit(good: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    rewrite(good, change)
    assert_refused(good, message)


def test_forms_that_cannot_be_made(good: Path, make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama", dtype="float32", **SMALL)
    tensors = make_tensors(KINDS["linear"], Variant(), read_base(base))
    unquantized = write_adapter(tmp_path / "other/adapter", base, tensors)
    assert "qlora prepare" in str(assert_refused(unquantized, "no quantization to repeat", onto="quantized").next_step)
    prepared = run_prepare(str(base), tmp_path / "prepared", dtype="float32")
    assert f"give {base}" in str(assert_refused(good, "no original weights", onto="original", base=str(prepared)).next_step)


def test_a_base_that_came_in_4_bits_again_in_4_bits(good: Path, make_base: MakeBase, tmp_path: Path) -> None:
    """Layers without an adapter keep their bytes; those with one are dequantized, added to and quantized."""
    base = make_base("llama", dtype="float32", **SMALL)
    prepared = run_prepare(str(base), tmp_path / "prepared", dtype="float32")
    out = run_merge(good, tmp_path / "out", onto="quantized", base=str(prepared))
    found, before = read_base(out), read_base(prepared)
    assert found.keys() == before.keys()
    same = {name for name in found if torch.equal(found[name], before[name])}
    assert {f"{path}.weight" for path in (Q, DOWN)} & same == set()
    others = {name for name in found if not name.startswith((Q, DOWN))}
    assert others <= same
    tensors, how = load_file(good / "adapter_model.safetensors"), Variant()
    trained = expect(KINDS["linear"], how, read_base(base), tensors, QUANTIZATIONS["nf4"], "dequantized")
    for path in (Q, DOWN):
        want = through_4_bits(trained[f"{path}.weight"].float(), QUANTIZATIONS["nf4"] or {})
        torch.testing.assert_close(quantized_values(out)[f"{path}.weight"], want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("fault", ["full disk", "no room at all", "interrupt"])
def test_what_ends_early_leaves_nothing(good: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "no room at all":
        monkeypatch.setattr(merge_files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        assert_refused(good, "does not fit onto the disk")
        return
    whole = write.write_file

    def end_early(path: Path, tensors: list[Any]) -> None:
        """The file is there, and not the rest."""
        whole(path, tensors[:2])
        raise KeyboardInterrupt if fault == "interrupt" else OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_file", end_early)
    if fault == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            run_merge(good, good.parent / "new/out")
        assert [path.name for path in good.parent.iterdir()] == ["adapter"]
    else:
        assert_refused(good, "No space left on device")


def test_nothing_is_written_over(good: Path) -> None:
    (good.parent / "out").mkdir()
    (good.parent / "out/mine.txt").write_text("mine")
    with pytest.raises(AdapterError, match="something is there already"):
        run_merge(good, good.parent / "out")
    assert [path.name for path in (good.parent / "out").iterdir()] == ["mine.txt"]
