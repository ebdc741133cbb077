"""Saved anywhere, gone on with anywhere: other numbers of ranks, other stages, with and without offloading.

The job file is the same at every place, so that with other ranks it would make another global batch: the one of the
checkpoint is kept, and the run says how. The oracle is the run that was never stopped: on the same ranks and stage to the
last bit, elsewhere the one on one process, within what another order of fp32 sums costs.

`make test-long` takes one run through all places; `make test-elastic` every pair of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.e2e
RANKS = {
    "single": 1, "zero1": 2, "sharded": 3, "ddp": 2, "four": 4, "zero2": 2, "zero3": 2, "zero3_offload": 2,
    "zero2_offload": 2,
}  # fmt: skip
EXACT = ("epoch", "learning_rate", "num_tokens", "num_target_tokens")
ASKED = os.environ.get("QLORA_TEST_ELASTIC") == "1"
NOT_RUN = pytest.param("", "", id="all", marks=pytest.mark.skip(reason=f"{len(RANKS) ** 2} pairs: make test-elastic"))
# Packs a step -> ranks -> micro-batch and micro-steps, where a rank has room for two packs at once.
KEPT = {
    4: {1: (2, 2), 2: (2, 1), 3: (2, 1), 4: (1, 1)},
    8: {1: (2, 4), 2: (2, 2), 3: (1, 3), 4: (2, 1)},
    12: {1: (2, 6), 2: (2, 3), 3: (2, 2), 4: (1, 3)},
    16: {1: (2, 8), 2: (2, 4), 3: (2, 3), 4: (2, 2)},
}


@pytest.mark.long
def test_one_run_through_all_places(project: Any, close_relative: Callable[..., None]) -> None:
    """8 packs a step, which three ranks cannot share evenly; every third step is the one pack that ends an epoch."""
    whole = project.result("single.ten")
    epochs = [0.0, *whole.values("epoch")]
    assert [round((b - a) * 17) for a, b in pairwise(epochs)] == [8, 8, 1, 8, 8, 1, 8, 8, 1, 8]
    before = None
    for step, place in enumerate([*RANKS, "again"]):
        leg = project.result(f"{place}.leg")
        goes_on_as(leg, whole, after=step, close_relative=close_relative)
        if before is not None:
            ranks = RANKS.get(place, 1)
            says_how_the_batch_is_kept(leg, 8, ranks_before=RANKS[before], ranks=ranks, same=ranks == 1)
        before = place


@pytest.mark.long
@pytest.mark.parametrize("place", ["sharded", "four", "zero2_offload"])
def test_on_the_same_ranks_it_is_the_same_run_to_the_last_bit(project: Any, place: str) -> None:
    """As in test_resume.py, where really everything is shared out, on more ranks, and with offloaded state at stage 2."""
    is_the_same_run(project.result(f"{place}.whole_resumed"), project.result(f"{place}.whole"))


@pytest.mark.long
@pytest.mark.parametrize("place", ["zero2", "zero3", "zero2_offload"])
def test_so_it_is_with_adapters_in_bf16(project: Any, place: str) -> None:
    """What an update adds to is an fp32 copy; the bf16 values alone would lose what they have no bits for."""
    resumed, whole = project.result(f"{place}.bf16_lora_resumed"), project.result(f"{place}.bf16_lora")
    assert {value.dtype for value in whole.adapter().values()} == {torch.bfloat16}
    is_the_same_run(resumed, whole)


@pytest.mark.long
@pytest.mark.parametrize("place", ["again", "zero3_offload"])
def test_adapters_in_bf16_go_on_elsewhere(project: Any, close_relative: Callable[..., None], place: str) -> None:
    """Not within 1e-4: where rounding to bf16 falls to the other side, a weight differs by 1/256 of itself."""
    resumed, whole = project.result(f"{place}.bf16_lora"), project.result("zero3.bf16_lora")
    assert "after step 3" in resumed.logs[0]
    for key in ("loss", "grad_norm"):
        close_relative(resumed.values(key)[3:], whole.values(key)[3:], 2e-3)


@pytest.mark.parametrize(("source", "target"), [*product(RANKS, RANKS)] if ASKED else [NOT_RUN])
def test_every_place_goes_on_from_every_place(
    project: Any, close_relative: Callable[..., None], source: str, target: str
) -> None:
    resumed, own = project.result(f"{target}_resumes.{source}"), project.result(f"{source}_saves.whole")
    before, now = RANKS[source], RANKS[target]
    alone = project.result("single_saves.whole" if before == 1 else f"single_saves.as_{before}")
    assert "after step 3" in resumed.logs[0]
    goes_on_as(resumed, alone, after=3, close_relative=close_relative)
    says_how_the_batch_is_kept(resumed, 4 * before, ranks_before=before, ranks=now, same=before == now)
    if source == target:
        is_the_same_run(resumed, own)


def goes_on_as(resumed: Any, whole: Any, *, after: int, close_relative: Callable[..., None]) -> None:
    """Every later step and the adapter are within rounding those of a run elsewhere."""
    for key in ("loss", "grad_norm"):
        close_relative(resumed.values(key)[after:], whole.values(key)[after:], 1e-4)
    for key in ("step", *EXACT):
        assert resumed.values(key) == whole.values(key)
    wanted, found = whole.adapter(), resumed.adapter()
    assert list(found) == list(wanted)
    for key, value in found.items():
        # Where a gradient is nearly zero, AdamW turns its rounding into a part of a step; the step is 1e-2, and B's 4e-2.
        torch.testing.assert_close(value, wanted[key], atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def is_the_same_run(resumed: Any, whole: Any) -> None:
    """To the last bit: metrics, adapter, and the last checkpoint's masters and moments."""
    assert "after step 3" in resumed.logs[0]
    for key in ("step", "loss", "grad_norm", *EXACT):
        assert resumed.values(key) == whole.values(key)
    last = "checkpoints/step-00000006"
    for name in ("adapter/adapter_model.safetensors", f"{last}/adapter_model.safetensors", f"{last}/optimizer.safetensors"):
        assert (resumed.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes(), name


def says_how_the_batch_is_kept(resumed: Any, packs: int, *, ranks_before: int, ranks: int, same: bool) -> None:
    """In its first lines, but where ranks, micro-batch and micro-steps are those of the job file; and in its checkpoints."""
    size, steps = KEPT[packs][ranks]
    places = ranks * size * steps
    line = f"as with {ranks_before} ranks before: now {ranks} ranks x {size} x {steps} micro-steps"
    if places > packs:
        line += f", of whose {places} places {places - packs} stay empty"
    said = [text.strip() for text in resumed.logs[0].splitlines() if "ranks before" in text]
    assert said == ([] if same else [line])
    newest = max((resumed.run_dir / "checkpoints").iterdir())
    identity = json.loads((newest / "manifest.json").read_text())["identity"]
    assert (identity["global_batch_size"], identity["world_size"]) == (packs, ranks)
