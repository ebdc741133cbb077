"""Rotary embedding against transformers' own and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora.errors import QloraError
from qlora.ops.rotary import apply_rotary, rotate


def values(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(num_rows: int, num_tokens: int, turned: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """As transformers makes them: both halves the same."""
    half = values(num_rows, num_tokens, turned // 2, seed=7) * 3
    whole = torch.cat((half, half), -1)
    return whole.cos().to(dtype), whole.sin().to(dtype)


def heads(num_rows: int, num_heads: int, num_tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(B, H, T, d) as attention is handed it: a view of what a projection made."""
    return values(num_rows, num_tokens, num_heads, width, dtype=dtype, seed=seed).transpose(1, 2)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_transformers_and_rounds_no_more_often(num_rows: int, dtype: torch.dtype) -> None:
    q, k = heads(2, 5, 9, 16, dtype), heads(2, 2, 9, 16, dtype, seed=1)
    q, k = q.requires_grad_(), k.requires_grad_()
    cos, sin = angles(num_rows, 9, 16, dtype)
    grads = [values(*t.shape, dtype=dtype, seed=2) for t in (q, k)]
    ours, theirs = apply_rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    want = apply_rotary_pos_emb(*wide, cos.double(), sin.double())
    for found, their, wanted in (
        *zip(ours, theirs, want, strict=True),
        *zip(
            torch.autograd.grad(ours, (q, k), grads),
            torch.autograd.grad(theirs, (q, k), grads),
            torch.autograd.grad(want, wide, [g.double() for g in grads]),
            strict=True,
        ),
    ):
        assert found.dtype == dtype
        error, their_error = ((t.double() - wanted).norm().item() for t in (found, their))
        assert error <= 1.02 * their_error + 1e-14


@pytest.mark.parametrize("turned", [8, 6, 2])
def test_gradients_in_float64_of_all_or_some_of_the_features(turned: int) -> None:
    """cos and sin are any numbers here: their halves may differ."""
    q, k = heads(2, 3, 4, 8, torch.float64).requires_grad_(), heads(2, 1, 4, 8, torch.float64, seed=1).requires_grad_()
    cos, sin = values(1, 4, turned, seed=2), values(1, 4, turned, seed=3)
    assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, cos, sin), (q, k))


def test_features_behind_the_turned_ones_pass() -> None:
    q, k = heads(1, 3, 5, 12, torch.bfloat16), heads(1, 3, 5, 12, torch.bfloat16, seed=1)
    cos, sin = angles(1, 5, 8, torch.bfloat16)
    found = apply_rotary(q, k, cos, sin)
    want = apply_rotary(q[..., :8], k[..., :8], cos, sin)
    for x, turned, given in zip(found, want, (q, k), strict=True):
        assert torch.equal(x[..., :8], turned)
        assert torch.equal(x[..., 8:], given[..., 8:])


def test_turned_back_is_what_was_there() -> None:
    q, k = heads(2, 3, 5, 8, torch.float64), heads(2, 1, 5, 8, torch.float64, seed=1)
    cos, sin = angles(1, 5, 8)
    there = rotate(q, k, cos, sin)
    torch.testing.assert_close(rotate(*there, cos, sin, backward=True), (q, k))
    torch.testing.assert_close(rotate(*there, cos, -sin), (q, k))


def test_strides_are_kept_and_inputs_left_alone() -> None:
    whole = values(2, 5, 6, 20, dtype=torch.bfloat16)
    cos, sin = angles(2, 5, 8, torch.bfloat16)
    for q in (whole.transpose(1, 2)[..., :8], whole[..., 4:12].transpose(1, 2), whole.transpose(1, 2).contiguous()):
        before = q.clone()
        found, _ = apply_rotary(q, q[:, :1], cos, sin)
        want, _ = apply_rotary(q.contiguous(), q[:, :1].contiguous(), cos, sin)
        assert torch.equal(found, want)
        assert torch.equal(q, before)
    dense = whole.transpose(1, 2)
    assert apply_rotary(dense, dense, cos, sin)[0].stride() == dense.stride()


def test_cos_in_fp32_over_bf16() -> None:
    q = heads(1, 2, 5, 8, torch.bfloat16)
    cos, sin = angles(1, 5, 8, torch.float32)
    found, _ = apply_rotary(q, q, cos, sin)
    assert found.dtype == torch.bfloat16
    want, _ = apply_rotary_pos_emb(q.double(), q.double(), cos.double(), sin.double())
    torch.testing.assert_close(found.double(), want, rtol=2**-6, atol=2**-6)


def test_what_is_saved_is_cos_and_sin_alone() -> None:
    saved: list[Tensor] = []
    q = heads(1, 2, 5, 8, torch.float64).requires_grad_()
    cos, sin = angles(1, 5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_rotary(q, q, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("turned", [7, 10])
def test_angles_that_do_not_fit_are_refused(turned: int) -> None:
    q = heads(1, 2, 5, 8, torch.float32)
    cos = torch.ones(1, 5, turned)
    with pytest.raises(QloraError, match="cannot turn heads of 8 features"):
        apply_rotary(q, q, cos, cos)
