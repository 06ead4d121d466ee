"""Makes train.index and val.index of an image folder: DIR/train/<class>/<image> and DIR/val/<class>/<image>.

    python -m tools.index_dataset DIR

Exit codes: 0 done, 2 wrong arguments, 3 wrong data.
"""

import argparse
from pathlib import Path

from tools._border import run
from tools._datasets import as_data_error, write_indexes


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.index_dataset", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds train/ and val/, each with a folder a class")
    folder: Path = parser.parse_args(arguments).folder
    try:
        write_indexes(folder, folder)
    except OSError as error:
        raise as_data_error(error, folder) from None
    return 0


if __name__ == "__main__":
    run(main)
