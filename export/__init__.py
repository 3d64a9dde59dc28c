"""Checkpoint -> network -> ONNX -> bundle; the NIH layout reader and the phantoms."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["Track", "no_progress"]

_T = TypeVar("_T")


class Track(Protocol):
    """Draws progress over items: given them, what is being done and how many there are, yields them."""

    def __call__(self, items: Iterable[_T], description: str, total: int) -> Iterable[_T]:
        """The same items, one by one."""


def no_progress(items: Iterable[_T], description: str, total: int) -> Iterable[_T]:
    """A `Track` that draws nothing."""
    return items
