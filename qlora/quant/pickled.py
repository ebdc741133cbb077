"""Weights in pickle files (*.bin), read only where the user asked for them by name.

torch.load runs with weights_only, which refuses to execute what a pickle may carry; the files are mapped, not copied.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora.errors import BaseModelError

if TYPE_CHECKING:
    from qlora.quant.shards import TensorEntry

PICKLES = "pytorch_model*.bin"  # a folder may hold other *.bin files, such as training_args.bin


@dataclass(frozen=True)
class PickledEntry:
    """One tensor of a pickle file, with the interface of `shards.TensorEntry`."""

    name: str
    file: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensor.reshape(-1)[start:stop].clone()

    def read_whole(self) -> Tensor:
        return self.tensor.clone()


def read_pickled_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of the folder's weight files by name.

    Raises:
        BaseModelError: a file that is damaged, of torch's format before 1.6, or that holds more than tensors.
    """
    entries: dict[str, PickledEntry] = {}
    for file in sorted(folder.glob(PICKLES)):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            raise BaseModelError(
                f"the weights cannot be read without executing what the file may carry: {str(error).splitlines()[0]}",
                place=str(file),
                next_step="convert them to safetensors where you trust them",
            ) from error
        if not isinstance(state, dict):
            raise BaseModelError("not a table of tensors", place=str(file), found=type(state).__name__)
        entries |= {name: PickledEntry(name, file, tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return entries  # type: ignore[return-value]
