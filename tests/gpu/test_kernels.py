"""Triton's kernels on a GPU, through the functions that choose them, against the same functions in float64 on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from qlora.ops import gated, norm, rotary
from qlora.ops.triton.available import works_on

NO_GPU = "torch.cuda.is_available() is false here"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = [(0.0, False), (1.0, True)]  # Llama's convention and Gemma's


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers that the dtype can hold, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(found: Tensor, want: Tensor, dtype: torch.dtype, roundings: int = 2) -> None:
    """Within so many roundings of the dtype, and of fp32's of the largest value."""
    assert found.device.type == "cuda"
    assert found.dtype == dtype
    step, fine = roundings * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps
    size = float(want.abs().max())
    torch.testing.assert_close(found.double().cpu(), want, rtol=step + fine, atol=(fine + step / 8) * size + 1e-6)


def test_triton_works_where_it_is_installed(device: torch.device) -> None:
    """Otherwise the tests below compare torch with torch."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert works_on(device.index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "late"), NORMS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (300, 257), (64, 4096), (3, 16384)])
def test_norm(device: torch.device, dtype: torch.dtype, offset: float, late: bool, rows: int, width: int) -> None:
    x, weight, dy = (values(*shape, dtype=dtype, seed=s) for s, shape in enumerate(((rows, width), (width,), (rows, width))))
    convention = {"offset": offset, "late_rounding": late}
    y, rstd = norm.rms_norm_forward(x.to(device), weight.to(device), 1e-5, **convention)
    again = norm.rms_norm_again(x.to(device), rstd, weight.to(device), **convention)
    dx, dw = norm.rms_norm_backward(dy.to(device), x.to(device), weight.to(device), rstd, need_weight=True, **convention)
    wide = [tensor.double() for tensor in (x, weight)]
    want, want_rstd = norm.rms_norm_forward(*wide, 1e-5, **convention)
    want_dx, want_dw = norm.rms_norm_backward(dy.double(), *wide, want_rstd, need_weight=True, **convention)
    assert torch.equal(again, y)
    assert_near(y, want, dtype)
    assert_near(dx, want_dx, dtype, 4)
    assert dw is not None
    assert want_dw is not None
    assert_near(dw, want_dw, dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 1001), (64, 14336)])
def test_gated(device: torch.device, dtype: torch.dtype, kind: str, rows: int, width: int) -> None:
    gate, up, dy = (values(rows, width, dtype=dtype, seed=seed) for seed in range(3))
    there = [tensor.to(device) for tensor in (dy, gate, up)]
    y = gated.gated_forward(there[1], there[2], kind)
    dgate, dup = gated.gated_backward(*there, kind)
    assert_near(y, gated.gated_forward(gate.double(), up.double(), kind), dtype)
    want_dgate, want_dup = gated.gated_backward(dy.double(), gate.double(), up.double(), kind)
    assert_near(dgate, want_dgate, dtype, 4)
    assert_near(dup, want_dup, dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv", "length", "width", "turned"), [(4, 2, 7, 64, 64), (32, 8, 129, 128, 128), (3, 3, 5, 80, 32)]
)
def test_rotary(device: torch.device, dtype: torch.dtype, heads: int, kv: int, length: int, width: int, turned: int) -> None:
    """Also through the strides that a model has: heads behind tokens in memory."""
    q, k = (values(2, length, n, width, dtype=dtype, seed=n).transpose(1, 2) for n in (heads, kv))
    angles = values(1, length, turned // 2, dtype=torch.float32, seed=9).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for backward in (False, True):
        found = rotary.rotate(*(t.to(device) for t in (q, k, cos, sin)), backward=backward)
        want = rotary.rotate(*(t.double() for t in (q, k, cos, sin)), backward=backward)
        for one, other in zip(found, want, strict=True):
            assert_near(one, other, dtype, 4)
