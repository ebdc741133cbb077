"""Embeddings as autograd functions: with a low-rank update (Hu et al. 2021, equation 3), and with some rows of their own.

    y = e (W[x] + s A^T[x] B^T)                                    low rank
    y = e (m / |V|) (W[x] + s A^T[x] B^T),   V = W^T + s B A       DoRA (Liu et al. 2024, equations 5 and 11), |V| constant
    y = e (rows[x] where x is one of theirs, else W[x])            rows

e is the factor that some architectures multiply embeddings by. W is frozen and asked for anew in backward where it is
needed; what stays alive in between are the token ids. Gradients have the size of A and B, or of the rows, never of W.

Shapes: T tokens, V vocabulary, H hidden size, R the rank of the update, N rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Weights whose update is added to them at one time for a norm: bounds what is made in fp32.
NORM_ELEMENTS = 1 << 20


def lora_embedding(
    ids: Tensor,
    look_up: Callable[[Tensor], Tensor],
    lora_A_RV: Tensor,
    lora_B_HR: Tensor,
    scaling: float,
    embed_scale: Tensor | float = 1.0,
    *,
    magnitude_H: Tensor | None = None,
    read_weight: Callable[[], Tensor] | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    anchor: Tensor | None = None,
) -> Tensor:
    """Apply a frozen embedding and its low-rank update. Rank-local.

    Args:
        ids: token ids (...), integers.
        look_up: ids to e W[x] (..., H); called in forward, and in backward where a magnitude needs it.
        lora_A_RV, lora_B_HR: trainable, any float dtype.
        scaling, embed_scale: s and e.
        magnitude_H, read_weight: m, and what returns W (V, H) for the norms; None for plain LoRA.
        padding_idx, scale_grad_by_freq: as torch's Embedding has them, of the gradient of A.
        anchor: any tensor that asks for a gradient, which is zero and is made together with those of A and B.

    Returns:
        (..., H) in the dtype of what `look_up` returns.
    """
    pad = -1 if padding_idx is None else padding_idx
    return _LoraEmbedding.apply(
        anchor, lora_A_RV, lora_B_HR, magnitude_H, ids, look_up, read_weight, scaling, embed_scale, pad, scale_grad_by_freq
    )


def column_norms(weight_VH: Tensor, lora_A_RV: Tensor, lora_B_HR: Tensor, scaling: float) -> Tensor:
    """|W^T + s B A| of each feature over the vocabulary (H,), fp32 or wider, without a graph. No second weight is made.

    A feature of zeros has the smallest positive number for a norm, as in `ops.lora_linear.row_norms`.
    """
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    A_RV, B_HR = lora_A_RV.detach().to(wide), lora_B_HR.detach().to(wide)
    step = max(1, NORM_ELEMENTS // weight_VH.shape[1])
    squares_H = torch.zeros(weight_VH.shape[1], dtype=wide, device=weight_VH.device)
    for rows_vH, A_Rv in zip(weight_VH.detach().split(step), A_RV.split(step, dim=1), strict=True):
        squares_H += torch.addmm(rows_vH.to(wide), A_Rv.T, B_HR.T, alpha=scaling).square_().sum(0)
    return squares_H.sqrt_().clamp_(min=torch.finfo(wide).tiny)


class _LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        lora_A_RV: Tensor,
        lora_B_HR: Tensor,
        magnitude_H: Tensor | None,
        ids: Tensor,
        look_up: Callable[[Tensor], Tensor],
        read_weight: Callable[[], Tensor] | None,
        scaling: float,
        embed_scale: Tensor | float,
        padding_idx: int,
        scale_grad_by_freq: bool,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        # Parameters as themselves, not as saved tensors: see `ops.lora_linear`.
        ctx.lora_A, ctx.lora_B, ctx.magnitude, ctx.anchor = lora_A_RV, lora_B_HR, magnitude_H, anchor
        ctx.look_up, ctx.factor = look_up, scaling * embed_scale
        ctx.padding_idx, ctx.scale_grad_by_freq = padding_idx, scale_grad_by_freq
        out = look_up(ids)
        y_TH = out.reshape(-1, out.shape[-1])
        y_TH = _add_low_rank(y_TH, ids, lora_A_RV, lora_B_HR, ctx.factor)
        if magnitude_H is not None and read_weight is not None:
            ctx.norms_H = column_norms(read_weight(), lora_A_RV, lora_B_HR, scaling)
            y_TH = y_TH * (magnitude_H / ctx.norms_H).to(y_TH.dtype)
        return y_TH.reshape(out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        lora_A, lora_B, magnitude = ctx.lora_A, ctx.lora_B, ctx.magnitude
        need_anchor, need_A, need_B, need_m = ctx.needs_input_grad[:4]
        dy_TH = grads[0].reshape(-1, grads[0].shape[-1])
        dz_TH = dy_TH if magnitude is None else dy_TH * (magnitude / ctx.norms_H).to(dy_TH.dtype)
        grad_A = grad_B = grad_m = None
        if need_B:
            grad_B = (dz_TH.T @ _looked_up(lora_A, ids, ctx.factor, dz_TH.dtype)).to(lora_B.dtype)
        if need_A:
            wide = torch.promote_types(dz_TH.dtype, lora_A.dtype)
            dh_TR = (dz_TH @ lora_B.to(dz_TH.dtype)).to(wide) * ctx.factor
            grad_A = _into_rows(dh_TR, ids.reshape(-1), lora_A.shape[1], ctx.padding_idx, ctx.scale_grad_by_freq)
            grad_A = grad_A.T.to(lora_A.dtype)
        if need_m:
            wide = ctx.norms_H.dtype
            z_TH = _add_low_rank(ctx.look_up(ids).reshape(dy_TH.shape), ids, lora_A, lora_B, ctx.factor)
            grad_m = (torch.einsum("th,th->h", dy_TH.to(wide), z_TH.to(wide)) / ctx.norms_H).to(magnitude.dtype)
        grad_anchor = torch.zeros_like(ctx.anchor) if need_anchor else None
        return grad_anchor, grad_A, grad_B, grad_m, None, None, None, None, None, None, None


def _looked_up(lora_A_RV: Tensor, ids: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """e s A^T[x] (T, R)."""
    wide = torch.promote_types(lora_A_RV.dtype, dtype)
    return (lora_A_RV.index_select(1, ids.reshape(-1)).T.to(wide) * factor).to(dtype)


def _add_low_rank(y_TH: Tensor, ids: Tensor, lora_A_RV: Tensor, lora_B_HR: Tensor, factor: Tensor | float) -> Tensor:
    dtype = y_TH.dtype
    return torch.addmm(y_TH, _looked_up(lora_A_RV, ids, factor, dtype), lora_B_HR.to(dtype).T)


def _into_rows(grad_TR: Tensor, ids_T: Tensor, num_rows: int, padding_idx: int = -1, by_frequency: bool = False) -> Tensor:
    """The gradient of a table of which rows were looked up (num_rows, R)."""
    return torch.ops.aten.embedding_dense_backward(grad_TR, ids_T, num_rows, padding_idx, by_frequency)


def embedding_with_rows(
    ids: Tensor,
    look_up: Callable[[Tensor], Tensor],
    rows_NH: Tensor,
    sorted_ids_N: Tensor,
    order_N: Tensor,
    embed_scale: Tensor | float = 1.0,
    *,
    anchor: Tensor | None = None,
) -> Tensor:
    """Apply a frozen embedding, some of whose rows are replaced by trainable ones. Rank-local.

    Args:
        ids, look_up, embed_scale, anchor: as in `lora_embedding`; `look_up` is called in forward alone.
        rows_NH: trainable, any float dtype.
        sorted_ids_N: the ids that have rows of their own, ascending.
        order_N: which of the rows each of the sorted ids has.

    Returns:
        (..., H) in the dtype of what `look_up` returns.
    """
    return _EmbeddingWithRows.apply(anchor, rows_NH, ids, look_up, sorted_ids_N, order_N, embed_scale)


class _EmbeddingWithRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        rows_NH: Tensor,
        ids: Tensor,
        look_up: Callable[[Tensor], Tensor],
        sorted_ids_N: Tensor,
        order_N: Tensor,
        embed_scale: Tensor | float,
    ) -> Tensor:
        place = torch.searchsorted(sorted_ids_N, ids).clamp_(max=sorted_ids_N.numel() - 1)
        own = sorted_ids_N[place] == ids
        index = order_N[place]
        ctx.save_for_backward(own, index)
        ctx.rows, ctx.anchor, ctx.embed_scale = rows_NH, anchor, embed_scale
        y = look_up(ids)
        replaced = rows_NH.detach().to(y.dtype)[index] * embed_scale
        return torch.where(own.unsqueeze(-1), replaced, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own, index = ctx.saved_tensors
        rows = ctx.rows
        grad_rows = None
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(grads[0].dtype, rows.dtype)
            taken = grads[0][own].to(wide) * ctx.embed_scale
            grad_rows = _into_rows(taken, index[own], rows.shape[0]).to(rows.dtype)
        grad_anchor = torch.zeros_like(ctx.anchor) if ctx.needs_input_grad[0] else None
        return grad_anchor, grad_rows, None, None, None, None, None
