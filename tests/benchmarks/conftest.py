"""The scripts in benchmarks/ import each other by their plain names, as they do when one of them is run."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = str(Path(__file__).parents[2] / "benchmarks")

if FOLDER not in sys.path:
    sys.path.append(FOLDER)


@pytest.fixture
def recorded() -> dict[str, Any]:
    """A pair of the row `packed` that was recorded: two layers, on a busy machine."""
    made: dict[str, Any] = json.loads((Path(__file__).parent / "recorded_pair.json").read_text())
    return made


@pytest.fixture
def record(recorded: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Makes of it what it would be on the whole base and a quiet machine, its first arm so many times faster."""
    from peers import pairs

    def make(ratio: float = 2.0, **changes: Any) -> dict[str, Any]:
        made = copy.deepcopy(recorded) | {"layers": pairs.LAYERS, "campaign": "2026-01-01"}
        rates = [4.0e11, 3.9e11, 4.0e11]
        made |= {"product_rates": rates, "others_share": 0.01} | changes
        made["arms"]["qlora"]["tokens_per_second"] = ratio * made["arms"]["trl"]["tokens_per_second"]
        return made

    return make
