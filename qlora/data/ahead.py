"""The next step's batches made while a device still computes on this one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """An iterator of which the next item may be asked for before it is due.

    Args:
        items: what it gives out, in their order.
        move: applied to each, such as the way to a device.
    """

    def __init__(self, items: Iterator[T], move: Callable[[T], T]) -> None:
        self._items, self._move = items, move
        self._made: T | None = None
        self._error: Exception | None = None

    def prepare(self) -> None:
        """Make the next item now. What goes wrong is raised when it is due: the step before it is not to be lost with it."""
        if self._made is not None or self._error is not None:
            return
        try:
            self._made = self._move(next(self._items))
        except Exception as error:
            self._error = error

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self.prepare()
        made, error, self._made, self._error = self._made, self._error, None, None
        if made is None:
            assert error is not None
            raise error
        return made
