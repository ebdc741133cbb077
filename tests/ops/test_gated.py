"""The gated activation against transformers' own, bit for bit, and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from qlora.errors import QloraError
from qlora.ops import gated, remake
from qlora.ops.gated import KINDS, gated_activation, gated_backward, gated_forward, kind_of

NAMES = sorted(set(KINDS) & set(ACT2FN))
# Those for which transformers calls torch's own activation, and spells nothing out.
TORCHS = ["silu", "swish", "gelu", "gelu_pytorch_tanh"]


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).to(dtype)


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_is_transformers_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    gate, up = (values(37, 1000, dtype=dtype, seed=seed) for seed in range(2))
    assert torch.equal(gated_forward(gate, up, name), ACT2FN[name](gate) * up)
    assert torch.equal(gated_activation(gate, up, name), ACT2FN[name](gate) * up)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_the_function_that_transformers_means(name: str) -> None:
    gate, up = (values(50, 20, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(2))
    found, want = gated_activation(gate, up, name), ACT2FN[name](gate) * up
    torch.testing.assert_close(found, want)
    dy = values(50, 20, dtype=torch.float64, seed=2)
    torch.testing.assert_close(torch.autograd.grad(found, (gate, up), dy), torch.autograd.grad(want, (gate, up), dy))


def test_other_functions_of_transformers_are_not_taken_for_these() -> None:
    gate = values(100, dtype=torch.float64)
    same = {name: [other for other in ACT2FN if other not in ("prelu", "xielu") and
                   torch.allclose(ACT2FN[other](gate), ACT2FN[name](gate), rtol=1e-6, atol=1e-9)]
            for name in ("silu", "gelu", "gelu_pytorch_tanh")}  # fmt: skip
    # gelu_fast's constant has ten digits and gelu_10 clips far out; neither is worth a kind of its own.
    for name, others in same.items():
        assert {o for o in others if kind_of(o) != kind_of(name)} <= {"gelu_fast", "gelu_10"}
        assert all(o in others for o in ACT2FN if kind_of(o) == kind_of(name))
    assert kind_of("relu") is None


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gradients_in_float64(kind: str) -> None:
    gate, up = (values(2, 3, 5, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, kind), (gate, up))


@pytest.mark.parametrize("name", TORCHS)
def test_gradients_are_no_further_from_float64_than_transformers(name: str) -> None:
    gate, up, dy = (values(200, 300, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    want = torch.autograd.grad(ACT2FN[name](wide[0]) * wide[1], wide, dy.double())
    given = [t.clone().requires_grad_() for t in (gate, up)]
    theirs = torch.autograd.grad(ACT2FN[name](given[0]) * given[1], given, dy)
    ours = gated_backward(dy, gate, up, name)
    for found, their, wanted in zip(ours, theirs, want, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() <= 1.01 * (their.double() - wanted).norm()


def test_dys_memory_is_used_up_only_where_it_is_lent() -> None:
    gate, up, dy = (values(8, 30, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    kept = dy.clone()
    want = gated_backward(dy, gate, up, "silu")
    assert torch.equal(dy, kept)
    torch.testing.assert_close(gated_backward(dy, gate, up, "silu", reuse_dy=True), want, rtol=0, atol=0)
    assert torch.equal(gate, values(8, 30, dtype=torch.bfloat16))


def test_halves_of_one_projection() -> None:
    both = values(2, 5, 60, dtype=torch.bfloat16).requires_grad_()
    gate, up = both.chunk(2, -1)
    y = gated_activation(gate, up, "silu")
    assert torch.equal(y, torch.nn.functional.silu(gate) * up)
    assert y.is_contiguous()
    (found,) = torch.autograd.grad(y.sum(), both)
    wide = both.detach().double().requires_grad_()
    first, second = wide.chunk(2, -1)
    (want,) = torch.autograd.grad((torch.nn.functional.silu(first) * second).sum(), wide)
    torch.testing.assert_close(found.double(), want, rtol=2**-6, atol=2**-8)


def test_what_is_saved_is_gate_and_up_themselves() -> None:
    saved: list[Tensor] = []
    gate, up = (values(6, 20, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_activation(gate, up, "gelu_tanh")
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}
    assert len(saved) == 2


def test_an_unknown_function_is_refused() -> None:
    x = torch.ones(2, 2)
    with pytest.raises(QloraError, match="'relu' is not a gated activation"):
        gated_activation(x, x, "relu")


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_an_activation_made_again_is_not_made_a_third_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a layer that eats the product and makes it again in backward; with and without, the gradients are the same."""
    gate, up = (values(6, 20, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in range(2))
    dy = values(6, 20, dtype=torch.bfloat16, seed=2)
    y = gated_activation(gate, up, kind)
    offer = remake.find(y)
    assert offer is not None
    want = torch.autograd.grad(y, (gate, up), dy, retain_graph=True)
    made, activate = [], gated._activate
    monkeypatch.setattr(gated, "_activate", lambda *given: made.append(1) or activate(*given))
    for _ in range(2):  # a second backward pass through the same graph finds nothing left over
        offer.remake.add_user()
        assert torch.equal(offer.remake.take((gate.detach(), up.detach())), y)
        found = torch.autograd.grad(y, (gate, up), dy, retain_graph=True)
        torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert len(made) == 2
    torch.testing.assert_close(torch.autograd.grad(y, (gate, up), dy), want, rtol=0, atol=0)
    assert len(made) == 3
