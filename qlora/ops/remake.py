"""Activations that are made again in backward instead of being kept.

A norm's output is eaten by several linear layers, the product inside a gated MLP by one. Each of them would save it for its
backward pass, although it is one cheap pass away from tensors that are saved anyway. So whoever makes such an activation
offers how it is made again; a layer that eats it saves the inputs of that instead, which are the same memory for all of
them, and it is made once for all layers that ask.

The offer hangs on the activation's storage: it is found through any view, such as those that DeepSpeed's hooks put between
two modules, and is gone with the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Remake:
    """How one activation is made again, shared by the layers that eat it.

    It holds on to none of the inputs: those are the layers' saved tensors, where recomputation and offloading see them.
    """

    def __init__(self, again: Callable[..., Tensor]) -> None:
        self._again = again
        self._num_users = 0
        self._made: Tensor | None = None

    def add_user(self) -> None:
        """One more layer will ask."""
        self._num_users += 1

    def take(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The activation; the last layer that asks lets go of it. Rank-local.

        Args:
            inputs: as they were offered, after their way through autograd's saved tensors.
        """
        made = self._again(*inputs) if self._made is None else self._made
        self._num_users -= 1
        self._made = made if self._num_users > 0 else None
        return made


@dataclass(frozen=True)
class Offer:
    """A way to make an activation again, and what tells whether a tensor is that activation.

    Attributes:
        inputs: of `remake`, to be saved instead of the activation.
    """

    inputs: tuple[Tensor, ...]
    remake: Remake
    num_elements: int
    version: int


def offer(activation: Tensor, inputs: tuple[Tensor, ...], again: Callable[..., Tensor]) -> None:
    """Let layers that eat this activation save `inputs` instead. Rank-local.

    Args:
        activation: contiguous, all of its storage.
        inputs: saved for backward by whoever made the activation, so that they cost nothing more.
        again: of the inputs, gives a tensor with the activation's elements, bit for bit.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    storage: Any = activation.untyped_storage()
    storage.qlora_offer = Offer(tuple(t.detach() for t in inputs), Remake(again), activation.numel(), activation._version)


def find(x: Tensor) -> Offer | None:
    """The offer for an activation, whatever view of it this is; None where it is not whole or has been changed since."""
    if torch.compiler.is_compiling():
        return None
    found: Offer | None = getattr(x.untyped_storage(), "qlora_offer", None)
    if found is None:
        return None
    is_whole = x.numel() == found.num_elements and x.storage_offset() == 0 and x.is_contiguous()
    return found if is_whole and x._version == found.version else None
