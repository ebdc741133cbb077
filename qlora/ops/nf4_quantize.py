"""4-bit block quantization on CPUs by table, bit-equal to bitsandbytes, which does a binary search for every weight.

bitsandbytes 0.50 scales a block by the reciprocal of its largest magnitude, v = x * (1 / absmax) in fp32, and a weight's
code is the number of the 15 midpoints between neighbouring values that lie below v. Here v is cut to a whole number of
1/16384. That number is looked up in a table, which knows the code wherever no midpoint lies between it and the next one.
Where one does, which is so for 15 numbers of 32,769 and about one weight in 1,800, the weight is marked, gathered, and
decided by bitsandbytes' own arithmetic. Scaling by 16384 is exact in floating point, so nothing else is ever in doubt.

What the table cannot take goes to bitsandbytes itself: the rest of a weight that is no whole block, other dtypes, and
weights with a scale that is not finite or next to nothing. Another version of bitsandbytes may round otherwise, so the two
are compared once, on weights made for it, and where they differ the table is not used.

The work is done in pieces that stay in a core's cache; threads take stretches of the weight. No compiler is needed. numpy
does what torch is slow at: masks, looking up, packing two codes to a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# The reference: (flat weight, block size) -> packed uint8 (ceil(n/2),), scales fp32 (ceil(n/block_size),).
Exact = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# Steps the table divides the unit into: a power of two, so that scaling is exact, and few enough for int16.
_STEPS = 16384
_MARK = 255
# What stays in a core's cache. Smaller where threads work side by side: torch shares out what has 32,768 elements and more.
_PIECE_ELEMENTS, _SHARED_PIECE_ELEMENTS = 57_344, 28_672
# A thread looks for marks in stretches of at most so many codes.
_STRETCH_ELEMENTS = 1 << 20
# Below this the calls cost more than what they do.
_LEAST_ELEMENTS = 4096
# Beyond, threads wait for their turn at the interpreter.
_MOST_THREADS = 8
# Its reciprocal times the steps is still a number of fp32; bitsandbytes itself takes scales below 1e-38 for that.
_SMALLEST_SCALE = 1e-30
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class TableQuantizer:
    """Quantizes as `exact` does, faster. One for each code of 16 values. Safe to use from several threads."""

    def __init__(self, values: Tensor, exact: Exact) -> None:
        """values: the 16 values of the code (16,), fp32, on the CPU."""
        self._exact = exact
        # As bitsandbytes does it: FP4's values are not in order.
        order = torch.argsort(values)
        self._midpoints = ((values[order[:-1]] + values[order[1:]]) / 2).numpy()
        self._order = order.numpy()
        self._table = _make_table(self._midpoints, self._order)
        self._spare: list[_Buffers] = []
        self.agrees = all(self._agrees_on(weight) for weight in _telling_weights(self._midpoints))

    def quantize(self, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Quantize a flat weight (n,) on the CPU. Rank-local.

        Returns:
            packed uint8 (ceil(n/2),), the first weight in the high half; scales fp32 (ceil(n/block_size),).
        """
        num_whole = weight.numel() // block_size * block_size
        found = None
        if self.agrees and num_whole >= _LEAST_ELEMENTS and weight.dtype in _BITS and _fits(block_size):
            found = self._by_table(weight[:num_whole].detach().contiguous(), block_size)
        if found is None:
            return self._exact(weight, block_size)
        if num_whole == weight.numel():
            return found
        rest = self._exact(weight[num_whole:], block_size)
        return torch.cat([found[0], rest[0]]), torch.cat([found[1], rest[1]])

    def _agrees_on(self, weight: Tensor) -> bool:
        """Whether table and reference give the same bytes."""
        found, wanted = self._by_table(weight, 64), self._exact(weight, 64)
        return found is not None and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))

    # What is made in inference mode could not be written to by a thread, which is not in it, or after it.
    @torch.inference_mode(False)
    def _by_table(self, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor] | None:
        """Quantize whole blocks; None where there is a scale that the table cannot take."""
        num_elements = weight.numel()
        packed = torch.empty(num_elements // 2, dtype=torch.uint8, device="cpu")
        absmax = torch.empty(num_elements // block_size, dtype=torch.float32, device="cpu")
        num_threads = min(torch.get_num_threads(), _MOST_THREADS, -(-num_elements // _SHARED_PIECE_ELEMENTS))
        length = min(-(-num_elements // num_threads), _STRETCH_ELEMENTS)
        length = -(-length // block_size) * block_size
        starts = range(0, num_elements, length)
        piece = (_PIECE_ELEMENTS if num_threads == 1 else _SHARED_PIECE_ELEMENTS) // block_size * block_size

        def one(first: int) -> bool:
            last = min(first + length, num_elements)
            blocks = absmax[first // block_size : last // block_size]
            return self._quantize_stretch(weight[first:last], block_size, piece, packed[first // 2 : last // 2], blocks)

        if num_threads == 1:
            done = all(map(one, starts))
        else:
            with ThreadPoolExecutor(num_threads - 1) as threads:
                elsewhere = threads.map(one, (first for place, first in enumerate(starts) if place % num_threads))
                done = all(list(map(one, starts[::num_threads])) + list(elsewhere))
        return (packed, absmax) if done else None

    def _quantize_stretch(self, weight: Tensor, block_size: int, piece: int, packed: Tensor, absmax: Tensor) -> bool:
        """Fill packed bytes and scales; False where there is a scale that the table cannot take."""
        # Fresh buffers would come as pages to be zeroed, every time. A list's pop and append are atomic.
        try:
            buffers = self._spare.pop()
        except IndexError:
            buffers = _Buffers()
        try:
            _find_scales(weight, block_size, piece, absmax, buffers)
            scales = absmax.numpy()
            if not ((scales >= _SMALLEST_SCALE) & (scales < np.inf) | (scales == 0)).all():
                return False
            # A block of zeros stays one, whatever it is multiplied with.
            inverse = 1 / np.maximum(scales, np.float32(_SMALLEST_SCALE))
            codes = buffers.codes[: weight.numel()]
            self._look_up(weight, block_size, piece, inverse, codes, buffers)
            self._decide_marked(weight, block_size, inverse, codes)
            _pack(codes, packed.numpy(), buffers)
            return True
        finally:
            self._spare.append(buffers)

    def _look_up(
        self, weight: Tensor, block_size: int, piece: int, inverse: np.ndarray, codes: np.ndarray, buffers: _Buffers
    ) -> None:
        """Fill in the codes, or marks."""
        steps = torch.from_numpy(inverse * _STEPS).unsqueeze(1)
        for run, size in _runs(weight.numel(), piece):
            scaled, cut, index = buffers.floats[:size], buffers.shorts[:size], buffers.index[:size]
            as_blocks, unsigned, places = scaled.view(-1, block_size), cut.view(torch.uint16), index.numpy()
            own_steps = steps[run.start // block_size : run.stop // block_size].split(size // block_size)
            for part, own, out in zip(weight[run].split(size), own_steps, codes[run].reshape(-1, size), strict=True):
                scaled.copy_(part)
                as_blocks.mul_(own)
                cut.copy_(scaled)  # towards zero
                index.copy_(unsigned)  # negative ones come to lie at the table's end
                self._table.take(places, out=out, mode="wrap")  # all are inside; the default mode writes to a copy first

    def _decide_marked(self, weight: Tensor, block_size: int, inverse: np.ndarray, codes: np.ndarray) -> None:
        """Replace marks by what bitsandbytes' arithmetic gives."""
        marked = codes == _MARK
        # By eights first: marks are few.
        eights = np.flatnonzero(marked.view(np.int64) != 0)
        row, column = np.nonzero(marked.reshape(-1, 8)[eights])
        where = eights[row] * 8 + column
        scaled = weight[torch.from_numpy(where)].float().numpy() * inverse[where // block_size]
        codes[where] = self._order[np.searchsorted(self._midpoints, np.clip(scaled, -1, 1))]


class _Buffers:
    """What one thread works in, two mebibytes."""

    def __init__(self) -> None:
        self.floats = torch.empty(_PIECE_ELEMENTS, dtype=torch.float32, device="cpu")
        self.shorts = torch.empty(_PIECE_ELEMENTS, dtype=torch.int16, device="cpu")
        self.index = torch.empty(_PIECE_ELEMENTS, dtype=torch.int64, device="cpu")
        self.codes = np.empty(_STRETCH_ELEMENTS + _SHARED_PIECE_ELEMENTS, dtype=np.uint8)


def _fits(block_size: int) -> bool:
    """Whether blocks are whole eights, and a piece holds one."""
    return block_size % 8 == 0 and block_size <= _SHARED_PIECE_ELEMENTS


def _runs(num_elements: int, length: int) -> Iterator[tuple[slice, int]]:
    """What is cut into pieces of one length, as (where, length of a piece): all whole pieces, then the rest."""
    whole = num_elements // length * length
    if whole:
        yield slice(0, whole), length
    if whole < num_elements:
        yield slice(whole, num_elements), num_elements - whole


def _find_scales(weight: Tensor, block_size: int, piece: int, absmax: Tensor, buffers: _Buffers) -> None:
    """Fill in the largest magnitude of each block. Bits of magnitudes, as integers, have their order, with NaN above all."""
    bits_type = _BITS[weight.dtype]
    without_sign = torch.iinfo(bits_type).max
    largest = torch.empty(absmax.numel(), dtype=bits_type, device="cpu")
    bits = weight.view(bits_type).numpy()
    for run, size in _runs(weight.numel(), piece):
        magnitudes = buffers.floats.view(bits_type)[:size]
        as_blocks, as_bits = magnitudes.view(-1, block_size), magnitudes.numpy()
        own_blocks = largest[run.start // block_size : run.stop // block_size].split(size // block_size)
        for part, out in zip(bits[run].reshape(-1, size), own_blocks, strict=True):
            np.bitwise_and(part, without_sign, out=as_bits)
            torch.amax(as_blocks, 1, out=out)
    absmax.copy_(largest.view(weight.dtype))


def _pack(codes: np.ndarray, packed: np.ndarray, buffers: _Buffers) -> None:
    """Two codes to a byte, the first in the high half."""
    pairs = codes.view("<u2")  # first + 256 * second
    for run, size in _runs(packed.size, _PIECE_ELEMENTS):
        both = buffers.shorts.numpy().view("<u2")[:size]
        for own, out in zip(pairs[run].reshape(-1, size), packed[run].reshape(-1, size), strict=True):
            np.multiply(own, 4097, out=both)  # the upper byte is second + 16 * first
            np.right_shift(both, 8, out=both)
            np.copyto(out, both, casting="unsafe")


def _make_table(midpoints: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Codes (65536,), uint8, by v in steps, cut towards zero and read as uint16; a mark where the steps do not tell."""
    steps = np.arange(-_STEPS, _STEPS + 1)
    # All v that are cut to a step lie between these two.
    low, high = (steps - (steps <= 0)) / _STEPS, (steps + (steps >= 0)) / _STEPS
    below, above = np.searchsorted(midpoints, low), np.searchsorted(midpoints, high, side="right")
    table = np.full(1 << 16, _MARK, dtype=np.uint8)
    table[steps] = np.where(below == above, order[below], _MARK)
    return table


def _telling_weights(midpoints: np.ndarray) -> Iterator[Tensor]:
    """Weights (n,) that show how a quantizer rounds: midpoints and their neighbours under many scales, and zeros."""
    infinity = np.float32(np.inf)
    near = np.concatenate([midpoints, np.nextafter(midpoints, infinity), np.nextafter(midpoints, -infinity)])
    block = np.zeros(64, dtype=np.float32)
    block[: 1 + near.size] = [1, *near]
    scales = np.linspace(0, 40, 128, dtype=np.float32)
    weights = torch.from_numpy((block * scales[:, None]).reshape(-1))
    for dtype in _BITS:
        yield weights.to(dtype)
