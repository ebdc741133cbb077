"""Token rows on disk: written once as they come, afterwards mapped into memory by every rank.

| file | dtype | holds |
|---|---|---|
| `tokens.npy` | int32 | the ids of all rows, one after another |
| `targets.npy` | uint8 | 1 where a token is to be learned |
| `offsets.npy` | int64 | where each row starts, and the end of the last |
| `target_counts.npy` | int32 | how many tokens of each row are to be learned |
| `info.json` | | fingerprint, statistics, and the sizes above |
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]
FlagArray = npt.NDArray[np.uint8]
IndexArray = npt.NDArray[np.int64]

_INFO = "info.json"


@dataclass(frozen=True)
class TokenStatistics:
    """What became of the data, in rows and tokens.

    Args:
        num_records: records read.
        num_rows: rows kept.
        num_tokens: tokens kept.
        num_target_tokens: tokens kept that are to be learned.
        num_truncated: documents cut to the maximum length.
        num_split: documents cut into several rows.
        num_dropped: documents left out because they were too long.
        num_without_target: rows left out because nothing in them was to be learned.
        num_unstable: records with turns that the template shows otherwise than they are generated, see `chat.py`.
    """

    num_records: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_dropped: int = 0
    num_without_target: int = 0
    num_unstable: int = 0

    def __post_init__(self) -> None:
        if any(getattr(self, field.name) < 0 for field in fields(self)):
            raise ValueError(f"negative counts: {self}")
        if not self.num_rows <= self.num_target_tokens <= max(0, self.num_tokens - self.num_rows):
            raise ValueError(f"each row has at least one target, and a first token that is none: {self}")


@dataclass(frozen=True)
class TokenizedDataset:
    """Token rows, mapped from files: ranks of one machine share the memory.

    Args:
        folder: where the files are.
        fingerprint: hash of everything the rows depend on.
        statistics: what became of the data.
        tokens, targets, offsets, target_counts: the arrays, see the head of this module.
    """

    folder: Path
    fingerprint: str
    statistics: TokenStatistics
    tokens: TokenArray
    targets: FlagArray
    offsets: IndexArray
    target_counts: TokenArray

    def __post_init__(self) -> None:
        num_rows, num_tokens = self.statistics.num_rows, self.statistics.num_tokens
        sizes = (len(self.tokens), len(self.targets), len(self.offsets), len(self.target_counts))
        if sizes != (num_tokens, num_tokens, num_rows + 1, num_rows):
            raise ValueError(f"{self.folder}: arrays of {sizes} for {num_rows} rows and {num_tokens} tokens")
        if self.offsets[0] != 0 or self.offsets[-1] != num_tokens:
            raise ValueError(f"{self.folder}: rows from {self.offsets[0]} to {self.offsets[-1]} of {num_tokens} tokens")

    def __len__(self) -> int:
        return len(self.target_counts)

    def row(self, index: int) -> tuple[TokenArray, FlagArray]:
        """The ids (int32) and target flags (uint8) of one row, both views of the mapped files."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[start:stop], self.targets[start:stop]

    @property
    def lengths(self) -> IndexArray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def num_target_tokens(self) -> int:
        """Tokens to be learned, over all rows."""
        return self.statistics.num_target_tokens


class TokenWriter:
    """Writes a token store row by row into an existing, empty folder; used as a context manager.

    Memory does not grow with the tokens. The folder is complete only after `finish`, which also flushes it to disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = _GrowingArray(folder / "tokens.npy", np.dtype(np.int32))
        self._targets = _GrowingArray(folder / "targets.npy", np.dtype(np.uint8))
        self._offsets = array("q", [0])
        self._target_counts = array("i")

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tokens.close()
        self._targets.close()

    def add(self, input_ids: Sequence[int], is_target: Sequence[bool]) -> None:
        """Append a row."""
        self._tokens.append(np.asarray(input_ids, dtype=np.int32))
        self._targets.append(np.asarray(is_target, dtype=np.uint8))
        self._offsets.append(self._offsets[-1] + len(input_ids))
        self._target_counts.append(sum(is_target))

    def finish(self, fingerprint: str, counts: dict[str, int]) -> TokenStatistics:
        """Complete the files and flush them to disk.

        Args:
            fingerprint: hash of everything the rows depend on.
            counts: the statistics that only the caller knows; rows and tokens are counted here.
        """
        target_counts = np.frombuffer(self._target_counts, dtype=np.int32) if self._target_counts else np.zeros(0, np.int32)
        statistics = TokenStatistics(
            num_rows=len(target_counts),
            num_tokens=self._offsets[-1],
            num_target_tokens=int(target_counts.sum(dtype=np.int64)),
            **counts,
        )
        self._tokens.finish()
        self._targets.finish()
        for name, values in (("offsets", np.frombuffer(self._offsets, np.int64)), ("target_counts", target_counts)):
            with (self.folder / f"{name}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                _flush(file)
        with (self.folder / _INFO).open("wb") as file:
            info = {"fingerprint": fingerprint, "statistics": asdict(statistics)}
            file.write(json.dumps(info, indent=2).encode())
            _flush(file)
        return statistics


def open_store(folder: Path, fingerprint: str) -> TokenizedDataset | None:
    """Map a complete store into memory; None where there is none, or what is there is damaged or another one."""
    try:
        info = json.loads((folder / _INFO).read_bytes())
        if info["fingerprint"] != fingerprint:
            return None
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "targets", "offsets", "target_counts")
        }
        return TokenizedDataset(folder, fingerprint, TokenStatistics(**info["statistics"]), **arrays)
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
        return None


class _GrowingArray:
    """A .npy file whose length is known only at its end.

    NumPy reserves room in the header for the first axis to grow, so the header can be written again in place.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._dtype = dtype
        self._length = 0
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, values: npt.NDArray[Any]) -> None:
        self._file.write(values.tobytes())
        self._length += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._header_bytes:
            raise RuntimeError(f"{self._file.name}: the header grew from {self._header_bytes} bytes")
        _flush(self._file)
        self.close()

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, description)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
