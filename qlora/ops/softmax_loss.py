"""Cross entropy of each row of logits, with the gradient written over the logits.

The logits come as the head's product gave them, in its dtype. A few rows at a time are widened to fp32 in a buffer that the
cache holds; factor, soft cap, softmax and gradient are computed there, and the gradient takes the logits' place. So a logit
is read and written once, and nothing of the logits' size is made beside them.

    a   = factor * logits                            l = soft_cap * tanh(a / soft_cap), or a where there is no cap
    lse = log sum_V exp(l)                           cross entropy = lse - l[target]
    dl  = softmax(l) (1 + 2 z lse) - onehot(target)  with z the coefficient of the z-loss, z lse^2
    dlogits = dl (1 - (l / soft_cap)^2) factor

The z-loss (PaLM, Chowdhery et al. 2022, section 5) is in the gradient alone: what is reported stays the cross entropy.

Shapes: N tokens, V vocabulary, n rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.ops.scratch import buffers

# Elements widened at once. On CPUs two buffers of them stay in the cache: 2**18 to 2**21 took the same time there, one row
# at a time a third more; the fewer blocks, the less often threads wait for one another. On GPUs they only bound what is made
# in fp32.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}


@dataclass(frozen=True)
class LogitForm:
    """What lies between the head's product and the loss.

    Attributes:
        factor: the product is multiplied by it.
        soft_cap: then l becomes soft_cap * tanh(l / soft_cap); None for none.
        z_loss: coefficient of logsumexp^2, added to what is differentiated for every target token; not to what is reported.
    """

    factor: float = 1.0
    soft_cap: float | None = None
    z_loss: float = 0.0

    def apply(self, logits: Tensor) -> Tensor:
        """The logits as the model states them, any shape, in the dtype of `logits`; differentiable."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


def softmax_loss_(logits_NV: Tensor, targets_N: Tensor, form: LogitForm, *, with_gradient: bool) -> Tensor:
    """Cross entropy of each token, nats. Rank-local, without a graph.

    Args:
        logits_NV: what the head's product gave; float, each row contiguous. With a gradient, overwritten by that of the sum
            of the losses (z-loss included) with respect to it; left alone otherwise.
        targets_N: int64, within the vocabulary.

    Returns:
        (N,), fp32, or float64 where the logits are.
    """
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    num_tokens, num_ids = logits_NV.shape
    losses_N = torch.empty(num_tokens, dtype=wide, device=logits_NV.device)
    step = max(1, min(num_tokens, BLOCK_ELEMENTS.get(logits_NV.device.type, BLOCK_ELEMENTS["cuda"]) // num_ids))
    block_nV, softmax_nV = buffers(2, (step, num_ids), wide, logits_NV.device)
    for rows in _slices(num_tokens, step):
        own_nV, targets_n1 = logits_NV[rows], targets_N[rows].unsqueeze(1)
        l_nV, p_nV = block_nV[: len(own_nV)], softmax_nV[: len(own_nV)]
        l_nV.copy_(own_nV)
        if form.factor != 1.0:
            l_nV.mul_(form.factor)
        if form.soft_cap is not None:
            l_nV.div_(form.soft_cap).tanh_().mul_(form.soft_cap)
        top_n1 = l_nV.amax(1, keepdim=True)
        torch.softmax(l_nV, 1, out=p_nV)
        # The largest of the softmax is exp(top - lse), and never underflows.
        top_less_lse_n1 = p_nV.amax(1, keepdim=True).log_()
        losses_N[rows] = (top_n1 - l_nV.gather(1, targets_n1) - top_less_lse_n1).squeeze(1)
        if not with_gradient:
            continue
        if form.z_loss:
            p_nV.mul_((top_n1 - top_less_lse_n1).mul_(2 * form.z_loss).add_(1))
        p_nV.scatter_(1, targets_n1, p_nV.gather(1, targets_n1) - 1)
        if form.soft_cap is not None:
            p_nV.addcmul_(p_nV, l_nV.div_(form.soft_cap).square_(), value=-1)
        if form.factor != 1.0:
            p_nV.mul_(form.factor)
        own_nV.copy_(p_nV)
    return losses_N


def _slices(num_rows: int, step: int) -> Iterator[slice]:
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
