"""The chunked loss against torch's own in float64, and that the logits are never whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.ops import softmax_loss
from qlora.ops.cross_entropy import cross_entropy_sum, linear_cross_entropy_gradients
from qlora.ops.softmax_loss import LogitForm, softmax_loss_

N, D, V = 37, 12, 50


def make_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, V, (N,), generator=generator)


def reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 5, 36, 37, 38, 1024])
def test_loss_and_gradients_are_torchs_for_every_size_of_the_pieces(chunk_tokens: int) -> None:
    hidden, head, targets = make_case()
    loss = cross_entropy_sum(hidden, targets, lambda h: h @ head.T, [head], chunk_tokens)
    want = reference(hidden, head, targets)
    torch.testing.assert_close(loss, want)
    found = torch.autograd.grad(3.0 * loss, (hidden, head))
    torch.testing.assert_close(found, torch.autograd.grad(3.0 * want, (hidden, head)))


def test_a_soft_capped_head() -> None:
    hidden, head, targets = make_case()

    def apply_head(piece: Tensor) -> Tensor:
        return torch.tanh(piece @ head.T / 5) * 5

    loss = cross_entropy_sum(hidden, targets, apply_head, [head], 10)
    want = nn.functional.cross_entropy(apply_head(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(want, (hidden, head)))


@pytest.mark.parametrize("trained", ["hidden", "head", "neither"])
def test_only_what_needs_a_gradient_gets_one(trained: str) -> None:
    hidden, head, targets = make_case()
    hidden.requires_grad_(trained == "hidden")
    head.requires_grad_(trained == "head")
    loss = cross_entropy_sum(hidden, targets, lambda h: h @ head.T, [head] if trained == "head" else [], 10)
    want = reference(hidden, head, targets)
    torch.testing.assert_close(loss, want)
    assert loss.requires_grad == (trained != "neither")
    if trained != "neither":
        tensor = hidden if trained == "hidden" else head
        torch.testing.assert_close(torch.autograd.grad(loss, tensor), torch.autograd.grad(want, tensor))


def test_a_head_that_is_tied_to_the_embedding_gets_both_gradients() -> None:
    _, head, targets = make_case()
    tokens = torch.arange(N) % V
    mix = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def hidden() -> Tensor:
        return torch.tanh(nn.functional.embedding(tokens, head) @ mix)

    loss = cross_entropy_sum(hidden(), targets, lambda h: h @ head.T, [head], 8)
    torch.testing.assert_close(
        torch.autograd.grad(loss, head), torch.autograd.grad(reference(hidden(), head, targets), head)
    )


def test_several_parameters_of_the_head() -> None:
    hidden, _, targets = make_case()
    layers = nn.Sequential(nn.Linear(D, 9), nn.Linear(9, V)).double()
    parameters = list(layers.parameters())
    loss = cross_entropy_sum(hidden, targets, layers, parameters, 10)
    want = nn.functional.cross_entropy(layers(hidden), targets, reduction="sum")
    inputs = (hidden, *parameters)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, inputs))


def test_without_targets_loss_and_gradients_are_zero() -> None:
    hidden, head, targets = make_case()
    whole = hidden * 1.0
    loss = cross_entropy_sum(whole[:0], targets[:0], lambda h: h @ head.T, [head])
    assert loss.item() == 0.0
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert all(not gradient.any() for gradient in gradients)
    assert [gradient.shape for gradient in gradients] == [hidden.shape, head.shape]


def test_bf16_hidden_states_give_an_fp32_loss() -> None:
    hidden, head, targets = make_case(torch.bfloat16)
    loss = cross_entropy_sum(hidden, targets, lambda h: (h @ head.T).float(), [head], 10)
    assert loss.dtype == torch.float32
    want = reference(hidden.double(), head.double(), targets)
    # Logits of size about 4 in bf16 are off by up to 2**-7 each, 37 tokens: far below a nat in all.
    assert abs(loss.item() - want.item()) < 37 * 2**-6
    assert [g.dtype for g in torch.autograd.grad(loss, (hidden, head))] == [torch.bfloat16, torch.bfloat16]


def test_the_logits_are_never_whole() -> None:
    hidden, head, targets = make_case()
    sizes = []

    def apply_head(piece: Tensor) -> Tensor:
        logits = piece @ head.T
        sizes.append(logits.numel())
        return logits

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = cross_entropy_sum(hidden, targets, apply_head, [head], 10)
        assert max(sizes) <= 10 * V
        assert len(sizes) == -(-N // 10)  # each piece once: backward applies the head no second time
        assert all(size <= max(10 * V, V * D) for size in saved)
        loss.backward()
    assert len(sizes) == -(-N // 10)


def test_without_gradients_nothing_is_made_for_backward() -> None:
    """An evaluation with a trainable head: the head's parameters still say that they need a gradient."""
    hidden, head, targets = make_case()
    modes = []

    def apply_head(piece: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return piece @ head.T

    with torch.no_grad():
        loss = cross_entropy_sum(hidden, targets, apply_head, [head], 10)
    assert not any(modes)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, head, targets).detach())


def test_a_second_backward_is_an_error_and_not_silence() -> None:
    hidden, head, targets = make_case()
    loss = cross_entropy_sum(hidden, targets, lambda h: h @ head.T, [head])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_a_head_that_keeps_its_own_output_is_an_error_and_not_silence() -> None:
    hidden, head, targets = make_case()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy_sum(hidden, targets, lambda h: torch.tanh(h @ head.T), [head])


# What lies between the product and the loss, and heads that are a plain product.

FORMS = {
    "plain": LogitForm(),
    "scaled": LogitForm(factor=0.3),
    "capped": LogitForm(soft_cap=3.0),
    "z-loss": LogitForm(z_loss=0.05),
    "all": LogitForm(1.7, 4.0, 0.02),
}


def formed_reference(product: Tensor, targets: Tensor, form: LogitForm) -> tuple[Tensor, Tensor]:
    """The cross entropy that is reported, and what is differentiated, straight from the formulas."""
    logits = product * form.factor
    if form.soft_cap is not None:
        logits = form.soft_cap * torch.tanh(logits / form.soft_cap)
    cross_entropy = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return cross_entropy, cross_entropy + form.z_loss * logits.logsumexp(-1).square().sum()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("chunk_tokens", [1, 10, None])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_plain_head_is_the_reference(form: LogitForm, chunk_tokens: int | None, has_bias: bool) -> None:
    hidden, weight, targets = make_case()
    bias = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    product = hidden @ weight.T + (bias if has_bias else 0)
    want, learned = formed_reference(product, targets, form)
    inputs = (hidden, weight, bias) if has_bias else (hidden, weight)
    wanted = torch.autograd.grad(learned, inputs)
    loss, grad_hidden, grad_head = linear_cross_entropy_gradients(
        hidden, targets, weight, bias if has_bias else None, chunk_tokens, form, needs=(True, True, has_bias)
    )
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close((grad_hidden, *grad_head[: len(inputs) - 1]), wanted)
    # The same through autograd, as a head that is more than a product goes.
    own = cross_entropy_sum(
        hidden,
        targets,
        lambda h: nn.functional.linear(h, weight, bias if has_bias else None),
        inputs[1:],
        chunk_tokens,
        form,
    )
    torch.testing.assert_close(own, want)
    torch.testing.assert_close(torch.autograd.grad(own, inputs), wanted)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_blocks_of_rows_change_nothing(rows: int, form: LogitForm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(softmax_loss.BLOCK_ELEMENTS, "cpu", rows * V)
    generator = torch.Generator().manual_seed(0)
    product = (3 * torch.randn(N, V, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    want, learned = formed_reference(product, targets, form)
    buffer = product.detach().clone()
    untouched = softmax_loss_(buffer, targets, form, with_gradient=False)
    assert torch.equal(buffer, product)
    losses = softmax_loss_(buffer, targets, form, with_gradient=True)
    assert torch.equal(losses, untouched)
    torch.testing.assert_close(losses.sum(), want.detach())
    torch.testing.assert_close(buffer, torch.autograd.grad(learned, product)[0])


def test_a_target_that_is_nearly_certain_keeps_the_digits_of_its_gradient() -> None:
    """2e-3 below 1, which bf16 does not tell from 1: the softmax must not be rounded before 1 is taken off."""
    product = torch.zeros(1, V, dtype=torch.float64)
    product[0, 3] = 10.0
    buffer = product.bfloat16()
    softmax_loss_(buffer, torch.tensor([3]), LogitForm(), with_gradient=True)
    want = torch.expm1(product[0, 3] - product.logsumexp(1))
    torch.testing.assert_close(buffer[0, 3].double(), want[0], rtol=1e-2, atol=0)


def test_targets_that_are_all_but_impossible_and_large_logits_stay_finite() -> None:
    product = torch.zeros(2, V)
    product[0, 1], product[1, 2] = 3e4, -3e4
    want = nn.functional.cross_entropy(product, torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(softmax_loss_(product, torch.tensor([0, 2]), LogitForm(), with_gradient=True), want)
    assert product.isfinite().all()
    torch.testing.assert_close(product.sum(1), torch.zeros(2), rtol=0, atol=1e-6)


def test_a_logit_that_is_no_number_makes_loss_and_gradient_none() -> None:
    product = torch.zeros(1, V)
    product[0, 5] = torch.nan
    assert softmax_loss_(product, torch.tensor([0]), LogitForm(), with_gradient=True).isnan().all()
    assert product.isnan().any()


def test_a_bf16_head_is_within_its_rounding() -> None:
    """Logits rounded to bf16 as the head gives them; from there on nothing is lost but the rounding of the gradient."""
    hidden, weight, targets = make_case(torch.bfloat16)
    product = (hidden @ weight.T).detach().double().requires_grad_()
    want = nn.functional.cross_entropy(product, targets, reduction="sum")
    (dlogits,) = torch.autograd.grad(want, product)
    loss, grad_hidden, _ = linear_cross_entropy_gradients(hidden, targets, weight)
    assert (loss.dtype, grad_hidden.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=0)
    wanted = dlogits @ weight.detach().double()
    # Two roundings of 2**-9: of each dlogit, and of the sum.
    assert (grad_hidden.double() - wanted).norm() < 2**-8 * wanted.norm()


def test_a_plain_head_makes_logits_of_one_piece_alone() -> None:
    hidden, weight, targets = make_case()
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.nbytes for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    with Sizes():
        linear_cross_entropy_gradients(hidden, targets, weight, chunk_tokens=10)
    # Of a piece, twice for the fp32 block and its softmax, which a vocabulary so small takes whole.
    assert max(sizes) <= 2 * 10 * V * 8 < N * V * 8


def test_only_the_gradients_that_are_needed_are_made() -> None:
    hidden, weight, targets = make_case()
    loss, grad_hidden, grad_head = linear_cross_entropy_gradients(hidden, targets, weight, needs=(False, False, False))
    assert grad_hidden is None
    assert grad_head == [None, None]
    torch.testing.assert_close(loss, reference(hidden, weight, targets).detach())
    loss, grad_hidden, _ = linear_cross_entropy_gradients(hidden[:0], targets[:0], weight)
    assert (loss.item(), grad_hidden.shape) == (0.0, (0, D))
