"""Reading a rank's run of one tensor, quantized while it is read.

Blocks of 64 weights are quantized each for itself, so a rank that is to keep the packed bytes [a, b) reads the weights
behind them, widened to whole blocks, and nothing else. What a rank cannot know alone are the scales of the other
ranks' blocks, which double quantization takes the mean of: a 64th of the weight, exchanged once. In 8 bits a block is a
row, and the scales are exchanged because they are cut elsewhere than the weight: in bytes, 4 a row.

Tensors come out in full size with this rank's run filled and the rest left as it was allocated, which on a CPU costs no
memory; `Sharding.keep` then cuts them down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.distributed.sharding import Sharding
from qlora.ops import int8, nf4
from qlora.ops.nf4 import QuantSpec
from qlora.quant.linear import QuantizedLinear
from qlora.quant.shards import JoinedEntry, TensorEntry


def read_run(entry: TensorEntry | JoinedEntry, sharding: Sharding, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor (shape of the entry, dtype) with this rank's run filled. Rank-local. Raises BaseModelError."""
    start, stop = sharding.run(entry.num_elements)
    flat = torch.empty(entry.num_elements, dtype=dtype, device=device)
    for first in range(start, stop, nf4.CHUNK_ELEMENTS):
        last = min(first + nf4.CHUNK_ELEMENTS, stop)
        flat[first:last] = entry.read(first, last).to(device=device, dtype=dtype)
    return flat.reshape(entry.shape)


def quantize_run(
    entry: TensorEntry, spec: QuantSpec, sharding: Sharding, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize what this rank keeps of a weight. Rank-local. Raises BaseModelError.

    Args:
        dtype: the weight is rounded to it before it is quantized.

    Returns:
        packed (storage dtype, `spec.packed_shape`) with this rank's run filled, and the fp32 scales of the blocks that
        begin in this run, for `all_scales`.
    """
    num_elements, block = entry.num_elements, spec.block_size
    shape = spec.packed_shape(num_elements)
    first, last = _weights_of_run(sharding, shape[0], spec, num_elements)
    packed = torch.empty((num_elements + 1) // 2, dtype=torch.uint8, device=device)
    own_first, own_last = -(-first // block), -(-last // block)
    scales = torch.zeros(own_last - own_first, dtype=torch.float32, device=device)
    for begin in range(first // block * block, last if first < last else 0, nf4.CHUNK_ELEMENTS):
        end = min(begin + nf4.CHUNK_ELEMENTS, -(-last // block) * block, num_elements)
        bits, absmax = nf4.quantize_blocks(entry.read(begin, end).to(device=device, dtype=dtype), spec)
        low, high = max(begin, first) // 2, (min(end, last) + 1) // 2
        packed[low:high] = bits[low - begin // 2 : high - begin // 2]
        from_block, to_block = max(begin // block, own_first), min(-(-end // block), own_last)
        if from_block < to_block:
            here = absmax[from_block - begin // block : to_block - begin // block]
            scales[from_block - own_first : to_block - own_first] = here
    return packed.view(spec.storage).reshape(shape), scales


def all_scales(own: Tensor, num_elements: int, spec: QuantSpec, sharding: Sharding) -> Tensor:
    """The scales of a whole weight (nb,), fp32, out of every rank's own. Collective where a copy is shared out."""
    if sharding.world_size == 1:
        return own
    packed_length = spec.packed_shape(num_elements)[0]
    runs = [_weights_of_run(sharding, packed_length, spec, num_elements, rank) for rank in range(sharding.world_size)]
    return _exchange_scales(own, runs, spec.block_size, sharding)


def _exchange_scales(own: Tensor, runs: list[tuple[int, int]], block_size: int, sharding: Sharding) -> Tensor:
    """The scales of all blocks, of which each rank has brought those that begin in its run of the weights. Collective."""
    counts = [-(-last // block_size) - -(-first // block_size) for first, last in runs]
    padded = torch.zeros(max(counts), dtype=torch.float32, device=own.device)
    padded[: own.numel()] = own
    gathered = sharding.exchange(padded).reshape(sharding.world_size, -1)
    return torch.cat([row[:count] for row, count in zip(gathered, counts, strict=True)])


def _weights_of_run(
    sharding: Sharding, packed_length: int, spec: QuantSpec, num_elements: int, rank: int | None = None
) -> tuple[int, int]:
    """First and last (exclusive) weight behind a rank's run of the packed tensor."""
    first, last = (2 * spec.storage.itemsize * n for n in sharding.run(packed_length, rank))
    return min(first, num_elements), min(last, num_elements)


def quantize_rows_run(
    entry: TensorEntry, sharding: Sharding, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize what this rank keeps of a weight (out, in) to 8 bits. Rank-local. Raises BaseModelError.

    Args:
        dtype: the weight is rounded to it before it is quantized.

    Returns:
        int8 (out, in) with this rank's run filled, and the fp32 absmax of the rows that begin in this run, for `all_rows`.
    """
    num_columns = entry.shape[1]
    first, last = sharding.run(entry.num_elements)
    own_first, own_last = -(-first // num_columns), -(-last // num_columns)
    packed = torch.empty(entry.num_elements, dtype=torch.int8, device=device)
    absmax = torch.zeros(own_last - own_first, dtype=torch.float32, device=device)
    step = int8.rows_at_once(num_columns)
    for begin in range(first // num_columns, own_last if first < last else 0, step):
        end = min(begin + step, own_last)
        rows = entry.read(begin * num_columns, end * num_columns).to(device=device, dtype=dtype)
        bits, own = int8.quantize_rows(rows.reshape(-1, num_columns), f"{entry.file}: {entry.name}")
        low, high = max(begin * num_columns, first), min(end * num_columns, last)
        packed[low:high] = bits.reshape(-1)[low - begin * num_columns : high - begin * num_columns]
        from_row = max(begin, own_first)
        absmax[from_row - own_first : end - own_first] = own[from_row - begin :]
    return packed.reshape(entry.shape), absmax


def all_rows(own: Tensor, shape: tuple[int, ...], sharding: Sharding) -> Tensor:
    """The absmax (out,) of a weight (out, in), fp32, out of every rank's own. Collective where a copy is shared out."""
    if sharding.world_size == 1:
        return own
    runs = [sharding.run(shape[0] * shape[1], rank) for rank in range(sharding.world_size)]
    return _exchange_scales(own, runs, shape[1], sharding)


def quantize_transpose(
    layer: QuantizedLinear, entry: TensorEntry, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Packed bytes and statistics, as wholes, of a weight that lies in its file as (in, out). Raises BaseModelError."""
    weight = entry.read_whole().to(device=device, dtype=dtype).T.contiguous()
    return layer.quantize(weight, f"{entry.file}: {entry.name}")
