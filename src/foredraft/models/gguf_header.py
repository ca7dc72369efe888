"""Checks that counts and lengths in the header of a GGUF file lies within the file, before anything of that size is read."""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path

from foredraft.models.checkpoint import ModelError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value -> its bytes."""

_UINT32, _STRING, _ARRAY = 4, 8, 9
_MOST_DIMENSIONS, _MOST_NESTED = 4, 4
_ALIGNMENT = "general.alignment"

_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144)}
_BLOCKS |= {13: (256, 176), 14: (256, 210), 30: (1, 2)}
"""Type of a tensor -> numbers and bytes of a block, for the types that can be read."""


class _Header:
    """A place in the file that moves forward."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        """Returns the next bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes are announced at {self.at}, and {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        """Passes over the next bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"{count} bytes are announced at {self.at}, and {len(self.data) - self.at} are left")
        self.at += count

    def number(self, kind: str) -> int:
        """Returns the next whole number, of the struct format `kind`."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        """Returns the next string."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int, depth: int = 0) -> None:
        """Passes over the next value of a type."""
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY and depth < _MOST_NESTED:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
                return
            if count > len(self.data) - self.at:
                raise ValueError(f"an array of {count} entries is announced, and {len(self.data) - self.at} bytes are left")
            for _ in range(count):
                self.value(inner, depth + 1)
        else:
            raise ValueError(f"{kind} is no type of a value")


def check_header(path: Path) -> None:
    """Checks the header of a GGUF file, and that its tensors lie in the file one behind the other.

    Raises:
        ModelError: something does not fit. The message says what.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(_Header(data))
    except (ValueError, OSError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise ModelError(f"{path.name} is corrupt or cut off ({error})", "copy it again") from None


def _check(header: _Header) -> None:
    if header.take(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = header.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; versions {_VERSIONS[0]} to {_VERSIONS[-1]} can be read")
    num_tensors, num_values = header.number("Q"), header.number("Q")
    alignment, keys = 32, set[str]()
    for _ in range(num_values):
        key, kind = header.text(), header.number("I")
        if key in keys:
            raise ValueError(f"the key {key!r} stands twice")
        keys.add(key)
        if key == _ALIGNMENT and kind == _UINT32:
            alignment = struct.unpack("<I", header.data[header.at : header.at + 4])[0]
        header.value(kind)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"the alignment {alignment} is no power of two")
    spans = [_tensor(header) for _ in range(num_tensors)]
    first = -(-header.at // alignment) * alignment
    end = 0
    for begin, size, name in sorted(spans):
        if begin < end or begin % alignment:
            raise ValueError(f"the tensor {name!r} overlaps another one, or is not aligned")
        end = begin + size
    if spans and first + end > len(header.data):
        raise ValueError(f"its tensors end at {first + end}, and it has {len(header.data)} bytes")


def _tensor(header: _Header) -> tuple[int, int, str]:
    """Returns the place of the next tensor behind the header, its bytes and its name. Types that are not read count nothing."""
    name, dimensions = header.text(), header.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"the tensor {name!r} has {dimensions} dimensions")
    shape = [header.number("Q") for _ in range(dimensions)]
    kind, begin = header.number("I"), header.number("Q")
    if min(shape) < 1:
        raise ValueError(f"the tensor {name!r} has the shape {shape}")
    if kind not in _BLOCKS:
        return begin, 0, name
    inputs, size = _BLOCKS[kind]
    if shape[0] % inputs:
        raise ValueError(f"the tensor {name!r} has rows of {shape[0]} numbers, and its blocks have {inputs}")
    return begin, prod(shape) // inputs * size, name
