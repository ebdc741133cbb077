"""Rotary position embedding on GPUs: queries and keys in one launch, arithmetic in fp32, rounded once.

A program takes one token and a few heads of either, so that cos and sin are read once for all of them. Strides are free
but for a head's own features, which lie side by side: what attention is handed is a view of what the projections made.

Shapes: B rows, H heads, T tokens, d features of a head, r <= d of them turned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a head's half times heads that a program takes.
TILE_ELEMENTS = 1 << 10


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """As `ops.rotary.rotate`."""
    q, k = _heads(q), _heads(k)
    num_rows, q_heads, num_tokens, width = q.shape
    k_heads, turned = k.shape[1], cos.shape[-1]
    cos, sin = (x.expand(num_rows, num_tokens, turned) for x in (_heads(cos), _heads(sin)))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    half = triton.next_power_of_2(turned // 2)
    heads = min(max(1, TILE_ELEMENTS // half), triton.next_power_of_2(max(q_heads, k_heads)))
    q_tiles, k_tiles = triton.cdiv(q_heads, heads), triton.cdiv(k_heads, heads)
    _rotate[(num_rows * num_tokens, q_tiles + k_tiles)](
        q, k, q_out, k_out, cos, sin,
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        num_tokens, q_heads, k_heads, q_tiles, turned // 2, width,
        BACKWARD=backward, HEADS=heads, HALF=half, REST=triton.next_power_of_2(width - turned) if width > turned else 0,
    )  # fmt: skip
    return q_out, k_out


def _heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["num_tokens", "q_heads", "k_heads", "q_tiles"])
def _rotate(
    q, k, q_out, k_out, cos, sin,
    q_row, q_head, q_token, k_row, k_head, k_token,
    qo_row, qo_head, qo_token, ko_row, ko_head, ko_token,
    cos_row, cos_token, sin_row, sin_token,
    num_tokens, q_heads, k_heads, q_tiles, half, width,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row, token = program // num_tokens, program % num_tokens
    at = tl.arange(0, HALF)
    inside = at < half
    cos += row * cos_row + token * cos_token
    sin += row * sin_row + token * sin_token
    c1 = tl.load(cos + at, inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half + at, inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + at, inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half + at, inside, other=0.0).to(tl.float32)
    if BACKWARD:
        s1, s2 = -s2, -s1
    if tile < q_tiles:
        q += row * q_row + token * q_token
        q_out += row * qo_row + token * qo_token
        _turn(q, q_out, q_head, qo_head, tile, q_heads, c1, c2, s1, s2, half, width, HEADS, HALF, REST)
    else:
        k += row * k_row + token * k_token
        k_out += row * ko_row + token * ko_token
        _turn(k, k_out, k_head, ko_head, tile - q_tiles, k_heads, c1, c2, s1, s2, half, width, HEADS, HALF, REST)


@triton.jit
def _turn(
    x, y, x_head, y_head, tile, num_heads, c1, c2, s1, s2, half, width,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A tile of heads of one token: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; what lies behind is copied."""
    head = tile * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (at < half)
    x += head * x_head
    y += head * y_head
    x1 = tl.load(x + at, inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + half + at, inside, other=0.0).to(tl.float32)
    y1 = x1 * c1[None, :] - x2 * s1[None, :]
    y2 = x2 * c2[None, :] + x1 * s2[None, :]
    tl.store(y + at, y1.to(y.dtype.element_ty), inside)
    tl.store(y + half + at, y2.to(y.dtype.element_ty), inside)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < num_heads) & (rest < width)
        tl.store(y + rest, tl.load(x + rest, inside), inside)
