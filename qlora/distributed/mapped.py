"""A rank's share of a frozen base in files instead of memory: what `offload_param` with the device nvme means here.

DeepSpeed 0.19.8 has a way of its own to a disk, which cannot carry this base: every parameter passes through buffers of one
dtype. Packed 4-bit weights come back as bfloat16 of twice the size, and training goes wrong without a word. It needs a
compiler and libaio besides. A frozen share is never written again, so mapping a file does all that is needed: the system
reads pages when they are gathered, ahead where it can, and drops them when memory is short.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from qlora.errors import LaunchError

PAGE = 4096  # bytes; what is smaller stays in memory


def move_to_file(share: Tensor, folder: Path) -> None:
    """Move a flat tensor from memory to a file in a folder; whoever holds it sees the same numbers. Rank-local.

    The file has no name: the system frees it with the process, however that ends.

    Raises:
        LaunchError: the folder cannot be written to, or its disk is full.
    """
    if share.nbytes < PAGE:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(share.view(torch.uint8).numpy().data)
            file.flush()
            # What has reached the disk can be dropped from memory without being written first.
            os.fsync(file.fileno())
            # Private: a write, should there be one, would stay in memory. The mapping outlives the open file.
            share.data = torch.from_file(f"/dev/fd/{file.fileno()}", shared=False, size=share.numel(), dtype=share.dtype)
    except OSError as error:
        raise LaunchError(
            f"a rank's share of the base cannot be written ({error.strerror})",
            place="DeepSpeed JSON: zero_optimization.offload_param.nvme_path",
            found=str(folder),
            wanted="a folder of a local disk with room for every rank's share",
        ) from error
