"""Root mean square norm on GPUs: forward, forward again and backward each in one pass, arithmetic in fp32.

A program takes a tile of whole rows: one where rows are long, several where they are short (a head's norm). In backward,
where the weight has a gradient, it goes on from tile to tile, keeps its part of that gradient in registers and writes it
once; the parts, a row for each program, are summed by one reduction.

Shapes: T rows, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile of rows, where rows are short.
TILE_ELEMENTS = 1 << 12
# Programs of the backward pass for each multiprocessor of the GPU.
PROGRAMS_EACH = 4


def rms_norm_forward(
    x_TD: Tensor, weight_D: Tensor, eps: float, *, offset: float, late_rounding: bool
) -> tuple[Tensor, Tensor]:
    """As `ops.norm.rms_norm_forward`."""
    rstd_T = torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    return _normalise(x_TD, rstd_T, weight_D, eps, offset, late_rounding, again=False), rstd_T


def rms_norm_again(x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor, *, offset: float, late_rounding: bool) -> Tensor:
    """As `ops.norm.rms_norm_again`."""
    return _normalise(x_TD, rstd_T, weight_D, 0.0, offset, late_rounding, again=True)


def rms_norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    offset: float,
    late_rounding: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `ops.norm.rms_norm_backward`."""
    dy_TD, x_TD = _rows(dy_TD), _rows(x_TD)
    num_rows, width = x_TD.shape
    weight_D, offset = _scale(weight_D, offset, late_rounding), offset if late_rounding else 0.0
    dx_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    tile = _tile(width)
    num_tiles = triton.cdiv(num_rows, tile["ROWS"])
    # Without a gradient of the weight there is nothing to carry from tile to tile.
    programs = min(num_tiles, PROGRAMS_EACH * _num_multiprocessors(x_TD.device)) if need_weight else num_tiles
    parts_PD = torch.empty(programs if need_weight else 0, width, dtype=torch.float32, device=x_TD.device)
    _backward[(programs,)](
        dy_TD, x_TD, weight_D, rstd_T, dx_TD, parts_PD,
        dy_TD.stride(0), x_TD.stride(0), dx_TD.stride(0), num_rows, width, num_tiles, offset,
        NEED_WEIGHT=need_weight, **tile,
    )  # fmt: skip
    return dx_TD, parts_PD.sum(0).to(weight_D.dtype) if need_weight else None


def _normalise(
    x_TD: Tensor, rstd_T: Tensor, weight_D: Tensor, eps: float, offset: float, late_rounding: bool, *, again: bool
) -> Tensor:
    x_TD = _rows(x_TD)
    num_rows, width = x_TD.shape
    weight_D, offset = _scale(weight_D, offset, late_rounding), offset if late_rounding else 0.0
    y_dtype = x_TD.dtype if late_rounding else torch.promote_types(x_TD.dtype, weight_D.dtype)
    y_TD = torch.empty(num_rows, width, dtype=y_dtype, device=x_TD.device)
    tile = _tile(width)
    _forward[(triton.cdiv(num_rows, tile["ROWS"]),)](
        x_TD, weight_D, y_TD, rstd_T, x_TD.stride(0), y_TD.stride(0), num_rows, width, eps, offset,
        LATE=late_rounding, AGAIN=again, **tile,
    )  # fmt: skip
    return y_TD


def _rows(x_TD: Tensor) -> Tensor:
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def _scale(weight_D: Tensor, offset: float, late_rounding: bool) -> Tensor:
    """The weight, and where rounding is early the offset on it: that sum is rounded to the weight's dtype."""
    weight_D = weight_D.detach().contiguous()
    return weight_D + offset if offset and not late_rounding else weight_D


def _tile(width: int) -> dict[str, int]:
    """How many rows a program takes, and with how many warps: 16 elements or so for each thread."""
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE_ELEMENTS // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": min(16, max(4, rows * columns // 512))}


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    x, weight, y, rstd, x_stride, y_stride, num_rows, width, eps, offset,
    LATE: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    rows_inside = row < num_rows
    inside = rows_inside[:, None] & (column < width)[None, :]
    v = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, column < width, other=0.0).to(tl.float32)[None, :]
    if AGAIN:
        r = tl.load(rstd + row, rows_inside, other=0.0)
    else:
        r = tl.rsqrt(tl.sum(v * v, 1) / width + eps)
        tl.store(rstd + row, r, rows_inside)
    v *= r[:, None]
    if LATE:
        v *= w + offset
    else:
        v = v.to(x.dtype.element_ty).to(tl.float32) * w
    tl.store(y + row[:, None] * y_stride + column[None, :], v.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _backward(
    dy, x, weight, rstd, dx, parts, dy_stride, x_stride, dx_stride, num_rows, width, num_tiles, offset,
    NEED_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    columns_inside = column < width
    w = tl.load(weight + column, columns_inside, other=0.0).to(tl.float32)[None, :] + offset
    part = tl.zeros((COLUMNS,), dtype=tl.float32)
    for tile in range(program, num_tiles, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        rows_inside = row < num_rows
        inside = rows_inside[:, None] & columns_inside[None, :]
        v = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
        d = tl.load(dy + row[:, None] * dy_stride + column[None, :], inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, rows_inside, other=0.0)[:, None]
        v *= r
        if NEED_WEIGHT:
            part += tl.sum(d * v, 0)
        d *= w
        d = r * (d - v * (tl.sum(d * v, 1) / width)[:, None])
        tl.store(dx + row[:, None] * dx_stride + column[None, :], d.to(dx.dtype.element_ty), inside)
    if NEED_WEIGHT:
        tl.store(parts + program * width + column, part, columns_inside)
