"""The root mean square norm against transformers' own modules, bit for bit, and against float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora.ops import scratch
from qlora.ops.norm import rms_norm, rms_norm_again, rms_norm_backward, rms_norm_forward

EPS = 1e-5
LLAMA: dict[str, Any] = {"offset": 0.0, "late_rounding": False}
GEMMA: dict[str, Any] = {"offset": 1.0, "late_rounding": True}
CONVENTIONS = [pytest.param(LlamaRMSNorm, LLAMA, id="llama"), pytest.param(GemmaRMSNorm, GEMMA, id="gemma")]
# One row, less than a block, several blocks of which the last is a part, rows wider than a block.
SHAPES = [(1, 7), (33, 576), (250, 96), (5, 3000)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "BLOCK_ELEMENTS", 2048)


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def module_with(kind: Any, weight_D: Tensor) -> Any:
    module = kind(len(weight_D), eps=EPS).to(weight_D.dtype)
    module.weight.data.copy_(weight_D)
    return module


@pytest.mark.parametrize(("kind", "convention"), CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_is_transformers_bit_for_bit(
    kind: Any, convention: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight = values(*shape, dtype=dtype), values(shape[1], dtype=dtype, seed=1)
    y, rstd = rms_norm_forward(x, weight, EPS, **convention)
    assert torch.equal(y, module_with(kind, weight)(x))
    assert y.dtype == dtype
    assert rstd.dtype == torch.float32
    assert torch.equal(rms_norm_again(x, rstd, weight, **convention), y)


@pytest.mark.parametrize("threads", [1, 2])
def test_forward_is_transformers_at_full_size_and_for_any_number_of_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = values(1024, 576, dtype=torch.bfloat16), values(576, dtype=torch.bfloat16, seed=1)
        y, rstd = rms_norm_forward(x, weight, EPS, **LLAMA)
        assert torch.equal(y, module_with(LlamaRMSNorm, weight)(x))
        assert torch.equal(rms_norm_again(x, rstd, weight, **LLAMA), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("convention", [LLAMA, GEMMA, {"offset": 0.5, "late_rounding": False}])
def test_gradients_in_float64(convention: dict[str, Any]) -> None:
    x = values(3, 4, 5, dtype=torch.float64).requires_grad_()
    weight = values(5, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, **convention), (x, weight))


@pytest.mark.parametrize(("kind", "convention"), CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_no_further_from_float64_than_transformers(
    kind: Any, convention: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, dy = (values(*shape, dtype=dtype, seed=seed) for seed in range(2))
    weight = values(shape[1], dtype=dtype, seed=2)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(rms_norm(*wide, EPS, **convention), wide, dy.double())
    module, given = module_with(kind, weight), x.clone().requires_grad_()
    theirs = torch.autograd.grad(module(given), (given, module.weight), dy)
    ours_given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    ours = torch.autograd.grad(rms_norm(*ours_given, EPS, **convention), ours_given, dy)
    for found, their, wanted in zip(ours, theirs, want, strict=True):
        assert found.dtype == dtype
        error, their_error = ((t.double() - wanted).norm().item() for t in (found, their))
        assert error <= 1.1 * their_error
        assert error <= 2 * torch.finfo(dtype).eps * wanted.norm().item()


def test_without_a_gradient_of_the_weight_none_is_made() -> None:
    x, dy, weight = (values(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate([(70, 96), (70, 96), (96,)]))
    _, rstd = rms_norm_forward(x, weight, EPS, **LLAMA)
    with_weight, _ = rms_norm_backward(dy, x, weight, rstd, need_weight=True, **LLAMA)
    without, none = rms_norm_backward(dy, x, weight, rstd, need_weight=False, **LLAMA)
    assert none is None
    assert torch.equal(with_weight, without)


def test_a_weight_in_fp32_over_bf16() -> None:
    """As it is where norms are trained in fp32: transformers' product is then fp32 with Llama, bf16 with Gemma."""
    x, weight = values(40, 96, dtype=torch.bfloat16), values(96, dtype=torch.float32, seed=1)
    for kind, convention, dtype in ((LlamaRMSNorm, LLAMA, torch.float32), (GemmaRMSNorm, GEMMA, torch.bfloat16)):
        x.grad = weight.grad = None
        x.requires_grad_(), weight.requires_grad_()
        y = rms_norm(x, weight, EPS, **convention)
        assert y.dtype == dtype
        assert torch.equal(y, module_with(kind, weight.detach())(x))
        y.sum().backward()
        assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_strided_inputs_and_none_at_all() -> None:
    x = values(6, 40, dtype=torch.bfloat16)[::2, 3:20]
    weight = values(17, dtype=torch.bfloat16, seed=1)
    y, rstd = rms_norm_forward(x, weight, EPS, **LLAMA)
    want, want_rstd = rms_norm_forward(x.contiguous(), weight, EPS, **LLAMA)
    assert torch.equal(y, want)
    dy = torch.ones(3, 1, dtype=torch.bfloat16).expand(3, 17)  # what sum() hands back
    found = rms_norm_backward(dy, x, weight, rstd, need_weight=True, **LLAMA)
    torch.testing.assert_close(
        found, rms_norm_backward(dy.contiguous(), x.contiguous(), weight, want_rstd, need_weight=True, **LLAMA)
    )
    assert rms_norm(x[:0], weight, EPS).shape == (0, 17)


def test_what_is_saved_is_the_input_and_a_number_a_row() -> None:
    saved: list[Tensor] = []
    x = values(2, 30, 64, dtype=torch.bfloat16).requires_grad_()
    weight = values(64, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert sorted(t.numel() for t in saved) == [60, 60 * 64]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_work_space_is_no_part_of_a_result() -> None:
    """Blocks are computed in buffers that the next call uses again."""
    x, weight = values(90, 96, dtype=torch.float32), values(96, dtype=torch.float32, seed=1)
    first, rstd = rms_norm_forward(x, weight, EPS, **LLAMA)
    dx, _ = rms_norm_backward(x, x, weight, rstd, need_weight=False, **LLAMA)
    kept = first.clone(), dx.clone()
    rms_norm_backward(2 * x, -x, weight, rstd, need_weight=True, **LLAMA)
    rms_norm_forward(3 * x, weight, EPS, **GEMMA)
    assert torch.equal(first, kept[0])
    assert torch.equal(dx, kept[1])


def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "BLOCK_ELEMENTS", 10)
    for num_rows, width in ((0, 3), (1, 3), (7, 3), (9, 3), (4, 11), (5, 1)):
        blocks = list(scratch.row_blocks(num_rows, width, torch.device("cpu")))
        assert [row for block in blocks for row in range(num_rows)[block]] == list(range(num_rows))
        assert all(block.stop - block.start <= max(1, 10 // width) for block in blocks)
        assert all(a.stop == b.start for a, b in pairwise(blocks))
        assert len(list(scratch.row_blocks(num_rows, width, torch.device("meta")))) == min(1, num_rows)


def test_buffers_share_nothing() -> None:
    for dtype in (torch.float32, torch.float64, torch.float32):
        first, second = scratch.buffers(2, (3, 5), dtype, torch.device("cpu"))
        first.fill_(1.0)
        second.fill_(2.0)
        assert first.dtype == dtype
        assert (first == 1).all()
        assert first.shape == second.shape == (3, 5)
