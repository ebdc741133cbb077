"""The chunked loss against torch's own in float64, and that the logits are never whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora.ops.cross_entropy import cross_entropy_sum

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
