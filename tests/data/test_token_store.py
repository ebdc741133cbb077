"""What is written comes back, and what is damaged is not opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.token_store import TokenizedDataset, TokenStatistics, TokenWriter, open_store

_FILES = ["tokens.npy", "targets.npy", "offsets.npy", "target_counts.npy", "info.json"]


def _write(folder: Path, rows: list[list[int]]) -> TokenizedDataset:
    folder.mkdir()
    with TokenWriter(folder) as writer:
        for row in rows:
            writer.add(row, [place % 3 == 1 for place in range(len(row))])
        writer.finish("f" * 64, {"num_records": len(rows)})
    dataset = open_store(folder, "f" * 64)
    assert dataset is not None
    return dataset


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=9), min_size=1, max_size=20))
def test_rows_round_trip(tmp_path_factory, rows: list[list[int]]) -> None:
    dataset = _write(tmp_path_factory.mktemp("store") / "x", rows)
    assert len(dataset) == len(rows)
    assert dataset.lengths.tolist() == [len(row) for row in rows]
    for index, row in enumerate(rows):
        tokens, targets = dataset.row(index)
        assert tokens.tolist() == row
        assert targets.tolist() == [int(place % 3 == 1) for place in range(len(row))]
        assert dataset.target_counts[index] == targets.sum()
    assert dataset.num_target_tokens == dataset.targets.sum()
    assert dataset.statistics.num_tokens == sum(map(len, rows))


def test_rows_are_views_of_the_files(tmp_path: Path) -> None:
    dataset = _write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    assert isinstance(dataset.tokens, np.memmap)
    assert np.shares_memory(dataset.row(1)[0], dataset.tokens)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            dataset.row(index)


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_store_is_not_opened(tmp_path: Path, name: str, damage: str) -> None:
    _write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    path = tmp_path / "x" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-1])
    assert open_store(tmp_path / "x", "f" * 64) is None


def test_a_store_of_another_fingerprint_is_not_opened(tmp_path: Path) -> None:
    _write(tmp_path / "x", [[1, 2, 3]])
    assert open_store(tmp_path / "x", "0" * 64) is None


def test_a_store_that_was_not_finished_is_not_opened(tmp_path: Path) -> None:
    with TokenWriter(tmp_path) as writer:
        writer.add([1, 2], [False, True])
    assert open_store(tmp_path, "f" * 64) is None


def test_statistics_check_themselves() -> None:
    with pytest.raises(ValueError, match="negative"):
        TokenStatistics(num_records=-1)
    with pytest.raises(ValueError, match="at least one target"):
        TokenStatistics(num_records=1, num_rows=1, num_tokens=5, num_target_tokens=5)
