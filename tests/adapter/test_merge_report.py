"""The report of a merge against torch's own KL divergence, on logits that are computed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora
from qlora.adapter import merge_files, merge_report
from qlora.adapter.merge_files import run_merge
from qlora.adapter.merge_report import REPORT_NAME
from qlora.cli.main import main
from qlora.config.schema import LoraConfig
from qlora.errors import DataError


@pytest.fixture
def adapter(random_base: Path, tmp_path: Path) -> Path:
    model, _ = qlora.load_base(str(random_base), dtype="float32")
    qlora.inject_lora(model, LoraConfig(r=4))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return qlora.save_adapter(model, tmp_path / "adapter")


def log_probabilities(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    return logits, logits.double().log_softmax(1)


def test_the_three_forms(adapter: Path, random_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello world, what is this? the answer to the question.\n")
    argv = ["merge", str(adapter), str(tmp_path / "out"), "--report", str(text), "--measure", "--onto", "original"]
    assert main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == str(tmp_path / "out")
    assert [line.split()[0] for line in shown[2:5]] == ["original", "dequantized", "quantized"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out", "text.txt"]
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert report["written"] == "original"
    forms = report["forms"]
    ids = merge_report.read_text(str(text), random_base, adapter).rows[0]
    assert report["num_tokens"] == len(ids)

    unmerged, _ = qlora.load_base(str(random_base), dtype="float32")
    qlora.load_adapter(unmerged, adapter)
    logits, p = log_probabilities(unmerged, ids)
    for form in ("dequantized", "original"):
        out = run_merge(adapter, tmp_path / form, onto=form)
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        own, q = log_probabilities(merged, ids)
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        found = forms[form]
        assert found["mean_kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-9)
        assert found["largest_logit_difference"] == pytest.approx(float((own - logits).abs().max()), rel=1e-3, abs=2e-5)
        assert found["loss"] == pytest.approx(float(-q[:-1].gather(1, ids[1:, None]).mean()), rel=1e-5)
        assert found["loss_unmerged"] == pytest.approx(float(-p[:-1].gather(1, ids[1:, None]).mean()), rel=1e-5)
    # What was trained is what the dequantized form computes, to rounding; the others are further from it.
    assert forms["dequantized"]["mean_kl"] < 1e-6
    assert forms["dequantized"]["same_token"] == 1.0
    assert min(forms[form]["mean_kl"] for form in ("original", "quantized")) > 1e-5


def test_the_text_at_hand(random_base: Path, adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    text = merge_report.read_text(merge_report.BUILTIN, random_base, adapter)
    assert text.rows[0].tolist() == tokenizer(merge_report._BUILTIN_TEXT[0])["input_ids"][: merge_report.ROW_TOKENS]
    assert text.num_tokens <= merge_report.MOST_TOKENS


def test_no_text_no_merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError):
        run_merge(adapter, tmp_path / "out", report=str(tmp_path / "empty.txt"))
    assert main(["merge", str(adapter), str(tmp_path / "out"), "--report", str(tmp_path / "gone.txt")]) == 2
    assert main(["merge", str(adapter), str(tmp_path / "out"), "--max-shard-size", "5"]) == 2
    err = capsys.readouterr().err
    assert "--report: no such file" in err
    assert "--max-shard-size: not a size" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "empty.txt"]


def test_a_report_that_fails_leaves_no_model(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DataError("nothing to compare")

    monkeypatch.setattr(merge_files.merge_report, "compare", fail)
    with pytest.raises(DataError, match="nothing to compare"):
        run_merge(adapter, tmp_path / "out", report="builtin", measure_all=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
