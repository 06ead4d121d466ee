"""Looks at every file of a data set before training does: ``python -m tools.scan_dataset DIR``.

In: DIR with train/ and val/ (a folder a class), or with train.index and val.index alone. Out: a table of what was
found, a picture of sizes (scan.png), and quarantine.jsonl, the list of bad files; `python -m tools.index_dataset DIR`
leaves them out. Started again after a kill, it goes on where it stopped. Exit codes: 0 nothing bad, 2 wrong arguments,
3 bad files or a wrong data set, 5 missing package.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path

from ii_dist.config.errors import EXIT_DATA, EXIT_DONE
from ii_dist.data.quarantine import QUARANTINE, append_quarantine, read_quarantine
from tools._border import run
from tools._datasets import as_data_error
from tools._progress import Progress
from tools._scan_picture import draw_sizes
from tools._scan_report import ScanReport
from tools._scan_splits import find_splits
from tools._scan_work import ScanJournal, scan


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    out: Path = args.out or args.folder / QUARANTINE
    picture = None if args.no_picture else args.picture or out.with_name("scan.png")
    started_s = time.monotonic()
    try:
        report = _scan(args.folder, out, max(0, args.workers) or len(os.sched_getaffinity(0)))
        seconds = time.monotonic() - started_s
        if picture is not None and report.width:
            name = args.folder.resolve().name
            draw_sizes(name, report.width, report.height, report.length, picture)
    except OSError as error:
        raise as_data_error(error, args.folder) from None
    if args.json:
        about = {"folder": str(args.folder), "quarantine": str(out) if report.bad else None, "seconds": seconds}
        print(json.dumps(about | report.tree(), indent=1))
    else:
        _print(args.folder, out, report, seconds)
    return EXIT_DATA if report.count("bad", "wrong") else EXIT_DONE


def _scan(folder: Path, out: Path, workers: int) -> ScanReport:
    report = ScanReport(read_quarantine(out) if out.exists() else ())
    splits = find_splits(folder)
    total, done = sum(len(split.images) for split in splits), 0
    journal, progress = ScanJournal(out.with_name(f".{out.name}.scan")), Progress("images")
    finished = False
    try:
        # Pillow warns of every odd tag; what matters of it is in the table.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for split in splits:
                for finding in split.findings:
                    report.note(finding)
                for path, label, facts in scan(split, journal, workers):
                    report.add(split.name, path, label, facts)
                    done += 1
                    progress(done, total)
        _write_list(out, report)
        finished = True
    finally:
        journal.close(finished)
    return report


def _write_list(out: Path, report: ScanReport) -> None:
    """Replace the list, whole; no list where nothing is bad."""
    hidden = out.with_name(f".{out.name}.partial")
    hidden.unlink(missing_ok=True)
    if report.bad:
        append_quarantine(hidden, report.bad)
        hidden.replace(out)
    else:
        out.unlink(missing_ok=True)


def _print(folder: Path, out: Path, report: ScanReport, seconds: float) -> None:
    images = report.images.total()
    splits = ", ".join(f"{count:,} {split}" for split, count in report.images.items())
    print(f"{folder}: {images:,} images ({splits}), {images / max(seconds, 1e-9):,.0f} images/s")
    if table := report.table():
        print(table)
    if report.bad:
        print(f"{len(report.bad):,} bad files are listed in {out}; leave them out with:")
        print(f"  python -m tools.index_dataset {folder} --quarantine {out}")
    elif not report.count("wrong"):
        print("nothing bad")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.scan_dataset",
        description="Look at every file of a data set: decode it, hash it, compare it with the index.",
        epilog="exit codes: 0 nothing bad, 3 bad files or a wrong data set",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds train/ and val/, or train.index and val.index")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"the list of bad files to make (default: DIR/{QUARANTINE})"
    )
    parser.add_argument("--picture", type=Path, metavar="PNG", help="default: scan.png beside the list")
    parser.add_argument("--no-picture", action="store_true", help="draw none (needs no matplotlib)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="threads (default: one a core); more hide a slow network"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    run(main)
