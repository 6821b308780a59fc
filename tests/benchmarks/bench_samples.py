"""A file of integers that several processes share: how the actors of the benchmark report times."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

_SLOT = struct.Struct("=q")


class Samples:
    """A fixed number of 64-bit integers in a mapped file; 0 means "not written yet"."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, count: int) -> Samples:
        """Make the file with `count` empty slots and map it."""
        path.write_bytes(bytes(count * _SLOT.size))
        return cls(path)

    def __len__(self) -> int:
        return len(self._map) // _SLOT.size

    def record(self, index: int, value: int) -> None:
        """Write a slot; a value of 0 is stored as 1, which is below any resolution here."""
        _SLOT.pack_into(self._map, index * _SLOT.size, value or 1)

    def get(self, index: int) -> int:
        """The value of a slot, 0 if nobody has written it."""
        return int(_SLOT.unpack_from(self._map, index * _SLOT.size)[0])

    def values(self, start: int, stop: int) -> list[int]:
        """The values of the slots `start` to `stop - 1`, the empty ones included."""
        return [self.get(index) for index in range(start, stop)]
