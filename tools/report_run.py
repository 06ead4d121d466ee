"""What a run did, in one Markdown page with a picture of its curves.

    python -m tools.report_run runs/digits                       writes runs/digits/report.md and report.png
    python -m tools.report_run runs/a runs/b --out compare.md    one page over both, with a table that compares them

In: run folders (numbers of all ranks, config, plan, job records, names of checkpoints); a run may still be going on.
Out: the page, its picture beside it, and the verdict of each run on the screen.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ii_dist.config.errors import ConfigError
from ii_dist.metrics.words import in_words_bytes, in_words_rate, in_words_s, in_words_share
from tools._border import run
from tools._run_facts import RunFacts, read_facts
from tools._run_plots import plot_runs

MOST_RANKS_SHOWN = 16
INPUT_BOUND_SHARE, COMPUTE_BOUND_SHARE = 0.15, 0.05

Cells = Sequence[str]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report_run", description="What a run did, as Markdown.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: report.md in the run folder, or beside several)"
    )
    parser.add_argument("--no-plots", action="store_true", help="leave the picture out (needs no matplotlib)")
    options = parser.parse_args(arguments)
    runs = [read_facts(folder) for folder in options.runs]
    first = options.runs[0]
    out: Path = options.out or (first if len(runs) == 1 else first.parent) / "report.md"
    picture = None if options.no_plots else out.with_suffix(".png")
    try:
        if picture is not None:
            plot_runs(runs, picture)
        out.write_text(report(runs, picture.name if picture else None))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None
    for facts in runs:
        print(f"{facts.name}: {verdict(facts).replace('*', '').replace('`', '')}")
    print(f"report: {out}")
    return 0


def report(runs: Sequence[RunFacts], picture: str | None) -> str:
    """The whole page. `picture` is the name of a file beside it."""
    parts = [f"# {' and '.join(facts.name for facts in runs)}"]
    if len(runs) == 1:
        parts.append(verdict(runs[0]))
    if picture:
        parts.append(f"![Loss, accuracy, images per second and data wait]({picture})")
    if len(runs) > 1:
        parts.append(comparison(runs))
    for facts in runs:
        level = "##"
        if len(runs) > 1:
            parts += [f"## {facts.name}", verdict(facts)]
            level = "###"
        parts += [f"{level} What ran\n\n{what_ran(facts)}", f"{level} Figures\n\n{figures(facts)}"]
        parts += [f"{level} Ranks\n\n{ranks(facts)}", f"{level} Checkpoints\n\n{checkpoints(facts)}"]
        parts.append(f"{level} Jobs\n\n{jobs(facts)}")
    return "\n\n".join(parts) + "\n"


def verdict(facts: RunFacts) -> str:
    """One or two sentences: what bounds the run, and what to do about it."""
    share, rate = facts.data_wait_share, facts.images_per_s
    if math.isnan(share) or math.isnan(rate):
        return "Too short to judge: no throughput was written yet."
    waits = f"{in_words_share(share)} of the training time waits for data"
    if share < COMPUTE_BOUND_SHARE:
        return f"**Compute bound**: {waits}; faster reading would gain next to nothing."
    threads = facts.setting("data.threads_per_rank")
    now = "the node's cores over its ranks" if threads in (0, None) else str(threads)
    most = (
        f"with the data always ready it would run at up to {in_words_rate(rate / (1 - share))} instead of {rate:,.0f}"
    )
    advice = f"Give it more cores or `data.threads_per_rank` (now {now}), smaller source images, or faster storage"
    if share < INPUT_BOUND_SHARE:
        return f"**Nearly balanced**: {waits}; {most}. {advice}."
    return f"**Input bound**: {waits}; {most}. {advice}."


def table(header: Cells, rows: Sequence[Cells], right: str = "") -> str:
    """A Markdown table; `right` holds the numbers of right-aligned columns, such as "12"."""
    lines = [header, ["---:" if str(i) in right else "---" for i in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def what_ran(facts: RunFacts) -> str:
    """Config and plan in a few rows."""
    setting, plan = facts.setting, facts.plan
    accumulate = plan.get("accumulate_steps", 1)
    share = f"{plan.get('images_per_rank', '?')} a rank" + (f" in {accumulate} parts" if accumulate != 1 else "")
    rows = [
        ("network", f"{setting('model.network')}, gate {setting('model.gate')}"),
        ("data", f"{setting('data.root')} ({setting('data.source')}), {image_sizes(facts)} px"),
        (
            "images",
            f"{plan.get('train_images', 0):,} to train, {plan.get('eval_images', 0):,} to evaluate, "
            f"{plan.get('num_classes', '?')} classes",
        ),
        ("global batch", f"{plan.get('global_batch', '?')} on {plan.get('world_size', '?')} ranks: {share}"),
        (
            "length",
            f"{setting('train.epochs')} epochs of {plan.get('steps_per_epoch', '?')} steps, "
            f"{plan.get('total_steps', 0):,} steps in all",
        ),
        (
            "learning rate",
            f"{setting('optim.optimizer')}, {setting('optim.schedule')}, peak {plan.get('peak_lr', math.nan):.4g}",
        ),
        ("engine", f"{setting('engine.kind')}, {setting('engine.precision')}, device {facts.device}"),
        ("seed", f"{setting('seed')}"),
    ]
    return table(("", ""), rows)


def image_sizes(facts: RunFacts) -> str:
    """Side of the training images, of the first and of the last epoch where they differ."""
    sides = [side for _, side in facts.plan.get("image_sizes", [])] or [facts.setting("data.image_size")]
    return " to ".join(str(side) for side in dict.fromkeys((sides[0], sides[-1])))


def figures(facts: RunFacts) -> str:
    """The last and best numbers of the run."""
    last = facts.metrics.last
    rows = [("top-1", accuracy(facts)), ("top-5", per_cent(last("eval/top5")))]
    rows.append(("evaluation loss", number(last("eval/loss"))))
    rows.append(("training loss", number(last("train/loss"))))
    rows.append(("images/s, all ranks, steady", rate_words(facts.images_per_s)))
    rows.append(("images/s, first epoch", rate_words(facts.cold_images_per_s)))
    share = facts.data_wait_share
    rows.append(("data wait", "-" if math.isnan(share) else in_words_share(share)))
    p50, p99 = last("time/step_p50_s"), last("time/step_p99_s")
    if p50 is not None and p99 is not None:
        rows.append(("step, median / 99th percentile", f"{1000 * p50:.1f} ms / {1000 * p99:.1f} ms"))
    rows.append(("steps", f"{facts.last_step:,} of {facts.plan.get('total_steps', 0):,}"))
    rows.append(("running time", f"{in_words_s(facts.running_s)} in {plural(len(facts.metrics.starts), 'attempt')}"))
    skipped = sum(facts.metrics.series("train/skipped_updates")[1])
    if skipped:
        rows.append(("updates skipped (not finite)", f"{skipped:.0f}"))
    return table(("", ""), rows)


def accuracy(facts: RunFacts) -> str:
    rows, values = facts.metrics.series("eval/top1")
    if not values:
        return "not evaluated"
    best = max(range(len(values)), key=values.__getitem__)
    return f"{values[-1]:.2f} % at step {rows[-1].step:,}, best {values[best]:.2f} % at step {rows[best].step:,}"


def ranks(facts: RunFacts) -> str:
    """Each rank's rate; the slowest first where there are many."""
    found = sorted(facts.metrics.ranks, key=lambda r: (math.isnan(r.images_per_s), r.images_per_s))
    shown = found[:MOST_RANKS_SHOWN]
    rows = [
        (
            str(rank.rank),
            rank.host,
            f"{rank.images_per_s:,.1f}",
            "-" if math.isnan(rank.data_wait_share) else in_words_share(rank.data_wait_share),
            gib(rank.rss_gib),
            gib(rank.device_gib),
        )
        for rank in (shown if len(found) > len(shown) else sorted(shown, key=lambda r: r.rank))
    ]
    lines = table(("rank", "host", "images/s", "data wait", "memory", "GPU memory"), rows, right="02345")
    more = f"\n\nThe {len(shown)} slowest of {len(found)} ranks." if len(found) > len(shown) else ""
    return f"{slowest(facts)}\n\n{lines}{more}"


def slowest(facts: RunFacts) -> str:
    """Which rank holds the others up. Ranks step together, so their rates hardly differ: who waits for data tells."""
    found = [rank for rank in facts.metrics.ranks if not math.isnan(rank.images_per_s)]
    if len(found) < 2:
        return "One rank." if found else "No rank wrote its rate."
    low = min(found, key=lambda rank: rank.images_per_s)
    high = max(found, key=lambda rank: rank.images_per_s)
    behind = 1 - low.images_per_s / high.images_per_s if high.images_per_s else 0.0
    said = f"Slowest: rank {low.rank} on {low.host}, {in_words_share(behind)} behind the fastest."
    waits = [rank.data_wait_share for rank in found]
    hungry = max(found, key=lambda rank: rank.data_wait_share)
    if hungry.data_wait_share - statistics.median_low(waits) > COMPUTE_BOUND_SHARE:
        said += (
            f" Rank {hungry.rank} on {hungry.host} waits longest for data "
            f"({in_words_share(hungry.data_wait_share)}), and the others for it."
        )
    return said


def checkpoints(facts: RunFacts) -> str:
    rows = [(name, in_words_bytes(size), when) for name, size, when in facts.checkpoints]
    return table(("committed step", "size", "when"), rows, right="1") if rows else "None on disk."


def jobs(facts: RunFacts) -> str:
    header = ("job", "attempt", "nodes", "ranks", "start", "lasted", "code", "why it ended")
    return table(header, facts.jobs, right="1356") if facts.jobs else "No job records: started without `launch`."


def comparison(runs: Sequence[RunFacts]) -> str:
    rows = []
    for facts in runs:
        share, best = facts.data_wait_share, facts.metrics.series("eval/top1")[1]
        rows.append(
            (
                facts.name,
                f"{facts.setting('model.network')}, {facts.setting('model.gate')}",
                str(facts.plan.get("world_size", "?")),
                per_cent(best[-1] if best else None),
                per_cent(max(best, default=None)),
                rate_words(facts.images_per_s),
                "-" if math.isnan(share) else in_words_share(share),
                in_words_s(facts.running_s),
            )
        )
    header = ("run", "network, gate", "ranks", "top-1", "best top-1", "images/s", "data wait", "running time")
    return table(header, rows, right="234567")


def per_cent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def rate_words(per_s: float) -> str:
    return "-" if math.isnan(per_s) else in_words_rate(per_s)


def gib(size: float) -> str:
    return "-" if math.isnan(size) else f"{size:.2f} GiB"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


if __name__ == "__main__":
    run(main)
