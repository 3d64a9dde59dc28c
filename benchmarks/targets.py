"""What is loaded: the engine in process, or a server in a process of its own over one of its two protocols.

Knows how an image is asked for and that each is answered once; not when it is asked for, nor what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Literal, Protocol, Self

__all__ = ["INPUTS", "Answered", "Input", "Target", "TargetName"]

TargetName = Literal["engine", "grpc", "oip"]
"""The engine in process; a server over thoraxrt.v1; a server over the Open Inference Protocol."""

Input = Literal["encoded", "decoded", "network"]
"""What is handed over: a file's bytes, pixels already decoded, or the network's input, geometry done."""

INPUTS: Final[dict[TargetName, tuple[Input, ...]]] = {
    "engine": ("encoded", "decoded", "network"),
    "grpc": ("encoded",),
    "oip": ("encoded", "network"),
}
"""What each target takes."""

Answered = Callable[[int, Exception | None], None]
"""Called once for every image, from any thread: its place among the images asked for, and the error it met if any."""


class Target(Protocol):
    """Something that answers images, by their number in the set it was made with."""

    name: TargetName
    input: Input

    def submit(self, numbers: Sequence[int], answered: Answered) -> None:
        """Ask for these images together and return at once; `answered` gets places in `numbers`."""

    def close(self) -> None:
        """Answer what has been submitted, then end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
