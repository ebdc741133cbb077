"""4-bit block quantization: weights to packed bytes and back, through bitsandbytes' kernels.

A weight of n elements becomes n/2 packed bytes and one scale (absmax) for every `block_size` elements. With double
quantization the scales are themselves stored in 8 bits, with one fp32 scale for every 256 of them and one fp32 mean.

All that is needed besides the packed bytes is kept in one flat uint8 tensor, the statistics, so that no cast can touch
it and one collective can carry it. Its layout, with nb blocks:

    double quantization:  [mean fp32: 4 bytes][nested absmax fp32: 4*ceil(nb/256)][absmax uint8: nb]
    otherwise:            [absmax fp32: 4*nb]

The tables (16 values of NF4 or FP4, 256 of the 8-bit code) are constants of the format and are not stored.
This is the only file that imports bitsandbytes. QLoRA paper: Dettmers et al. 2023, section 3.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.ops.nf4_quantize import NativeQuantizer


def _compile_when_called(function: Any = None, **options: Any) -> Any:
    """`torch.compile`, which is asked when the function is first called."""
    if function is None:
        return functools.partial(_compile_when_called, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


# bitsandbytes 0.50 compiles some functions for devices it has no kernels for while it is imported. That imports torch's
# compiler, which takes as long as all other imports of a job, on every rank, for functions that are hardly ever called.
# It also warns, on CPUs with AVX512-BF16, that an optional inference kernel is not installed, which nothing here uses.
_cpu_log = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level, _cpu_log.level = _cpu_log.level, logging.ERROR
_compile, torch.compile = torch.compile, _compile_when_called  # type: ignore[assignment]
try:
    import bitsandbytes
finally:
    torch.compile, _cpu_log.level = _compile, _level

NESTED_BLOCK_SIZE = 256
# Quantizing goes through the weight in pieces of this many elements, so that only a piece is ever held in 16 bits.
CHUNK_ELEMENTS = 1 << 20

BnbLinear4bit = bitsandbytes.nn.Linear4bit
BnbLinear8bit = bitsandbytes.nn.Linear8bitLt


@dataclass(frozen=True)
class QuantSpec:
    """How one weight is quantized. Equal specs and equal weights give equal bytes."""

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    storage: torch.dtype = torch.uint8

    def packed_shape(self, num_elements: int) -> tuple[int, int]:
        """Shape of the packed tensor as bitsandbytes stores it, (bytes / itemsize, 1)."""
        num_bytes = (num_elements + 1) // 2
        if num_bytes % self.storage.itemsize:
            raise BaseModelError(
                f"a weight of {num_elements} elements cannot be stored as {self.storage}",
                next_step="set model.quantization.quant_storage to uint8",
            )
        return num_bytes // self.storage.itemsize, 1

    def num_blocks(self, num_elements: int) -> int:
        """Number of scales."""
        return -(-num_elements // self.block_size)

    def statistics_bytes(self, num_elements: int) -> int:
        """Bytes of the statistics tensor."""
        num_blocks = self.num_blocks(num_elements)
        if not self.double_quant:
            return 4 * num_blocks
        return 4 + 4 * -(-num_blocks // NESTED_BLOCK_SIZE) + num_blocks


def quantize_blocks(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Quantize whole blocks. Rank-local.

    Args:
        weight: any shape, float; its number of elements is a multiple of the block size unless it is the end of a weight.

    Returns:
        packed uint8 ((n+1)//2,), scales fp32 (ceil(n/block_size),).
    """
    if weight.device.type == "cpu":
        return _native_quantizer(spec.quant_type).quantize(weight.reshape(-1), spec.block_size)
    return _quantize_exactly(spec.quant_type, weight.reshape(-1), spec.block_size)


def _quantize_exactly(quant_type: str, weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed bytes and scales of a flat weight, by bitsandbytes."""
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, block_size, quant_type, torch.uint8)
    return packed.reshape(-1), absmax.reshape(-1)


@functools.cache
def _native_quantizer(quant_type: str) -> NativeQuantizer:
    """The faster way to the same bytes on CPUs."""
    return NativeQuantizer(four_bit_code(quant_type, torch.device("cpu")), functools.partial(_quantize_exactly, quant_type))


def pack_statistics(absmax: Tensor, spec: QuantSpec) -> Tensor:
    """Turn the fp32 scales (nb,) of a whole weight into the statistics tensor (uint8, flat)."""
    if not spec.double_quant:
        return absmax.view(torch.uint8)
    # The same three steps as bitsandbytes.functional.quantize_4bit with compress_statistics.
    mean = _mean(absmax)
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise.default(
        absmax - mean, dynamic_code(absmax.device), NESTED_BLOCK_SIZE
    )
    return torch.cat([mean.reshape(1).view(torch.uint8), nested.view(torch.uint8), codes])


def _mean(absmax: Tensor) -> Tensor:
    """The mean as one thread computes it. On CPUs torch splits a sum over its threads, and the last bit depends on them."""
    if absmax.device.type != "cpu":
        return absmax.mean()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return absmax.mean()
    finally:
        torch.set_num_threads(num_threads)


def quantize(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Quantize a whole weight piece by piece.

    Returns:
        packed (storage dtype, `spec.packed_shape`), statistics (uint8, flat); the same bytes as bitsandbytes' own.
    """
    flat = weight.reshape(-1)
    packed_shape = spec.packed_shape(flat.numel())
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(spec.num_blocks(flat.numel()), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        piece = flat[start : start + CHUNK_ELEMENTS]
        place = start // spec.block_size
        piece_packed, piece_absmax = quantize_blocks(piece, spec)
        packed[start // 2 : start // 2 + piece_packed.numel()] = piece_packed
        absmax[place : place + piece_absmax.numel()] = piece_absmax
    return packed.view(spec.storage).reshape(packed_shape), pack_statistics(absmax, spec)


def unpack_absmax(statistics: Tensor, spec: QuantSpec, num_elements: int) -> Tensor:
    """The fp32 scales (nb,) a statistics tensor stands for."""
    if not spec.double_quant:
        return _as_floats(statistics)
    mean, nested, codes = split_statistics(statistics, spec, num_elements)
    absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
        codes, nested, dynamic_code(statistics.device), NESTED_BLOCK_SIZE, torch.float32
    )
    return absmax.add_(mean)


def split_statistics(statistics: Tensor, spec: QuantSpec, num_elements: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parts (mean fp32 (1,), nested absmax fp32 (m,), absmax uint8 (nb,)) of double-quantized statistics."""
    num_blocks = spec.num_blocks(num_elements)
    end = 4 + 4 * -(-num_blocks // NESTED_BLOCK_SIZE)
    return _as_floats(statistics[:4]), _as_floats(statistics[4:end]), statistics[end:]


def _as_floats(raw: Tensor) -> Tensor:
    """Bytes read as fp32. Copied where they do not lie on a float's boundary, as in a buffer gathered from shares."""
    return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)


def dequantize(packed: Tensor, statistics: Tensor, spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight (shape, dtype) that packed bytes and statistics stand for. Allocates only the result and the scales."""
    absmax = unpack_absmax(statistics, spec, math.prod(shape))
    packed = packed.view(torch.uint8)
    if packed.device.type == "cpu" and not _cpu_kernel_is_exact(spec, shape):
        return _dequantize_rows_of_one_block(packed.reshape(-1), absmax, spec, math.prod(shape), dtype).reshape(shape)
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, spec.block_size, spec.quant_type, shape, dtype)


# The widest block that bitsandbytes' CPU kernel takes itself.
_CPU_BLOCK_SIZE = 1024


def _cpu_kernel_is_exact(spec: QuantSpec, shape: tuple[int, ...]) -> bool:
    """Whether rows are whole blocks.

    bitsandbytes 0.50's CPU kernel begins a block with every row, and so takes wrong scales where blocks run on from one
    row to the next; and it sends odd rows and wide blocks through torch.compile.
    """
    return shape[-1] % spec.block_size == 0 and spec.block_size <= _CPU_BLOCK_SIZE


def _dequantize_rows_of_one_block(
    packed: Tensor, absmax: Tensor, spec: QuantSpec, num_elements: int, dtype: torch.dtype
) -> Tensor:
    """The flat weight (num_elements,), on the CPU, computed as rows of one block each."""
    size = min(spec.block_size, _CPU_BLOCK_SIZE)
    if size < spec.block_size:
        absmax = absmax.repeat_interleave(spec.block_size // size)[: -(-num_elements // size)]
    num_whole = num_elements // size
    rest = num_elements - num_whole * size
    even_rest = rest + rest % 2  # the last byte holds two weights also where one alone is meant
    parts = []
    for begin, shape in ((0, (num_whole, size)), (num_whole, (1, even_rest))):
        if math.prod(shape):
            own = packed[begin * size // 2 : begin * size // 2 + math.prod(shape) // 2]
            parts.append(
                torch.ops.bitsandbytes.dequantize_4bit.default(
                    own, absmax[begin : begin + shape[0]], size, spec.quant_type, shape, dtype
                ).reshape(-1)
            )
    return torch.cat(parts)[:num_elements] if len(parts) > 1 else parts[0][:num_elements]


def dequantize_borrowed(
    packed: Tensor, statistics: Tensor, spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Like `dequantize`, for a result that is done with before this thread dequantizes again.

    On CPUs it lies in one buffer a thread. A fresh buffer for every layer would come back from the kernel as pages to be
    zeroed, or leave holes in the heap: five times the largest weight was seen to stay behind.
    """
    kernel = _cpu_kernel(packed.device, spec, shape, dtype)
    if kernel is None:
        return dequantize(packed, statistics, spec, shape, dtype)
    num_elements = math.prod(shape)
    absmax = unpack_absmax(statistics, spec, num_elements).contiguous()
    packed_bytes = packed.view(torch.uint8).contiguous()
    out = thread_buffer(num_elements, dtype).reshape(shape)
    pointers = [bitsandbytes.functional.get_ptr(tensor) for tensor in (packed_bytes, absmax, out)]
    rows, columns = num_elements // shape[-1], shape[-1]
    kernel(*pointers, *(ctypes.c_longlong(n) for n in (spec.block_size, rows, columns)))
    return out


def _cpu_kernel(device: torch.device, spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """bitsandbytes' own CPU kernel, which writes where it is told to; None where it is not there or not exact."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    if device.type != "cpu" or dtype not in names or not _cpu_kernel_is_exact(spec, shape):
        return None
    return getattr(bitsandbytes.cextension.lib, f"cdequantize_blockwise_cpu_{spec.quant_type}_{names[dtype]}", None)


def thread_buffer(num_elements: int, dtype: torch.dtype) -> Tensor:
    """This thread's buffer, at least so large, as a flat tensor."""
    num_bytes = num_elements * dtype.itemsize
    buffer = getattr(_buffers, "bytes", None)
    if buffer is None or buffer.numel() < num_bytes:
        _buffers.bytes = buffer = torch.empty(num_bytes, dtype=torch.uint8)
    return buffer[:num_bytes].view(dtype)


_buffers = threading.local()


def four_bit_code(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of NF4 or FP4 (16,), fp32."""
    return bitsandbytes.functional.get_4bit_type(quant_type, device=device)


def dynamic_code(device: torch.device) -> Tensor:
    """bitsandbytes' signed 8-bit dynamic map (256,), fp32, which double quantization stores the scales with."""
    if device not in _dynamic_codes:
        _dynamic_codes[device] = bitsandbytes.functional.create_dynamic_map().to(device)
    return _dynamic_codes[device]


_dynamic_codes: dict[torch.device, Tensor] = {}


def bitsandbytes_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """bitsandbytes' optimizer of a name of the job file. GPU only."""
    classes = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
    return getattr(bitsandbytes.optim, classes[name])
