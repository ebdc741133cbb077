"""Activations that are made again: who finds an offer, how often an activation is made, and when it is let go of."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from qlora.ops import remake
from qlora.ops.lora_linear import lora_linear


def doubled(x: Tensor) -> Tensor:
    """An activation with an offer; counts how often it is made again in `doubled.again`."""
    y = x * 2

    def again(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    remake.offer(y, (x,), again)
    return y


calls: list[int] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def test_an_offer_is_found_through_any_view_of_the_whole() -> None:
    y = doubled(torch.randn(4, 6, requires_grad=True))
    found = remake.find(y)
    assert found is not None
    assert remake.find(y.view(2, 12)) is found
    assert remake.find(y.detach()) is found
    assert torch.equal(found.remake.take(found.inputs), y)


def test_a_part_a_turned_one_a_changed_one_and_a_copy_are_other_tensors() -> None:
    y = doubled(torch.randn(4, 6))
    assert remake.find(y[:2]) is None
    assert remake.find(y[1:]) is None
    assert remake.find(y.T) is None
    assert remake.find(y.clone()) is None
    y.add_(1)
    assert remake.find(y) is None


def test_where_nothing_is_kept_nothing_is_offered() -> None:
    with torch.no_grad():
        assert remake.find(doubled(torch.randn(4, 6))) is None


def test_an_offer_keeps_nothing_alive_once_its_activation_is_gone() -> None:
    x = torch.randn(4, 6)
    y = doubled(x)
    found = remake.find(y)
    assert found is not None
    gone = weakref.ref(found)
    del found, y
    gc.collect()
    assert gone() is None


Factors = list[tuple[Tensor, Tensor]]


def make_inputs() -> tuple[Tensor, Factors, Tensor]:
    """An input, A and B of three layers, and the frozen weight beside them."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 8, dtype=torch.float64)
    factors = [(torch.randn(2, 8).double().requires_grad_(), torch.randn(6, 2).double().requires_grad_()) for _ in range(3)]
    return x, factors, weight


def layers(x: Tensor, factors: Factors, weight: Tensor) -> Tensor:
    return sum((lora_linear(x, lambda: weight, None, A, B, 0.5) for A, B in factors), torch.zeros(()))


def gradients(y: Tensor, x: Tensor, factors: Factors, *, keep: bool = False) -> tuple[Tensor, ...]:
    """Of the sum of squares with respect to the input, A and B."""
    return torch.autograd.grad(y.square().sum(), [x, *(f for pair in factors for f in pair)], retain_graph=keep)


def test_layers_that_eat_it_save_its_input_and_make_it_once() -> None:
    x, factors, weight = make_inputs()
    wanted = gradients(layers(x * 2, factors, weight), x, factors)

    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        y = layers(doubled(x), factors, weight)
    assert saved == [x.data_ptr()] * 3  # and the product with 2 saves nothing
    assert not calls
    found = gradients(y, x, factors, keep=True)
    assert len(calls) == 1
    torch.testing.assert_close(found, wanted)
    # A graph that is used twice makes it again.
    again = gradients(y, x, factors)
    assert len(calls) > 1
    torch.testing.assert_close(again, wanted)


def test_recomputation_sees_what_is_saved_instead() -> None:
    from torch.utils.checkpoint import checkpoint

    x, factors, weight = make_inputs()
    wanted = gradients(layers(x.sin() * 2, factors, weight), x, factors)
    alive: list[weakref.ref[Tensor]] = []

    def block(x: Tensor) -> Tensor:
        inside = x.sin()
        alive.append(weakref.ref(inside))
        return layers(doubled(inside), factors, weight) + 0 * x.sum()

    y = checkpoint(block, x, use_reentrant=False)
    gc.collect()
    assert alive[0]() is None  # the inside of a block is not kept by what makes an activation again
    torch.testing.assert_close(gradients(y, x, factors), wanted)
