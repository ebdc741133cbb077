"""Cross entropy over hidden states, piece by piece, with the gradient made in the same pass.

The logits of all target tokens never exist at once: for each piece of tokens the head is applied, the loss is summed
in fp32, and the gradient with respect to the piece's hidden states (and to the head's own trainable parameters) is
taken at once. Backward only multiplies by the incoming factor.

Shapes: N target tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy_sum(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Sequence[Tensor] = (),
    chunk_tokens: int = 1024,
) -> Tensor:
    """Sum over tokens of -log softmax(head(hidden))[target], in fp32. Rank-local.

    Args:
        hidden_ND: hidden states at target positions only, float.
        targets_N: int64 token ids, all valid.
        head: hidden states (n, D) to logits (n, V); differentiable in its input and in `head_parameters`.
        head_parameters: trainable tensors that `head` reads.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        fp32 scalar (float64 where the hidden states are). Zero, with zero gradients, where there are no targets.
    """
    if not torch.is_grad_enabled():
        # Inside an autograd function a parameter still says that it needs a gradient.
        hidden_ND, head_parameters = hidden_ND.detach(), ()
    return _CrossEntropySum.apply(hidden_ND, targets_N, head, chunk_tokens, *head_parameters)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        targets_N: Tensor,
        head: Callable[[Tensor], Tensor],
        chunk_tokens: int,
        *head_parameters: Tensor,
    ) -> Tensor:
        dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        loss_sum = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        need_hidden, need_head = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        grad_hidden = torch.zeros_like(hidden_ND) if need_hidden else None
        grad_head = [torch.zeros_like(p, dtype=dtype) for p in head_parameters] if need_head else []
        for start in range(0, targets_N.numel(), chunk_tokens):
            piece = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(need_hidden or need_head):
                hidden = hidden_ND[piece].detach().requires_grad_(need_hidden)
                logits = head(hidden).to(dtype)
                loss = torch.nn.functional.cross_entropy(logits, targets_N[piece], reduction="sum")
            loss_sum += loss.detach()
            wanted = ([hidden] if need_hidden else []) + (list(head_parameters) if need_head else [])
            if not wanted:
                continue
            grads = list(torch.autograd.grad(loss, wanted))
            if grad_hidden is not None:
                grad_hidden[piece] = grads.pop(0)
            for total, grad in zip(grad_head, grads, strict=True):
                total += grad
        ctx.grad_hidden, ctx.grad_head = grad_hidden, grad_head
        ctx.head_dtypes = [p.dtype for p in head_parameters]
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_head is None:
            raise RuntimeError("the gradients of this loss were taken already, and are made only once")
        grad_hidden = None if ctx.grad_hidden is None else ctx.grad_hidden.mul_(grads[0])
        grad_head: list[Tensor | None] = [
            (total * grads[0]).to(dtype) for total, dtype in zip(ctx.grad_head, ctx.head_dtypes, strict=False)
        ]
        grad_head += [None] * (len(ctx.head_dtypes) - len(grad_head))
        ctx.grad_hidden = ctx.grad_head = None
        return grad_hidden, None, None, None, *grad_head
