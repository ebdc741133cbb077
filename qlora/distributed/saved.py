"""What autograd saves of a gathered weight is the way back to it, not the weight.

Under ZeRO-3 a module's weights are gathered for its forward pass, freed, and gathered again for its backward pass. An
operation that saves such a weight for backward would keep the gathered copy alive in between, and with it, layer by layer,
the whole base on every rank: sharding would save nothing during a step. So a saved tensor that is a partitioned parameter,
or a view of one, is replaced by the parameter and the view's geometry, and looked up when backward asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.distributed.collectives import is_partitioned


@dataclass(frozen=True)
class _View:
    """Where in a parameter a saved tensor lay."""

    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def without_gathered_weights(gathered: Callable[[nn.Parameter], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
    """What is computed inside the context saves no gathered weight. Rank-local, but for what `gathered` does.

    Args:
        gathered: makes a parameter whole that is not gathered when backward asks for it, as where another module than
            its owner uses it.
    """

    def unpack(saved: Tensor | _View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.parameter.numel() > 0:
            return _look_up(saved)
        with gathered(saved.parameter):
            return _look_up(saved).clone()

    return torch.autograd.graph.saved_tensors_hooks(_pack, unpack)


def _pack(tensor: Tensor) -> Tensor | _View:
    owner: Any = tensor if isinstance(tensor, nn.Parameter) else tensor._base
    # Parameters that stay whole need no looking up.
    if owner is None or not is_partitioned(owner) or owner.ds_persist:
        return tensor
    return _View(owner, tensor.shape, tensor.stride(), tensor.storage_offset() - owner.storage_offset())


def _look_up(saved: _View) -> Tensor:
    whole = saved.parameter.data
    return whole.as_strided(saved.size, saved.stride, whole.storage_offset() + saved.offset)
