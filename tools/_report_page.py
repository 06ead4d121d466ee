"""What a report is made of, before it becomes HTML or Markdown. In: nothing. Out: blocks and pages.

Words may hold ``**bold**`` and ```code```; everything else in them is text, whatever it looks like: who renders a page
escapes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Cells: TypeAlias = Sequence[str]


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph; `mark` makes it stand out: "" | "good" | "warn" | "bad"."""

    text: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text. `right` holds the numbers of right-aligned columns, such as "12"; no header: names and values."""

    header: Cells
    rows: Sequence[Cells]
    right: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot: an SVG document for HTML. Markdown has one picture for all of them, beside it."""

    svg: str
    says: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Shares of a whole, drawn as one bar: name, share, what it is."""

    parts: Sequence[tuple[str, float, str]]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The few numbers to see first: value, what it is."""

    tiles: Sequence[tuple[str, str]]


Block: TypeAlias = Words | Bullets | Table | Picture | Bar | Tiles


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    blocks: Sequence[Block] = ()
    inside: Sequence["Section"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    blocks: Sequence[Block]
    """Above the table of contents: the verdict."""
    sections: Sequence[Section]
