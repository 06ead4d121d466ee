"""A report as one HTML file that needs nothing else: no network, no fonts, light and dark, from phone to desk.

In: a `Page`. Out: the document. What comes from a run (names, settings, messages) is escaped before our own ``**`` and
backticks become tags, and the page's policy lets no script run but the one below, by its hash.
"""

import base64
import hashlib
import html
import re
from collections.abc import Iterator, Sequence

from tools._report_page import Bar, Block, Bullets, Page, Picture, Section, Table, Tiles, Words
from tools._report_style import CSS, SCRIPT

_LONG_CELL = 26  # letters, above which a cell is broken into lines
_BAR_COLOURS = ("--c2", "--c4", "--c0", "--c5", "--c3", "--c6", "--c1", "--bad", "--c7", "--faint")


def to_html(page: Page, made: str) -> str:
    """The whole document. made: the line at its end."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    body = [f"<h1>{_plain(page.title)}</h1>", *_blocks(page.blocks), _contents(page.sections)]
    for number, section in enumerate(page.sections):
        body += _section(section, 2, f"s{number}")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_plain(page.title)}</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            f"<footer>{_marked(made)}</footer>",
            "</main>",
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _contents(sections: Sequence[Section]) -> str:
    """Links to all sections; those inside another one follow it on a line of their own."""
    lines = []
    for number, section in enumerate(sections):
        inside = "".join(
            f'<li><a href="#s{number}-{k}">{_plain(each.title)}</a></li>' for k, each in enumerate(section.inside)
        )
        deep = f' class="deep"><a href="#s{number}">{_plain(section.title)}</a><ul>{inside}</ul>' if inside else ""
        lines.append(f"<li{deep}</li>" if deep else f'<li><a href="#s{number}">{_plain(section.title)}</a></li>')
    return f'<nav aria-label="Contents"><ul>{"".join(lines)}</ul></nav>'


def _section(section: Section, level: int, own: str) -> Iterator[str]:
    yield f'<h{level} id="{own}">{_plain(section.title)}</h{level}>'
    yield from _blocks(section.blocks)
    for k, inside in enumerate(section.inside):
        yield from _section(inside, level + 1, f"{own}-{k}")


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    """Plots that follow each other share a grid."""
    open_grid = False
    for block in blocks:
        if isinstance(block, Picture) != open_grid:
            open_grid = not open_grid
            yield '<div class="plots">' if open_grid else "</div>"
        yield _block(block)
    if open_grid:
        yield "</div>"


def _block(block: Block) -> str:
    if isinstance(block, Words):
        return (
            f'<p class="note {block.mark}">{_marked(block.text)}</p>' if block.mark else f"<p>{_marked(block.text)}</p>"
        )
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_marked(line)}</li>" for line in block.lines) + "</ul>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Bar):
        return _bar(block)
    if isinstance(block, Tiles):
        tiles = (f"<li><b>{_plain(value)}</b><span>{_plain(name)}</span></li>" for value, name in block.tiles)
        return f'<ul class="tiles">{"".join(tiles)}</ul>'
    return f'<figure role="img" aria-label="{_plain(block.says)}">{block.svg}</figure>'


def _table(table: Table) -> str:
    """With a header it can be sorted; without one it is a list of names and values."""

    def kind(column: int, cell: str = "") -> str:
        if str(column) in table.right:
            return ' class="right"'
        return ' class="long"' if len(cell) > _LONG_CELL else ""

    heads = "".join(
        f'<th{kind(i)} scope="col"><button type="button">{_plain(cell)}</button></th>'
        for i, cell in enumerate(table.header)
    )
    rows = [
        "<tr>" + "".join(f"<td{kind(i, cell)}>{_marked(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    ]
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    facts = "" if heads else ' class="facts"'
    return f'<div class="scroll"><table{facts}>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _bar(bar: Bar) -> str:
    shown = [(_plain(name), share, _BAR_COLOURS[k % len(_BAR_COLOURS)]) for k, (name, share, _) in enumerate(bar.parts)]
    spans = "".join(
        f'<span style="flex: {share:.5f} 0 0; background: var({colour})" title="{name}: {100 * share:.1f} %"></span>'
        for name, share, colour in shown
    )
    keys = "".join(
        f'<li><i style="background: var({colour})"></i>{name} {100 * share:.1f} %</li>' for name, share, colour in shown
    )
    said = ", ".join(f"{name} {100 * share:.1f} %" for name, share, _ in bar.parts)
    return f'<div class="bar" role="img" aria-label="{_plain(said)}">{spans}</div><ul class="key">{keys}</ul>'


def _plain(text: str) -> str:
    return html.escape(text, quote=True)


def _marked(text: str) -> str:
    """Escaped first; then our two marks."""
    said = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", _plain(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", said)
