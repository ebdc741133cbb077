"""The LoRA linear as one autograd function: y = x W^T + b + s ((dropout(x) A^T) B^T + c)  (Hu et al. 2021, equation 3).

With a magnitude m it is DoRA (Liu et al. 2024, equations 5 and 11), with V = W + s B A and its row norms |V| held constant:

    y = (m / |V|) (x W^T + s (dropout(x) A^T) B^T) + b

Dropout is of the input of A alone, as in plain LoRA. PEFT's DoRA multiplies the dropped input with W too while it trains;
without dropout, and in evaluation, both are the same function.

W is frozen and is asked for when it is needed, in forward and again in backward, by calling `read_weight`. What stays
alive in between is the input, or what it can be made from again (`ops.remake`), nothing that was dequantized or gathered.
Dropout is drawn again.

Shapes: T tokens, I inputs, O outputs, R the rank of the update.

    h_TR  = dropout(x) A^T
    dz_TO = dy (m / |V|)               (dy where there is no magnitude)
    dB_OR = s dz^T h
    dh_TR = s dz B
    dA_RI = dh^T dropout(x)
    dx_TI = dz W + dropout'(dh A)
    dc_O  = s sum_T dy
    dm_O  = sum_T dy z / |V|,          z = x W^T + s h B^T, computed again

m / |V| begins at 1 and moves by less than bf16 can show there, so what comes after x W^T is added up in fp32 and rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops import remake
from qlora.ops.dropout import Draw, draw

# Weights whose update is added to them at one time for a row norm: bounds what is made in fp32.
NORM_ELEMENTS = 1 << 20


def lora_linear(
    x: Tensor,
    read_weight: Callable[[], Tensor],
    bias_O: Tensor | None,
    lora_A_RI: Tensor | None,
    lora_B_OR: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    layer: int = 0,
    lora_bias_O: Tensor | None = None,
    magnitude_O: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear and, where A and B are given, its low-rank update. Rank-local.

    Args:
        x: (..., I), float.
        read_weight: returns W (O, I) in the dtype to compute in. Called once in forward and once in backward; it must
            read the weight's storage anew each time, because ZeRO-3 frees and regathers it in between, and may give
            out the same buffer each time: the weight is done with before the next call.
        bias_O: frozen bias or None.
        lora_A_RI, lora_B_OR: trainable, any float dtype; None for the frozen linear alone.
        scaling: s.
        dropout: probability of dropping an input of A; 0 costs nothing.
        layer: the number from which `ops.dropout` draws for this layer.
        lora_bias_O: c, the bias of B, or None; not together with a magnitude.
        magnitude_O: m, or None for plain LoRA.

    Returns:
        (..., O) in the dtype of x. Gradients of A, B, c and m come in the dtypes of these.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(
                x, read_weight, bias_O, lora_A_RI, lora_B_OR, scaling, dropout,
                layer=layer, lora_bias_O=lora_bias_O, magnitude_O=magnitude_O,
            )  # fmt: skip
    x_TI = x.reshape(-1, x.shape[-1])
    drawn = draw(len(x_TI), layer) if dropout > 0 and lora_A_RI is not None else None
    y_TO = _LoraLinear.apply(
        x_TI,
        lora_A_RI,
        lora_B_OR,
        lora_bias_O,
        magnitude_O,
        read_weight,
        bias_O,
        scaling,
        dropout,
        drawn,
    )
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def row_norms(weight_OI: Tensor, lora_A_RI: Tensor, lora_B_OR: Tensor, scaling: float) -> Tensor:
    """|W + s B A| of each row (O,), fp32 or wider, without a graph. No second weight is made.

    A row of zeros has the smallest positive number for a norm: it has no direction, and stays what it is.
    """
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    A_RI, B_OR = lora_A_RI.detach().to(wide), lora_B_OR.detach().to(wide)
    step = max(1, NORM_ELEMENTS // weight_OI.shape[1])
    norms = [
        torch.linalg.vector_norm(torch.addmm(rows.to(wide), B, A_RI, alpha=scaling), dim=1)
        for rows, B in zip(weight_OI.detach().split(step), B_OR.split(step), strict=True)
    ]
    return torch.cat(norms).clamp_(min=torch.finfo(wide).tiny)


def _sum_tokens(x_TO: Tensor) -> Tensor:
    """Sum over tokens (O,), fp32 or wider."""
    return x_TO.sum(0, dtype=torch.promote_types(x_TO.dtype, torch.float32))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        lora_A_RI: Tensor | None,
        lora_B_OR: Tensor | None,
        lora_bias_O: Tensor | None,
        magnitude_O: Tensor | None,
        read_weight: Callable[[], Tensor],
        bias_O: Tensor | None,
        scaling: float,
        dropout: float,
        drawn: Draw | None,
    ) -> Tensor:
        ctx.x_shape, ctx.x_dtype, ctx.remake = x_TI.shape, x_TI.dtype, None
        # dx alone needs no input: it is dz W.
        if drawn is not None or any(ctx.needs_input_grad[i] for i in (1, 2, 4)):
            offer = remake.find(x_TI)
            if offer is None:
                ctx.save_for_backward(x_TI)
            else:
                ctx.save_for_backward(*offer.inputs)
                ctx.remake = offer.remake
                ctx.remake.add_user()
        # Kept as the parameters themselves, not as saved tensors: recomputation compares the shapes of saved tensors, and
        # a frozen parameter that ZeRO-3 has partitioned in the meantime has shape (0,).
        ctx.lora_A, ctx.lora_B, ctx.lora_bias, ctx.magnitude = lora_A_RI, lora_B_OR, lora_bias_O, magnitude_O
        ctx.read_weight, ctx.scaling, ctx.dropout, ctx.drawn = read_weight, scaling, dropout, drawn
        weight_OI = read_weight()
        in_dtype, dtype = x_TI.dtype, weight_OI.dtype
        x_TI = x_TI.to(dtype)
        bias = None if bias_O is None else bias_O.to(dtype)
        y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias if magnitude_O is None else None)
        if lora_A_RI is None or lora_B_OR is None:
            return y_TO.to(in_dtype)
        norms_O = None if magnitude_O is None else row_norms(weight_OI, lora_A_RI, lora_B_OR, scaling)
        del weight_OI
        dropped_TI = x_TI if drawn is None else x_TI * drawn.mask(x_TI, dropout)
        h_TR = dropped_TI @ lora_A_RI.to(dtype).T
        if norms_O is not None:
            ctx.norms_O, dtype = norms_O, norms_O.dtype
            y_TO = y_TO.to(dtype)
        y_TO.addmm_(h_TR.to(dtype), lora_B_OR.to(dtype).T, alpha=scaling)
        if magnitude_O is not None and norms_O is not None:
            y_TO.mul_(magnitude_O / norms_O)
            if bias is not None:
                y_TO.add_(bias)
        elif lora_bias_O is not None:
            y_TO.add_(lora_bias_O.to(dtype), alpha=scaling)
        return y_TO.to(in_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lora_A, lora_B, lora_bias, magnitude = ctx.lora_A, ctx.lora_B, ctx.lora_bias, ctx.magnitude
        need_x, need_A, need_B, need_c, need_m = ctx.needs_input_grad[:5]
        grad_x = grad_A = grad_B = grad_c = grad_m = None
        saved = ctx.saved_tensors
        x_TI = saved[0] if ctx.remake is None and saved else None
        if ctx.remake is not None:
            x_TI = ctx.remake.take(saved).view(ctx.x_shape)
        weight_OI = ctx.read_weight() if need_x or need_m else None
        dtype = weight_OI.dtype if weight_OI is not None else grads[0].dtype
        dy_TO = grads[0].to(dtype)
        if need_c:
            grad_c = (_sum_tokens(dy_TO) * ctx.scaling).to(lora_bias.dtype)
        dz_TO = dy_TO if magnitude is None else dy_TO.clone().mul_(magnitude / ctx.norms_O)
        z_TO = None
        if need_m and weight_OI is not None and x_TI is not None:
            z_TO = (x_TI.to(dtype) @ weight_OI.T).to(ctx.norms_O.dtype)
        if need_x and weight_OI is not None:
            grad_x = dz_TO @ weight_OI
        del weight_OI
        if lora_A is not None and lora_B is not None:
            mask_TI = dropped_TI = None
            if x_TI is not None:
                x_TI = x_TI.to(dtype)
                mask_TI = None if ctx.drawn is None else ctx.drawn.mask(x_TI, ctx.dropout)
                dropped_TI = x_TI if mask_TI is None else x_TI * mask_TI
            A_RI, B_OR = lora_A.to(dtype), lora_B.to(dtype)
            if (need_B or z_TO is not None) and dropped_TI is not None:
                h_TR = dropped_TI @ A_RI.T
                if need_B:
                    grad_B = (dz_TO.T @ h_TR).to(lora_B.dtype).mul_(ctx.scaling)
                if z_TO is not None:
                    z_TO.addmm_(h_TR.to(z_TO.dtype), lora_B.to(z_TO.dtype).T, alpha=ctx.scaling)
                    grad_m = (_sum_tokens(z_TO.mul_(dy_TO)) / ctx.norms_O).to(magnitude.dtype)
            if need_A or need_x:
                dh_TR = (dz_TO @ B_OR).mul_(ctx.scaling)
                if need_A and dropped_TI is not None:
                    grad_A = (dh_TR.T @ dropped_TI).to(lora_A.dtype)
                if grad_x is not None:
                    if mask_TI is None:
                        grad_x.addmm_(dh_TR, A_RI)
                    else:
                        grad_x.addcmul_(dh_TR @ A_RI, mask_TI)
        grad_x = None if grad_x is None else grad_x.to(ctx.x_dtype)
        return grad_x, grad_A, grad_B, grad_c, grad_m, None, None, None, None, None
