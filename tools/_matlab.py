"""Reads MATLAB files of version 5 as far as ImageNet's `meta.mat` needs it: structs of numbers and text.

In: the bytes of a file. Out: its variables as plain Python values. Nothing in such a file is code. The format is that
of MathWorks' "MAT-File Format" (level 5): elements of type, length and data, each on a multiple of 8 bytes.
"""

import struct
import zlib
from typing import Any

from ii_dist.config.errors import DataError

_HEADER_BYTES, _MAX_BYTES, _MAX_DEPTH = 128, 1 << 26, 8
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _FIRST_NUMBER, _LAST_NUMBER = 1, 2, 4, 6, 15
# Element type -> how `struct` names one value.
_VALUES = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q", 16: "B", 17: "H"}


def read_matlab(content: bytes, where: str) -> dict[str, Any]:
    """Variables by name: a struct array becomes a list of dicts, text a str, numbers a list. Raises DataError."""
    try:
        order = {b"IM": "<", b"MI": ">"}[content[126:128]]
        variables = {}
        elements = _Elements(content[_HEADER_BYTES:], order)
        while elements.more():
            kind, data = elements.next()
            if kind == _COMPRESSED:
                unpack = zlib.decompressobj()
                kind, data = _Elements(unpack.decompress(data, _MAX_BYTES), order).next()
            if kind == _MATRIX:
                name, value = _matrix(data, order, 0)
                variables[name] = value
        return variables
    except (KeyError, IndexError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{where}: not a MATLAB file of version 5, or a damaged one ({error!r})") from None


class _Elements:
    """The elements of a piece of the file, one after the other."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order, self._at = data, order, 0

    def more(self) -> bool:
        return self._at < len(self._data)

    def next(self) -> tuple[int, bytes]:
        (first,) = struct.unpack_from(f"{self._order}I", self._data, self._at)
        if first >> 16:  # a short element: length, type and up to 4 bytes of data in 8 bytes
            kind, length, start, end = first & 0xFFFF, first >> 16, self._at + 4, self._at + 8
        else:
            (length,) = struct.unpack_from(f"{self._order}I", self._data, self._at + 4)
            kind, start = first, self._at + 8
            # Only a compressed element is not filled up to a multiple of 8.
            end = start + length + (0 if kind == _COMPRESSED else -length % 8)
        if start + length > len(self._data):
            raise ValueError("it is cut off")
        self._at = end
        return kind, self._data[start : start + length]

    def text(self) -> str:
        codes = self.values()
        return bytes(codes).decode() if max(codes) < 256 else "".join(map(chr, codes))

    def values(self) -> tuple[Any, ...]:
        kind, data = self.next()
        code = _VALUES[kind]
        return struct.unpack(f"{self._order}{len(data) // struct.calcsize('=' + code)}{code}", data)


def _matrix(data: bytes, order: str, depth: int) -> tuple[str, Any]:
    """Name and value of one array."""
    if not data:
        return "", []
    if depth > _MAX_DEPTH:
        raise ValueError("too deeply nested")
    elements = _Elements(data, order)
    kind = elements.values()[0] & 0xFF
    count = 1
    for side in elements.values():
        count *= side
    name = elements.next()[1].decode("ascii")
    if kind == _STRUCT:
        (width,) = elements.values()
        text = elements.next()[1]
        fields = [text[i : i + width].split(b"\0")[0].decode("ascii") for i in range(0, len(text), width)]
        return name, [{f: _inner(elements, order, depth) for f in fields} for _ in range(_sane(count, data))]
    if kind == _CELL:
        return name, [_inner(elements, order, depth) for _ in range(_sane(count, data))]
    if kind == _CHAR:
        return name, elements.text() if count else ""
    if _FIRST_NUMBER <= kind <= _LAST_NUMBER:
        return name, list(elements.values()) if count else []
    raise ValueError(f"array class {kind}")


def _sane(count: int, data: bytes) -> int:
    if not 0 <= count <= len(data) // 8:  # each value takes 8 bytes at least
        raise ValueError(f"{count} values")
    return count


def _inner(elements: _Elements, order: str, depth: int) -> Any:
    kind, data = elements.next()
    if kind != _MATRIX:
        raise ValueError(f"element type {kind} in a struct")
    return _matrix(data, order, depth + 1)[1]
