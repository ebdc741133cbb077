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
    loss, grad_hidden, grad_head = cross_entropy_gradients(hidden_ND, targets_N, head, head_parameters, chunk_tokens)
    return with_gradients(loss, (hidden_ND, *head_parameters), (grad_hidden, *grad_head))


def cross_entropy_gradients(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Sequence[Tensor] = (),
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """The loss of `cross_entropy_sum` cut off from the graph, and its gradients, taken in the same pass. Rank-local.

    Returns:
        loss; gradient of the hidden states (N, D), their dtype, or None where none is needed; of each of the head's
        parameters, in the dtype of the loss, or None.
    """
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    loss_sum = torch.zeros((), dtype=dtype, device=hidden_ND.device)
    need_hidden = torch.is_grad_enabled() and hidden_ND.requires_grad
    trained = [p for p in head_parameters if torch.is_grad_enabled() and p.requires_grad]
    grad_hidden = torch.zeros_like(hidden_ND, requires_grad=False) if need_hidden else None
    grad_trained = [torch.zeros_like(p, dtype=dtype, requires_grad=False) for p in trained]
    for start in range(0, targets_N.numel(), chunk_tokens):
        piece = slice(start, start + chunk_tokens)
        with torch.set_grad_enabled(need_hidden or bool(trained)):
            hidden = hidden_ND[piece].detach().requires_grad_(need_hidden)
            logits = head(hidden).to(dtype)
            loss = torch.nn.functional.cross_entropy(logits, targets_N[piece], reduction="sum")
        loss_sum += loss.detach()
        wanted = ([hidden] if need_hidden else []) + trained
        if not wanted:
            continue
        grads = list(torch.autograd.grad(loss, wanted))
        if grad_hidden is not None:
            grad_hidden[piece] = grads.pop(0)
        for total, grad in zip(grad_trained, grads, strict=True):
            total += grad
    by_parameter = {id(p): grad for p, grad in zip(trained, grad_trained, strict=True)}
    return loss_sum, grad_hidden, [by_parameter.get(id(p)) for p in head_parameters]


def with_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Put a loss into the graph whose gradients with respect to its inputs are known already. They are used up once."""
    return _WithGradients.apply(loss, list(gradients), *inputs)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were taken already, and are made only once")
        found = [
            None if gradient is None else gradient.mul_(grads[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return None, None, *found
