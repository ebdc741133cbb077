"""The header of a safetensors file, read by hand so that nothing of the file is trusted or loaded."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from qlora.adapter.folder import short, unique_keys
from qlora.errors import AdapterError

MOST_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
MOST_DIMENSIONS = 64  # as many as torch has
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BOOL": 8, "U8": 8, "I8": 8}
BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64}
BITS |= {"C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """Return the tensors and the metadata that a safetensors file declares, once they are known to fill the file exactly.

    Follows the format's description: 8 bytes little-endian length, a JSON header, then the data without holes.
    """

    def damaged(message: str, found: object = None, wanted: object = None) -> AdapterError:
        return AdapterError(
            message, place=str(path), found=found, wanted=wanted, next_step="copy or download the file again"
        )

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise damaged("cut off before its header", f"{size} bytes")
        (num_header_bytes,) = struct.unpack("<Q", start)
        if num_header_bytes > MOST_HEADER_BYTES and start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")):
            raise AdapterError("a pickle file under a safetensors name; it is never opened", place=str(path))
        if num_header_bytes > MOST_HEADER_BYTES:
            raise damaged(
                "not a safetensors file, or a hostile one", f"a header of {num_header_bytes} bytes", MOST_HEADER_BYTES
            )
        if num_header_bytes > size - 8:
            raise damaged("cut off inside its header", f"{size} bytes", f"more than {8 + num_header_bytes}")
        raw = file.read(num_header_bytes)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise damaged(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise damaged("the header is not a JSON object")
    tensors, spans, metadata = [], [], {}
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                raise damaged("the header's metadata is not text by name", short(entry))
            metadata = entry
            continue
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = len(shape) <= MOST_DIMENSIONS and all(
                isinstance(number, int) and number >= 0 for number in (*shape, begin, end)
            )
            fits = whole and math.prod(shape) * BITS[dtype] == (end - begin) * 8
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f"the header's entry {name!r} is malformed", short(entry)) from error
        if not fits:
            raise damaged(f"the header's entry {name!r} contradicts itself", short(entry))
        tensors.append(TensorInfo(name, dtype, shape, end - begin))
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise damaged("tensors overlap or leave a hole", f"data at byte {begin}", f"byte {position}")
        position = end
    if 8 + num_header_bytes + position != size:
        raise damaged("cut off or extended", f"{size} bytes", f"{8 + num_header_bytes + position} bytes")
    return tuple(tensors), metadata
