"""Every variant of LoRA, trained in shares on two ranks: the file is that of one process.

As in `test_stages.py` the oracle is one process, and ranks only reorder fp32 sums. All parameters are cut up, also the
small ones that the project's launch files keep whole. The variants are in `conftest.py`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_the_file_is_that_of_one_process(project: Any, variant: str) -> None:
    found, wanted = (project.result(f"{world}.{variant}") for world in ("variants_sharded", "variants_single"))
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(found.values(key), wanted.values(key), rtol=1e-4, atol=0)
    configs = [json.loads((run.run_dir / "adapter/adapter_config.json").read_text()) for run in (found, wanted)]
    assert configs[0] == configs[1]
    tensors = wanted.adapter()
    assert list(found.adapter()) == list(tensors)
    for key, value in found.adapter().items():
        assert value.numel() > 0
        torch.testing.assert_close(value, tensors[key], atol=2e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_everything_that_is_saved_was_trained(project: Any, variant: str) -> None:
    """Two steps of AdamW at a rate of 0.01 move a weight that has a gradient by about 0.02, whatever the gradient's size."""
    run = project.result(f"variants_single.{variant}")
    num_moved = {key: (value != 0).sum().item() for key, value in run.adapter().items() if "lora_B" in key}
    assert all(num_moved.values())
    assert run.values("grad_norm")[0] > 0
