"""A rank's share of the base: which elements of each tensor it reads, quantizes and keeps.

ZeRO-3 cuts every parameter, flattened, into as many runs of equal length as there are ranks, the last one padded. So a rank
needs to read only what its run stands for. A 4-bit weight is cut by its packed bytes; the elements behind a run of them are
widened to whole quantization blocks, read, and quantized alone, because a block's bytes depend on nothing outside it. Only
double quantization looks at the whole tensor: it takes the mean over all scales. The scales, 1/64 of the weights, are
therefore exchanged, and the result is the same, byte for byte, as that of quantizing the whole weight in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec
from qlora.quant.shards import TensorEntry


@dataclass(frozen=True)
class Share:
    """What one rank keeps of every tensor.

    Attributes:
        rank, world_size: of this process.
        exchange: all ranks' runs of a flat tensor, equal in length, one after the other. Collective.
        keep: cut a parameter, of which this rank's run alone is filled, and free the rest.
    """

    rank: int
    world_size: int
    exchange: Callable[[Tensor], Tensor]
    keep: Callable[[nn.Parameter], None]

    def run(self, num_elements: int) -> tuple[int, int]:
        """First and past the last element of this rank's run; equal where it has nothing but padding."""
        length = -(-num_elements // self.world_size)
        start = min(self.rank * length, num_elements)
        return start, min(start + length, num_elements)


def read_share(entry: TensorEntry, share: Share, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor in its shape, of which this rank's run alone is read and filled. Rank-local.

    The rest is memory that was never written to: on a CPU it is not resident.
    """
    start, stop = share.run(entry.num_elements)
    flat = torch.empty(entry.num_elements, dtype=dtype, device=device)
    for first in range(start, stop, nf4.CHUNK_ELEMENTS):
        last = min(first + nf4.CHUNK_ELEMENTS, stop)
        flat[first:last] = entry.read(first, last).to(device=device, dtype=dtype)
    return flat.reshape(entry.shape)


def read_quantized_share(
    entry: TensorEntry, spec: QuantSpec, share: Share, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Packed weight with this rank's run filled, and the statistics of the whole weight. Collective.

    Returns:
        packed (storage dtype, `spec.packed_shape`), statistics (uint8, flat).
    """
    num_elements, block = entry.num_elements, spec.block_size
    shape = spec.packed_shape(num_elements)
    first, last = (2 * spec.storage.itemsize * n for n in share.run(shape[0]))
    last = min(last, num_elements)
    packed = torch.empty((num_elements + 1) // 2, dtype=torch.uint8, device=device)
    num_blocks = spec.num_blocks(num_elements)
    # The scales of the blocks that begin in this run, in a run of equal length on every rank.
    length = -(-num_blocks // share.world_size) + 1
    scales = torch.zeros(length, dtype=torch.float32, device=device)
    own_first, own_last = -(-first // block), -(-last // block)
    step = nf4.CHUNK_ELEMENTS
    for begin in range(first // block * block, last, step):
        end = min(begin + step, -(-last // block) * block, num_elements)
        bits, absmax = nf4.quantize_blocks(entry.read(begin, end).to(device=device, dtype=dtype), spec)
        low, high = max(begin, first) // 2, min(end, last + last % 2) // 2 + (end == num_elements and num_elements % 2)
        packed[low:high] = bits[low - begin // 2 : high - begin // 2]
        from_block, to_block = max(begin // block, own_first), min(-(-end // block), own_last)
        if from_block < to_block:
            place = slice(from_block - begin // block, to_block - begin // block)
            scales[from_block - own_first : to_block - own_first] = absmax[place]
    absmax = _in_order(share.exchange(scales), shape[0], spec, share, num_elements)
    return packed.view(spec.storage).reshape(shape), nf4.pack_statistics(absmax, spec)


def _in_order(gathered: Tensor, packed_length: int, spec: QuantSpec, share: Share, num_elements: int) -> Tensor:
    """The scales (nb,) out of all ranks' padded runs."""
    length = gathered.numel() // share.world_size
    parts = []
    for rank in range(share.world_size):
        other = Share(rank, share.world_size, share.exchange, share.keep)
        first, last = (min(2 * spec.storage.itemsize * n, num_elements) for n in other.run(packed_length))
        count = -(-last // spec.block_size) - -(-first // spec.block_size)
        parts.append(gathered[rank * length : rank * length + count])
    return torch.cat(parts)
