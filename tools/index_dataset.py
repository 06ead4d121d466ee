"""Makes train.index and val.index of an image folder: DIR/train/<class>/<image> and DIR/val/<class>/<image>.

    python -m tools.index_dataset DIR [--quarantine FILE]

Files in the list FILE (DIR/quarantine.jsonl, where it is there) are left out: `python -m tools.scan_dataset DIR` makes
one, and so does every run that meets a bad file, in its run folder.

Started again after a kill, it goes on where it stopped. Hashes are remembered beside the indexes (.train.journal,
.val.journal): a later start reads only files that changed since; --fresh reads all of them.

Exit codes: 0 done, 2 wrong arguments, 3 wrong data.
"""

import argparse
from pathlib import Path

from ii_dist.config.errors import ConfigError
from ii_dist.data.quarantine import QUARANTINE, read_quarantine
from ii_dist.data.scan import THREADS
from tools._border import run
from tools._datasets import SPLITS, as_data_error, write_indexes


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.index_dataset", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds train/ and val/, each with a folder a class")
    parser.add_argument("--workers", type=int, default=THREADS, metavar="N", help=f"threads (default: {THREADS})")
    parser.add_argument("--fresh", action="store_true", help="read every file again, also those that did not change")
    parser.add_argument(
        "--quarantine", type=Path, metavar="FILE", help=f"bad files to leave out (default: DIR/{QUARANTINE} if there)"
    )
    asked = parser.parse_args(arguments)
    folder: Path = asked.folder
    if asked.workers < 1:
        raise ConfigError(f"--workers {asked.workers}: must be at least 1")
    listed = asked.quarantine or folder / QUARANTINE
    try:
        if asked.fresh:
            for split in SPLITS:
                (folder / f".{split}.journal").unlink(missing_ok=True)
        bad_files = read_quarantine(listed) if asked.quarantine or listed.exists() else []
        write_indexes(folder, folder, asked.workers, bad_files=bad_files)
        if bad_files:
            print(f"{listed}: its {len(bad_files):,} bad files are left out, but for those that are good copies by now")
    except OSError as error:
        raise as_data_error(error, folder) from None
    return 0


if __name__ == "__main__":
    run(main)
