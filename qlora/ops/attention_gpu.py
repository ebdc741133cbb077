"""Attention inside documents on a GPU: one call of a kernel that takes the packed row and where its documents begin.

Three kernels do it, and the first that this machine has and that gives the right numbers is used: torch's own varlen
attention, the flash-attn package's, and flex attention with a mask of documents in blocks, which is compiled first. All are
of half precision; what none of them takes (float32, dropout) is left to `ops/attention_segments.py`.
**Not yet run on a GPU.**

Shapes: T tokens, H query heads, K key heads, d and e head sizes of keys and values.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qlora.ops.documents import DocumentLayout

# query (T, H, d), key (T, K, d), value (T, K, e), layout, scaling, sliding window: to (T, H, e).
Kernel = Callable[[Tensor, Tensor, Tensor, DocumentLayout, float, "int | None"], Tensor]
# Documents and window of the row that a kernel is tried on.
TRIED_LENGTHS, TRIED_WINDOW = (5, 1, 9), 3
# Halves are rounded to 2**-9, values of size one; a kernel that sees another document, or not all of its own, is far off.
TRIED_TOLERANCE = 0.05


@dataclass(frozen=True)
class Choice:
    """Which kernel computes attention per document, and why; None for segments."""

    name: str
    kernel: Kernel | None
    reason: str


def varlen_arguments(layout: DocumentLayout, scaling: float, window: int | None) -> dict[str, Any]:
    """What torch's varlen attention is told besides query, key and value.

    Its window counts the tokens to the left of a token's own; 0 to the right makes it causal.
    """
    return {
        "cu_seq_q": layout.cu_seqlens,
        "cu_seq_k": layout.cu_seqlens,
        "max_q": max(layout.lengths),
        "max_k": max(layout.lengths),
        "scale": scaling,
        "window_size": (-1 if window is None else window - 1, 0),
    }


def flash_attn_arguments(layout: DocumentLayout, scaling: float, window: int | None) -> dict[str, Any]:
    """The same for flash-attn's `flash_attn_varlen_func` (2.3 and later)."""
    return {
        "cu_seqlens_q": layout.cu_seqlens,
        "cu_seqlens_k": layout.cu_seqlens,
        "max_seqlen_q": max(layout.lengths),
        "max_seqlen_k": max(layout.lengths),
        "softmax_scale": scaling,
        "causal": True,
        "window_size": (-1 if window is None else window - 1, 0 if window is not None else -1),
    }


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, window: int | None
) -> Tensor:
    """torch.nn.attention.varlen (torch 2.10 and later), flash attention of torch's own."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, **varlen_arguments(layout, scaling, window), enable_gqa=grouped)
    return out[0] if isinstance(out, tuple) else out


def flash_attn(
    query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, window: int | None
) -> Tensor:
    """The flash-attn package, where it is installed."""
    function = importlib.import_module("flash_attn").flash_attn_varlen_func
    out: Tensor = function(query, key, value, **flash_attn_arguments(layout, scaling, window))
    return out


def flex(query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, window: int | None) -> Tensor:
    """torch's flex attention; compiled on a GPU, where its scores would else be made whole."""
    from torch.nn.attention.flex_attention import create_block_mask

    document_T, num_tokens = layout.document_T, len(query)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_seen = (document_T[q] == document_T[k]) & (q >= k)
        return is_seen if window is None else is_seen & (q - k < window)

    mask = layout.remember(
        ("block mask", window), lambda: create_block_mask(visible, None, None, num_tokens, num_tokens, device=query.device)
    )
    out: Tensor = _flex_function(query.device.type)(
        *(t.transpose(0, 1).unsqueeze(0) for t in (query, key, value)),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


@lru_cache
def _flex_function(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


KERNELS: dict[str, Kernel] = {"torch's varlen attention": torch_varlen, "flash-attn": flash_attn, "flex attention": flex}


@lru_cache
def choose(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], grouped: bool) -> Choice:
    """The kernel that computes attention per document. Rank-local; the first call tries kernels on a few tokens.

    Args:
        dtype: of queries, keys and values.
        widths: head sizes of keys and values.
        grouped: whether several query heads share a key head.
    """
    if device.type != "cuda":
        return Choice("segments", None, f"no kernel takes a packed row on {device.type}")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("segments", None, f"kernels that take a packed row compute in half precision, not in {dtype}")
    return first_that_works(KERNELS, device, dtype, widths, grouped)


def first_that_works(
    kernels: dict[str, Kernel], device: torch.device, dtype: torch.dtype, widths: tuple[int, int], grouped: bool
) -> Choice:
    """The first kernel that gives attention per document on a few tokens, with the reasons why those before it do not."""
    reasons: list[str] = []
    for name, kernel in kernels.items():
        problem = _problem(kernel, device, dtype, widths, grouped)
        if problem is None:
            return Choice(name, kernel, "; ".join([*reasons, "tried on a few tokens and right"]))
        reasons.append(f"{name}: {problem}")
    return Choice("segments", None, "; ".join(reasons))


def _problem(kernel: Kernel, device: torch.device, dtype: torch.dtype, widths: tuple[int, int], grouped: bool) -> str | None:
    """Why a kernel cannot be used, or None. Forward alone, without a graph: it may be asked for inside of any."""
    generator = torch.Generator().manual_seed(0)
    layout = DocumentLayout.from_lengths(TRIED_LENGTHS, device)
    shapes = ((4, widths[0]), (2 if grouped else 4, widths[0]), (2 if grouped else 4, widths[1]))
    query, key, value = (torch.randn(sum(TRIED_LENGTHS), *shape, generator=generator).to(device, dtype) for shape in shapes)
    scaling = widths[0] ** -0.5
    with torch.no_grad():
        for window in (None, TRIED_WINDOW):
            try:
                found = kernel(query, key, value, layout, scaling, window).float()
            # Whatever goes wrong in another project's kernel, there is another way.
            except Exception as error:
                return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            worst = (found - _reference(query, key, value, layout, scaling, window)).abs().max().item()
            if not worst <= TRIED_TOLERANCE:
                return f"off by {worst:.2g}"
    return None


def _reference(
    query: Tensor, key: Tensor, value: Tensor, layout: DocumentLayout, scaling: float, window: int | None
) -> Tensor:
    """Attention of a few tokens (T, H, e) in fp32, with a mask of the whole row."""
    query, key, value = (t.float().transpose(0, 1) for t in (query, key, value))
    key, value = (t.repeat_interleave(len(query) // len(t), 0) for t in (key, value))
    place, document = torch.arange(query.shape[1], device=query.device), layout.document_T
    distance = place[:, None] - place[None, :]
    visible = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or len(place)))
    scores = (query @ key.transpose(1, 2) * scaling).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)
