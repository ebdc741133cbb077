"""8-bit rows: the bytes are those of bitsandbytes' own layer, and the weight is the one that it multiplies by."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.ops import int8, nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 5), (1, 200), (64, 64), (33, 127), (300, 257))


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of widely different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[0]).unsqueeze(1)
    weight[shape[0] // 2] = 0
    return weight.to(dtype)


def theirs(weight: Tensor) -> bitsandbytes.nn.Linear8bitLt:
    layer = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(shape, dtype)
    want = theirs(weight).weight
    for piece in (1, 500, 1 << 20):
        monkeypatch.setattr(nf4, "CHUNK_ELEMENTS", piece)
        packed, statistics = int8.quantize(weight)
        assert torch.equal(packed, want.data)
        assert torch.equal(int8.unpack_absmax(statistics), want.SCB)
        assert statistics.dtype == torch.uint8
        assert statistics.shape == (int8.statistics_bytes(shape[0]),)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 300), piece=st.integers(1, 900), seed=st.integers(0, 1000))
def test_an_error_is_at_most_half_a_step_of_its_row(rows: int, columns: int, piece: int, seed: int) -> None:
    """In float64, against the definition: absmax / 254, and what fp16 and fp32 round away."""
    weight = weight_of((rows, columns), seed=seed)
    former, int8.PIECE_ELEMENTS = int8.PIECE_ELEMENTS, piece
    found = int8.dequantize(*int8.quantize(weight), torch.float32).double()
    int8.PIECE_ELEMENTS = former
    absmax = weight.double().abs().amax(1, keepdim=True)
    assert ((found - weight.double()).abs() <= absmax * (1 / 254 + 2**-10) + 2**-24).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", [7, 1 << 18])
def test_the_weight_is_the_one_bitsandbytes_multiplies_by(
    shape: tuple[int, int], dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layer in training mode on a CPU, given the unit vectors; its own dequantizing rounds one step later."""
    monkeypatch.setattr(int8, "PIECE_ELEMENTS", piece)
    weight = weight_of(shape)
    layer = theirs(weight)
    packed, statistics = int8.quantize(weight)
    found = int8.dequantize(packed, statistics, dtype)
    plain = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    torch.testing.assert_close(int8.dequantize(packed, statistics, torch.float32), plain, rtol=2**-22, atol=0)
    assert torch.equal(found.T, layer.train()(torch.eye(shape[1], dtype=dtype)))
    assert found.dtype == dtype
    assert torch.equal(int8.dequantize_borrowed(packed, statistics, dtype), found)


def test_a_borrowed_weight_lies_where_the_last_one_lay() -> None:
    large, small = (int8.quantize(weight_of(shape)) for shape in ((40, 30), (20, 10)))
    first = int8.dequantize_borrowed(*large, torch.float32)
    second = int8.dequantize_borrowed(*small, torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()


def test_statistics_may_lie_anywhere() -> None:
    """As in a buffer that was gathered from shares."""
    packed, statistics = int8.quantize(weight_of((5, 9)))
    moved = torch.cat([torch.zeros(3, dtype=torch.uint8), statistics])[3:]
    assert torch.equal(int8.dequantize(packed, moved, torch.float32), int8.dequantize(packed, statistics, torch.float32))


@pytest.mark.parametrize("number", [70000.0, float("inf"), float("nan")])
def test_what_fp16_cannot_hold_is_refused(number: float) -> None:
    """bitsandbytes makes a row of zeros times infinity of it."""
    weight = weight_of((5, 9))
    weight[3, 4] = number
    assert not torch.isfinite(theirs(weight).weight.SCB).all()
    with pytest.raises(BaseModelError, match=r"here: the weight has numbers that fp16 cannot hold"):
        int8.quantize(weight, "here")


GOOD = {"SCB": torch.ones(4), "weight_format": torch.tensor(0, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("weight", "changes", "message"),
    [
        (torch.int8, {"SCB": None}, "has no scales"),
        (torch.uint8, {}, "is not one"),
        (torch.int8, {"SCB": torch.ones(5)}, "scales do not fit"),
        (torch.int8, {"SCB": torch.ones(4, dtype=torch.float16)}, "scales do not fit"),
        (torch.int8, {"weight_format": torch.tensor(1, dtype=torch.uint8)}, "laid out for a GPU"),
        (torch.int8, {"weight_format": torch.tensor([], dtype=torch.uint8)}, "laid out for a GPU"),
    ],
)
def test_damaged_files_are_refused(weight: torch.dtype, changes: dict[str, Tensor | None], message: str) -> None:
    stored = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(BaseModelError, match=message) as error:
        int8.check_stored(torch.zeros((4, 3), dtype=weight), stored, stored.__getitem__, "a place")
    assert error.value.place == "a place"
    int8.check_stored(torch.zeros((4, 3), dtype=torch.int8), GOOD, GOOD.__getitem__, "a place")
    int8.check_stored(torch.zeros((4, 3), dtype=torch.int8), {"SCB": GOOD["SCB"]}, GOOD.__getitem__, "a place")
