"""A value made from files, and made anew when they change; a bad replacement keeps the old one.

Knows nothing of what is in the files.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Final, Generic, TypeVar

from thoraxrt.engine.errors import ConfigError

__all__ = ["Watched", "read_file"]

_EVERY_S: Final = 1.0
_AGAIN_S: Final = 30.0  # files that were refused and have not changed: a certificate may become valid by itself

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Watched(Generic[_T]):
    """What `load` makes of `paths`, at once and whenever one of them has changed; threads may share it.

    `load` raises ConfigError for files that make no sense: the first time to the caller, later to
    the log, where the value that was there stays. Two files replaced one after the other are read
    again after the second, so that a pair which does not match yet is passed over.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[], _T]) -> None:
        self._paths, self._load = tuple(paths), load
        self._lock = Lock()
        self._checked = time.monotonic()
        self._seen = self._state()
        self._refused: float | None = None
        self._value = load()

    def refresh(self) -> _T:
        """The value, with the files looked at first."""
        with self._lock:
            self._checked = now = time.monotonic()
            state = self._state()
            again = self._refused is not None and now - self._refused >= _AGAIN_S
            if state != self._seen or again:
                self._seen = state  # taken before the files are read: a later change is seen next time
                self._replace(now)
        return self._value

    async def latest(self) -> _T:
        """The value, at most a second behind the files; they are read on a thread."""
        now = time.monotonic()
        if now - self._checked < _EVERY_S:
            return self._value
        self._checked = now  # one look a second, however many calls there are
        return await asyncio.to_thread(self.refresh)

    def _replace(self, now: float) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            self._value = self._load()
        except ConfigError as error:
            self._refused = now
            _log.error("%s changed, and what it held before stays in force: %s", names, error)
        else:
            self._refused = None
            _log.info("%s changed and is in force", names)

    def _state(self) -> list[tuple[int, ...] | None]:
        return [_file_state(path) for path in self._paths]


def _file_state(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)  # of what a symbolic link points to: Kubernetes swaps links
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_file(path: Path, what: str) -> bytes:
    """The file's bytes. Raises ConfigError saying why it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the {what} {path} cannot be read: {error.strerror}; correct the path, or let the server's user read it"
        ) from error
