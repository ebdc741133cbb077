"""Quantizing against bitsandbytes' own functions: equal bytes, equal statistics, equal weights."""

from __future__ import annotations

import copy
import math
import threading

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.errors import BaseModelError
from qlora.ops import nf4
from qlora.ops.nf4 import QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def make_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    # Outliers in one place, so that scales differ widely from block to block.
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[::97] *= 20
    return weight.to(dtype)


def reference(weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, QuantState]:
    return quantize_4bit(
        weight,
        blocksize=spec.block_size,
        compress_statistics=spec.double_quant,
        quant_type=spec.quant_type,
        quant_storage=spec.storage,
    )


def dequantize_by_hand(
    packed: torch.Tensor, statistics: torch.Tensor, spec: QuantSpec, shape: tuple[int, ...]
) -> torch.Tensor:
    """The definition: the table's value of each half byte, high half first, times the scale of its block (fp32)."""
    num_elements = math.prod(shape)
    table = bitsandbytes.functional.get_4bit_type(spec.quant_type, device="cpu")
    as_bytes = packed.view(torch.uint8).reshape(-1).long()
    halves = torch.stack([as_bytes >> 4, as_bytes & 15], dim=1).reshape(-1)[:num_elements]
    scales = nf4.unpack_absmax(statistics, spec, num_elements).repeat_interleave(spec.block_size)[:num_elements]
    return (table[halves] * scales).reshape(shape)


def test_statistics_do_not_depend_on_the_number_of_threads() -> None:
    """torch's own sum on CPUs does, and ranks of a launch have other threads than a process alone."""
    scales = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    before, found, plain = torch.get_num_threads(), [], []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(nf4.pack_statistics(scales, QuantSpec()))
            plain.append(scales.mean())
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert plain[0] != plain[1], "this many scales no longer show it"


def in_dtype(state: QuantState, dtype: torch.dtype) -> QuantState:
    state = copy.deepcopy(state)
    state.dtype = dtype
    return state


def assert_equal_to_bitsandbytes(weight: torch.Tensor, spec: QuantSpec) -> None:
    packed, statistics = nf4.quantize(weight, spec)
    want_packed, state = reference(weight, spec)
    assert packed.dtype == spec.storage
    assert tuple(packed.shape) == tuple(want_packed.shape) == spec.packed_shape(weight.numel())
    # As bytes: packed bytes that are stored as floats may well be NaN, which equals nothing.
    assert torch.equal(packed.view(torch.uint8), want_packed.view(torch.uint8))
    assert statistics.dtype == torch.uint8
    assert statistics.shape == (spec.statistics_bytes(weight.numel()),)
    if spec.double_quant:
        mean, nested, absmax = nf4.split_statistics(statistics, spec, weight.numel())
        assert torch.equal(mean[0], state.offset)
        assert torch.equal(nested, state.state2.absmax)
        assert torch.equal(absmax, state.absmax)
    else:
        assert torch.equal(statistics.view(torch.float32), state.absmax)
    want = dequantize_by_hand(packed, statistics, spec, tuple(weight.shape))
    for dtype in DTYPES:
        found = nf4.dequantize(packed, statistics, spec, tuple(weight.shape), dtype)
        assert found.dtype == dtype
        assert found.shape == weight.shape
        assert torch.equal(found, want.to(dtype))
    # bitsandbytes' CPU kernel is right where a block begins with every row; for wider ones it compiles a kernel first.
    if weight.shape[-1] % spec.block_size == 0 and spec.block_size <= 1024:
        assert torch.equal(found, dequantize_4bit(want_packed, in_dtype(state, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_and_weights_are_those_of_bitsandbytes(
    quant_type: str, block_size: int, double_quant: bool, dtype: torch.dtype
) -> None:
    # 260 blocks of 64: more than one block of scales. Blocks above 128 run on from one row to the next.
    assert_equal_to_bitsandbytes(make_weight(130, 128, dtype=dtype), QuantSpec(quant_type, block_size, double_quant))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape_also_odd_ones(
    rows: int, columns: int, quant_type: str, block_size: int, double_quant: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = make_weight(rows, columns, dtype=dtype, seed=seed)
    assert_equal_to_bitsandbytes(weight, QuantSpec(quant_type, block_size, double_quant))


@pytest.mark.parametrize("num_elements", [8191, 8192, 8193, 3 * 8192, 3 * 8192 + 1, 20_001])
@pytest.mark.parametrize("block_size", [64, 4096])
def test_the_size_of_the_pieces_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, num_elements: int, block_size: int) -> None:
    assert all(nf4.CHUNK_ELEMENTS % size == 0 for size in BLOCK_SIZES)
    spec = QuantSpec(block_size=block_size)
    weight = make_weight(1, num_elements, dtype=torch.bfloat16)
    monkeypatch.setattr(nf4, "CHUNK_ELEMENTS", 8192)
    assert_equal_to_bitsandbytes(weight, spec)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_storage_changes_the_type_and_no_byte(storage: torch.dtype) -> None:
    weight = make_weight(24, 64, dtype=torch.bfloat16)
    assert_equal_to_bitsandbytes(weight, QuantSpec(storage=storage))
    as_bytes, statistics = nf4.quantize(weight, QuantSpec())
    packed, own = nf4.quantize(weight, QuantSpec(storage=storage))
    assert torch.equal(packed.view(torch.uint8).reshape(-1), as_bytes.reshape(-1))
    assert torch.equal(own, statistics)


def test_a_storage_the_bytes_do_not_fill_is_refused() -> None:
    # 3 x 7 weights are 11 bytes, no multiple of two.
    with pytest.raises(BaseModelError, match="cannot be stored"):
        nf4.quantize(torch.randn(3, 7), QuantSpec(storage=torch.bfloat16))


@pytest.mark.parametrize(("quant_type", "widest_gap"), [("nf4", 1 - 0.6961928), ("fp4", 2 / 3 - 0.3333333)])
def test_no_weight_moves_by_more_than_half_a_gap_of_the_table(quant_type: str, widest_gap: float) -> None:
    weight = make_weight(70, 96)
    spec = QuantSpec(quant_type, 64, double_quant=False)
    packed, statistics = nf4.quantize(weight, spec)
    moved = (nf4.dequantize(packed, statistics, spec, (70, 96), torch.float32) - weight).abs()
    scales = weight.reshape(-1, 64).abs().amax(1)
    assert torch.equal(statistics.view(torch.float32), scales)
    assert (moved.reshape(-1, 64) <= scales[:, None] * widest_gap / 2 * (1 + 1e-6)).all()


def test_a_weight_that_is_not_contiguous_is_quantized_in_its_own_order() -> None:
    weight = make_weight(64, 96)
    assert_equal_to_bitsandbytes(weight.T, QuantSpec())


@pytest.mark.parametrize("double_quant", [True, False])
def test_statistics_may_lie_anywhere_in_a_larger_buffer(double_quant: bool) -> None:
    """What ZeRO-3 gathers is a view into a flat buffer, at a place that is no multiple of a float's size."""
    spec = QuantSpec(double_quant=double_quant)
    weight = make_weight(40, 64)
    packed, statistics = nf4.quantize(weight, spec)
    wanted = nf4.dequantize(packed, statistics, spec, (40, 64), torch.float32)
    for offset in range(5):
        buffer = torch.zeros(statistics.numel() + 5, dtype=torch.uint8)
        view = buffer[offset : offset + statistics.numel()]
        view.copy_(statistics)
        assert torch.equal(nf4.dequantize(packed, view, spec, (40, 64), torch.float32), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 64), (40, 96), (4, 7)])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("fp4", 32, False), QuantSpec(storage=torch.bfloat16)], ids=str)
def test_a_borrowed_weight_is_the_same_weight(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(3):  # one buffer, another weight each time
        packed, statistics = nf4.quantize(make_weight(*shape, seed=seed), spec)
        want = nf4.dequantize(packed, statistics, spec, shape, dtype)
        found = nf4.dequantize_borrowed(packed, statistics, spec, shape, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, want)


def test_threads_do_not_share_what_they_borrow() -> None:
    spec = QuantSpec()
    weights = [nf4.quantize(make_weight(64, 64, seed=seed), spec) for seed in range(2)]
    want = [nf4.dequantize(*weight, spec, (64, 64), torch.float32) for weight in weights]
    borrowed = [torch.empty(0), torch.empty(0)]

    def borrow(index: int) -> None:
        borrowed[index] = nf4.dequantize_borrowed(*weights[index], spec, (64, 64), torch.float32)

    borrow(0)
    thread = threading.Thread(target=borrow, args=(1,))
    thread.start()
    thread.join()
    assert all(torch.equal(*pair) for pair in zip(borrowed, want, strict=True))
