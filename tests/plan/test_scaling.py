"""docs/scaling.md says what its script computes, and the script's arithmetic is that of the model and of public facts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qlora.config.schema import JobConfig
from qlora.data.batch import collate_packed
from qlora.lora.inject import inject_lora
from qlora.objective.train_model import TrainModel
from qlora.plan.shapes import read_shapes
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "benchmarks/scaling_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_document_holds_what_the_script_computes(script: ModuleType) -> None:
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert script.filled(text) == text
    with pytest.raises(ValueError, match="has places for"):
        script.filled(text.replace("<!-- table bases -->", ""))


@pytest.mark.long
def test_a_number_that_was_edited_is_noticed(script: ModuleType) -> None:
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert "**0.99 GB**" in text
    assert script.filled(text.replace("**0.99 GB**", "**9.90 GB**")) == text


@pytest.mark.parametrize(
    ("name", "weights"),
    [("Llama-3.1-8B", 8_030_261_248), ("Llama-3.1-70B", 70_553_706_496), ("Llama-3.1-405B", 405_853_388_800)],
)
def test_the_bases_have_as_many_weights_as_their_model_cards_say(script: ModuleType, name: str, weights: int) -> None:
    assert sum(t.num_elements for t in script.shapes(name).tensors) == weights


def test_statistics_that_are_not_shared_out_by_hand(script: ModuleType) -> None:
    """405B: a byte for 64 weights and 4 for 16,384, over the weights of the layers alone."""
    weights = 126 * (2 * 16384**2 + 2 * 1024 * 16384 + 3 * 16384 * 53248)
    assert script.replicated_statistics(script.shapes("Llama-3.1-405B")) == weights // 64 + weights // 4096 + 126 * 7 * 4


@pytest.mark.parametrize("recompute", [False, True])
def test_arithmetic_of_a_token_against_torchs_count(script: ModuleType, recompute: bool) -> None:
    """All but attention, which torch does not count on CPUs, to the last operation.

    Three things are known to differ: the last token is no target and never reaches the head; without recomputation the
    input of the first layer's q, k and v needs no gradient; and a LoRA layer computes A x again in its backward pass.
    """
    r, length, hidden, vocabulary = 8, 64, 256, 4096
    job = JobConfig.model_validate({"lora": {"r": r}})
    model = load_model(resolve_base("builtin:tiny"), quantization=job.model.quantization, device="cpu")
    inject_lora(model, job.lora)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train_model = TrainModel(model, "sdpa").train()
    batch = collate_packed([(np.arange(length), np.ones(length, dtype=np.uint8))])
    train_model(batch)[0].backward()  # the first pass looks at the model as well
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        train_model(batch)[0].backward()
    counts = counter.get_flop_counts()["Global"]
    counted = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm_]
    base = read_shapes(ROOT / "qlora/assets/tiny")
    planned = script.flop_per_token(base, job, 0, recompute=recompute) * length
    not_to_the_head = 4 * vocabulary * hidden
    no_gradient = 0 if recompute else length * 3 * (2 * hidden**2 + 2 * r * hidden)
    again = length * sum(2 * r * t.shape[1] for t in base.tensors if t.kind == "linear")
    assert counted == planned - not_to_the_head - no_gradient + again
    # Attention: two products of T x D a head and layer, half of each masked, and twice that backward.
    with_attention = script.flop_per_token(base, job, length, recompute=False) * length
    without = script.flop_per_token(base, job, 0, recompute=False) * length
    assert with_attention - without == 3 * 6 * 2 * (2 * length * length * hidden) // 2
