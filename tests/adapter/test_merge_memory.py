"""Merging holds about two of the largest tensors, whatever the number of the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapter.merge_cases import Kind, Variant, make_tensors, read_base, write_adapter

SCRIPT = Path(__file__).with_name("merge_in_process.py")
LONG = 540_672
# Three large tensors of 66 MiB in bfloat16. Smaller ones glibc takes from its heap, and what it keeps would be measured.
WIDE = {"intermediate_size": LONG, "num_hidden_layers": 1}
LARGEST_BYTES = 64 * LONG * 2
PATHS = ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj")
QUANTIZATION = {"quant_type": "nf4", "double_quant": True}
# Pieces in fp32, the adapter's own factors, what the allocator keeps, which varies by 25 MiB. A third would show.
CONSTANT_BYTES = 40 << 20


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_two_of_the_largest_tensors(make_base: Callable[..., Path], tmp_path: Path) -> None:
    kind = Kind("llama", PATHS)
    adapters = []
    for name, changes in (("large", WIDE), ("small", {"num_hidden_layers": 1})):
        base = make_base("llama", **changes)
        tensors = make_tensors(kind, Variant({"use_dora": True}), read_base(base))
        adapters.append(
            write_adapter(tmp_path / name, base, tensors, dtype="bfloat16", quantization=QUANTIZATION, use_dora=True)
        )
    command = [sys.executable, str(SCRIPT), *map(str, adapters), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    rose = {form: int(num_bytes) for form, num_bytes in map(str.split, done.stdout.splitlines())}
    assert sorted(rose) == ["dequantized", "original", "quantized"]
    assert max(rose.values()) < 2 * LARGEST_BYTES + CONSTANT_BYTES, rose
