"""One rank's JSON lines as columns: fast enough for a thousand ranks, in memory that grows with the steps only.

In: ``metrics/rank_*.jsonl``, perhaps torn by a kill or with steps that a later attempt made again. Out: a `RankTable`:
each step once, for each tag an array over the steps.

msgspec makes a decoder that expects the keys seen so far, all of them numbers, and fills in `_MISSING` for those that a
line lacks: seven times as fast as Python's json, which is left with lines that bring a new key and with whatever is odd
(torn, foreign, null, NaN), or with all of them where msgspec is missing.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ii_dist.metrics.jsonl import parse_line

_BLOCK_BYTES = 1 << 17  # an odd line makes its whole block slow
_NEWLINE, _OPEN, _CLOSE = b"\n{}"
_FIRST_KEYS = ("step", "time")
_MOST_TRIES = 4  # of taking the rest of a block as a whole
_MOST_KEYS = 256  # more than that are no tags
_MISSING_BITS = 0x7FF8_0000_4E4F_4E45  # a NaN that no file can hold
_MISSING: float = struct.unpack("<d", struct.pack("<q", _MISSING_BITS))[0]
Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]
Keys: TypeAlias = tuple[str, ...]
Parsed: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Start:
    """An attempt began on one rank: from `step`, at Unix time `time_s`."""

    step: int
    time_s: float
    rank: int
    world_size: int
    host: str


@dataclass(frozen=True, slots=True)
class RankTable:
    """Steps in ascending order, each once; `times_s` is the Unix time of a step's first line."""

    steps: Ints
    times_s: Floats
    keys: Keys
    """Of the columns. The first two are step and time; the others are tags, of any version."""
    values: Floats
    """A step a row, a key a column. A value may be NaN."""
    there: Mask
    """What was written; what was not is NaN."""
    starts: list[Start]
    """Oldest first."""

    def tags(self) -> list[str]:
        """Those that were written at least once."""
        written: list[bool] = np.any(self.there, axis=0).tolist()
        return [key for key, some in zip(self.keys[2:], written[2:], strict=True) if some]

    def values_of(self, tag: str) -> Floats:
        return self.values[:, self.keys.index(tag)]

    def there_of(self, tag: str) -> Mask:
        return self.there[:, self.keys.index(tag)]


def read_columns(path: Path, keys: Keys = ()) -> RankTable:
    """One rank's file. A line counts if no later line is of an earlier step: an attempt that goes back makes later
    steps again. Of several values of a tag in one step the last counts. What follows the last newline is torn.

    keys: those of another rank's file, to begin with; any do, the right ones are faster.
    """
    found = _Lines(keys or _FIRST_KEYS)
    buffer, filled = bytearray(_BLOCK_BYTES), 0
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(memoryview(buffer)[filled:]):
            filled += read
            end = buffer.rfind(b"\n", 0, filled) + 1
            if end:
                found.add(memoryview(buffer)[:end])
                buffer[: filled - end] = buffer[end:filled]
                filled -= end
            elif filled == len(buffer):
                buffer = buffer + bytes(len(buffer))  # a line longer than the block
    return found.table()


class _Decoder(NamedTuple):
    """What turns a line, or all of a block, into objects, and an object into numbers; ValueError for odd lines."""

    line: Callable[[bytes], Any]
    lines: Callable[[memoryview], list[Any]]
    as_tuple: Callable[[Any], tuple[float, ...]]


class _Lines:
    """Collects the lines of a file, then sorts out which of them count. Numbers lie in tables, one after the other,
    each with the keys that were known when it was begun: the first is always `step`, the second `time`."""

    def __init__(self, keys: Keys) -> None:
        self._count = 0
        self._keys = keys
        self._places: list[int] = []
        self._packed: list[bytes] = []
        self._tables: list[tuple[int, bytes]] = []
        """Keys of a finished table, and its numbers."""
        self._events: list[tuple[int, Parsed]] = []

    def add(self, block: memoryview) -> None:
        """Whole lines."""
        letters = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(letters == _NEWLINE) + 1
        first = 0
        for _ in range(_MOST_TRIES):
            begin = int(ends[first - 1]) if first else 0
            if self._add_whole(block[begin:], letters[begin:], ends[first:] - begin):
                return
            # One by one until an odd line has been dealt with; what follows is tried as a whole again.
            first = self._add_until_odd(block, ends, first)
            if first == len(ends):
                return
        while first < len(ends):
            first = self._add_until_odd(block, ends, first)

    def _add_whole(self, block: memoryview, letters: NDArray[np.uint8], ends: Ints) -> bool:
        """All lines at once, if each is an object of known keys and numbers; else none of them. That each line is one
        object is certain: all begin with { and end with }, which a flat object has nowhere else, and there are as many
        objects as lines."""
        decoder = _decoder(self._keys)
        if decoder is None or letters[0] != _OPEN or ends[0] == 1:
            return False
        if (letters[ends - 2] != _CLOSE).any() or (letters[ends[:-1]] != _OPEN).any():
            return False
        try:
            rows = decoder.lines(block)
        except ValueError:
            return False
        if len(rows) != len(ends):
            return False
        self._packed.append(b"".join(starmap(struct.Struct(f"{len(self._keys)}d").pack, map(decoder.as_tuple, rows))))
        self._places.extend(range(self._count, self._count + len(rows)))
        self._count += len(rows)
        return True

    def _add_until_odd(self, block: memoryview, ends: Ints, first: int) -> int:
        """Take lines from number `first` on up to and with the first odd one; the number of the next line."""
        begins = [int(ends[first - 1]) if first else 0, *ends[first:].tolist()]
        numbered = enumerate((bytes(block[a:b]) for a, b in pairwise(begins)), self._count)
        other = self._add_known(numbered)
        if other:
            self._add_other(*other)
        taken = (other[0] + 1 - self._count) if other else len(ends) - first
        self._count += taken
        return first + taken

    def _add_known(self, numbered: Iterator[tuple[int, bytes]]) -> tuple[int, bytes] | None:
        """Take lines that have known keys and numbers only; the first other one is returned, None at the end."""
        decoder = _decoder(self._keys)
        decode, as_tuple = (decoder.line, decoder.as_tuple) if decoder else (_refuse, tuple)
        pack = struct.Struct(f"{len(self._keys)}d").pack
        add_place, add_numbers = self._places.append, self._packed.append
        for place, line in numbered:
            try:
                add_numbers(pack(*as_tuple(decode(line))))
            except (ValueError, struct.error):
                return place, line
            add_place(place)
        return None

    def _add_other(self, place: int, line: bytes) -> None:
        row = parse_line(line)
        if row is None:
            return
        if "event" in row:
            self._events.append((place, row))
            return
        new = [key for key in row if key not in self._keys][: _MOST_KEYS - len(self._keys)]
        if new:
            self._end_table()
            self._keys = (*self._keys, *new)
        numbers = (_number(row[key]) if key in row else _MISSING for key in self._keys)
        self._places.append(place)
        self._packed.append(struct.pack(f"{len(self._keys)}d", *numbers))

    def _end_table(self) -> None:
        self._tables.append((len(self._keys), b"".join(self._packed)))
        self._packed.clear()

    def _matrix(self) -> Floats:
        """All tables in one, a line a row, a key a column."""
        self._end_table()
        if len(self._tables) == 1:
            width, packed = self._tables[0]
            return np.frombuffer(packed).reshape(-1, width)
        whole = np.full((len(self._places), len(self._keys)), _MISSING)
        end = 0
        for width, packed in self._tables:
            numbers = np.frombuffer(packed).reshape(-1, width)
            whole[end : end + len(numbers), :width] = numbers
            end += len(numbers)
        return whole

    def table(self) -> RankTable:
        matrix, places = self._matrix(), np.array(self._places, np.int64)
        counts, begun = self._counting(matrix[:, 0], places)
        if not counts.all():
            matrix = matrix[counts]
        line_steps = matrix[:, 0].astype(np.int64)
        steps, first, row_of_line = _first_of_each(line_steps)
        times_s = np.where(_is_there(matrix[first, 1]), matrix[first, 1], math.nan)
        values = _last_of_each(matrix, row_of_line, first) if len(steps) < len(matrix) else matrix
        return RankTable(steps, times_s, self._keys, values, _is_there(values), begun)

    def _counting(self, line_steps: Floats, places: Ints) -> tuple[Mask, list[Start]]:
        """Which lines of numbers count, and the starts that do."""
        at = np.array([place for place, _ in self._events], np.int64)
        all_places = np.concatenate([places, at])
        all_steps = np.concatenate([line_steps, [_number(row["step"]) for _, row in self._events]])
        order = np.argsort(all_places)
        in_order = all_steps[order]
        counts = np.empty(len(order), np.bool_)
        counts[order] = in_order <= np.minimum.accumulate(in_order[::-1])[::-1]
        kept = counts[len(places) :].tolist()
        events = [row for (_, row), keep in zip(self._events, kept, strict=True) if keep]
        return counts[: len(places)], [_start(row) for row in events if row["event"] == "start"]


@lru_cache(maxsize=256)  # a decoder costs as much as a hundred lines, and the files of all ranks have the same keys
def _decoder(keys: Keys) -> _Decoder | None:
    """For lines with some of these keys. None: without msgspec."""
    try:
        import msgspec
    except ImportError:
        return None
    names = [f"value_{k}" for k in range(len(keys))]
    fields: list[Any] = [("value_0", int), *((name, float, _MISSING) for name in names[1:])]
    rename = dict(zip(names, keys, strict=True))
    try:
        line_type = msgspec.defstruct("Line", fields, rename=rename, forbid_unknown_fields=True, gc=False)
    except ValueError:  # a key that holds a quotation mark or a backslash
        return None
    decoder = msgspec.json.Decoder(line_type)
    return _Decoder(decoder.decode, decoder.decode_lines, msgspec.structs.astuple)


def _refuse(line: bytes) -> Any:
    raise ValueError


def _is_there(values: Floats) -> Mask:
    there: Mask = np.ascontiguousarray(values).view(np.int64) != _MISSING_BITS
    return there


def _first_of_each(line_steps: Ints) -> tuple[Ints, Ints, Ints]:
    """Of steps that never fall: each step once, its first line, and each line's row."""
    differs = np.concatenate(([True], line_steps[1:] != line_steps[:-1]))[: len(line_steps)]
    first = np.flatnonzero(differs)
    return line_steps[first], first, np.cumsum(differs) - 1


def _last_of_each(matrix: Floats, row_of_line: Ints, first: Ints) -> Floats:
    """Of each step the last value of each key: its first lines, then its second ones laid over them, and so on."""
    values = matrix[first]
    turn = np.arange(len(matrix)) - first[row_of_line]
    for k in range(1, int(turn.max()) + 1):
        lines = np.flatnonzero(turn == k)
        rows = row_of_line[lines]
        values[rows] = np.where(_is_there(matrix[lines]), matrix[lines], values[rows])
    return values


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # a whole number with hundreds of digits
        return math.inf if value > 0 else -math.inf


def _start(row: Parsed) -> Start:
    def whole(key: str, otherwise: int) -> int:
        value = row.get(key, otherwise)
        return value if isinstance(value, int) else otherwise

    return Start(
        row["step"], _number(row.get("time")), whole("rank", 0), whole("world_size", 1), str(row.get("host", "?"))
    )
