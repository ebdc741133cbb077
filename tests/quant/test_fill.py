"""What ranks read and keep of one tensor: put side by side, their runs are the whole tensor and nothing is read twice.

The oracles are `nf4.quantize` and `int8.quantize` of the whole weight, which `tests/ops` hold against bitsandbytes. Ranks
are objects in one process here; real ones load in `tests/e2e/test_sharded_load.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qlora.distributed.sharding import Sharding
from qlora.errors import BaseModelError
from qlora.ops import int8, nf4
from qlora.ops.nf4 import QuantSpec
from qlora.quant.fill import all_rows, all_scales, quantize_rows_run, quantize_run, read_run
from qlora.quant.shards import TensorEntry, read_header

CPU = torch.device("cpu")
WORLDS = (1, 2, 3, 4, 7)
# One element, fewer elements than ranks, odd numbers, less than a block, whole blocks, and more scales than one of 256.
SHAPES = ((1, 1), (1, 5), (3, 3), (7, 9), (64, 64), (33, 127), (130, 129))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WatchedEntry(TensorEntry):
    """Notes what is read of it."""

    reads: list[tuple[int, int]] = field(default_factory=list)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        self.reads.append((start, self.num_elements if stop is None else stop))
        return super().read(start, stop)


class Share(Sharding):
    """One of several ranks in one process: its exchange gives what each has brought so far, zeros for the others."""

    def __init__(self, rank: int, brought: list[Tensor | None]) -> None:
        super().__init__(rank, len(brought))
        self.brought = brought

    def exchange(self, own: Tensor) -> Tensor:
        self.brought[self.rank] = own
        rows = [torch.zeros_like(own) if row is None else row for row in self.brought]
        assert {(row.shape, row.dtype) for row in rows} == {(own.shape, own.dtype)}, "a collective needs equal tensors"
        return torch.cat(rows)


def ranks_of(world_size: int) -> list[Share]:
    brought: list[Tensor | None] = [None] * world_size
    return [Share(rank, brought) for rank in range(world_size)]


def run_of(num_elements: int, world_size: int, rank: int) -> range:
    """DeepSpeed's cut: equal lengths, rounded up, of which the last ranks lack what is padding."""
    length = math.ceil(num_elements / world_size)
    return range(num_elements)[rank * length : (rank + 1) * length]


@contextmanager
def pieces_of(num_elements: int) -> Iterator[None]:
    """Weights are read in pieces so large."""
    former, nf4.CHUNK_ELEMENTS = nf4.CHUNK_ELEMENTS, num_elements
    yield
    nf4.CHUNK_ELEMENTS = former


def write_weight(folder: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> WatchedEntry:
    """A random tensor in a file, behind another one; its scales differ widely from block to block."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[::97] *= 20
    file = folder / "model.safetensors"
    save_file({"before": torch.ones(3), "weight": weight.to(dtype)}, file)
    entry = read_header(file)["weight"]
    return WatchedEntry(entry.name, entry.file, entry.dtype, entry.shape, entry.offset)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def assert_runs_make_the_whole(entry: WatchedEntry, spec: QuantSpec, world_size: int, dtype: torch.dtype) -> None:
    """Packed bytes and statistics are those of the whole, and a rank reads its own weights once, widened to blocks."""
    num_elements, block = entry.num_elements, spec.block_size
    packed, statistics = nf4.quantize(entry.read_whole().to(dtype), spec)
    ranks = ranks_of(world_size)
    runs, scales = [], []
    for share in ranks:
        entry.reads.clear()
        own_packed, own_scales = quantize_run(entry, spec, share, CPU, dtype)
        assert (own_packed.shape, own_packed.dtype) == (packed.shape, packed.dtype)
        own = run_of(packed.numel(), world_size, share.rank)
        runs.append(own_packed[own.start : own.stop])
        scales.append(own_scales)
        per_element = 2 * spec.storage.itemsize
        first, last = (min(per_element * n, num_elements) for n in (own.start, own.stop))
        widened = range(first // block * block, min(math.ceil(last / block) * block, num_elements))
        if first < last:
            assert [i for start, stop in entry.reads for i in range(start, stop)] == list(widened)
    assert torch.equal(as_bytes(torch.cat(runs)), as_bytes(packed))
    assert sum(own.numel() for own in scales) == spec.num_blocks(num_elements)
    for share, own in zip(ranks, scales, strict=True):
        all_scales(own, num_elements, spec, share)
    for share, own in zip(ranks, scales, strict=True):  # now that each has brought its own
        found = nf4.pack_statistics(all_scales(own, num_elements, spec, share), spec)
        assert torch.equal(found, statistics)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_runs_of_a_quantized_weight_make_the_whole(tmp_path: Path, block_size: int, world_size: int) -> None:
    num_cases = 0
    kinds = itertools.product(("nf4", "fp4"), (True, False), (torch.uint8, torch.bfloat16, torch.float32))
    specs = [QuantSpec(quant_type, block_size, double, storage) for quant_type, double, storage in kinds]
    for shape in SHAPES:
        entry = write_weight(tmp_path, shape)
        for spec in specs:
            if (math.prod(shape) + 1) // 2 % spec.storage.itemsize == 0:
                assert_runs_make_the_whole(entry, spec, world_size, torch.bfloat16)
                num_cases += 1
            else:
                with pytest.raises(BaseModelError, match="cannot be stored as"):
                    quantize_run(entry, spec, ranks_of(world_size)[0], CPU, torch.bfloat16)
    assert num_cases > 4 * len(SHAPES)


@settings(max_examples=150, deadline=None)
@given(
    num_elements=st.integers(1, 12_000),
    world_size=st.integers(1, 9),
    spec=st.builds(QuantSpec, st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 256, 4096]), st.booleans()),
    piece=st.sampled_from([4096, 8192, 1 << 20]),
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_runs_of_any_length_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    num_elements: int,
    world_size: int,
    spec: QuantSpec,
    piece: int,
    stored: torch.dtype,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Also a weight that is stored in another dtype than it is quantized in."""
    entry = write_weight(tmp_path_factory.getbasetemp(), (num_elements,), stored, seed)
    with pieces_of(piece):
        assert_runs_make_the_whole(entry, spec, world_size, dtype)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple),
    world_size=st.integers(1, 9),
    piece=st.integers(1, 99),
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
)
def test_runs_of_an_unquantized_tensor_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    world_size: int,
    piece: int,
    stored: torch.dtype,
    dtype: torch.dtype,
) -> None:
    entry = write_weight(tmp_path_factory.getbasetemp(), shape, stored)
    want = entry.read_whole().to(dtype)
    runs = []
    for share in ranks_of(world_size):
        entry.reads.clear()
        with pieces_of(piece):
            found = read_run(entry, share, CPU, dtype)
        assert (found.shape, found.dtype) == (want.shape, dtype)
        own = run_of(entry.num_elements, world_size, share.rank)
        runs.append(found.reshape(-1)[own.start : own.stop])
        assert [i for start, stop in entry.reads for i in range(start, stop)] == list(own)
    assert torch.equal(torch.cat(runs), want.reshape(-1))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("num_elements", [0, 1, 2, 6, 7, 8, 1000, 1001])
def test_the_cut_is_deepspeeds(num_elements: int, world_size: int) -> None:
    shares = ranks_of(world_size)
    wanted = [run_of(num_elements, world_size, rank) for rank in range(world_size)]
    for share in shares:
        assert [range(*share.run(num_elements, rank)) for rank in range(world_size)] == wanted
        assert range(*share.run(num_elements)) == wanted[share.rank]
    assert [i for own in wanted for i in own] == list(range(num_elements))


def test_a_scale_belongs_to_the_rank_where_its_block_begins(tmp_path: Path) -> None:
    """Five blocks of 64 over two ranks: the third begins in the first rank's run and ends in the second's."""
    entry = write_weight(tmp_path, (5, 64))
    whole = nf4.quantize_blocks(entry.read_whole(), QuantSpec())[1]
    scales = [quantize_run(entry, QuantSpec(), share, CPU, entry.dtype)[1] for share in ranks_of(2)]
    assert [own.tolist() for own in scales] == [whole[:3].tolist(), whole[3:].tolist()]


def test_a_rank_alone_exchanges_nothing(tmp_path: Path) -> None:
    entry = write_weight(tmp_path, (64, 3))
    share = ranks_of(1)[0]
    _, scales = quantize_run(entry, QuantSpec(), share, CPU, entry.dtype)
    assert all_scales(scales, entry.num_elements, QuantSpec(), share) is scales
    assert share.brought == [None]


# In 8 bits a block is a row, and the statistics are cut by bytes.


def assert_runs_make_the_rows(entry: WatchedEntry, world_size: int, dtype: torch.dtype) -> None:
    """As `assert_runs_make_the_whole`: bytes and statistics are those of the whole, and a rank reads whole rows once."""
    num_elements, columns = entry.num_elements, entry.shape[1]
    packed, statistics = int8.quantize(entry.read_whole().to(dtype))
    ranks = ranks_of(world_size)
    runs, scales = [], []
    for share in ranks:
        entry.reads.clear()
        own_packed, own_scales = quantize_rows_run(entry, share, CPU, dtype)
        assert (own_packed.shape, own_packed.dtype) == (packed.shape, packed.dtype)
        own = run_of(num_elements, world_size, share.rank)
        runs.append(own_packed.reshape(-1)[own.start : own.stop])
        scales.append(own_scales)
        widened = range(own.start // columns * columns, math.ceil(own.stop / columns) * columns) if own else range(0)
        assert [i for start, stop in entry.reads for i in range(start, stop)] == list(widened)
    assert torch.equal(torch.cat(runs), packed.reshape(-1))
    for share, own in zip(ranks, scales, strict=True):
        all_rows(own, entry.shape, share)
    for share, own in zip(ranks, scales, strict=True):  # now that each has brought its own
        assert torch.equal(int8.pack_statistics(all_rows(own, entry.shape, share)), statistics)


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_a_weight_in_8_bits_make_the_whole(tmp_path: Path, shape: tuple[int, int], world_size: int) -> None:
    for dtype in DTYPES:
        assert_runs_make_the_rows(write_weight(tmp_path, shape), world_size, dtype)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    world_size=st.integers(1, 9),
    piece=st.sampled_from([1, 100, 1000, 1 << 20]),
    stored=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_rows_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    world_size: int,
    piece: int,
    stored: torch.dtype,
    seed: int,
) -> None:
    """Also runs that begin and end inside one row, and pieces that are smaller than a row."""
    entry = write_weight(tmp_path_factory.getbasetemp(), shape, stored, seed)
    with pieces_of(piece):
        assert_runs_make_the_rows(entry, world_size, torch.bfloat16)


def test_a_run_inside_one_row_has_no_scale_of_its_own(tmp_path: Path) -> None:
    """Two rows over four ranks: the second and the fourth begin inside a row, and read it for its absmax."""
    entry = write_weight(tmp_path, (2, 64))
    found = [quantize_rows_run(entry, share, CPU, entry.dtype)[1].numel() for share in ranks_of(4)]
    assert found == [1, 0, 1, 0]
