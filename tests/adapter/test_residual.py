"""Adapters that started from the base's weights: recorded, opened where they fit, and made plain for the base itself.

The oracle of a plain adapter is real PEFT on the unchanged base; of what is opened again, the model that was saved.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora.adapter.files import load_adapter, open_adapter, save_adapter
from qlora.adapter.merge_files import run_merge
from qlora.adapter.merge_report import Text
from qlora.adapter.residual import INITIAL_NAME, unfold_initial
from qlora.adapter.unfolding import measure, write_plain
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import AdapterError
from qlora.lora.from_weights import FromWeights
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers
from qlora.lora.starts import needs_weights
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from qlora.train.model_card import model_card

MakeBase = Callable[..., Path]
NF4 = QuantizationConfig()


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def trained(
    base: Path, folder: Path, config: LoraConfig, quantization: QuantizationConfig | None = None, dtype: str = "float32"
) -> nn.Module:
    """A model whose adapter has moved away from its start, and is saved in the folder."""
    initial = FromWeights(config, seed=0) if needs_weights(config) else None
    model = load_model(resolve_base(str(base)), dtype=dtype, quantization=quantization, initial=initial)
    inject_lora(model, config)
    draw = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        for parameter in layer.parts("default").values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    save_adapter(model, folder)
    return model


def opened(base: Path, folder: Path, quantization: QuantizationConfig | None = None, dtype: str = "float32") -> nn.Module:
    recorded = open_adapter(folder).initial
    initial = recorded.read() if recorded is not None else None
    model = load_model(resolve_base(str(base)), dtype=dtype, quantization=quantization, initial=initial)
    load_adapter(model, folder)
    return model


def in_peft(base: Path, folder: Path) -> nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder)).eval()


STARTS = {
    "pissa": LoraConfig(r=4, lora_alpha=10, init_lora_weights="pissa"),
    "fast pissa, rslora": LoraConfig(r=4, lora_alpha=3, init_lora_weights="pissa_niter_3", use_rslora=True),
    "olora, patterns": LoraConfig(
        r=4, init_lora_weights="olora", rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 6}, alpha_pattern={"o_proj": 5}
    ),
    "pissa, dora": LoraConfig(r=4, init_lora_weights="pissa", use_dora=True, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_plain_adapter_is_the_same_function_in_peft(make_base: MakeBase, tmp_path: Path, name: str) -> None:
    base, config = make_base("llama", dtype="float32"), STARTS[name]
    model = trained(base, tmp_path / "adapter", config)
    (tmp_path / "plain").mkdir()
    found = open_adapter(tmp_path / "adapter")
    write_plain(found, tmp_path / "plain")
    tensors, fields = unfold_initial(found)
    assert (fields["r"], fields["lora_alpha"]) == (8, config.lora_alpha * (2**0.5 if config.use_rslora else 2))
    assert {value.shape[0] for key, value in tensors.items() if "q_proj.lora_A" in key} == {6 if "patterns" in name else 8}
    wanted = logits(model)
    plain = logits(load_model(resolve_base(str(base)), dtype="float32"))
    assert (wanted - plain).abs().max() > 0.1
    theirs = in_peft(base, tmp_path / "plain")
    torch.testing.assert_close(logits(theirs), wanted, atol=2e-4, rtol=1e-4)
    ours = load_model(resolve_base(str(base)), dtype="float32")
    assert not load_adapter(ours, tmp_path / "plain").changes_base
    torch.testing.assert_close(logits(ours), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_peft_opens_the_adapter_as_its_config_says(make_base: MakeBase, tmp_path: Path, method: str) -> None:
    """PEFT changes the base itself where the config names such a start; on an unquantized base it finds the same."""
    base = make_base("llama", dtype="float32")
    model = trained(base, tmp_path, LoraConfig(r=4, init_lora_weights=method))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == method
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), logits(model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        (LoraConfig(r=4, init_lora_weights="pissa_niter_16"), None),
        (LoraConfig(r=4, init_lora_weights="loftq", loftq_iterations=2), NF4),
    ],
)
def test_peft_refuses_what_it_would_find_otherwise(
    make_base: MakeBase, tmp_path: Path, config: LoraConfig, quantization: QuantizationConfig | None
) -> None:
    base = make_base("llama", dtype="float32")
    model = trained(base, tmp_path, config, quantization)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"]
    assert written == f"qlora:{config.init_lora_weights}"
    with pytest.raises(ValueError, match="Unknown initialization"):
        in_peft(base, tmp_path)
    assert torch.equal(logits(opened(base, tmp_path, quantization, "float32")), logits(model))
    (tmp_path / "plain").mkdir()
    write_plain(open_adapter(tmp_path), tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("config", "quantization"),
    [
        (STARTS["pissa"], None),
        (STARTS["fast pissa, rslora"], NF4),
        (LoraConfig(r=4, init_lora_weights="olora"), QuantizationConfig(bits=8)),
        (LoraConfig(r=4, init_lora_weights="loftq", loftq_iterations=3), NF4),
        (LoraConfig(r=4, init_lora_weights="pissa", use_dora=True), NF4),
    ],
)
def test_what_is_opened_is_what_was_saved(
    make_base: MakeBase, tmp_path: Path, config: LoraConfig, quantization: QuantizationConfig | None
) -> None:
    """To the last bit, also saved once more; and nothing but that base takes it, nor does that base take another."""
    base = make_base("llama")
    model = trained(base, tmp_path / "adapter", config, quantization, "bfloat16")
    again = opened(base, tmp_path / "adapter", quantization, "bfloat16")
    assert torch.equal(logits(again), logits(model))
    own = model.state_dict()
    assert all(
        torch.equal(value.view(torch.uint8), own[name].view(torch.uint8)) for name, value in again.state_dict().items()
    )
    save_adapter(again, tmp_path / "again")
    for name in (INITIAL_NAME, "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    plain = load_model(resolve_base(str(base)), quantization=quantization)
    before = plain.state_dict()
    with pytest.raises(AdapterError, match="not this base") as raised:
        load_adapter(plain, tmp_path / "adapter")
    calls = f"load_base(BASE, adapter={str(tmp_path / 'adapter')!r}) and then load_adapter(model, "
    assert calls in str(raised.value.next_step)
    assert "qlora export" in str(raised.value.next_step)
    assert list(plain.state_dict()) == list(before)
    trained(base, tmp_path / "other", LoraConfig(r=4), quantization, "bfloat16")
    with pytest.raises(AdapterError, match="another adapter started from"):
        load_adapter(again, tmp_path / "other", "other")
    trained(base, tmp_path / "third", LoraConfig(r=3, init_lora_weights="pissa"), quantization, "bfloat16")
    with pytest.raises(AdapterError, match="not this base") as raised:
        load_adapter(again, tmp_path / "third", "third")
    assert raised.value.found == "the residual of another adapter"


def test_one_turn_of_loftq_changes_no_base(make_base: MakeBase, tmp_path: Path) -> None:
    """It quantizes the weight itself, so that the adapter is one of the plain base, here and in PEFT."""
    base = make_base("llama")
    model = trained(base, tmp_path, LoraConfig(r=4, init_lora_weights="loftq"), NF4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    found = open_adapter(tmp_path)
    assert found.initial is not None
    assert not found.changes_base
    recorded = found.initial.read()
    assert all(own.subtracted is None for own in recorded.factors.values())
    plain = load_model(resolve_base(str(base)), dtype="float32", quantization=NF4)
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))
    tensors, fields = unfold_initial(found)
    assert fields == {"init_lora_weights": True}
    assert all(torch.equal(value, load_file(tmp_path / "adapter_model.safetensors")[key]) for key, value in tensors.items())


def test_the_record_says_method_seed_and_errors(make_base: MakeBase, tmp_path: Path) -> None:
    model: Any = trained(make_base("llama"), tmp_path, LoraConfig(r=4, init_lora_weights="loftq", loftq_iterations=2), NF4)
    found = open_adapter(tmp_path)
    assert found.initial is not None
    described = found.described["initial"]
    assert (described["method"], described["seed"], described["changes_base"]) == ("loftq", 0, True)
    recorded = found.initial.read()
    assert recorded.errors == model.qlora_initial.errors
    for path, own in model.qlora_initial.factors.items():
        for pair, other in ((own.start, recorded.factors[path].start), (own.subtracted, recorded.factors[path].subtracted)):
            assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))


@pytest.mark.parametrize("damage", ["lost", "another", "unknown", "cut"])
def test_a_record_that_is_not_the_adapters_is_refused(make_base: MakeBase, tmp_path: Path, damage: str) -> None:
    base = make_base("llama", num_hidden_layers=1)
    trained(base, tmp_path / "adapter", STARTS["pissa"])
    trained(base, tmp_path / "other", LoraConfig(r=4, init_lora_weights="olora"))
    trained(base, tmp_path / "plain", LoraConfig(r=4))
    file = tmp_path / "adapter" / INITIAL_NAME
    place = tmp_path / "adapter"
    if damage == "lost":
        file.unlink()
    elif damage == "another":
        shutil.copyfile(tmp_path / "other" / INITIAL_NAME, file)
    elif damage == "unknown":
        place = tmp_path / "plain"
        shutil.copyfile(file, place / INITIAL_NAME)
    else:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(AdapterError):
        open_adapter(place)


def test_pefts_own_adapter_of_such_a_start_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    """Its residual base is nowhere recorded."""
    base = make_base("llama", num_hidden_layers=1)
    trained(base, tmp_path, LoraConfig(r=4))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(AdapterError, match="init_lora_weights"):
        open_adapter(tmp_path)


def test_what_remains_on_a_quantized_base_is_measured(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama")
    source = resolve_base(str(base))
    text = Text("some tokens", tuple(ids()))
    for quantization, most in ((NF4, 10.0), (None, 1e-6)):
        folder = tmp_path / str(quantization is None)
        model = trained(base, folder, STARTS["pissa"], quantization)
        found = open_adapter(folder)
        remaining = measure(found, source, quantization, torch.float32, text)
        assert remaining.num_places == 34
        assert remaining.kl < most
        plain = load_model(source, dtype="float32", quantization=quantization)
        (tmp_path / f"plain {quantization is None}").mkdir()
        write_plain(found, tmp_path / f"plain {quantization is None}")
        load_adapter(plain, tmp_path / f"plain {quantization is None}")
        p, q = logits(model).double().log_softmax(-1), logits(plain).double().log_softmax(-1)
        assert remaining.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05, abs=1e-7)
        assert remaining.same == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
        if quantization is not None:
            assert remaining.kl > 1e-4
        assert f"{remaining.kl:.3g}" in str(remaining)


@pytest.mark.parametrize(("onto", "quantization"), [("dequantized", NF4), ("original", NF4), ("original", None)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merging_takes_out_what_was_taken_out(
    make_base: MakeBase, tmp_path: Path, architecture: str, onto: str, quantization: QuantizationConfig | None
) -> None:
    base = make_base(architecture)
    model = trained(base, tmp_path / "adapter", STARTS["pissa"], quantization)
    run_merge(tmp_path / "adapter", tmp_path / "merged", onto=onto, dtype="float32", base=str(base))
    merged = load_model(resolve_base(str(tmp_path / "merged")), dtype="float32")
    if onto == "dequantized" or quantization is None:
        torch.testing.assert_close(logits(merged), logits(model), atol=1e-3, rtol=1e-3)
        return
    source = resolve_base(str(base))
    plain = dict(load_model(source, dtype="float32").named_parameters())
    initial: Any = model.qlora_initial  # type: ignore[assignment]
    weights = dict(merged.named_parameters())
    for path, layer in lora_layers(model):
        own = initial.factors[path]
        A, B = own.subtracted
        delta = layer.delta("default") - own.scaling * (B @ A)  # type: ignore[operator]
        wanted = plain[f"{path}.weight"] + (delta.T if architecture == "gpt2" else delta)
        torch.testing.assert_close(weights[f"{path}.weight"], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("lora", "folder"),
    [
        ({}, "THIS_FOLDER"),
        ({"init_lora_weights": "loftq"}, "THIS_FOLDER"),
        ({"init_lora_weights": "loftq", "loftq_iterations": 2}, "OUT"),
        ({"init_lora_weights": "pissa_niter_4"}, "OUT"),
        ({"new_tokens": ["<a>"]}, "THIS_FOLDER"),
    ],
)
def test_the_card_opens_what_peft_can_open(lora: dict[str, Any], folder: str) -> None:
    from types import SimpleNamespace

    job: Any = SimpleNamespace(lora=LoraConfig(**lora), model=SimpleNamespace(quantization=None))
    identity: Any = SimpleNamespace(base={"name": "b"}, versions={})
    report: Any = SimpleNamespace(num_trainable=1, num_total=2, percent=50.0)
    text = model_card(job, identity, report, 3)
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f'PeftModel.from_pretrained(model, "{folder}")' in code
    assert ("THIS_FOLDER OUT --for peft" in text) == (folder == "OUT")
    assert ("resize_token_embeddings" in code) == ("new_tokens" in lora)


def test_a_factor_of_another_dtype_in_the_record_is_damage(make_base: MakeBase, tmp_path: Path) -> None:
    from safetensors import safe_open

    trained(make_base("llama", num_hidden_layers=1), tmp_path, STARTS["pissa"])
    found = open_adapter(tmp_path)
    assert found.initial is not None
    file = tmp_path / INITIAL_NAME
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata)
    with pytest.raises(AdapterError, match="damaged"):
        found.initial.read()
