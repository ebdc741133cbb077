"""Draws of dropout: of each pack for itself in a training step, of a whole call elsewhere."""

from __future__ import annotations

import pytest
import torch

from qlora.ops.dropout import Draw, Packs, computing, draw, dropout_mask
from qlora.ops.lora_linear import lora_linear

NUM_IN, NUM_OUT, RANK = 5, 4, 2
LENGTHS = {3: 4, 8: 7, 1: 2}


def masks(packs: Packs, layer: int = 9) -> dict[int, torch.Tensor]:
    """The mask of each pack, by its number."""
    with computing(packs):
        drawn = draw(packs.num_places, layer)
    mask, found, start = drawn.mask(torch.empty(packs.num_places, NUM_IN), 0.5), {}, 0
    for number, length in zip(packs.numbers, packs.lengths, strict=True):
        found[number] = mask[start : start + length]
        start += packs.row_length or length
    return found


def packs(*numbers: int, key: str = "0/1", row_length: int | None = None) -> Packs:
    return Packs(key, numbers, tuple(LENGTHS[number] for number in numbers), row_length)


@pytest.mark.parametrize("split", [[(3, 8, 1)], [(1,), (8, 3)], [(8,), (3,), (1,)]])
@pytest.mark.parametrize("row_length", [None, 7, 11])
def test_a_pack_has_the_same_draw_wherever_it_is(split: list[tuple[int, ...]], row_length: int | None) -> None:
    whole = masks(packs(3, 8, 1))
    parts = [masks(packs(*numbers, row_length=row_length)) for numbers in split]
    for part in parts:
        for number, mask in part.items():
            assert torch.equal(mask, whole[number])
            assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_padding_is_kept() -> None:
    padded = packs(3, 8, row_length=7)
    mask = Draw(9, padded).mask(torch.empty(14, NUM_IN), 0.5)
    assert (mask[4:7] == 1).all()


def test_packs_layers_and_steps_differ() -> None:
    first = masks(packs(3, 8))
    assert not torch.equal(first[3], first[8][:4])
    assert not torch.equal(first[8], masks(packs(8), layer=10)[8])
    assert not torch.equal(first[8], masks(packs(8, key="0/2"))[8])
    assert not torch.equal(first[8], masks(packs(8, key="1/1"))[8])


@pytest.mark.parametrize(("places", "layer", "by_pack"), [(11, 9, True), (10, 9, False), (11, 0, False)])
def test_what_is_not_the_packs_tokens_is_drawn_as_one(places: int, layer: int, by_pack: bool) -> None:
    torch.manual_seed(4)
    seed = int(torch.randint(0, 2**62, ()))
    torch.manual_seed(4)
    with computing(packs(3, 8)):
        drawn = draw(places, layer)
    assert (drawn.packs is not None) == by_pack
    if not by_pack:
        assert drawn.seed == seed
        like = torch.empty(places, NUM_IN)
        assert torch.equal(drawn.mask(like, 0.3), dropout_mask(like, 0.3, seed))
    assert draw(11, 9).packs is None  # outside


def test_a_linear_layer_does_not_see_how_packs_are_shared_out() -> None:
    """Sums over calls of gradients too, which are what ranks and micro-steps add up."""
    torch.manual_seed(0)
    weight, A, B = torch.randn(NUM_OUT, NUM_IN), torch.randn(RANK, NUM_IN), torch.randn(NUM_OUT, RANK)
    x = {number: torch.randn(length, NUM_IN) for number, length in LENGTHS.items()}

    def run(split: list[tuple[int, ...]]) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor]:
        own_A, own_B = A.clone().requires_grad_(), B.clone().requires_grad_()
        outputs: dict[int, torch.Tensor] = {}
        for numbers in split:
            with computing(packs(*numbers)):
                rows = torch.cat([x[number] for number in numbers])
                y = lora_linear(rows, lambda: weight, None, own_A, own_B, 2.0, 0.4, layer=5)
                y.square().sum().backward()
            outputs |= dict(zip(numbers, y.detach().split([LENGTHS[number] for number in numbers]), strict=True))
        assert own_A.grad is not None
        assert own_B.grad is not None
        return outputs, own_A.grad, own_B.grad

    whole, *grads = run([(3, 8, 1)])
    parts, *others = run([(8,), (1, 3)])
    for number in LENGTHS:
        torch.testing.assert_close(whole[number], parts[number])
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other)
