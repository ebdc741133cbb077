"""What an adapter makes of one weight, row by row, so that no more than a few rows are ever held in fp32.

    W' = W + s B A                                   LoRA (Hu et al. 2021, equation 3)
    W' = m (W + s B A) / |W + s B A|                 DoRA (Liu et al. 2024, equation 5)

Every kind of layer is a matrix here, (rows, rest), and its update a product of two tall ones, `LowRank`; of fused experts,
one product an expert. All is computed in fp32 and rounded once, to what is written. Rows are read when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.quant.shards import TensorEntry

# Elements of the rows that are held in fp32 at one time, where a row is not longer.
PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Rows:
    """A tensor that is read by rows.

    Attributes:
        shape: (N, ...); rows are numbered along the first dimension.
        read: first and last (exclusive) row -> these rows (n, ...), fp32, the caller's own to change.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    def runs(self) -> Iterator[tuple[int, int]]:
        """All rows in runs of about `PIECE_ELEMENTS`."""
        step = max(1, PIECE_ELEMENTS // max(1, self.row_elements))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor in a dtype, as runs of its rows one after another."""
        for start, stop in self.runs():
            yield self.read(start, stop).to(dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The tensor in a dtype; in fp32 there are never more than some of its rows."""
        out = torch.empty(self.shape, dtype=dtype)
        for start, stop in self.runs():
            out[start:stop] = self.read(start, stop)
        return out


@dataclass(frozen=True)
class LowRank:
    """s L R as a matrix of N rows: L (N, r) and R (r, rest), fp32. Also one product for each of several blocks of rows."""

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    scaling: float

    @classmethod
    def of_parts(cls, parts: Mapping[str, Tensor], scaling: float, *, transposed: bool = False) -> LowRank:
        """From an update's tensors by their names in a file.

        Linear: A (r, in), B (out, r). Convolution: A (r, in, ...), B (out, r, 1, ...). Embedding: A (r, vocabulary),
        B (hidden, r), and a row is a token's.

        Args:
            transposed: for a weight that lies transposed, (in, out).
        """
        if "lora_embedding_A" in parts:
            left, right = parts["lora_embedding_A"].T, parts["lora_embedding_B"].T
        else:
            left, right = parts["lora_B.weight"].flatten(1), parts["lora_A.weight"].flatten(1)
        if transposed:
            left, right = right.T, left.T
        return cls((left.float(),), (right.float(),), scaling)

    @classmethod
    def of_experts(cls, A: Tensor, B: Tensor, num_experts: int, scaling: float, *, transposed: bool = False) -> LowRank:
        """From A (E r, in), expert-major, and B (out, r E), read as (out, r, E): PEFT's form of E products.

        Args:
            transposed: for experts (in, out) each.
        """
        A_ERI = A.float().reshape(num_experts, -1, A.shape[1])
        B_EOR = B.float().reshape(B.shape[0], -1, num_experts).permute(2, 0, 1)
        left, right = (A_ERI.mT, B_EOR.mT) if transposed else (B_EOR, A_ERI)
        return cls(tuple(left), tuple(right), scaling)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop (exclusive), (n, rest)."""
        found, first = [], 0
        for left, right in zip(self.left, self.right, strict=True):
            low, high = max(start - first, 0), min(stop - first, len(left))
            if low < high:
                found.append((left[low:high] @ right).mul_(self.scaling))
            first += len(left)
        return torch.cat(found) if len(found) != 1 else found[0]


def of_file(entry: TensorEntry, through: torch.dtype | None = None) -> Rows:
    """The rows of a tensor in a file, rounded to a dtype on the way."""
    size = math.prod(entry.shape[1:])

    def read(start: int, stop: int) -> Tensor:
        rows = entry.read(start * size, stop * size).reshape(-1, *entry.shape[1:])
        return (rows if through is None else rows.to(through)).to(torch.float32)

    return Rows(entry.shape, read)


def of_tensor(tensor: Tensor) -> Rows:
    """The rows of a tensor in memory."""
    return Rows(tuple(tensor.shape), lambda start, stop: tensor[start:stop].to(torch.float32, copy=True))


def equal(one: Rows, other: Rows) -> bool:
    """Whether two tensors have the same shape and values."""
    return one.shape == other.shape and all(torch.equal(one.read(*run), other.read(*run)) for run in one.runs())


def as_matrix(rows: Rows) -> Rows:
    """The same elements as (rows of all blocks, last dimension), for a tensor of blocks such as fused experts."""
    size = rows.shape[-1]
    per_block = math.prod(rows.shape[1:-1])

    def read(start: int, stop: int) -> Tensor:
        first, last = start // per_block, -(-stop // per_block)
        return rows.read(first, last).reshape(-1, size)[start - first * per_block : stop - first * per_block]

    return Rows((rows.shape[0] * per_block, size), read)


def plus(rows: Rows, update: LowRank, sign: float = 1.0, offset: int = 0) -> Rows:
    """W + sign s L R. Row 0 of W is the offset-th of the update."""

    def read(start: int, stop: int) -> Tensor:
        own = rows.read(start, stop)
        return own.add_(update.read(start + offset, stop + offset).reshape(own.shape), alpha=sign)

    return Rows(rows.shape, read)


def plus_vector(rows: Rows, vector: Tensor, scaling: float) -> Rows:
    """b + s c, for the bias of B."""
    return Rows(rows.shape, lambda start, stop: rows.read(start, stop).add_(vector[start:stop].float(), alpha=scaling))


def with_magnitude(rows: Rows, magnitude: Tensor, *, of_columns: bool = False) -> Rows:
    """m V / |V|: each row is given the length that m says, or each column, for which all rows are read once more.

    One of zeros has no direction and stays what it is, as in `ops.lora_linear.row_norms`.
    """
    m, smallest = magnitude.flatten().float(), torch.finfo(torch.float32).tiny
    if not of_columns:

        def read(start: int, stop: int) -> Tensor:
            own = rows.read(start, stop)
            lengths = torch.linalg.vector_norm(own.flatten(1), dim=1).clamp_(min=smallest)
            each = (-1, *[1] * (own.ndim - 1))
            return own.div_(lengths.reshape(each)).mul_(m[start:stop].reshape(each))

        return Rows(rows.shape, read)
    squares = torch.zeros(rows.shape[1], dtype=torch.float64)
    for start, stop in rows.runs():
        squares += rows.read(start, stop).double().square_().sum(0)
    lengths = squares.sqrt().float().clamp_(min=smallest)
    return Rows(rows.shape, lambda start, stop: rows.read(start, stop).div_(lengths).mul_(m))


def with_rows(rows: Rows, numbers: Tensor, values: Tensor) -> Rows:
    """Some rows replaced: row numbers[i] is values[i]. There may be new ones behind the last; all of these are given."""
    num_rows = rows.shape[0]

    def read(start: int, stop: int) -> Tensor:
        own = rows.read(min(start, num_rows), min(stop, num_rows))
        own = torch.cat([own, own.new_empty(stop - start - len(own), *own.shape[1:])]) if len(own) < stop - start else own
        here = (numbers >= start) & (numbers < stop)
        own[numbers[here] - start] = values[here].to(own.dtype)
        return own

    return Rows((max(num_rows, int(numbers.max()) + 1), *rows.shape[1:]), read)
