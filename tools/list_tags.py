"""Every number that a run writes: ``python -m tools.list_tags``.

In: nothing. Out: the table of tags (name, unit, how ranks become one number, meaning) as Markdown or JSON, or put in
the place of the one in a page.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from ii_dist.config.errors import EXIT_DONE, ConfigError
from ii_dist.metrics.tags import TAGS, tag_table
from tools._border import run


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    if args.json:
        print(json.dumps([dataclasses.asdict(tag) for tag in TAGS.values()], indent=1))
    elif args.into is None:
        print(tag_table())
    else:
        args.into.write_text(with_table(args.into.read_text(), str(args.into)))
    return EXIT_DONE


def with_table(page: str, name: str) -> str:
    """The page with today's table in the place of the one it has. Raises ConfigError where it has none."""
    lines, table = page.splitlines(), tag_table().splitlines()
    if table[0] not in lines:
        raise ConfigError(f"{name}: no line {table[0]!r}, below which the table of tags would stand")
    start = end = lines.index(table[0])
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:start], *table, *lines[end:]]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.list_tags", description="List the numbers that runs write.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace the table in this Markdown page")
    return parser


if __name__ == "__main__":
    run(main)
