"""The same job on one process, data parallel, and ZeRO-1, 2 and 3, each with and without accumulation: one training.

The oracle is the run on one process. Ranks and micro-steps only reorder fp32 sums, which costs about 1e-7 of a
gradient norm a step; 1e-4 leaves room for what AdamW makes of that, and none for a lost micro-batch or a wrong factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.e2e
MODES = ["single", "ddp", "zero1", "zero2", "zero3"]
METRICS_KEYS = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "num_target_tokens", "tokens_per_second",
    "step_seconds", "peak_memory_bytes", "num_skipped_steps", "time",
}  # fmt: skip


def test_the_runs_are_uneven_and_clipped(project: Any) -> None:
    """What the other tests stand on: a short last batch, a second epoch, gradients that are clipped, losses that fall."""
    rows = project.result("single.acc1").training
    epochs = [0.0, *(row["epoch"] for row in rows)]
    taken = [round((b - a) / epochs[1], 6) for a, b in pairwise(epochs)]
    assert sorted(taken)[:2] == [0.25, 1.0]
    assert epochs[-1] > 1
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert max(row["grad_norm"] for row in rows) > 1.0
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2


@pytest.mark.parametrize("job", ["acc1", "acc2"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_norm_of_every_step_are_those_of_one_process(
    project: Any, close_relative: Callable[..., None], mode: str, job: str
) -> None:
    found, wanted = project.result(f"{mode}.{job}"), project.result("single.acc1")
    for key in ("loss", "grad_norm"):
        close_relative(found.values(key), wanted.values(key), 1e-4)
    for key in ("epoch", "learning_rate", "num_tokens", "num_target_tokens"):
        assert found.values(key) == wanted.values(key)


@pytest.mark.parametrize("job", ["acc1", "acc2"])
@pytest.mark.parametrize("mode", MODES)
def test_the_adapter_is_that_of_one_process(project: Any, mode: str, job: str) -> None:
    found, wanted = project.result(f"{mode}.{job}").adapter(), project.result("single.acc1").adapter()
    assert list(found) == list(wanted)
    assert len(found) == 2 * 2 * 7  # A and B of the seven linear layers of two blocks
    for key, value in found.items():
        assert value.numel() > 0
        assert value.dtype == torch.float32
        # Where a gradient is nearly zero, AdamW turns its rounding into a part of a step; the step is 1e-2.
        torch.testing.assert_close(value, wanted[key], atol=2e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
        if ".lora_B." in key:
            assert value.abs().max() > 1e-3  # it starts at zero


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_the_same_in_all_modes_and_leaves_training_alone(
    project: Any, close_relative: Callable[..., None], mode: str
) -> None:
    """`acc1` evaluates after every second step, `acc2` never: their losses are compared above, and here bit for bit."""
    found, wanted = project.result(f"{mode}.acc1"), project.result("single.acc1")
    assert [row["step"] for row in found.evaluations] == [2, 4, 6, 7]
    close_relative([row["eval_loss"] for row in found.evaluations], [row["eval_loss"] for row in wanted.evaluations], 1e-4)
    for row in found.evaluations:
        assert set(row) == {"step", "eval_loss", "eval_perplexity", "eval_num_target_tokens"}
        assert math.isclose(row["eval_perplexity"], math.exp(row["eval_loss"]))
    assert len({row["eval_num_target_tokens"] for row in [*found.evaluations, *wanted.evaluations]}) == 1
    assert not project.result(f"{mode}.acc2").evaluations


@pytest.mark.parametrize("mode", MODES)
def test_metrics_and_status(project: Any, mode: str) -> None:
    result = project.result(f"{mode}.acc1")
    for row in result.training:
        assert set(row) == METRICS_KEYS
        assert row["step_seconds"] > 0
        assert row["peak_memory_bytes"] > 1e8  # the interpreter with torch alone is more
    assert result.status["state"] == "done"
    assert (result.status["step"], result.status["num_steps"], result.status["exit_code"]) == (7, 7, 0)
    world_size = 1 if mode == "single" else 2
    assert f"processes {world_size}, {mode}, on" in result.logs[0]
    assert all("processes" not in log for log in result.logs[1:])


@pytest.mark.parametrize("mode", MODES)
def test_the_run_folder_holds_what_was_trained_and_no_more(project: Any, mode: str) -> None:
    run_dir: Path = project.result(f"{mode}.acc2").run_dir
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "LOCK", "adapter", "checkpoints", "config.yaml", "metrics.jsonl", "status.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (3, 6, 7)]
    assert sorted(path.name for path in (run_dir / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    num_bytes = sum(value.numel() * 4 for value in project.result("single.acc1").adapter().values())
    for folder in (run_dir / "checkpoints").iterdir():
        # Adapter, two moments, and some kilobytes of headers and JSON.
        assert sum(path.stat().st_size for path in folder.iterdir()) < 3 * num_bytes + 40_000


def test_an_adapter_saved_under_zero3_is_one_to_peft(project: Any) -> None:
    """Logits of PEFT over the base in full precision equal ours over the same weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import qlora

    folder = project.result("zero3.acc1").run_dir / "adapter"
    ids = torch.arange(40).reshape(2, 20)
    base = AutoModelForCausalLM.from_pretrained(project.base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder)
    own, _ = qlora.load_base(str(project.base), dtype="float32", quantization=None)
    with torch.no_grad():
        without = own(ids).logits
        qlora.load_adapter(own, folder)
        torch.testing.assert_close(own(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert (own(ids).logits - without).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["ddp", "zero1", "zero2", "zero3"])
def test_dropout_is_drawn_for_a_pack_whoever_computes_it(
    project: Any, close_relative: Callable[..., None], mode: str
) -> None:
    found, wanted = project.result(f"{mode}.dropout"), project.result("single.dropout")
    for key in ("loss", "grad_norm"):
        close_relative(found.values(key), wanted.values(key), 1e-4)


@pytest.mark.parametrize("kind", ["recompute", "reentrant", "one_layer"])
@pytest.mark.parametrize("mode", MODES)
def test_recomputation_changes_nothing_with_dropout_on(
    project: Any, close_relative: Callable[..., None], mode: str, kind: str
) -> None:
    found, wanted = project.result(f"{mode}.{kind}"), project.result(f"{mode}.dropout")
    for key in ("loss", "grad_norm"):
        close_relative(found.values(key), wanted.values(key), 1e-5)
    assert abs(found.values("loss")[0] / project.result("single.acc1").values("loss")[0] - 1) < 1e-5  # B is zero then
    assert found.values("grad_norm")[1] != project.result(f"{mode}.acc2").values("grad_norm")[1]  # dropout is on
    number = "the first 1" if kind == "one_layer" else "all"
    assert f"backward  {number} of 2 layers computed again: as the job says" in found.logs[0]


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_modules_trained_as_wholes(project: Any, close_relative: Callable[..., None], mode: str) -> None:
    """Norms, and an embedding that is the head as well: their gradients come from both its uses."""
    found, wanted = project.result(f"{mode}.wholly"), project.result("single.wholly")
    for key in ("loss", "grad_norm"):
        close_relative(found.values(key), wanted.values(key), 1e-4)
    assert found.values("loss")[1] < project.result("single.acc1").values("loss")[1]
    wanted_adapter = wanted.adapter()
    assert list(found.adapter()) == list(wanted_adapter)
    wholes = {key: value for key, value in found.adapter().items() if ".lora_" not in key}
    assert len(wholes) >= 5 + 1
    for key, value in wholes.items():
        torch.testing.assert_close(value, wanted_adapter[key], atol=2e-4, rtol=1e-4)


def test_really_sharded_on_three_ranks_with_padding(project: Any, close_relative: Callable[..., None]) -> None:
    """No parameter is kept whole, no size is a multiple of three, and the losses are those of two ranks."""
    wanted = project.result("zero3.six")
    for job in ("six", "six_recompute", "six_reentrant"):
        found = project.result(f"sharded.{job}")
        for key in ("loss", "grad_norm"):
            close_relative(found.values(key), wanted.values(key), 1e-4)
    found_adapter, wanted_adapter = project.result("sharded.six").adapter(), wanted.adapter()
    assert list(found_adapter) == list(wanted_adapter)
    for key, value in found_adapter.items():
        torch.testing.assert_close(value, wanted_adapter[key], atol=2e-4, rtol=1e-4)
    assert len(project.result("sharded.six").evaluations) == 3


def test_bf16_base_under_zero3_with_recomputation(project: Any, close_relative: Callable[..., None]) -> None:
    """The same training within bf16's rounding, and fp32 adapters all the same."""
    found, wanted = project.result("zero3.bf16"), project.result("single.acc1")
    close_relative(found.values("loss"), wanted.values("loss"), 0.02)
    assert {value.dtype for value in found.adapter().values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["single", "zero3"])
def test_a_dry_run_keeps_nothing(project: Any, mode: str) -> None:
    result = project.result(f"{mode}.dry")
    assert not result.run_dir.exists()
    assert "dry run: one step of 512 tokens" in result.logs[0]  # 4 packs of max_length over all ranks
    assert all("dry run" not in log for log in result.logs[1:])
