"""A report as Markdown, readable as it stands. In: a `Page`, the name of the picture beside it. Out: text.

What comes from a run (names, settings, messages) is escaped: it neither ends a table cell nor becomes HTML, a link or a
picture.
"""

import re
from collections.abc import Iterator, Sequence

from tools._report_page import Bar, Block, Bullets, Cells, Page, Section, Table, Tiles, Words

_ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "[": "\\[", "]": "\\]", "\n": " ", "\r": " "}


def to_markdown(page: Page, picture: str | None) -> str:
    parts = [f"# {escaped(page.title)}", *_blocks(page.blocks)]
    if picture:
        parts.append(f"![Loss, accuracy, images per second and data wait]({picture})")
    for section in page.sections:
        parts += _section(section, 2)
    return "\n\n".join(parts) + "\n"


def table(header: Cells, rows: Sequence[Cells], right: str = "") -> str:
    """A Markdown table; `right` holds the numbers of right-aligned columns, such as "12"."""
    width = max((len(row) for row in rows), default=len(header))
    head = [*header, *[""] * (width - len(header))]
    lines = [head, ["---:" if str(i) in right else "---" for i in range(width)], *rows]
    ruler = lines[1]
    return "\n".join("| " + " | ".join(c if line is ruler else escaped(c) for c in line) + " |" for line in lines)


def escaped(text: str) -> str:
    return re.sub("[" + re.escape("".join(_ESCAPED)) + "]", lambda found: _ESCAPED[found[0]], text)


def _section(section: Section, level: int) -> Iterator[str]:
    blocks = list(_blocks(section.blocks))
    if not blocks and not section.inside:
        return
    yield f"{'#' * level} {escaped(section.title)}"
    yield from blocks
    for inside in section.inside:
        yield from _section(inside, level + 1)


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, Words):
            yield escaped(block.text)
        elif isinstance(block, Bullets):
            yield "\n".join(f"- {escaped(line)}" for line in block.lines)
        elif isinstance(block, Table):
            yield table(block.header, block.rows, block.right)
        elif isinstance(block, Tiles):
            yield " · ".join(f"{escaped(name)} **{escaped(value)}**" for value, name in block.tiles)
        elif isinstance(block, Bar):
            yield "`" + _drawn(block) + "`"


def _drawn(bar: Bar, width: int = 60) -> str:
    """The first part, which is the one that should be long, against the rest."""
    name, share, _ = bar.parts[0]
    filled = round(width * share)
    return f"{'#' * filled}{'.' * (width - filled)} {name.replace('`', '')} {100 * share:.0f} %"
