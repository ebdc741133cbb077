"""The inputs of layers that are computed again, kept in the host's memory until backward needs them.

Recomputation keeps one tensor a layer: its input, a piece of the residual stream. For long rows these alone fill a GPU. Here
each is copied to pinned memory while the next layers compute, and comes back while the layer behind it is in its backward
pass. Both copies run on a stream of their own, so they cost time only where a layer takes less of it than its copy.

What is saved is told by autograd's hooks for saved tensors; no model is changed. A storage that is saved twice is moved
once. On a CPU there is nothing to move: the tensors are in the host's memory already. (Copies from the host to itself are
for tests.) The GPU's path is written and not yet run on one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Smaller storages stay where they are: each copy has to be started.
LEAST_BYTES = 1 << 20


class InputsOnHost:
    """Calls a function so that what it saves for backward is kept in the host's memory. Rank-local.

    Attributes:
        num_moved: storages that were moved so far.
    """

    def __init__(self, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        """`device` is where the model computes; storages below `least_bytes` stay."""
        self.device, self.least_bytes, self.num_moved = device, least_bytes, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # By storage and version; each is there as long as the graph that needs it.
        self._known: WeakValueDictionary[tuple[int, int], _Moved] = WeakValueDictionary()
        self._last: ReferenceType[_Moved] | None = None

    def __call__(self, checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call torch's checkpoint, of either kind, which saves the inputs; what is computed inside has hooks of its own."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        num_bytes = storage.nbytes()
        is_part = 2 * tensor.numel() * tensor.element_size() < num_bytes
        if tensor.device.type != self.device.type or num_bytes < self.least_bytes or is_part:
            return tensor
        # The address is no other storage's for as long as there is a weak reference to this one.
        key = (storage._cdata, tensor._version)
        moved = self._known.get(key)
        if moved is None or moved.source.expired():
            before = self._last
            moved = self._known[key] = _Moved(storage, self._stream, before)
            self._last = ref(moved)
            self.num_moved += 1
        return _Saved(moved, tensor)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.take()


class _Moved:
    """The bytes of one storage, in the host's memory.

    Attributes:
        source: the storage, which may be gone.
        num_users: saved tensors that still have to ask for it.
    """

    def __init__(self, storage: torch.UntypedStorage, stream: Any, before: ReferenceType[_Moved] | None) -> None:
        self.source, self.num_users = StorageWeakRef(storage), 0
        # What was moved just before it, which backward needs just after it.
        self._stream, self._before = stream, before
        self._back: Tensor | None = None
        self._is_back: Any = None
        own = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self._device = own.device
        self._host = torch.empty(own.numel(), dtype=torch.uint8, pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(own)
            return
        stream.wait_stream(torch.cuda.current_stream(own.device))
        with torch.cuda.stream(stream):
            self._host.copy_(own, non_blocking=True)
        own.record_stream(stream)  # its memory is not given to others before it was copied

    def fetch(self) -> None:
        """Start to copy it back, where that has not begun."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._host.clone()
            return
        with torch.cuda.stream(self._stream):  # behind the copy to the host
            self._back = self._host.to(self._device, non_blocking=True)
        self._is_back = self._stream.record_event()

    def take(self) -> Tensor:
        """Its bytes on the device, for the current stream. The one before it is on its way from now on."""
        self.fetch()
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()
        back = self._back
        assert back is not None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._is_back)
            back.record_stream(current)
        self.num_users -= 1
        if self.num_users <= 0:  # more may ask where a graph is used twice: it is fetched anew
            self._back = None
        return back


class _Saved:
    """One saved tensor: a view of what was moved."""

    def __init__(self, moved: _Moved, tensor: Tensor) -> None:
        moved.num_users += 1
        self._moved, self._dtype = moved, tensor.dtype
        self._view = tensor.size(), tensor.stride(), tensor.storage_offset()

    def take(self) -> Tensor:
        return self._moved.take().view(self._dtype).as_strided(*self._view)
