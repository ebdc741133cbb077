"""What a finished run is good for: every verb that reads it, and its own config.yaml as a job file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora
from qlora.adapter.merge_files import run_merge
from qlora.cli.main import main
from qlora.config.load import load_config
from qlora.errors import AdapterError

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run_dir(project: Any) -> Path:
    return project.result("zero3.acc2").run_dir


@pytest.fixture(scope="module")
def adapter(run_dir: Path) -> Path:
    return run_dir / "adapter"


def succeed(capfd: pytest.CaptureFixture[str], *argv: object) -> str:
    """Standard output of a command that has to end well."""
    code = main([str(word) for word in argv])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out


def test_config_yaml_is_the_job_and_can_be_started_again(
    project: Any, run_dir: Path, finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = load_config(run_dir / "config.yaml")
    overrides = [project.fill(text, 2) for text in ("train.per_device_train_batch_size={half}",)]
    job = load_config(project.job, [*overrides, "train.gradient_accumulation_steps=2", f"train.output_dir={run_dir}"])
    changed = {"checkpoint": again.checkpoint}
    assert again == job.model_copy(update=changed)
    assert "# torch: " in (run_dir / "config.yaml").read_text()

    before = (finished_run / "adapter/adapter_model.safetensors").read_bytes()
    out = succeed(capfd, "train", finished_run / "config.yaml", f"train.output_dir={finished_run}")
    assert "after step 7" in out
    assert "step 7/7" not in out  # there was nothing left to do
    assert (finished_run / "adapter/adapter_model.safetensors").read_bytes() == before


def test_status(run_dir: Path) -> None:
    command = [sys.executable, "-m", "qlora", "status", str(run_dir), "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (facts["state"], facts["step"], facts["num_steps"], facts["owner_alive"]) == ("done", 7, 7, False)
    assert facts["last_checkpoint"]["step"] == 7
    assert facts["last_row"]["step"] == 7


def test_inspect(run_dir: Path, adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(succeed(capfd, "inspect", adapter, "--json"))
    assert (facts["kind"], facts["r"], facts["num_lora_modules"], facts["integrity"]) == ("adapter", 3, 14, "ok")
    facts = json.loads(succeed(capfd, "inspect", run_dir / "checkpoints/step-00000003", "--json"))
    assert facts["kind"] == "checkpoint"
    assert facts["num_verified_files"] == 4


def test_generate_with_an_adapter_a_checkpoint_and_alone(
    project: Any, run_dir: Path, adapter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ("generate", "--prompt", "one two three", "--max-new-tokens", "12")
    trained = succeed(capfd, *argv, "--adapter", adapter)
    assert succeed(capfd, *argv, "--adapter", run_dir / "checkpoints/step-00000007") == trained
    assert succeed(capfd, *argv, "--adapter", adapter) == trained  # greedy
    assert succeed(capfd, *argv, "--base", project.base) != trained


def test_eval_shows_the_base_beside_the_adapter(
    project: Any, capfd: pytest.CaptureFixture[str], close_relative: Any
) -> None:
    result = project.result("zero3.acc1")
    argv = ("eval", project.job, f"data.eval=[{project.eval}]", "train.per_device_train_batch_size=2")
    lines = succeed(capfd, *argv, "--adapter", result.run_dir / "adapter").splitlines()
    rows = {words[0]: float(words[1]) for words in map(str.split, lines) if words and words[0] in ("base", "adapter")}
    close_relative([rows["adapter"]], [result.evaluations[-1]["eval_loss"]], 1e-4)  # four decimals are printed
    assert rows["base"] > rows["adapter"] + 0.2


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_merged_folder_computes_what_was_trained(
    project: Any, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], onto: str
) -> None:
    """transformers' own loading of the result against our model with the adapter beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    assert succeed(capfd, "merge", adapter, out, "--onto", onto, "--dtype", "float32").strip() == str(out)
    quantization = {} if onto == "dequantized" else {"quantization": None}
    own, tokenizer = qlora.load_base(str(project.base), dtype="float32", **quantization)
    qlora.load_adapter(own, adapter)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, own(ids).logits, atol=2e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_merging_onto_a_base_that_came_in_4_bits(project: Any, adapter: Path, tmp_path: Path) -> None:
    """The same function, from a folder as transformers and bitsandbytes write it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(project.base, quantization_config=quantized, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "base4")
    for file in project.base.glob("*token*"):
        (tmp_path / "base4" / file.name).write_bytes(file.read_bytes())

    own, _ = qlora.load_base(str(tmp_path / "base4"), dtype="float32")
    qlora.inject_lora(own, qlora.LoraConfig(r=3))
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    qlora.save_adapter(own, tmp_path / "adapter")
    merged = run_merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, own(ids).logits, atol=2e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="no original weights"):
        run_merge(tmp_path / "adapter", tmp_path / "other", onto="original")
    assert not (tmp_path / "other").exists()
    with pytest.raises(AdapterError, match="trained on another base"):
        run_merge(adapter, tmp_path / "other", base=str(tmp_path / "base4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base4", "merged"]


def test_merging_modules_that_were_trained_as_wholes(project: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = project.result("zero3.wholly").run_dir / "adapter"
    merged = run_merge(folder, tmp_path / "merged", dtype="float32")
    own, _ = qlora.load_base(str(project.base), dtype="float32")
    qlora.load_adapter(own, folder)
    ids = torch.arange(40).reshape(2, 20)
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, own(ids).logits, atol=2e-5, rtol=1e-5)


def test_every_launch_file_starts_some_of_these_runs(launched_files: set[str]) -> None:
    shipped = {path.stem for path in (Path(__file__).parents[2] / "launch/accelerate").glob("*.yaml")}
    assert shipped == launched_files
