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

from qlora.model_files import INDEX_NAME
from qlora.quant.shards import DTYPES

SHARD_BYTES = 5_000_000_000
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """One tensor to be written.

    Attributes:
        make: called once, when its turn comes. Gives the tensor, or runs of its elements one after another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor | Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_model(folder: Path, tensors: Iterable[Planned], shard_bytes: int = SHARD_BYTES) -> None:
    """Write model.safetensors, or shards with their index. Holds one tensor at a time.

    Args:
        shard_bytes: the most a shard's tensors have; one that is larger has a shard to itself.
    """
    shards: list[list[Planned]] = [[]]
    filled = 0
    for planned in tensors:
        if shards[-1] and filled + planned.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += planned.num_bytes
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
        ValueError: a tensor comes out with another shape, size or dtype than was planned.
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
            made = planned.make()
            if isinstance(made, Tensor) and tuple(made.shape) != planned.shape:
                raise ValueError(f"{planned.name} came out as {tuple(made.shape)}")
            num_elements = 0
            for piece in [made] if isinstance(made, Tensor) else made:
                if piece.dtype != planned.dtype:
                    raise ValueError(f"{planned.name} came out as {piece.dtype}")
                file.write(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                num_elements += piece.numel()
            if num_elements != math.prod(planned.shape):
                raise ValueError(f"{planned.name} came out with {num_elements} elements")
        file.flush()
        os.fsync(file.fileno())
