"""The experts' LoRA linear against dense W_e + s B_e A_e in float64, and what it keeps alive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora.ops import lora_experts
from qlora.ops.dropout import dropout_mask
from qlora.ops.lora_experts import Routing, expert_delta, lora_experts_linear, per_expert, route

T, K, E, I, O, R = 9, 2, 5, 8, 6, 3  # noqa: E741  the shape letters of the module under test
S = T * K
SCALING = 1.75
UNHIT = 3


class Case:
    """Random W, b, A, B and x, and choices that leave one expert out; W is handed out by a function that counts calls."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, *, transposed: bool = False, outputs: int = O, r: int = R
    ) -> None:
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        self.r = r
        self.weight = random(E, I, outputs).mT if transposed else random(E, outputs, I)
        self.bias = random(E, outputs)
        self.lora_A, self.lora_B = random(E * r, I).requires_grad_(), random(outputs, r * E).requires_grad_()
        self.tokens, self.pairs = random(T, I).requires_grad_(), random(S, I).requires_grad_()
        allowed = torch.tensor([e for e in range(E) if e != UNHIT])
        self.index = torch.stack([allowed[torch.randperm(len(allowed), generator=draw)[:K]] for _ in range(T)])
        self.routing = route(self.index, E)
        self.num_reads = 0

    def read(self) -> Tensor:
        self.num_reads += 1
        return self.weight

    def x(self, from_tokens: bool) -> Tensor:
        return self.tokens if from_tokens else self.pairs

    def ours(self, from_tokens: bool, bias: bool = True, dropout: float = 0.0) -> Tensor:
        return lora_experts_linear(
            self.x(from_tokens), self.routing, self.read, self.bias if bias else None, self.lora_A, self.lora_B, SCALING,
            dropout, from_tokens=from_tokens,
        )  # fmt: skip

    def dense(self, from_tokens: bool, bias: bool = True, masks: Tensor | None = None) -> Tensor:
        """Pair by pair, each with its expert's whole matrix."""
        pairs = sorted((int(expert), pair) for pair, expert in enumerate(self.index.flatten()))
        rows = []
        for number, (expert, pair) in enumerate(pairs):
            A = self.lora_A[expert * self.r : (expert + 1) * self.r]
            B = torch.stack([self.lora_B[:, row * E + expert] for row in range(self.r)], dim=1)
            x = self.tokens[pair // K] if from_tokens else self.pairs[number]
            dropped = x if masks is None else x * masks[number]
            y = self.weight[expert] @ x + SCALING * (B @ A @ dropped)
            rows.append(y + self.bias[expert] if bias else y)
        return torch.stack(rows)


def gradients(case: Case, make: Callable[[], Tensor], from_tokens: bool) -> list[Tensor]:
    y = make()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), [case.x(from_tokens), case.lora_A, case.lora_B])]


def test_the_routing_groups_pairs_by_expert() -> None:
    case = Case()
    flat = case.index.flatten()
    assert flat[case.routing.perm_S].tolist() == sorted(flat.tolist())
    assert case.routing.ends_E.tolist() == [int((flat <= expert).sum()) for expert in range(E)]
    assert torch.equal(case.routing.experts_S(), flat.sort().values)
    assert [expert for expert, _ in case.routing.segments()] == sorted(set(flat.tolist()))
    x = torch.randn(T, 4, dtype=torch.float64)
    spread = case.routing.spread(x)
    assert torch.equal(spread, x[case.routing.perm_S // K])
    torch.testing.assert_close(case.routing.gather(spread), K * x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("from_tokens", [False, True])
def test_values_and_gradients_are_those_of_whole_matrices(from_tokens: bool, bias: bool, transposed: bool) -> None:
    case = Case(transposed=transposed)
    found = gradients(case, lambda: case.ours(from_tokens, bias), from_tokens)
    assert case.num_reads == 2  # once in forward, once in backward
    for ours, dense in zip(found, gradients(case, lambda: case.dense(from_tokens, bias), from_tokens), strict=True):
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("from_tokens", [False, True])
def test_gradcheck(from_tokens: bool) -> None:
    case = Case()
    torch.autograd.gradcheck(lambda *_: case.ours(from_tokens), (case.x(from_tokens), case.lora_A, case.lora_B))


def test_an_expert_without_tokens_has_zero_gradients() -> None:
    case = Case()
    _, _, grad_A, grad_B = gradients(case, lambda: case.ours(True), True)
    A_ERI, B_EOR = per_expert(grad_A, grad_B, E)
    hit = [bool(A_ERI[expert].any() and B_EOR[expert].any()) for expert in range(E)]
    assert hit == [expert != UNHIT for expert in range(E)]
    assert not A_ERI[UNHIT].any()
    assert not B_EOR[UNHIT].any()


@pytest.mark.parametrize("from_tokens", [False, True])
def test_dropout_is_drawn_for_each_pair_and_again_in_backward(from_tokens: bool) -> None:
    case = Case()
    torch.manual_seed(7)
    found = gradients(case, lambda: case.ours(from_tokens, dropout=0.4), from_tokens)
    torch.manual_seed(7)
    masks = dropout_mask(torch.empty(S, I, dtype=torch.float64), 0.4, int(torch.randint(0, 2**62, ())))
    assert 0 < int((masks == 0).sum()) < masks.numel()
    for ours, dense in zip(found, gradients(case, lambda: case.dense(from_tokens, masks=masks), from_tokens), strict=True):
        torch.testing.assert_close(ours, dense)


def test_the_frozen_layers_alone() -> None:
    case = Case()
    y = lora_experts_linear(case.tokens, case.routing, case.read, None, None, None, 1.0, from_tokens=True)
    case.lora_B.data.zero_()
    dense = case.dense(True, bias=False)
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), case.tokens), torch.autograd.grad(dense.sum(), case.tokens))


def test_no_weight_is_read_in_backward_where_no_input_needs_a_gradient() -> None:
    case = Case()
    case.tokens.requires_grad_(False)
    y = case.ours(True)
    grad_A, grad_B = torch.autograd.grad(y.sum(), [case.lora_A, case.lora_B])
    assert case.num_reads == 1
    want = torch.autograd.grad(case.dense(True).sum(), [case.lora_A, case.lora_B])
    torch.testing.assert_close((grad_A, grad_B), want)


def test_only_the_input_and_the_order_stay_alive() -> None:
    case = Case()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = case.ours(True)
    kept = {tensor.data_ptr() for tensor in saved}
    assert kept == {case.tokens.data_ptr(), case.routing.perm_S.data_ptr(), case.routing.ends_E.data_ptr()}
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor)]
    assert {tensor.data_ptr() for tensor in held} <= {case.lora_A.data_ptr(), case.lora_B.data_ptr()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same_dropout(reentrant: bool) -> None:
    case = Case()

    def again() -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return lora_experts_linear(
                x, route(case.index, E), case.read, None, case.lora_A, case.lora_B, SCALING, 0.3, from_tokens=True
            )

        y: Tensor = checkpoint(inner, case.tokens, use_reentrant=reentrant)
        return y

    def grads(make: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        for tensor in (case.tokens, case.lora_A, case.lora_B):
            tensor.grad = None
        make().square().sum().backward()
        return [tensor.grad for tensor in (case.tokens, case.lora_A, case.lora_B)]  # type: ignore[misc]

    for ours, want in zip(grads(again), grads(lambda: case.ours(True, bias=False, dropout=0.3)), strict=True):
        torch.testing.assert_close(ours, want)


def test_dtypes_and_autocast() -> None:
    case = Case(torch.float32)
    case.weight = case.weight.bfloat16()
    y = case.ours(True)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert (case.tokens.grad.dtype, case.lora_A.grad.dtype, case.lora_B.grad.dtype) == (torch.float32,) * 3  # type: ignore[union-attr]
    want = Case().dense(True)
    assert (y - want).norm() < 0.02 * want.norm()  # bf16 rounds to one part in 256
    with torch.autocast("cpu", torch.bfloat16):
        assert case.ours(True).dtype == torch.bfloat16


@pytest.mark.parametrize("from_tokens", [False, True])
def test_the_device_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch, from_tokens: bool) -> None:
    """torch has it for CPUs too, in float32 with strides of 16 bytes: here the same calls run as on a GPU."""
    case = Case(torch.float32, outputs=12, r=4)
    want = gradients(case, lambda: case.ours(from_tokens), from_tokens)
    monkeypatch.setattr(lora_experts, "has_kernel", lambda *_: True)
    monkeypatch.setattr(Routing, "segments", None)  # no loop, and no waiting
    for found, wanted in zip(gradients(case, lambda: case.ours(from_tokens), from_tokens), want, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_delta_is_what_the_layer_adds(transposed: bool) -> None:
    case = Case()
    delta = expert_delta(case.lora_A, case.lora_B, E, R, SCALING, transposed)
    assert delta.shape == ((E, I, O) if transposed else (E, O, I))
    for expert in range(E):
        rows = expert_delta(case.lora_A, case.lora_B, E, R, SCALING, transposed, slice(expert, expert + 1))
        torch.testing.assert_close(rows[0], delta[expert])
    whole = delta.mT if transposed else delta
    merged = lora_experts_linear(
        case.tokens, case.routing, lambda: case.weight + whole, case.bias, None, None, 1.0, from_tokens=True
    )
    torch.testing.assert_close(merged, case.ours(True))
