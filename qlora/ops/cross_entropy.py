"""Cross entropy over hidden states, piece by piece, with the gradient made in the same pass.

The logits of all target tokens never exist at once: for each piece of tokens the head is applied, the loss is summed in
fp32, the gradient of the logits takes their place (`ops/softmax_loss.py`), and from it come at once the gradients of the
piece's hidden states and of what of the head trains. Backward only multiplies by the incoming factor.

A head that is a plain product with a weight, frozen or trained, is two or three products a piece, without autograd and with
one buffer for all pieces. Any other (a LoRA layer, rows of tokens) is differentiated by autograd.

Shapes: N target tokens, n of a piece, D hidden size, V vocabulary.

    logits_nV = h W^T + b        dh_nD = dlogits W        dW_VD += dlogits^T h        db_V += sum_n dlogits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops.softmax_loss import LogitForm, softmax_loss_

# Tokens whose logits exist at once. On two CPU cores 256 took the least time at vocabularies of 49k and 150k (64: a third
# more, because the head's weight is read for every piece). On GPUs 1024 tokens are what fills one with the second product.
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
PLAIN = LogitForm()

Gradients = tuple[Tensor, Tensor | None, list[Tensor | None]]


def cross_entropy_sum(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Sequence[Tensor] = (),
    chunk_tokens: int | None = None,
    form: LogitForm = PLAIN,
) -> Tensor:
    """Sum over tokens of -log softmax(head(hidden))[target], in fp32. Rank-local.

    Args:
        hidden_ND: hidden states at target positions only, float.
        targets_N: int64 token ids, all valid.
        head: hidden states (n, D) to logits (n, V); differentiable in its input and in `head_parameters`. What it returns is
            its own to give away: it is overwritten.
        head_parameters: trainable tensors that `head` reads.
        chunk_tokens: tokens whose logits exist at once; None for what suits the device.
        form: what is made of the logits before the loss.

    Returns:
        fp32 scalar (float64 where the hidden states are). Zero, with zero gradients, where there are no targets.
    """
    loss, grad_hidden, grad_head = cross_entropy_gradients(hidden_ND, targets_N, head, head_parameters, chunk_tokens, form)
    return with_gradients(loss, (hidden_ND, *head_parameters), (grad_hidden, *grad_head))


def cross_entropy_gradients(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    head_parameters: Sequence[Tensor] = (),
    chunk_tokens: int | None = None,
    form: LogitForm = PLAIN,
) -> Gradients:
    """The loss of `cross_entropy_sum` cut off from the graph, and its gradients, taken in the same pass. Rank-local.

    Returns:
        loss; gradient of the hidden states (N, D), their dtype, or None where none is needed; of each of the head's
        parameters, in the dtype of the loss, or None.
    """
    dtype = _loss_dtype(hidden_ND)
    need_hidden = torch.is_grad_enabled() and hidden_ND.requires_grad
    trained = [p for p in head_parameters if torch.is_grad_enabled() and p.requires_grad]
    grad_hidden = torch.empty_like(hidden_ND, requires_grad=False) if need_hidden else None
    grad_trained = [torch.zeros_like(p, dtype=dtype, requires_grad=False) for p in trained]
    losses_N = torch.empty(targets_N.numel(), dtype=dtype, device=hidden_ND.device)
    for piece in _pieces(targets_N, chunk_tokens):
        with torch.set_grad_enabled(need_hidden or bool(trained)):
            hidden = hidden_ND[piece].detach().requires_grad_(need_hidden)
            logits = head(hidden)
            if dtype == torch.float64:
                logits = logits.to(dtype)
        wanted = ([hidden] if need_hidden else []) + trained
        # Where the head keeps its own output for its backward pass, autograd notices that it was overwritten.
        dlogits = logits.detach()
        losses_N[piece] = softmax_loss_(dlogits, targets_N[piece], form, with_gradient=bool(wanted))
        if not wanted:
            continue
        grads = list(torch.autograd.grad(logits, wanted, dlogits))
        if grad_hidden is not None:
            grad_hidden[piece] = grads.pop(0)
        for total, grad in zip(grad_trained, grads, strict=True):
            total += grad
    by_parameter = {id(p): grad for p, grad in zip(trained, grad_trained, strict=True)}
    return losses_N.sum(), grad_hidden, [by_parameter.get(id(p)) for p in head_parameters]


@torch.no_grad()
def linear_cross_entropy_gradients(
    hidden_ND: Tensor,
    targets_N: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    chunk_tokens: int | None = None,
    form: LogitForm = PLAIN,
    *,
    needs: tuple[bool, bool, bool] = (True, False, False),
) -> Gradients:
    """What `cross_entropy_gradients` gives for the head h W^T + b, without autograd. Rank-local.

    Args:
        hidden_ND: hidden states at target positions only, float; multiplied in the weight's dtype.
        weight_VD: float. Read from here on until this returns, never kept.
        bias_V: float, or None.
        needs: whether the gradients of hidden states, weight and bias are wanted.

    Returns:
        loss, fp32 or float64, cut off from the graph; gradient of the hidden states in their dtype, or None; of weight and
        bias in the dtype of the loss, or None.
    """
    dtype, num_tokens, num_ids = weight_VD.dtype, targets_N.numel(), len(weight_VD)
    loss_dtype = _loss_dtype(hidden_ND)
    # Products of float64 hidden states are as wide as the weight's dtype, and the loss of them as wide as they are.
    logit_dtype = torch.promote_types(dtype, torch.float64) if loss_dtype == torch.float64 else dtype
    grad_hidden = torch.empty_like(hidden_ND) if needs[0] else None
    grad_weight = torch.zeros_like(weight_VD, dtype=loss_dtype) if needs[1] else None
    grad_bias = torch.zeros(num_ids, dtype=loss_dtype, device=weight_VD.device) if needs[2] else None
    bias = None if bias_V is None else bias_V.to(dtype)
    losses_N = torch.empty(num_tokens, dtype=loss_dtype, device=hidden_ND.device)
    size = min(num_tokens, chunk_tokens or _chunk_tokens(hidden_ND))
    buffer_nV = torch.empty((size, num_ids), dtype=dtype, device=hidden_ND.device)
    for piece in _pieces(targets_N, size or 1):
        hidden_nD, targets_n = hidden_ND[piece].to(dtype), targets_N[piece]
        logits_nV = buffer_nV[: len(targets_n)]
        if bias is None:
            torch.mm(hidden_nD, weight_VD.T, out=logits_nV)
        else:
            torch.addmm(bias, hidden_nD, weight_VD.T, out=logits_nV)
        logits_nV = logits_nV.to(logit_dtype)
        losses_N[piece] = softmax_loss_(logits_nV, targets_n, form, with_gradient=any(needs))
        dlogits_nV = logits_nV.to(dtype)
        if grad_hidden is not None:
            grad_hidden[piece] = dlogits_nV @ weight_VD
        if grad_weight is not None:
            grad_weight.addmm_(dlogits_nV.T.to(loss_dtype), hidden_nD.to(loss_dtype))
        if grad_bias is not None:
            grad_bias += dlogits_nV.sum(0, dtype=loss_dtype)
    return losses_N.sum(), grad_hidden, [grad_weight, grad_bias]


def _loss_dtype(hidden_ND: Tensor) -> torch.dtype:
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def _chunk_tokens(hidden_ND: Tensor) -> int:
    return CHUNK_TOKENS.get(hidden_ND.device.type, CHUNK_TOKENS["cuda"])


def _pieces(targets_N: Tensor, chunk_tokens: int | None) -> Iterator[slice]:
    size = chunk_tokens or _chunk_tokens(targets_N)
    for start in range(0, targets_N.numel(), size):
        yield slice(start, start + size)


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
