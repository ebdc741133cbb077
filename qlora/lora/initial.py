"""The mathematics of where an update starts: A and B from nothing, from the weight, or from the layer's inputs.

    default    A uniform, B zero (`lora.layer.initial_A`)
    gaussian   A normal with standard deviation 1/r, B zero (Hu et al. 2021, section 4.1)
    pissa      W = U S V: A = (S/s)^(1/2) V, B = U (S/s)^(1/2), of the r largest (Meng et al. 2024, equations 2 to 4)
    olora      W = Q R: A = R, B = Q, of the first r (Buyukakyuz 2024, algorithm 1)
    loftq      Q_t = quantize(W - s B A), then A, B of W - Q_t as in pissa, in turns (Li et al. 2023, algorithm 1)
    eva        A = the r largest right singular vectors of the layer's inputs, B zero (Paischer et al. 2024, section 3)

Dividing by s makes s B A what was meant whatever lora_alpha is, as PEFT has it; olora's factors are not divided there
either, so that s B' A' is taken out of its weight. Singular vectors are known but for their sign; it is chosen so that
the largest entry of each column of B (row of A in eva) is positive.

W is (out, in), A (r, in), B (out, r). Everything is fp32, on the weight's device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
# Columns beyond r that a randomized decomposition carries along (Halko et al. 2011, section 4.2).
OVERSAMPLING = 10


def gaussian_A(shape: tuple[int, ...], r: int, generator: torch.Generator) -> Tensor:
    """A with normal entries of standard deviation 1/r, on the CPU."""
    return torch.empty(shape).normal_(std=1.0 / r, generator=generator)


def pissa(
    weight: Tensor, r: int, scaling: float, niter: int | None = None, generator: torch.Generator | None = None
) -> Pair:
    """Factors of the principal part, s B A = its best approximation of rank r.

    Args:
        niter: power iterations of a randomized decomposition; None decomposes in full.
        generator: for the randomized one.
    """
    if niter is None:
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
    else:
        assert generator is not None
        U, S, V = randomized_svd(weight, r, niter, generator)
    root = (S[:r] / scaling).sqrt()
    signs = largest_signs(U[:, :r], dim=0)
    return (root * signs).unsqueeze(1) * V[:r], U[:, :r] * (root * signs)


def olora(weight: Tensor, r: int) -> Pair:
    """The first r columns of Q and rows of R. R's others are not needed, so neither are Q's: R_r = Q_r^T W."""
    Q, _ = torch.linalg.qr(weight[:, :r])
    return Q.T @ weight, Q


def loftq(
    weight: Tensor, r: int, scaling: float, iterations: int, held: Callable[[Tensor], Tensor]
) -> tuple[Pair, Pair | None]:
    """Factors of what quantization loses, by turns.

    Args:
        held: a weight to the quantized weight that the layer would compute with.

    Returns:
        The factors of the last turn, and those of the turn before, without which the weight that they fit was quantized;
        None after one turn, which quantizes W itself.
    """
    start, subtracted = _loftq_turn(weight, None, r, scaling, held), None
    for _ in range(iterations - 1):
        start, subtracted = _loftq_turn(weight, start, r, scaling, held), start
    return start, subtracted


def _loftq_turn(weight: Tensor, pair: Pair | None, r: int, scaling: float, held: Callable[[Tensor], Tensor]) -> Pair:
    residual = weight if pair is None else weight - scaling * (pair[1] @ pair[0])
    return pissa(weight - held(residual), r, scaling)


def randomized_svd(matrix: Tensor, r: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """About the r largest singular values and their vectors: U (m, r), S (r,), V (r, n).

    Halko et al. 2011, algorithms 4.4 and 5.1: the range is found by power iterations from random columns, and what the
    matrix is within it is decomposed in full. Exact where r reaches the matrix's smaller side.

    Args:
        generator: on the CPU, so that every device draws the same.
    """
    width = min(r + OVERSAMPLING, *matrix.shape)
    draw = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    Q, _ = torch.linalg.qr(matrix @ draw)
    for _ in range(niter):
        Q, _ = torch.linalg.qr(matrix.T @ Q)
        Q, _ = torch.linalg.qr(matrix @ Q)
    inner, S, V = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return (Q @ inner)[:, :r], S[:r], V[:r]


def largest_signs(vectors: Tensor, dim: int) -> Tensor:
    """+1 or -1 for each vector, those along `dim`: the sign of its entry of largest magnitude."""
    largest = vectors.abs().argmax(dim=dim, keepdim=True)
    return torch.where(vectors.gather(dim, largest).squeeze(dim) < 0, -1.0, 1.0)


class InputDirections:
    """The r main directions of a layer's inputs, found batch by batch without keeping these.

    A batch is decomposed together with what was found before, weighted by its singular values, and with one row for how
    the mean has moved (Ross et al. 2008, section 3.1; in PEFT IncrementalPCA).

    Attributes:
        directions: (r, in), orthonormal rows, the largest first; None before the first batch.
    """

    NITER = 4

    def __init__(self, r: int, generator: torch.Generator) -> None:
        self.r, self._generator = r, generator
        self.directions: Tensor | None = None
        self._values: Tensor | None = None
        self._mean: Tensor | None = None
        self._count = 0

    def update(self, inputs: Tensor) -> None:
        """Take in a batch (n, in), fp32; the first one has n >= r."""
        count, mean = inputs.shape[0], inputs.mean(dim=0, dtype=torch.float64)
        rows = [inputs - mean.float()]
        if self.directions is not None and self._values is not None and self._mean is not None:
            weight = (self._count * count / (self._count + count)) ** 0.5
            moved = weight * (self._mean - mean)
            rows += [self._values.unsqueeze(1) * self.directions, moved.float().unsqueeze(0)]
            mean = (self._mean * self._count + mean * count) / (self._count + count)
        _, self._values, V = randomized_svd(torch.cat(rows), self.r, self.NITER, self._generator)
        self.directions = V * largest_signs(V, dim=1).unsqueeze(1)
        self._mean, self._count = mean, self._count + count
