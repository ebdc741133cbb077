"""Reading safetensors files piece by piece, with plain reads.

Files are not memory-mapped: mapped pages count as resident memory until the file is closed, and a base is larger than
what a rank may hold. A tensor, or any run of its elements, is read straight into the buffer it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora import model_files
from qlora.errors import BaseModelError
from qlora.model_files import INDEX_NAME, find_weight_files, read_config

# By the name a dtype has in a header; the same names as `model_files.ITEMSIZES`.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `offset` counts bytes from the start of the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, as a flat tensor on the CPU. Reads no other byte.

        Raises:
            BaseModelError: the file ends early, or cannot be read.
        """
        stop = self.num_elements if stop is None else stop
        out = torch.empty(stop - start, dtype=self.dtype)
        if out.numel() == 0:
            return out
        view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise BaseModelError(f"the file ends inside {self.name}", place=str(self.file))
                    done += count
        except OSError as error:
            raise BaseModelError(f"{self.name} cannot be read ({error.strerror})", place=str(self.file)) from error
        return out

    def as_bytes(self) -> TensorEntry:
        """The same bytes as a flat uint8 tensor."""
        return TensorEntry(self.name, self.file, torch.uint8, (self.num_bytes,), self.offset)

    def read_whole(self) -> Tensor:
        """The tensor in its shape, on the CPU."""
        return self.read().reshape(self.shape)


@dataclass(frozen=True)
class JoinedEntry:
    """Several tensors of the files as one: their elements one after another, in a shape of its own.

    Fused expert weights are that. It has the part of `TensorEntry` that reading needs.
    """

    parts: tuple[TensorEntry, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened whole, on the CPU. Reads no other byte. Raises BaseModelError."""
        pieces, offset = [], 0
        for part in self.parts:
            first, last = max(start - offset, 0), min(stop - offset, part.num_elements)
            if first < last:
                pieces.append(part.read(first, last))
            offset += part.num_elements
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; see `read_header_and_metadata`."""
    return read_header_and_metadata(file)[0]


def read_header_and_metadata(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one safetensors file, and its free-form metadata. Reads the header alone.

    Raises:
        BaseModelError: not a safetensors file, damaged, truncated, or of an unknown dtype.
    """
    stated, metadata = model_files.read_header(file)
    size = file.stat().st_size
    for item in stated:
        if item.stop > size:
            raise BaseModelError(
                f"the file is cut short inside {item.name}", place=str(file), found=f"{size} bytes",
                wanted=f"at least {item.stop}", next_step="download or copy the file again",
            )  # fmt: skip
    return {item.name: TensorEntry(item.name, file, DTYPES[item.dtype], item.shape, item.start) for item in stated}, metadata


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a model folder by name.

    Raises:
        BaseModelError: files missing or damaged, a tensor in two files, or one the index names and no file holds.
    """
    entries: dict[str, TensorEntry] = {}
    for file in find_weight_files(folder):
        for name, entry in read_header(file).items():
            if name in entries:
                raise BaseModelError(f"{name} is in {entries[name].file.name} and in {file.name}", place=str(folder))
            entries[name] = entry
    index = folder / INDEX_NAME
    if index.is_file():
        lost = sorted(set(json.loads(index.read_text())["weight_map"]) - set(entries))
        if lost:
            raise BaseModelError(
                f"the index names {len(lost)} tensors that no file holds", place=str(index), found=", ".join(lost[:5])
            )
    return entries


def fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """A hash that tells two bases apart without reading them whole: config, headers, sizes, and samples of the data.

    From each tensor, its first, middle and last 256 bytes are taken. Rank-local; equal for equal folders anywhere.
    """
    digest = hashlib.sha256()
    config = read_config(folder)
    for volatile in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    entries = {name: entry for file in files for name, entry in read_header(file).items()}
    by_file: dict[Path, list[TensorEntry]] = {}
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        by_file.setdefault(entry.file, []).append(entry)
    for _, group in sorted(by_file.items(), key=lambda item: item[1][0].name):
        with open(group[0].file, "rb", buffering=0) as stream:
            for entry in group:
                for start in (0, max(0, entry.num_bytes // 2 - 128), max(0, entry.num_bytes - 256)):
                    stream.seek(entry.offset + start)
                    digest.update(stream.read(min(256, entry.num_bytes)))
    return digest.hexdigest()
