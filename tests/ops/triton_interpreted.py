"""Every kernel of ops/triton in Triton's interpreter, against float64. Run by test_triton.py, in a process of its own.

The interpreter is chosen by an environment variable before Triton is imported, and runs kernels on CPU tensors.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.ops import gated, norm, rotary
from qlora.ops.triton import gated as triton_gated
from qlora.ops.triton import norm as triton_norm
from qlora.ops.triton import rotary as triton_rotary
from qlora.ops.triton.probe import doubled

assert os.environ.get("TRITON_INTERPRET") == "1", "to be set before Triton is imported: run test_triton.py"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [(0.0, False), (0.5, False), (1.0, True)]


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(found: Tensor, want: Tensor, dtype: torch.dtype, roundings: int = 1, terms: Tensor | None = None) -> None:
    """Within `roundings` of the dtype and a few of fp32's, the latter of the largest among the terms that were summed.

    The interpreter cuts bfloat16 off where GPUs round, so that a rounding is a whole step.
    """
    assert found.dtype == dtype
    terms = want if terms is None else terms
    step, fine = roundings * torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), want, rtol=step + fine, atol=fine * float(terms.abs().max()) + 1e-6)


def test_the_smallest_kernel() -> None:
    assert doubled(torch.arange(5.0)).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "late"), NORMS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (70, 33), (2, 4100)])
def test_norm(dtype: torch.dtype, offset: float, late: bool, rows: int, width: int) -> None:
    x, dy = values(rows, width, dtype=dtype), values(rows, width, dtype=dtype, seed=1)
    weight = values(width, dtype=dtype, seed=2)
    convention = {"offset": offset, "late_rounding": late}
    y, rstd = triton_norm.rms_norm_forward(x, weight, 1e-5, **convention)
    dx, dw = triton_norm.rms_norm_backward(dy, x, weight, rstd, need_weight=True, **convention)
    # Where rounding is early, offset + w is rounded too.
    scale = weight if late else weight + offset
    wide = [t.double().requires_grad_() for t in (x, scale)]
    want = norm.rms_norm(*wide, 1e-5, offset=offset if late else 0.0, late_rounding=late)
    want_dx, want_dw = torch.autograd.grad(want, wide, dy.double())
    assert_near(y, want.detach(), dtype, 2)
    assert_near(dx, want_dx, dtype, 1, terms=(weight + offset).abs().max() * dy * rstd[:, None])
    assert_near(dw, want_dw, dtype, 1)
    assert torch.equal(triton_norm.rms_norm_again(x, rstd, weight, **convention), y)
    dx_alone, no_dw = triton_norm.rms_norm_backward(dy, x, weight, rstd, need_weight=False, **convention)
    assert torch.equal(dx_alone, dx)
    assert no_dw is None


def test_norm_rounds_where_torchs_own_does() -> None:
    """In float16, because the interpreter does not round bfloat16."""
    x, weight = values(40, 96, dtype=torch.float16), values(96, dtype=torch.float16, seed=1)
    for offset, late in NORMS:
        y, _ = triton_norm.rms_norm_forward(x, weight, 1e-5, offset=offset, late_rounding=late)
        want, _ = norm.rms_norm_forward(x, weight, 1e-5, offset=offset, late_rounding=late)
        # The sums of squares are added up in another order, which moves a rounding now and then, by one step.
        assert (y != want).float().mean() < 0.01
        torch.testing.assert_close(y, want, rtol=2**-9, atol=0)


def test_norm_of_strided_rows_and_a_wide_weight() -> None:
    x = values(9, 80, dtype=torch.bfloat16)[:, 7:60]
    turned = values(53, 9, dtype=torch.bfloat16, seed=3).T
    weight = values(53, dtype=torch.float32, seed=1)
    for rows in (x, turned):
        y, rstd = triton_norm.rms_norm_forward(rows, weight, 1e-5, offset=0.0, late_rounding=False)
        want, _ = norm.rms_norm_forward(rows.contiguous(), weight, 1e-5, offset=0.0, late_rounding=False)
        assert y.dtype == want.dtype == torch.float32
        torch.testing.assert_close(y, want, rtol=2**-7, atol=0)
        same = {"offset": 0.0, "late_rounding": False, "need_weight": True}
        found = triton_norm.rms_norm_backward(turned, rows, weight, rstd, **same)
        contiguous = triton_norm.rms_norm_backward(turned.contiguous(), rows.contiguous(), weight, rstd, **same)
        torch.testing.assert_close(found, contiguous, rtol=0, atol=0)


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_the_weights_gradient_is_whole_for_any_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that some go on from tile to tile, and that the last ones have one tile less."""
    monkeypatch.setattr(triton_norm, "PROGRAMS_EACH", programs)
    monkeypatch.setattr(triton_norm, "TILE_ELEMENTS", 64)
    x, dy, weight = (values(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(23, 30), (23, 30), (30,)]))
    same = {"offset": 0.0, "late_rounding": False}
    _, rstd = triton_norm.rms_norm_forward(x, weight, 1e-5, **same)
    found = triton_norm.rms_norm_backward(dy, x, weight, rstd, need_weight=True, **same)
    want = norm.rms_norm_backward(*(t.double() for t in (dy, x, weight, rstd)), need_weight=True, **same)
    torch.testing.assert_close([t.double() for t in found], list(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 77), (2, 2100)])
def test_gated(dtype: torch.dtype, kind: str, rows: int, width: int) -> None:
    gate, up, dy = (values(rows, width, dtype=dtype, seed=seed) for seed in range(3))
    gate *= 4
    wide = [t.double().requires_grad_() for t in (gate, up)]
    want = gated.gated_activation(*wide, kind)
    want_grads = torch.autograd.grad(want, wide, dy.double())
    assert_near(triton_gated.gated_forward(gate, up, kind), want.detach(), dtype, 2)
    for found, wanted in zip(triton_gated.gated_backward(dy, gate, up, kind), want_grads, strict=True):
        assert_near(found, wanted, dtype)


def test_gated_far_out() -> None:
    """Where exp overflows."""
    gate = torch.tensor([[-300.0, -89.0, -20.0, 0.0, 20.0, 89.0, 300.0]])
    up, dy = torch.full_like(gate, 2.0), torch.ones_like(gate)
    for kind in ("silu", "gelu", "gelu_tanh"):
        y = triton_gated.gated_forward(gate, up, kind)
        torch.testing.assert_close(y, gated.gated_forward(gate, up, kind), rtol=1e-5, atol=1e-6)
        found, want = (f(dy, gate, up, kind) for f in (triton_gated.gated_backward, gated.gated_backward))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_gated_halves_of_one_projection_and_dys_memory() -> None:
    both = values(2, 3, 140, dtype=torch.float16)
    gate, up = both.chunk(2, -1)
    dy = values(2, 3, 70, dtype=torch.float16, seed=1)
    y = triton_gated.gated_forward(gate, up, "silu")
    assert y.shape == gate.shape
    assert y.is_contiguous()
    torch.testing.assert_close(y, gated.gated_forward(gate, up, "silu"), rtol=2**-9, atol=0)
    want = triton_gated.gated_backward(dy, gate, up, "silu")
    lent = dy.clone()
    found = triton_gated.gated_backward(lent, gate, up, "silu", reuse_dy=True)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert found[0].data_ptr() == lent.data_ptr()
    expanded = dy[:1, :1].expand(2, 3, 70)  # of a sum: rows that share their memory cannot be written to
    found = triton_gated.gated_backward(expanded, gate, up, "silu", reuse_dy=True)
    want = triton_gated.gated_backward(expanded.contiguous(), gate, up, "silu")
    torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_heads", "k_heads", "width", "turned"), [(1, 1, 2, 2), (5, 2, 12, 12), (3, 3, 20, 8), (40, 8, 64, 64), (2, 1, 96, 24)]
)
def test_rotary(dtype: torch.dtype, q_heads: int, k_heads: int, width: int, turned: int) -> None:
    # As attention is handed them: views of what projections made, heads behind tokens.
    q = values(2, 3, q_heads, width, dtype=dtype).transpose(1, 2)
    k = values(2, 3, k_heads, width, dtype=dtype, seed=1).transpose(1, 2)
    for num_rows, backward in ((1, False), (2, True)):
        cos, sin = (values(num_rows, 3, turned, dtype=dtype, seed=seed) for seed in (2, 3))
        found = triton_rotary.rotate(q, k, cos, sin, backward=backward)
        want = rotary.rotate(q.double(), k.double(), cos.double(), sin.double(), backward=backward)
        for x, wanted, given in zip(found, want, (q, k), strict=True):
            assert_near(x, wanted, dtype)
            assert x.transpose(1, 2).is_contiguous()
            assert torch.equal(x[..., turned:], given[..., turned:])


def test_rotary_of_other_strides() -> None:
    """Heads before tokens, slices of a wider projection, features that do not lie side by side, cos from a wider table."""
    whole = values(2, 5, 6, 40, dtype=torch.float32)
    table = values(9, 32, dtype=torch.float32, seed=1)
    cos, sin = table[None, 2:7, :16], table[None, 2:7, 16:]
    apart = values(2, 40, 6, 5, dtype=torch.float32).permute(0, 2, 3, 1)
    for q in (whole.transpose(1, 2)[..., 8:32], whole.transpose(1, 2).contiguous(), apart):
        found = triton_rotary.rotate(q, q[:, :2], cos, sin)
        want = rotary.rotate(q.contiguous(), q[:, :2].contiguous(), cos.contiguous(), sin.contiguous())
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_the_operations_go_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the three operations where the kernels are chosen, which on CPUs they never are."""
    used = []
    for module, kernels in ((norm, triton_norm), (gated, triton_gated), (rotary, triton_rotary)):
        monkeypatch.setattr(module, "can_use_triton", lambda *tensors: True)
        for name in ("_forward", "_backward", "_rotate"):
            if hasattr(kernels, name):
                monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name), used))
    x, gate, up, dy = (values(2, 3, 40, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(4))
    weight = values(40, dtype=torch.float32, seed=4).requires_grad_()
    q, k = (values(2, heads, 3, 16, dtype=torch.float32, seed=heads).requires_grad_() for heads in (4, 2))
    cos, sin = (values(1, 3, 8, dtype=torch.float32, seed=seed) for seed in range(2))

    def everything(t: list[Tensor]) -> list[Tensor]:
        x, weight, gate, up, q, k, cos, sin, dy = t
        y = norm.rms_norm(x, weight, 1e-5, offset=1.0, late_rounding=True)
        z = gated.gated_activation(gate, up, "silu")
        turned = rotary.apply_rotary(q, k, cos, sin)
        loss = ((y + z) * dy).sum() + sum((t**2).sum() for t in turned)
        return [y, z, *turned, *torch.autograd.grad(loss, (x, weight, gate, up, q, k))]

    tensors = [x, weight, gate, up, q, k, cos, sin, dy]
    found = everything(tensors)
    assert len(used) == 6
    for module in (norm, gated, rotary):
        monkeypatch.setattr(module, "can_use_triton", lambda *tensors: False)
    want = everything([t.detach().double().requires_grad_() for t in tensors])
    assert len(used) == 6
    torch.testing.assert_close([t.double() for t in found], want, rtol=1e-5, atol=1e-5)


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, used: list[str]) -> None:
        self.kernel, self.used = kernel, used

    def __getitem__(self, grid: Any) -> Any:
        self.used.append(self.kernel.__name__)
        return self.kernel[grid]
