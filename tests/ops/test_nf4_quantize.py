"""Quantizing by the kernel in C against bitsandbytes itself: equal bytes and equal scales, whatever the weight."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.ops import nf4, nf4_quantize
from qlora.ops.native import build
from qlora.ops.nf4 import QuantSpec
from qlora.ops.nf4_quantize import NativeQuantizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = ("nf4", "fp4")
BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


def by_bitsandbytes(quant_type: str) -> Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    def quantize(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, block_size, quant_type, torch.uint8)
        return packed.reshape(-1), absmax.reshape(-1)

    return quantize


def no_reference(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    pytest.fail("the kernel left something to the reference")


@pytest.fixture(scope="module")
def quantizers() -> dict[str, NativeQuantizer]:
    """One for each code, compared with bitsandbytes."""
    if build._find_compiler() is None:
        pytest.skip("no C compiler")
    return {name: NativeQuantizer(nf4.four_bit_code(name, torch.device("cpu")), by_bitsandbytes(name)) for name in CODES}


@pytest.fixture
def by_kernel_alone(quantizers: dict[str, NativeQuantizer], monkeypatch: pytest.MonkeyPatch) -> dict[str, NativeQuantizer]:
    """The same, which fail where they would ask bitsandbytes."""
    for quantizer in quantizers.values():
        monkeypatch.setattr(quantizer, "_exact", no_reference)
    return quantizers


def assert_equal(
    found: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, block_size: int, quant_type: str = "nf4"
) -> None:
    packed, absmax = by_bitsandbytes(quant_type)(weight, block_size)
    assert found[0].dtype == torch.uint8
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0], packed)
    # As bytes: NaN equals nothing, and 0 equals -0.
    assert torch.equal(found[1].view(torch.uint8), absmax.view(torch.uint8))


def random_weight(num_elements: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    weight = 0.02 * torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))
    weight[::97] *= 20
    return weight.to(dtype)


@pytest.mark.parametrize("quant_type", CODES)
def test_the_installed_bitsandbytes_is_agreed_with(quantizers: dict[str, NativeQuantizer], quant_type: str) -> None:
    """Otherwise the kernel would not be used, and all the tests below would compare bitsandbytes with itself."""
    assert quantizers[quant_type].is_native, quantizers[quant_type].describe()
    assert nf4._native_quantizer(quant_type).describe() == "a kernel in C"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", CODES)
def test_whole_blocks_are_quantized_by_the_kernel_alone(
    by_kernel_alone: dict[str, NativeQuantizer], quant_type: str, block_size: int, dtype: torch.dtype
) -> None:
    weight = random_weight(4096 * 17, dtype)
    assert_equal(by_kernel_alone[quant_type].quantize(weight, block_size), weight, block_size, quant_type)


@pytest.mark.parametrize("block_size", [64, 4096])
def test_many_stretches(by_kernel_alone: dict[str, NativeQuantizer], block_size: int) -> None:
    weight = random_weight(nf4_quantize._STRETCH_ELEMENTS * 2 + 4096 * 3, torch.bfloat16)
    assert_equal(by_kernel_alone["nf4"].quantize(weight, block_size), weight, block_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", CODES)
def test_every_weight_of_16_bits_under_every_scale_of_a_binade(
    by_kernel_alone: dict[str, NativeQuantizer], quant_type: str, dtype: torch.dtype
) -> None:
    """Scales one to two, weights down to 1/64 of them: below, all are nearer to zero than the first midpoint."""
    one = torch.ones(1, dtype=dtype).view(torch.int16).item()
    binade = torch.tensor(2.0, dtype=dtype).view(torch.int16).item() - one
    step = 1 if dtype == torch.bfloat16 else 37  # of 1,024 scales in fp16
    for scale in range(one, one + binade, step):
        magnitudes = torch.arange(one - 6 * binade, scale + 1, dtype=torch.int16).view(dtype)
        both = torch.cat([magnitudes, -magnitudes])
        # A block's first weight is its scale.
        both = torch.nn.functional.pad(both, (0, -both.numel() % 62)).reshape(-1, 31)
        scales = torch.tensor([scale], dtype=torch.int16).view(dtype).expand(both.shape[0], 1)
        weight = torch.cat([scales, both], 1).reshape(-1)
        assert_equal(by_kernel_alone[quant_type].quantize(weight, 32), weight, 32, quant_type)


@pytest.mark.parametrize("quant_type", CODES)
def test_weights_at_a_midpoint_and_next_to_it(by_kernel_alone: dict[str, NativeQuantizer], quant_type: str) -> None:
    values = nf4.four_bit_code(quant_type, torch.device("cpu")).sort().values
    midpoints = (values[1:] + values[:-1]) / 2
    near = [midpoints]
    for _ in range(2):
        near = [torch.nextafter(near[0], torch.tensor(-2.0)), *near, torch.nextafter(near[-1], torch.tensor(2.0))]
    block = torch.cat([torch.ones(1), *near, torch.zeros(128 - 1 - 15 * 5)])
    scales = torch.cat([torch.rand(4000, generator=torch.Generator().manual_seed(0)), 2.0 ** torch.arange(-99, 127)])
    weight = (block * scales[:, None]).reshape(-1)
    assert_equal(by_kernel_alone[quant_type].quantize(weight, 128), weight, 128, quant_type)
    # Under a scale of one every one of them is a tie, or one bit away from it.
    assert_equal(by_kernel_alone[quant_type].quantize(block, 128), block, 128, quant_type)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 3.1e-5, 1e-30, 6e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", CODES)
def test_a_weight_of_one_value(
    quantizers: dict[str, NativeQuantizer], quant_type: str, dtype: torch.dtype, value: float
) -> None:
    weight = torch.full((8192,), value, dtype=dtype)
    assert_equal(quantizers[quant_type].quantize(weight, 64), weight, 64, quant_type)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, 1e-38, 1e-40, 1e-45], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("everywhere", [True, False])
def test_scales_the_kernel_cannot_take_give_what_bitsandbytes_gives(
    quantizers: dict[str, NativeQuantizer], dtype: torch.dtype, value: float, everywhere: bool
) -> None:
    """A NaN's code is the last one, and so is that of an infinite weight; others beside an infinite one get zero's."""
    weight = random_weight(64 * 200, dtype)
    weight[64 * 7 : 64 * 8] = 0
    weight[64 * 7 + 5] = value
    if everywhere:
        weight = torch.full_like(weight, value)
    assert_equal(quantizers["nf4"].quantize(weight, 64), weight, 64)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bits(quantizers: dict[str, NativeQuantizer], data: st.DataObject) -> None:
    """Weights of any length whose bits are random within a range of exponents, which may take in subnormals, inf and NaN."""
    dtype = data.draw(st.sampled_from(DTYPES))
    quant_type = data.draw(st.sampled_from(CODES))
    block_size = data.draw(st.sampled_from(BLOCK_SIZES))
    num_elements = data.draw(st.one_of(st.integers(1, 300), st.integers(4096, 40_000)))
    fraction_bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[dtype]
    sign_bit = 8 * dtype.itemsize - 1
    highest = data.draw(st.integers(1, (1 << sign_bit - fraction_bits)))
    lowest = data.draw(st.integers(max(0, highest - 8), highest - 1))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    magnitudes = random.integers(lowest << fraction_bits, highest << fraction_bits, num_elements)
    magnitudes[random.random(num_elements) < data.draw(st.sampled_from([0, 0.01, 0.9]))] = 0
    bits = magnitudes | (random.integers(0, 2, num_elements) << sign_bit)
    weight = torch.from_numpy(bits.astype(BITS[dtype])).view(dtype)
    assert_equal(quantizers[quant_type].quantize(weight, block_size), weight, block_size, quant_type)


@settings(max_examples=60, deadline=None)
@given(
    num_elements=st.integers(4096, 20_000),
    block_size=st.sampled_from(BLOCK_SIZES),
    num_values=st.integers(1, 40),
    scale=st.floats(-28, 38).map(lambda power: 10.0**power),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_few_values_under_any_scale(
    quantizers: dict[str, NativeQuantizer],
    num_elements: int,
    block_size: int,
    num_values: int,
    scale: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """As in a weight that has been quantized before: many weights lie at one place, which may be a midpoint."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-num_values, num_values + 1, (num_elements,), generator=generator)
    weight = (steps / num_values * scale).to(dtype)
    assert_equal(quantizers["nf4"].quantize(weight, block_size), weight, block_size)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
def test_any_number_of_threads(quantizers: dict[str, NativeQuantizer], num_threads: int) -> None:
    weight = random_weight(64 * 9000 + 17, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = quantizers["nf4"].quantize(weight, 64)
        weight[64 * 4000] = torch.nan
        with_nan = quantizers["nf4"].quantize(weight, 64)
    finally:
        torch.set_num_threads(before)
    assert_equal(with_nan, weight, 64)
    weight[64 * 4000] = 0
    weight[64 * 4000] = random_weight(64 * 9000 + 17, torch.bfloat16)[64 * 4000]
    assert_equal(found, weight, 64)


def test_several_threads_of_the_caller(quantizers: dict[str, NativeQuantizer]) -> None:
    weights = [random_weight(64 * 3000, torch.float32, seed) for seed in range(4)]
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = quantizers["nf4"].quantize(weights[number], 64)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, weight in enumerate(weights):
        assert_equal(found[number], weight, 64)


def test_in_and_after_inference_mode_and_of_a_parameter() -> None:
    own = NativeQuantizer(nf4.four_bit_code("nf4", torch.device("cpu")), by_bitsandbytes("nf4"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            inside = random_weight(64 * 5000, torch.bfloat16)
            assert_equal(own.quantize(inside, 64), inside, 64)
        assert_equal(own.quantize(inside, 64), inside, 64)
        parameter = torch.nn.Parameter(inside.clone().float())
        found = own.quantize(parameter, 64)
    finally:
        torch.set_num_threads(before)
    assert_equal(found, parameter.detach(), 64)
    assert not found[1].requires_grad


def test_the_process_may_have_other_defaults() -> None:
    """Models are made under a default dtype and a default device of their own."""
    weight = random_weight(64 * 200, torch.float32)
    values = nf4.four_bit_code("nf4", torch.device("cpu"))
    by_bitsandbytes("nf4")(weight, 64)  # which makes its own table at its first call, in the default dtype of then
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            own = NativeQuantizer(values, by_bitsandbytes("nf4"))
            found = own.quantize(weight, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert own.is_native == nf4._native_quantizer("nf4").is_native
    assert_equal(found, weight, 64)


def test_another_rounding_of_the_reference_is_noticed_and_followed() -> None:
    """A bitsandbytes that puts ties into the upper code."""
    values = nf4.four_bit_code("nf4", torch.device("cpu"))
    midpoints = (values[1:] + values[:-1]) / 2

    def ties_upwards(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = weight.float().reshape(-1, block_size)
        absmax = blocks.abs().amax(1)
        codes = torch.bucketize(blocks / absmax.clamp(min=1e-38)[:, None], midpoints, right=True).to(torch.uint8)
        return (codes.reshape(-1)[::2] << 4) | codes.reshape(-1)[1::2], absmax

    own = NativeQuantizer(values, ties_upwards)
    assert not own.is_native
    assert own.describe().startswith("bitsandbytes (")
    weight = torch.cat([torch.ones(1), midpoints, torch.zeros(16)]).repeat(256)
    found = own.quantize(weight, 32)
    assert torch.equal(found[0], ties_upwards(weight, 32)[0])
    assert not torch.equal(found[0], by_bitsandbytes("nf4")(weight, 32)[0])


@pytest.mark.parametrize("num_elements", [1, 2, 31, 63, 64, 65, 4095, 4096, 4097, 8192 + 33])
def test_blocks_that_are_not_whole(num_elements: int) -> None:
    """bitsandbytes divides by the scale there, instead of multiplying with its reciprocal."""
    for dtype in (*DTYPES, torch.float64):
        weight = random_weight(num_elements, dtype)
        assert_equal(nf4.quantize_blocks(weight, QuantSpec()), weight, 64)


def test_a_weight_that_does_not_lie_in_one_piece() -> None:
    weight = random_weight(128 * 192, torch.bfloat16).reshape(128, 192)
    assert_equal(nf4.quantize_blocks(weight.T, QuantSpec()), weight.T.reshape(-1), 64)
    every_other = random_weight(64 * 400, torch.bfloat16)[1::2]
    assert_equal(nf4.quantize_blocks(every_other, QuantSpec()), every_other.contiguous(), 64)
    from_the_middle = random_weight(64 * 400, torch.bfloat16)[3 : 3 + 64 * 300]
    assert_equal(nf4.quantize_blocks(from_the_middle, QuantSpec()), from_the_middle, 64)
