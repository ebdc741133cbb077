"""The LoRA linear as one autograd function: y = x W^T + b + s (dropout(x) A^T) B^T  (Hu et al. 2021, equation 3).

W is frozen and is asked for when it is needed, in forward and again in backward, by calling `read_weight`. What stays
alive in between is the input, nothing that was dequantized or gathered. Dropout is drawn again from its seed.

Shapes: T tokens, I inputs, O outputs, R the rank of the update.

    h_TR  = dropout(x) A^T
    dB_OR = s dy^T h
    dh_TR = s dy B
    dA_RI = dh^T dropout(x)
    dx_TI = dy W + dropout'(dh A)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear(
    x: Tensor,
    read_weight: Callable[[], Tensor],
    bias_O: Tensor | None,
    lora_A_RI: Tensor | None,
    lora_B_OR: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
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

    Returns:
        (..., O) in the dtype of x. Gradients of A and B come in the dtype of A and B.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x, read_weight, bias_O, lora_A_RI, lora_B_OR, scaling, dropout)
    # Drawn on the host from the default generator, so that recomputation, which restores it, draws the same.
    seed = int(torch.randint(0, 2**62, ())) if dropout > 0 and lora_A_RI is not None else 0
    y_TO = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), lora_A_RI, lora_B_OR, read_weight, bias_O, scaling, dropout, seed)
    return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def dropout_mask(like: Tensor, dropout: float, seed: int) -> Tensor:
    """Multipliers of dropout, 0 or 1/(1-p), shape, dtype and device of `like`; a function of the seed alone."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = torch.rand(like.shape, generator=generator, device=like.device) >= dropout
    return keep.to(like.dtype).div_(1.0 - dropout)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        lora_A_RI: Tensor | None,
        lora_B_OR: Tensor | None,
        read_weight: Callable[[], Tensor],
        bias_O: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        ctx.save_for_backward(x_TI)
        # Kept as the parameters themselves, not as saved tensors: recomputation compares the shapes of saved tensors, and
        # a frozen parameter that ZeRO-3 has partitioned in the meantime has shape (0,).
        ctx.lora_A, ctx.lora_B = lora_A_RI, lora_B_OR
        ctx.read_weight, ctx.scaling, ctx.dropout, ctx.seed = read_weight, scaling, dropout, seed
        weight_OI = read_weight()
        in_dtype, dtype = x_TI.dtype, weight_OI.dtype
        x_TI = x_TI.to(dtype)
        bias = None if bias_O is None else bias_O.to(dtype)
        y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias)
        del weight_OI
        if lora_A_RI is not None and lora_B_OR is not None:
            dropped_TI = x_TI * dropout_mask(x_TI, dropout, seed) if dropout > 0 else x_TI
            h_TR = dropped_TI @ lora_A_RI.to(dtype).T
            y_TO.addmm_(h_TR, lora_B_OR.to(dtype).T, alpha=scaling)
        return y_TO.to(in_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TI,) = ctx.saved_tensors
        lora_A, lora_B = ctx.lora_A, ctx.lora_B
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        grad_x = grad_A = grad_B = None
        in_dtype = x_TI.dtype
        weight_OI = ctx.read_weight() if need_x else None
        dtype = weight_OI.dtype if weight_OI is not None else grads[0].dtype
        dy_TO = grads[0].to(dtype)
        if weight_OI is not None:
            grad_x = dy_TO @ weight_OI
            del weight_OI
        if lora_A is not None and lora_B is not None:
            x_TI = x_TI.to(dtype)
            mask_TI = dropout_mask(x_TI, ctx.dropout, ctx.seed) if ctx.dropout > 0 else None
            dropped_TI = x_TI if mask_TI is None else x_TI * mask_TI
            A_RI, B_OR = lora_A.to(dtype), lora_B.to(dtype)
            if need_B:
                h_TR = dropped_TI @ A_RI.T
                grad_B = (dy_TO.T @ h_TR).to(lora_B.dtype).mul_(ctx.scaling)
            if need_A or need_x:
                dh_TR = (dy_TO @ B_OR).mul_(ctx.scaling)
                if need_A:
                    grad_A = (dh_TR.T @ dropped_TI).to(lora_A.dtype)
                if grad_x is not None:
                    if mask_TI is None:
                        grad_x.addmm_(dh_TR, A_RI)
                    else:
                        grad_x.addcmul_(dh_TR @ A_RI, mask_TI)
        return None if grad_x is None else grad_x.to(in_dtype), grad_A, grad_B, None, None, None, None, None
