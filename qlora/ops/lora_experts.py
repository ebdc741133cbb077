"""Linear layers of experts, each with its own low-rank update, over tokens that are grouped by expert.

    y_s = W_e x_s + b_e + s B_e A_e dropout(x_s),    e the expert that the pair s of a token and one of its choices goes to

A and B lie in their parameters as in an adapter file (PEFT's ParamWrapper): A (E R, I) expert after expert, B (O, R E) read
as (O, R, E). No W + s B A and no s B A of all experts is made. What stays alive from forward to backward is the input and
the order of the pairs; W is asked for again in backward. Every expert has a gradient: of one that no token was sent to it is
zero, so that ranks whose tokens went elsewhere take part in the same reductions.

Shapes: T tokens, K choices of each, S = T K pairs sorted by expert, E experts, I inputs, O outputs, R rank of one update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.ops.dropout import dropout_mask


class Routing:
    """The order in which pairs of a token and a chosen expert lie expert by expert.

    Attributes:
        perm_S: which of the T K pairs, token after token, each sorted pair is; int64.
        ends_E: where the pairs of each expert end; int32.
        num_choices: K.
        bounds: 0 and the ends on the host, once a loop has asked for them: the one synchronization there is.
    """

    def __init__(self, perm_S: Tensor, ends_E: Tensor, num_choices: int, bounds: list[int] | None = None) -> None:
        self.perm_S, self.ends_E, self.num_choices, self.bounds = perm_S, ends_E, num_choices, bounds

    def segments(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has pairs, and which."""
        if self.bounds is None:
            self.bounds = [0, *self.ends_E.tolist()]
        for expert, (start, end) in enumerate(pairwise(self.bounds)):
            if start < end:
                yield expert, slice(start, end)

    def experts_S(self) -> Tensor:
        """The expert of each sorted pair."""
        return torch.searchsorted(self.ends_E, torch.arange(len(self.perm_S), device=self.ends_E.device), right=True)

    def spread(self, x_TD: Tensor) -> Tensor:
        """Rows of tokens -> rows of sorted pairs."""
        return x_TD[self.perm_S // self.num_choices]

    def gather(self, y_SD: Tensor) -> Tensor:
        """Rows of sorted pairs -> the sum over each token's choices, in an order of its own: no atomic additions."""
        inverse_S = torch.empty_like(self.perm_S)
        inverse_S[self.perm_S] = torch.arange(len(self.perm_S), device=self.perm_S.device)
        return y_SD[inverse_S].unflatten(0, (-1, self.num_choices)).sum(dim=1)


def route(top_k_index_TK: Tensor, num_experts: int) -> Routing:
    """Sort the pairs by expert. Rank-local, without waiting for the device.

    Args:
        top_k_index_TK: the experts chosen for each token, integers below `num_experts`.
    """
    experts_S, perm_S = torch.sort(top_k_index_TK.reshape(-1), stable=True)
    every_E = torch.arange(num_experts, device=experts_S.device, dtype=experts_S.dtype)
    ends_E = torch.searchsorted(experts_S, every_E, right=True, out_int32=True)
    return Routing(perm_S, ends_E, top_k_index_TK.shape[-1])


def lora_experts_linear(
    x: Tensor,
    routing: Routing,
    read_weight: Callable[[], Tensor],
    bias_EO: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    from_tokens: bool,
) -> Tensor:
    """Apply the experts' frozen linear layers and, where A and B are given, their updates. Rank-local.

    Args:
        x: (T, I) if `from_tokens`, each then goes to K experts; else (S, I) in the routing's order.
        read_weight: returns W (E, O, I), any strides, in the dtype to compute in. Called once in forward and once in
            backward; it must read the weight's storage anew each time, because ZeRO-3 frees and regathers it in between.
        bias_EO: frozen bias or None.
        lora_A, lora_B: (E R, I) and (O, R E), any float dtype; None for the frozen layers alone.
        dropout: probability of dropping an input of A; drawn for each pair.

    Returns:
        (S, O) in the dtype of x. Gradients of A and B come in their dtypes.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return lora_experts_linear(
                x, routing, read_weight, bias_EO, lora_A, lora_B, scaling, dropout, from_tokens=from_tokens
            )
    # Drawn on the host from the default generator, so that recomputation, which restores it, draws the same.
    seed = int(torch.randint(0, 2**62, ())) if dropout > 0 and lora_A is not None else 0
    y_SO: Tensor = _LoraExpertsLinear.apply(
        x, lora_A, lora_B, routing, read_weight, bias_EO, scaling, dropout, seed, from_tokens
    )
    return y_SO


def per_expert(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Views of the factors (E R, I) and (O, R E) by expert: (E, R, I) and (E, O, R)."""
    return lora_A.unflatten(0, (num_experts, -1)), lora_B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def expert_delta(
    lora_A: Tensor,
    lora_B: Tensor,
    num_experts: int,
    r: int,
    scaling: float,
    transposed: bool,
    experts: slice = slice(None),
) -> Tensor:
    """s B_e A_e of some experts, multiplied in fp32 or wider, without a graph.

    Args:
        lora_A, lora_B: (E R, I) and (O, R E), as in an adapter file.
        transposed: whether the weights lie as (E, in, out).
        experts: which; one e is slice(e, e + 1).

    Returns:
        (experts, out, in), or (experts, in, out) if `transposed`.
    """
    assert lora_A.shape[0] == lora_B.shape[1] == num_experts * r
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    A_ERI, B_EOR = (factor[experts].to(wide) for factor in per_expert(lora_A.detach(), lora_B.detach(), num_experts))
    delta_EOI = torch.bmm(B_EOR, A_ERI).mul_(scaling)
    return delta_EOI.mT if transposed else delta_EOI


class _LoraExpertsLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        routing: Routing,
        read_weight: Callable[[], Tensor],
        bias_EO: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
        from_tokens: bool,
    ) -> Tensor:
        # The order is saved as the input is, so that recomputation drops it too.
        ctx.save_for_backward(x, routing.perm_S, routing.ends_E)
        # Kept as the parameters themselves, not as saved tensors: see `ops.lora_linear`.
        ctx.lora_A, ctx.lora_B = lora_A, lora_B
        ctx.num_choices, ctx.read_weight, ctx.scaling = routing.num_choices, read_weight, scaling
        ctx.dropout, ctx.seed, ctx.from_tokens = dropout, seed, from_tokens
        weight_EOI = read_weight()
        dtype = weight_EOI.dtype
        x_SI = (routing.spread(x) if from_tokens else x).to(dtype)
        y_SO = _each(x_SI, weight_EOI.mT, routing)
        num_experts = len(weight_EOI)
        del weight_EOI
        if bias_EO is not None:
            y_SO += bias_EO.to(dtype)[routing.experts_S()]
        if lora_A is not None and lora_B is not None:
            A_ERI, B_EOR = _factors(lora_A, lora_B, num_experts, dtype)
            dropped_SI = x_SI * dropout_mask(x_SI, dropout, seed) if dropout > 0 else x_SI
            h_SR = _each(dropped_SI, A_ERI.mT, routing)
            y_SO.add_(_each(h_SR, B_EOR.mT, routing), alpha=scaling)
        ctx.bounds = routing.bounds
        return y_SO.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, perm_S, ends_E = ctx.saved_tensors
        routing = Routing(perm_S, ends_E, ctx.num_choices, ctx.bounds)
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        grad_x = grad_A = grad_B = None
        dx_SI = None
        weight_EOI = ctx.read_weight() if need_x else None
        dtype = weight_EOI.dtype if weight_EOI is not None else grads[0].dtype
        dy_SO = grads[0].to(dtype)
        if weight_EOI is not None:
            dx_SI = _each(dy_SO, weight_EOI, routing)
        del weight_EOI
        if ctx.lora_A is not None:
            num_experts = len(ends_E)
            x_SI = (routing.spread(x) if ctx.from_tokens else x).to(dtype)
            mask_SI = dropout_mask(x_SI, ctx.dropout, ctx.seed) if ctx.dropout > 0 else None
            dropped_SI = x_SI if mask_SI is None else x_SI * mask_SI
            A_ERI, B_EOR = _factors(ctx.lora_A, ctx.lora_B, num_experts, dtype)
            if need_B:
                h_SR = _each(dropped_SI, A_ERI.mT, routing)
                dB_EOR = _outer(dy_SO, h_SR, routing).to(ctx.lora_B.dtype).mul_(ctx.scaling)
                grad_B = dB_EOR.permute(1, 2, 0).reshape(ctx.lora_B.shape)
            dh_SR = _each(dy_SO, B_EOR, routing).mul_(ctx.scaling)
            if need_A:
                grad_A = _outer(dh_SR, dropped_SI, routing).to(ctx.lora_A.dtype).reshape(ctx.lora_A.shape)
            if dx_SI is not None:
                low_rank_SI = _each(dh_SR, A_ERI, routing)
                dx_SI = dx_SI.add_(low_rank_SI) if mask_SI is None else dx_SI.addcmul_(low_rank_SI, mask_SI)
        if dx_SI is not None:
            grad_x = (routing.gather(dx_SI) if ctx.from_tokens else dx_SI).to(x.dtype)
        return grad_x, grad_A, grad_B, None, None, None, None, None, None, None


def _factors(lora_A: Tensor, lora_B: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(E, R, I) and (E, O, R), each expert's factors in one piece."""
    A_ERI, B_EOR = per_expert(lora_A.detach(), lora_B.detach(), num_experts)
    return A_ERI.to(dtype), B_EOR.to(dtype).contiguous()


def _each(x_SI: Tensor, weight_EIO: Tensor, routing: Routing) -> Tensor:
    """x_s W_e (S, O) for each pair."""
    if has_kernel(x_SI, weight_EIO):
        return torch.nn.functional.grouped_mm(x_SI, weight_EIO, offs=routing.ends_E)
    y_SO = x_SI.new_empty(len(x_SI), weight_EIO.shape[2])
    for expert, pairs in routing.segments():
        torch.mm(x_SI[pairs], weight_EIO[expert], out=y_SO[pairs])
    return y_SO


def _outer(a_SM: Tensor, b_SN: Tensor, routing: Routing) -> Tensor:
    """The sum of a_s b_s^T over each expert's pairs (E, M, N); zero where there are none."""
    if has_kernel(a_SM.T, b_SN):
        sums_EMN = torch.nn.functional.grouped_mm(a_SM.T, b_SN, offs=routing.ends_E)
        # The kernel promises nothing of a group without rows.
        starts_E = torch.nn.functional.pad(routing.ends_E, (1, -1))
        return sums_EMN.masked_fill_((starts_E == routing.ends_E)[:, None, None], 0.0)
    sums_EMN = a_SM.new_zeros(len(routing.ends_E), a_SM.shape[1], b_SN.shape[1])
    for expert, pairs in routing.segments():
        torch.mm(a_SM[pairs].T, b_SN[pairs], out=sums_EMN[expert])
    return sums_EMN


def has_kernel(*operands: Tensor) -> bool:
    """Whether the device multiplies these by groups in one kernel, which does not wait for the host.

    torch 2.10 and later: bf16 on compute capability 8.0 or above, rows at multiples of 16 bytes.
    """
    if any(not operand.is_cuda or operand.dtype != torch.bfloat16 for operand in operands):
        return False
    if torch.cuda.get_device_capability(operands[0].device) < (8, 0):
        return False
    return all(_is_aligned(operand) for operand in operands)


def _is_aligned(operand: Tensor) -> bool:
    rows, columns = operand.stride()[-2:]
    others = [*operand.stride()[:-2], max(rows, columns)]
    return min(rows, columns) == 1 and operand.data_ptr() % 16 == 0 and all(stride * 2 % 16 == 0 for stride in others)
