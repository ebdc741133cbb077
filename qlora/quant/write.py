"""Writing safetensors files tensor by tensor: the header is made from shapes alone, then each tensor is streamed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora.quant.shards import DTYPES, INDEX_NAME

SHARD_BYTES = 5_000_000_000
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """One tensor to be written; `make` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_model(folder: Path, tensors: Iterable[Planned], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards with their index. Holds one tensor at a time."""
    shards: list[list[Planned]] = [[]]
    for planned in tensors:
        if shards[-1] and sum(p.num_bytes for p in shards[-1]) + planned.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(planned)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {planned.name: name for planned in shard}
    total = sum(planned.num_bytes for shard in shards for planned in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: list[Planned]) -> None:
    """Write one safetensors file and flush it to the disk.

    Raises:
        ValueError: a tensor comes out with another shape or dtype than was planned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in tensors:
        end = offset + planned.num_bytes
        header[planned.name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for planned in tensors:
            value = planned.make()
            if tuple(value.shape) != planned.shape or value.dtype != planned.dtype:
                raise ValueError(f"{planned.name} came out as {tuple(value.shape)} {value.dtype}")
            file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
