"""8-bit row quantization: weights to int8 and back, with the bytes that bitsandbytes' Linear8bitLt keeps.

    W ~ diag(absmax / 127) C,    C = round(W 127 / absmax) in int8, absmax of each row of W

(Dettmers et al. 2022, "LLM.int8()", section 3.1, of which this is the part that quantizes weights.) A row is a block: as
many scales as outputs. Weights pass through fp16 on their way, because bitsandbytes' kernels take nothing else.

The scales are kept in one flat uint8 tensor, the statistics: the rows' absmax as fp32, 4 bytes a row. So no cast can touch
them, and 8-bit layers are sharded and gathered as 4-bit ones are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.ops import nf4

# Rows that are dequantized at one time on a CPU, in elements: their fp32 stays in the cache.
PIECE_ELEMENTS = 1 << 18
# What bitsandbytes writes beside the weight, by the end of its name; the format says how the bytes are laid out: by rows.
SCALES, FORMAT, ROW_FORMAT = "SCB", "weight_format", 0


def statistics_bytes(num_rows: int) -> int:
    """Bytes of the statistics tensor."""
    return 4 * num_rows


def rows_at_once(num_columns: int) -> int:
    """Rows that are quantized at one time, so that only a piece of a weight is ever held in 16 bits; at least one."""
    return max(1, nf4.CHUNK_ELEMENTS // num_columns)


def quantize_rows(rows: Tensor, place: str = "") -> tuple[Tensor, Tensor]:
    """Quantize whole rows. Rank-local.

    Args:
        rows: (R, in), float.
        place: for errors.

    Returns:
        int8 (R, in), absmax fp32 (R,); the same bytes as bitsandbytes' own on the same device.

    Raises:
        BaseModelError: a weight that is not finite in fp16.
    """
    packed, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(rows.to(torch.float16).contiguous())
    if not torch.isfinite(absmax).all():
        raise BaseModelError(
            "the weight has numbers that fp16 cannot hold, and bitsandbytes quantizes to 8 bits by way of fp16",
            place=place or None,
            found=f"up to {float(rows.abs().max()):g}",
            wanted=f"at most {torch.finfo(torch.float16).max:g}",
            next_step="add the layer's name to model.quantization.skip_modules, or quantize to 4 bits",
        )
    return packed, absmax


def quantize(weight: Tensor, place: str = "") -> tuple[Tensor, Tensor]:
    """Quantize a whole weight (out, in) piece by piece: int8 (out, in), statistics (uint8, flat). Raises BaseModelError."""
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = rows_at_once(weight.shape[1])
    for first in range(0, weight.shape[0], step):
        piece = slice(first, first + step)
        packed[piece], absmax[piece] = quantize_rows(weight[piece], place)
    return packed, pack_statistics(absmax)


def pack_statistics(absmax: Tensor) -> Tensor:
    """The statistics tensor (uint8, flat) of all rows' absmax (out,)."""
    return absmax.to(torch.float32).contiguous().view(torch.uint8)


def unpack_absmax(statistics: Tensor) -> Tensor:
    """The rows' absmax (out,), fp32, that a statistics tensor holds."""
    # Copied where they do not lie on a float's boundary, as in a buffer gathered from shares.
    return (statistics if statistics.storage_offset() % 4 == 0 else statistics.clone()).view(torch.float32)


def dequantize(packed: Tensor, statistics: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that int8 and statistics stand for: multiplied in fp32, then rounded to dtype."""
    return _write(torch.empty(packed.shape, dtype=dtype, device=packed.device), packed, statistics)


def dequantize_borrowed(packed: Tensor, statistics: Tensor, dtype: torch.dtype) -> Tensor:
    """Like `dequantize`, for a result that is done with before this thread dequantizes again.

    On CPUs it lies in one buffer a thread, for the reason that `nf4.dequantize_borrowed` gives.
    """
    if packed.device.type != "cpu":
        return dequantize(packed, statistics, dtype)
    return _write(nf4.thread_buffer(packed.numel(), dtype).reshape(packed.shape), packed, statistics)


def _write(out: Tensor, packed: Tensor, statistics: Tensor) -> Tensor:
    # As bitsandbytes does it in its own backward pass, so that both multiply by the same weight.
    factors = unpack_absmax(statistics).mul(1.0 / 127.0).unsqueeze(1)
    if packed.device.type != "cpu":
        return torch.mul(packed, factors, out=out)
    # On CPUs torch would make fp32 copies of both operands as wholes.
    step = max(1, PIECE_ELEMENTS // packed.shape[1])
    wide = torch.empty((min(step, packed.shape[0]), packed.shape[1]), dtype=torch.float32)
    for first in range(0, packed.shape[0], step):
        own = packed[first : first + step]
        product = wide[: own.shape[0]].copy_(own).mul_(factors[first : first + step])
        out[first : first + step].copy_(product)
    return out


def check_stored(weight: Any, entries: Mapping[str, Any], read: Callable[[str], Tensor], place: str) -> None:
    """Make sure that what bitsandbytes wrote beside an int8 weight fits it.

    Args:
        weight: the int8 tensor, or where it lies; it has dtype and shape.
        entries: by the end of the name, `SCB` and `weight_format`.
        read: the tensor behind such an end; asked for the format alone.

    Raises:
        BaseModelError: no scales, scales of another shape or dtype, or bytes that are not laid out by rows.
    """
    scales = entries.get(SCALES)
    if scales is None:
        raise BaseModelError("the 8-bit weight has no scales", place=place, wanted=SCALES)
    if weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise BaseModelError(
            "the 8-bit weight is not one",
            place=place,
            found=f"{tuple(weight.shape)} {weight.dtype}",
            wanted="int8 (out, in)",
        )
    if math.prod(scales.shape) != weight.shape[0] or scales.dtype != torch.float32:
        raise BaseModelError(
            "the 8-bit weight's scales do not fit its shape",
            place=place,
            found=f"{math.prod(scales.shape)} x {scales.dtype}",
            wanted=f"{weight.shape[0]} x torch.float32 for {tuple(weight.shape)}",
        )
    stated = read(FORMAT).reshape(-1).tolist() if FORMAT in entries else [ROW_FORMAT]
    if stated != [ROW_FORMAT]:
        raise BaseModelError(
            "the 8-bit weight is laid out for a GPU of one kind, as old versions of bitsandbytes wrote it",
            place=place,
            found=f"{FORMAT} {stated}",
            wanted=f"{ROW_FORMAT}, by rows",
            next_step="save the model again with bitsandbytes 0.45 or later, or use the unquantized one",
        )


def from_linear8bit(linear: Any, place: str) -> tuple[Tensor, Tensor]:
    """Take the weight out of a bitsandbytes Linear8bitLt: int8 (out, in), statistics. Copies nothing, not even scales.

    Raises:
        BaseModelError: see `check_linear8bit`.
    """
    check_linear8bit(linear, place)
    packed, absmax = _state_of(linear)
    assert packed is not None
    assert absmax is not None
    return packed.detach(), pack_statistics(absmax.detach().reshape(-1))


def check_linear8bit(linear: torch.nn.Module, place: str) -> None:
    """Whether `from_linear8bit` can take a layer's weight; raises what it would raise, and copies nothing."""
    packed, absmax = _state_of(linear)
    if packed is not None and absmax is not None:
        return
    if linear.state.has_fp16_weights:  # type: ignore[union-attr]
        raise BaseModelError(
            "the 8-bit layer keeps its weight in 16 bits and quantizes it at every step",
            place=place,
            next_step="make it with has_fp16_weights=False, or load the base with qlora.load_base",
        )
    raise BaseModelError("the 8-bit layer is not quantized yet", place=place, next_step="move the model to its device")


def _state_of(linear: Any) -> tuple[Tensor | None, Tensor | None]:
    """int8 weight and absmax, which a first forward pass moves from the weight to the layer's state."""
    weight, state = linear.weight, linear.state
    places = (getattr(weight, "CB", None), state.CB, weight.data)
    packed = next((t for t in places if t is not None and t.dtype == torch.int8), None)
    absmax = next((t for t in (getattr(weight, "SCB", None), state.SCB) if t is not None), None)
    fits = packed is not None and absmax is not None and not packed.is_meta and not state.has_fp16_weights
    return (packed, absmax) if fits else (None, None)
