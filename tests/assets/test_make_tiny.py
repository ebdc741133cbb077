"""The parts of the script that made the base: the optimizer's algebra and the documents it read."""

from __future__ import annotations

from itertools import islice

import torch

from qlora.assets.corpus import documents
from qlora.assets.docstrings import Pair
from qlora.assets.make_tiny import Muon, learning_rate_factor, orthogonalize

PAIRS = [Pair(f"module.name{i}", f"Return the number {i} and nothing else.") for i in range(20)]


def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values() -> None:
    """Against the exact polar factor in float64: U V' of the singular value decomposition."""
    torch.manual_seed(0)
    for shape in ((2, 24, 40), (40, 24)):
        g = torch.randn(shape)
        u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
        in_that_basis = u.mT @ orthogonalize(g).double() @ vh.mT
        values = in_that_basis.diagonal(dim1=-2, dim2=-1)
        assert ((values > 0.6) & (values < 1.3)).all()
        torch.testing.assert_close(in_that_basis, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_muon_lowers_a_quadratic() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(12, 8), torch.nn.Parameter(torch.zeros(12, 8))
    optimizer = Muon([weight], lr=0.2)
    losses = []
    for _ in range(60):
        loss = (weight - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] < factors[10] < factors[19] == factors[400] == 1.0
    assert factors[-1] < 0.01
    assert factors[500:] == sorted(factors[500:], reverse=True)


def test_documents_are_the_same_every_time_and_state_every_fact_once_a_round() -> None:
    texts = ["some prose", "other prose"]
    first, again = (list(islice(documents(PAIRS, texts, seed=3), 60)) for _ in range(2))
    assert first == again
    facts = [d for d in first if d not in texts][: len(PAIRS)]
    for pair in PAIRS:
        assert sum(pair.summary in d and pair.name in d for d in facts) == 1
