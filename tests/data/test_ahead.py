"""Items that are made before they are due."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qlora.data.ahead import Ahead


def test_the_same_items_in_the_same_order_whenever_they_are_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    ahead = Ahead(items(), lambda number: number * 10)
    ahead.prepare()
    ahead.prepare()
    assert made == [0]
    assert next(ahead) == 0
    assert next(ahead) == 10
    ahead.prepare()
    assert made == [0, 1, 2]
    assert list(ahead) == [20, 30]


def test_what_goes_wrong_is_raised_when_the_item_is_due() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    ahead = Ahead(items(), lambda number: number)
    assert next(ahead) == 1
    ahead.prepare()
    with pytest.raises(OSError, match="gone"):
        next(ahead)
