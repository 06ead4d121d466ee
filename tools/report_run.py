"""What runs did, as pages that explain themselves.

    python -m tools.report_run runs/digits                       writes report.html, report.md and report.png there
    python -m tools.report_run runs/a runs/b --html compare.html one page over both: figures, scaling, settings
    python -m tools.report_run runs/a peer/tb --html compare.html    ... with another trainer's TensorBoard files
    python -m tools.report_run runs/digits --json                figures and verdict for a program
    python -m tools.report_run runs/digits --csv numbers.csv     every step's numbers, all ranks combined

In: run folders (numbers of all ranks, config, plan, job records, names of checkpoints); a run may still be going on.
Out: the pages, and the verdict of each run on the screen.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ii_dist.config.errors import ConfigError
from tools._border import run
from tools._report_compare import compare_sections
from tools._report_data import to_csv, to_json
from tools._report_html import to_html
from tools._report_markdown import to_markdown
from tools._report_page import Page, Section, Words
from tools._report_parts import Pictures, made_line, run_sections, verdict_blocks
from tools._report_verdict import findings, verdict
from tools._run_facts import RunFacts, read_facts


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    by_hand = dict(_pair(text) for text in options.map)
    runs = []
    for folder in options.runs:
        if len(options.runs) > 1:
            print(f"... reading {folder}", file=sys.stderr, flush=True)
        runs.append(read_facts(folder, by_hand, options.global_batch))
    markdown, page_file = _where(options)
    if page_file is not None:
        _write(page_file, "--html", to_html(make_page(runs, _pictures(runs, options.no_plots)), made_line()))
    if markdown is not None:
        picture = None if options.no_plots else markdown.with_suffix(".png")
        if picture is not None:
            _draw(runs, picture)
        _write(markdown, "--markdown", to_markdown(make_page(runs, {}), picture.name if picture else None))
    if options.csv is not None:
        _write(options.csv, "--csv", to_csv(runs))
    if options.json:
        print(to_json(runs))
        return 0
    for facts in runs:
        for said in (verdict(facts), *findings(facts)):
            print(f"{facts.name}: {said.replace('*', '').replace('`', '')}")
        if facts.unknown:
            print(f"{facts.name}: tags that were not read: {', '.join(facts.unknown)} (--map theirs=ours reads one)")
    for file in (page_file, markdown, options.csv):
        if file is not None:
            print(f"report: {file}")
    return 0


def make_page(runs: Sequence[RunFacts], pictures: Pictures) -> Page:
    """One run: its sections. Several: what compares them, then each."""
    if len(runs) == 1:
        return Page(runs[0].name, verdict_blocks(runs[0]), run_sections(runs[0], pictures))
    alone = [
        Section(facts.name, verdict_blocks(facts), run_sections(facts, _of_one(facts, pictures))) for facts in runs
    ]
    headlines = [Words(f"**{facts.name}**: {verdict(facts)}") for facts in runs]
    return Page(" and ".join(facts.name for facts in runs), headlines, [*compare_sections(runs, pictures), *alone])


def _of_one(facts: RunFacts, pictures: Pictures) -> Pictures:
    """Plots of one of several runs: those that the common ones do not show."""
    if not pictures or not facts.phase_s:
        return {}
    from tools._report_plots import phases_plot

    picture = phases_plot(facts)
    return {} if picture is None else {"phases": picture}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report_run",
        description="What runs did: HTML, Markdown, JSON, CSV.",
        epilog="Without any of the four, HTML and Markdown are written into the run folder (of several: beside them).",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="run folder, or another trainer's folder of event files"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page that needs no network")
    parser.add_argument(
        "--markdown",
        "--out",
        type=Path,
        metavar="FILE",
        help="the same as text, with its plots as FILE's .png beside it",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="every step's numbers, a column a tag")
    parser.add_argument("--json", action="store_true", help="figures, goodput, ranks and verdict on standard output")
    parser.add_argument("--no-plots", action="store_true", help="leave pictures out (needs no matplotlib)")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="THEIRS=OURS",
        help="read this tag of another trainer as ours, such as speed=throughput/images_per_s; may be given again",
    )
    parser.add_argument(
        "--global-batch",
        type=int,
        default=0,
        metavar="N",
        help="images a step of another trainer that tells the time of a step only",
    )
    return parser.parse_args(arguments)


def _where(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """Files of Markdown and of HTML."""
    if options.html or options.markdown or options.json or options.csv:
        return options.markdown, options.html
    first: Path = options.runs[0]
    folder = first if len(options.runs) == 1 else first.parent
    return folder / "report.md", folder / "report.html"


def _pair(text: str) -> tuple[str, str]:
    theirs, equals, ours = text.rpartition("=")
    if not equals or not theirs:
        raise ConfigError(f"--map {text}: needs THEIRS=OURS, such as speed=throughput/images_per_s")
    return theirs, ours


def _pictures(runs: Sequence[RunFacts], none: bool) -> Pictures:
    if none:
        return {}
    from tools._report_plots import plots

    return plots(runs)


def _draw(runs: Sequence[RunFacts], picture: Path) -> None:
    from tools._run_plots import plot_runs

    try:
        plot_runs(runs, picture)
    except OSError as error:
        raise ConfigError(f"--markdown {picture}: cannot be written ({error.strerror})") from None


def _write(file: Path, option: str, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {file}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run(main)
