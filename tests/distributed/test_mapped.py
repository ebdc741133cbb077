"""A share in a file is the share, and nothing of it is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qlora.distributed.mapped import PAGE, move_to_file
from qlora.errors import LaunchError


def mappings(folder: Path) -> list[str]:
    """This process's mappings of files in a folder."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f" {folder}/" in line]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_share_in_a_file_is_the_same_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tmp_path / "not there yet"
    wanted = torch.randint(0, 255, (5001,)).to(dtype)
    share = wanted.clone()
    share.ds_numel = 5001  # type: ignore[attr-defined]
    num_open = len(os.listdir("/dev/fd"))
    move_to_file(share, folder)
    assert share.dtype == dtype
    assert share.shape == (5001,)
    assert share.ds_numel == 5001  # type: ignore[attr-defined]
    assert torch.equal(share, wanted)
    assert len(mappings(folder)) == 1
    assert not list(folder.iterdir())
    assert len(os.listdir("/dev/fd")) == num_open


def test_a_write_stays_in_memory(tmp_path: Path) -> None:
    share = torch.zeros(PAGE)
    move_to_file(share, tmp_path)
    share[7] = 1
    assert share.sum() == 1


def test_what_fills_no_page_stays_where_it_is(tmp_path: Path) -> None:
    share = torch.ones(PAGE - 1, dtype=torch.uint8)
    move_to_file(share, tmp_path)
    assert not mappings(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    share = torch.ones(PAGE)
    with pytest.raises(LaunchError, match="share of the base cannot be written") as raised:
        move_to_file(share, tmp_path / "file")
    assert raised.value.found == str(tmp_path / "file")
    assert share.sum() == PAGE


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    share = torch.ones(PAGE)
    with pytest.raises(LaunchError, match="No space left on device"):
        move_to_file(share, tmp_path)
    assert share.sum() == PAGE
