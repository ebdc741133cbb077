"""4-bit block quantization on CPUs by a kernel in C, bit-equal to bitsandbytes, which does a binary search for every weight.

bitsandbytes 0.50 scales a block by the reciprocal of its largest magnitude, v = x * (1 / absmax) in fp32, and a weight's
code is the number of the 15 midpoints between neighbouring values that lie below v. The kernel (`native/nf4_quantize.c`)
does the same arithmetic and compares with all of them at once; threads take stretches of the weight.

What the kernel cannot take goes to bitsandbytes itself: the rest of a weight that is no whole block, other dtypes, and
weights with a scale that is not finite or next to nothing. Where there is no compiler everything goes there. Another version
of bitsandbytes may round otherwise, so the two are compared once, on weights made for it, and where they differ the kernel
is not used.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from qlora.ops.native.build import load

logger = logging.getLogger(__name__)

# The reference: (flat weight, block size) -> packed uint8 (ceil(n/2),), scales fp32 (ceil(n/block_size),).
Exact = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# The dtypes that the kernel reads, by its own numbers for them.
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# The kernel takes blocks of whole pieces, and whole tiles altogether.
_PIECE, _TILE = 32, 64
# Threads take stretches of so many weights, a seventh of a millisecond's work. For fewer than two none is worth starting.
_STRETCH_ELEMENTS = 1 << 17
_LEAST_STRETCHES = 2
_MOST_THREADS = 8


class NativeQuantizer:
    """Quantizes as `exact` does, faster. One for each code of 16 values. Safe to use from several threads."""

    def __init__(self, values: Tensor, exact: Exact) -> None:
        """values: the 16 values of the code (16,), fp32, on the CPU."""
        self._exact = exact
        # As bitsandbytes does it: FP4's values are not in order.
        order = torch.argsort(values)
        self._midpoints = ((values[order[:-1]] + values[order[1:]]) / 2).numpy()
        self._first_code = int(order[0])
        self._steps = np.diff(order.numpy()).astype(np.int32)
        loaded = load("nf4_quantize")
        self._function = _declare(loaded.library) if loaded.library else None
        self._reason = loaded.reason
        if self._function and not all(self._agrees_on(weight) for weight in _telling_weights(self._midpoints)):
            self._function, self._reason = None, "the kernel in C rounds otherwise than the installed bitsandbytes"
        self.is_native = self._function is not None
        logger.info("4-bit weights are quantized on CPUs by %s", self.describe())

    def describe(self) -> str:
        """What quantizes whole blocks, and why. Rank-local."""
        return "a kernel in C" if self.is_native else f"bitsandbytes ({self._reason})"

    def quantize(self, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Quantize a flat weight (n,) on the CPU. Rank-local.

        Returns:
            packed uint8 (ceil(n/2),), the first weight in the high half; scales fp32 (ceil(n/block_size),).
        """
        unit = math.lcm(block_size, _TILE)
        num_whole = weight.numel() // unit * unit
        found = None
        if self.is_native and num_whole and weight.dtype in _KINDS and block_size % _PIECE == 0:
            found = self._by_kernel(weight[:num_whole].detach().contiguous(), block_size, unit)
        if found is None:
            return self._exact(weight, block_size)
        if num_whole == weight.numel():
            return found
        rest = self._exact(weight[num_whole:], block_size)
        return torch.cat([found[0], rest[0]]), torch.cat([found[1], rest[1]])

    def _agrees_on(self, weight: Tensor) -> bool:
        """Whether kernel and reference give the same bytes."""
        found, wanted = self._by_kernel(weight, 64, 64), self._exact(weight, 64)
        return found is not None and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))

    def _by_kernel(self, weight: Tensor, block_size: int, unit: int) -> tuple[Tensor, Tensor] | None:
        """Quantize whole units; None where there is a scale that the kernel cannot take."""
        num_elements = weight.numel()
        packed = torch.empty(num_elements // 2, dtype=torch.uint8, device="cpu")
        absmax = torch.empty(num_elements // block_size, dtype=torch.float32, device="cpu")
        length = max(_STRETCH_ELEMENTS // unit, 1) * unit
        starts = deque(range(0, num_elements, length))

        def one(first: int) -> bool:
            assert self._function is not None
            refused = self._function(
                _KINDS[weight.dtype],
                weight.data_ptr() + first * weight.element_size(),
                (min(first + length, num_elements) - first) // block_size,
                block_size,
                self._midpoints.ctypes.data,
                self._first_code,
                self._steps.ctypes.data,
                packed.data_ptr() + first // 2,
                absmax.data_ptr() + first // block_size * absmax.element_size(),
            )
            return refused == 0

        def work() -> bool:
            """Take stretches until none is left: a thread that comes late, or is held up, leaves them to others."""
            while True:
                try:
                    first = starts.popleft()
                except IndexError:
                    return True
                if not one(first):
                    return False

        num_threads = min(torch.get_num_threads(), _MOST_THREADS, len(starts) // _LEAST_STRETCHES)
        if num_threads <= 1:
            return (packed, absmax) if work() else None
        with ThreadPoolExecutor(num_threads - 1) as threads:
            others = [threads.submit(work) for _ in range(num_threads - 1)]
            done = [work(), *(other.result() for other in others)]
        return (packed, absmax) if all(done) else None


def _declare(library: ctypes.CDLL) -> Callable[..., int]:
    """The kernel, with the types of its arguments."""
    function = library.qlora_quantize_4bit
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, count, count, pointer, ctypes.c_int32, pointer, pointer, pointer]
    function.restype = ctypes.c_int
    return function


def _telling_weights(midpoints: np.ndarray) -> Iterator[Tensor]:
    """Weights (n,) that show how a quantizer rounds: midpoints and their neighbours under many scales, and zeros."""
    infinity = np.float32(np.inf)
    near = np.concatenate([midpoints, np.nextafter(midpoints, infinity), np.nextafter(midpoints, -infinity)])
    block = np.zeros(64, dtype=np.float32)
    block[: 1 + near.size] = [1, *near]
    scales = np.linspace(0, 40, 128, dtype=np.float32)
    weights = torch.from_numpy((block * scales[:, None]).reshape(-1))
    for dtype in _KINDS:
        yield weights.to(dtype)
