"""Attention on a CPU, whole and in tiles, against one masked attention over the whole row in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qlora.ops import attention_cpu
from qlora.ops.attention_cpu import attention_on_cpu
from qlora.ops.documents import DocumentLayout

SCALING = 0.3
POWER_OF_TWO = 0.25
LENGTHS = {"one": [70], "like": [16, 16, 16], "mixed": [40, 2, 39, 3, 7], "long and short": [90, 5, 6, 5]}


def make_qkv(
    num_tokens: int,
    dtype: torch.dtype,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    widths: tuple[int, int] = (8, 8),
    seed: int = 0,
) -> list[Tensor]:
    """As transformers' models give them: views of what lies in memory as (1, T, H, d)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, widths[0]), (kv_heads, widths[0]), (kv_heads, widths[1]))
    return [
        torch.randn(1, num_tokens, *shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def reference(
    qkv: list[Tensor], lengths: list[int], window: int | None = None, scaling: float = SCALING
) -> tuple[list[Tensor], Tensor]:
    query, key, value = inputs = [t.detach().double().requires_grad_() for t in qkv]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(document))[:, None] - torch.arange(len(document))
    visible = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(document)))
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, float("-inf"))
    return inputs, scores.softmax(-1) @ value


@pytest.mark.parametrize("tile_elements", [1, 300, 4000, 1 << 19])
@pytest.mark.parametrize(("window", "scaling"), [(None, SCALING), (5, SCALING), (None, POWER_OF_TWO)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_tiles_of_any_size_are_the_reference(
    lengths: list[int], window: int | None, scaling: float, tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "TILE_ELEMENTS", tile_elements)
    monkeypatch.setattr(attention_cpu, "FEWEST_QUERIES", 3)
    qkv = make_qkv(sum(lengths), torch.float64)
    inputs, want = reference(qkv, lengths, window, scaling)
    found = attention_on_cpu(*qkv, DocumentLayout.from_lengths(lengths), scaling, window)
    torch.testing.assert_close(found, want)
    direction = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(found, qkv, direction), torch.autograd.grad(want, inputs, direction))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (9, 3)])
@pytest.mark.parametrize("widths", [(8, 8), (12, 8), (8, 16)], ids=str)
def test_heads_and_widths(heads: int, kv_heads: int, widths: tuple[int, int]) -> None:
    """Also values narrower or wider than keys, as in multi-head latent attention."""
    lengths = [11, 30, 12]
    qkv = make_qkv(sum(lengths), torch.float64, heads=heads, kv_heads=kv_heads, widths=widths)
    inputs, want = reference(qkv, lengths)
    found = attention_on_cpu(*qkv, DocumentLayout.from_lengths(lengths), SCALING)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), qkv), torch.autograd.grad(want.sum(), inputs))


@pytest.mark.parametrize(("size", "scaling"), [(1.0, SCALING), (6.0, SCALING), (6.0, POWER_OF_TWO)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_half_precision_is_within_the_rounding_of_its_inputs(
    lengths: list[int], dtype: torch.dtype, tolerance: float, size: float, scaling: float
) -> None:
    """Also where scores reach hundreds, of which bf16 alone keeps no digit behind the point."""
    qkv = make_qkv(sum(lengths), dtype, widths=(32, 32))
    qkv[0] = (qkv[0].detach() * size).requires_grad_()
    qkv[1] = (qkv[1].detach() * size).requires_grad_()
    inputs, want = reference(qkv, lengths, None, scaling)
    found = attention_on_cpu(*qkv, DocumentLayout.from_lengths(lengths), scaling)
    direction = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(found, qkv, direction)
    wanted = torch.autograd.grad(want, inputs, direction.double())
    for own, oracle in zip((found, *gradients), (want, *wanted), strict=True):
        assert own.dtype == dtype
        assert (own.double() - oracle).norm() < tolerance * oracle.norm()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_what_comes_out_lies_as_the_next_layer_reads_it(lengths: list[int]) -> None:
    qkv = make_qkv(sum(lengths), torch.bfloat16)
    found = attention_on_cpu(*qkv, DocumentLayout.from_lengths(lengths), SCALING)
    gradients = torch.autograd.grad(found.float().square().sum(), qkv)
    for tensor in (found, *gradients):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_inputs_may_lie_in_any_order(lengths: list[int]) -> None:
    qkv = make_qkv(sum(lengths), torch.float64)
    layout = DocumentLayout.from_lengths(lengths)
    other = [t.detach().contiguous().requires_grad_() for t in qkv]
    found = [attention_on_cpu(*inputs, layout, SCALING) for inputs in (qkv, other)]
    assert torch.equal(*found)
    gradients = [torch.autograd.grad(out.sum(), inputs) for out, inputs in zip(found, (qkv, other), strict=True)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_no_scores_are_kept_for_backward() -> None:
    lengths = [40, 30, 50]
    qkv = make_qkv(sum(lengths), torch.bfloat16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention_on_cpu(*qkv, DocumentLayout.from_lengths(lengths), SCALING)
    # Queries, keys and values as they came, and one number for each place of a query head (padding included).
    assert [t.data_ptr() for t in saved[:3]] == [t.data_ptr() for t in qkv]
    assert len(saved) == 4
    assert saved[3].numel() <= 6 * 3 * 50


def test_a_number_that_is_none_is_not_hidden() -> None:
    qkv = make_qkv(20, torch.bfloat16)
    with torch.no_grad():
        qkv[0][0, 1, 15] = torch.nan
    found = attention_on_cpu(*qkv, DocumentLayout.from_lengths([12, 8]), SCALING)
    assert found[0, 1, 15].isnan().all()
    assert not found[0, :, :12].isnan().any()
    assert torch.autograd.grad(found.sum(), qkv)[1].isnan().any()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_what_values_have_in_common_is_in_no_gradient_of_scores(lengths: list[int]) -> None:
    """In exact arithmetic it adds nothing to dS; weights in bf16 do not quite add up to one, and would let some through."""
    qkv = make_qkv(sum(lengths), torch.bfloat16, widths=(32, 32))
    qkv[2] = (qkv[2].detach() + 16).requires_grad_()
    inputs, want = reference(qkv, lengths)
    found = attention_on_cpu(*qkv, DocumentLayout.from_lengths(lengths), SCALING)
    direction = torch.ones_like(want)  # all of it along what they have in common
    own, oracle = (torch.autograd.grad(out, qk[:2], direction.to(out.dtype)) for out, qk in ((found, qkv), (want, inputs)))
    for mine, true in zip(own, oracle, strict=True):
        assert (mine.double() - true).norm() < 2**-5 * true.norm()


@pytest.mark.parametrize("window", [None, 64, 512, 4096])
@pytest.mark.parametrize("length", [40, 700, 8192, 131_072])
@pytest.mark.parametrize("num_shared", [1, 4, 16])
def test_tiles_cover_what_is_seen_once_and_are_no_larger_than_said(length: int, num_shared: int, window: int | None) -> None:
    num_pairs = 5
    tiles = list(attention_cpu._tiles(num_pairs, num_shared, length, window))
    for tile in tiles:
        is_small = tile.last - tile.first <= attention_cpu.FEWEST_QUERIES
        assert is_small or math.prod(tile.shape(num_shared)) <= attention_cpu.TILE_ELEMENTS
        assert tile.first_key == (0 if window is None else max(0, tile.first - window + 1))
    for pair in range(num_pairs):
        own = [tile for tile in tiles if tile.pairs.start <= pair < tile.pairs.stop]
        assert [tile.first for tile in own] == [0, *(tile.last for tile in own[:-1])]
        assert own[-1].last == length
