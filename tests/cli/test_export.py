"""`qlora export` as people meet it: what is printed where, and what is refused before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlora.adapter.files import save_adapter
from qlora.cli.main import main
from qlora.config.schema import LoraConfig
from qlora.lora.inject import inject_lora


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make(**config: object) -> Path:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        inject_lora(model, LoraConfig(**({"r": 2, "target_modules": ["0", "1"]} | config)))
        return save_adapter(model, tmp_path / "adapter")

    return make


def test_the_folder_is_printed_and_the_rest_stands_on_standard_error(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = make(), tmp_path / "out"
    assert main(["export", str(adapter), str(out), "--for", "vllm"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert "--max-lora-rank 8" in shown.err
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert {tuple(t.shape) for t in load_file(out / "adapter_model.safetensors").values()} == {(8, 8)}
    assert main(["inspect", str(out)]) == 0
    assert main(["export", str(adapter), str(tmp_path / "again"), "--for", "sglang"]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("gone", "out", "--for", "vllm"), "no such folder"),
        (("adapter", "adapter", "--for", "vllm"), "would overwrite what is there"),
        (("adapter", "out", "--for", "another"), "vllm"),
        (("adapter", "out"), "--for"),
    ],
)
def test_what_is_refused(
    make: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    wanted: str,
) -> None:
    make()
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    assert wanted in capsys.readouterr().err
    assert not Path("out").exists()


def test_what_a_server_does_not_apply(make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make(use_dora=True)
    assert main(["export", str(adapter), str(tmp_path / "out"), "--for", "vllm"]) == 2
    shown = capsys.readouterr().err
    assert "use_dora" in shown
    assert f"qlora merge {adapter} OUT" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["vllm", "peft"])
@pytest.mark.parametrize("text", ["builtin", "not/there.jsonl"])
def test_a_report_of_nothing(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str, text: str
) -> None:
    assert main(["export", str(make()), str(tmp_path / "out"), "--for", reader, "--report", text]) == 2
    shown = capsys.readouterr().err
    assert "--report" in shown
    assert "nothing to measure" in shown
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_started_from_the_bases_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the two models' logits on the embedded base; what remains where it is quantized is told and measured."""
    import qlora

    lora = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
    ids = torch.arange(3, 40).unsqueeze(0)
    for quantization, note in ((None, False), (qlora.QuantizationConfig(), True)):
        folder = tmp_path / f"{note}"
        model, _ = qlora.load_base("builtin:tiny", dtype="float32", quantization=quantization, lora=lora)
        inject_lora(model, lora)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter *= 1.2
            want = model(ids).logits
        save_adapter(model, folder / "adapter")
        for reader in ("peft", "vllm"):
            out = folder / reader
            report = ["--report", "builtin"] if note and reader == "peft" else []
            assert main(["export", str(folder / "adapter"), str(out), "--for", reader, *report]) == 0
            shown = capsys.readouterr().err
            assert ("note: this adapter started from" in shown) == note
            assert ("KL" in shown) == bool(report)
            plain, _ = qlora.load_base("builtin:tiny", dtype="float32", quantization=quantization)
            with torch.no_grad():
                alone = plain(ids).logits
                qlora.load_adapter(plain, out)
                found = plain(ids).logits
            if note:  # near, and nearer than the base alone
                assert (found - want).norm() < 0.5 * (alone - want).norm()
            else:
                torch.testing.assert_close(found, want, rtol=0, atol=1e-4 * want.abs().max().item())
                assert (alone - want).norm() > 10 * (found - want).norm()
