"""Turns what a job file names (files, folders, hub data sets) into records with a place.

Every row that enters the pipeline is a `Record`: named fields and where they came from, so that whatever goes wrong
later can be answered with `file:line`. This module needs neither torch nor a tokenizer.

| named | a record is | its place |
|---|---|---|
| `*.jsonl` | a line that holds an object | `file:line` |
| `*.json` | an object of the list | `file:line` where it starts |
| `*.parquet` | a row | `file:row N` |
| `*.txt` | the whole file, as the field `text` | `file:1` |
| a folder | the records of such files below it, in the order of their paths | as above |
| `user/name`, `user/name:split` | a row of a hub data set; the split is `train` if not named | `user/name:split:row N` |
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.json_rows import decode_utf8, read_json_lines, read_json_list
from qlora.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<split>[\w.-]+))?")
_WANTED = "a .jsonl, .json, .parquet or .txt file, a folder of those, or a hub data set as user/name or user/name:split"


@dataclass(frozen=True)
class Record:
    """One row of data as it was found.

    Args:
        fields: its named values.
        place: where it stands, `file:line` for text files.
    """

    fields: dict[str, Any]
    place: str

    def __post_init__(self) -> None:
        if not isinstance(self.fields, dict) or not all(isinstance(name, str) for name in self.fields):
            raise DataError("a row has no named fields", place=self.place, found=type(self.fields).__name__)


def read_records(paths: Sequence[str]) -> Iterator[Record]:
    """Yield the records of every named source, in the order named. Rank-local.

    Args:
        paths: files, folders or hub ids, as `data.train` in a job file.

    Raises:
        DataError: a source that is not there, holds no rows, or holds something that is not a row; with its place.
    """
    for path in paths:
        num_rows = 0
        for record in _source_records(path):
            num_rows += 1
            yield record
        if num_rows == 0:
            raise DataError(f"0 rows in {path}", place=path, wanted="at least one row", next_step="name a file with rows")


def digest_of_sources(paths: Sequence[str]) -> str:
    """Hash (sha256, hexadecimal) the content of every named source, in the order named. Rank-local.

    Names do not count: files that were moved or renamed keep their digest, as long as the suffix and the order stay.

    Raises:
        DataError: a source that is not there.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in _files_of(path):
            digest.update(f"file {file.suffix} {_digest_of_file(file)}\n".encode())
        if _is_hub_id(path):
            digest.update(f"hub {path} {_hub_dataset(path)._fingerprint}\n".encode())
    return digest.hexdigest()


def _source_records(path: str) -> Iterator[Record]:
    if _is_hub_id(path):
        for row_number, row in enumerate(_hub_dataset(path)):
            yield Record(_without_nulls(row), f"{path}:row {row_number}")
        return
    for file in _files_of(path):
        yield from _file_records(file)


def _file_records(file: Path) -> Iterator[Record]:
    try:
        if file.suffix == ".jsonl":
            yield from (Record(row, f"{file}:{line}") for row, line in read_json_lines(file))
        elif file.suffix == ".json":
            yield from (Record(row, f"{file}:{line}") for row, line in read_json_list(file))
        elif file.suffix == ".parquet":
            yield from _parquet_records(file)
        else:
            text = decode_utf8(file.read_bytes(), str(file))
            if text.strip():
                yield Record({"text": text}, f"{file}:1")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", place=str(file)) from error


def _parquet_records(file: Path) -> Iterator[Record]:
    # The reader that `datasets` itself uses, without its detour through a copy of the whole file in a cache folder.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            row_number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Record(_without_nulls(row), f"{file}:row {row_number}")
                    row_number += 1
    except pyarrow.ArrowException as error:
        raise DataError("not a readable parquet file", place=str(file), found=str(error).splitlines()[0]) from error


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out columns that are null in this row: a table cannot say that a field is missing in any other way."""
    return {name: value for name, value in row.items() if value is not None}


def _files_of(path: str) -> list[Path]:
    """The files a name stands for, none for a hub id."""
    if _is_hub_id(path):
        return []
    here = Path(path)
    if here.is_dir():
        inside = sorted(found for found in here.rglob("*") if found.is_file())
        files = [file for file in inside if file.suffix in SUFFIXES and not _is_hidden(file.relative_to(here))]
        if not files:
            names = ", ".join(str(file.relative_to(here)) for file in inside[:5]) or "no file"
            raise DataError(f"0 rows in {path}: the folder holds no data file", place=path, found=names, wanted=_WANTED)
        return files
    if not here.exists():
        raise _missing(path)
    if here.suffix not in SUFFIXES:
        raise DataError("not a kind of file that can be read", place=path, found=here.suffix or "no suffix", wanted=_WANTED)
    return [here]


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_hub_id(path: str) -> bool:
    match = _HUB_ID.fullmatch(path)
    if match is None or Path(path).exists() or Path(path).suffix in SUFFIXES:
        return False
    # A typing error inside a folder that is here must not become a question to the network.
    return not Path(Path(path).parts[0]).is_dir()


def _missing(path: str) -> DataError:
    folder = Path(path).parent
    while not folder.is_dir():
        folder = folder.parent
    wanted_name = Path(path).relative_to(folder).parts[0]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(wanted_name, names, n=3, cutoff=0.5)
    found = "near it is " + ", ".join(str(folder / name) for name in near) if near else f"nothing like it in {folder}"
    return DataError("no such file or folder", place=path, found=found, wanted=_WANTED)


def _hub_dataset(path: str) -> Any:
    """Open a hub data set (downloaded once, then from the cache of `datasets`)."""
    import datasets

    match = _HUB_ID.fullmatch(path)
    assert match is not None
    try:
        return datasets.load_dataset(match["name"], split=match["split"] or "train")
    except Exception as error:  # whatever a hub, a network or a data set's builder raises is the source's fault here
        raise DataError(
            "neither a file or folder here, nor a hub data set that can be opened",
            place=path,
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            wanted=_WANTED,
            next_step="correct the name, or download the data set and name its files",
        ) from error


def _digest_of_file(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", place=str(file)) from error
    return digest.hexdigest()
