"""The sections of a report that speak of one run. In: `RunFacts` and its plots. Out: sections.

What a run of an earlier version, or of another trainer, did not write is left out, and said where a reader would miss
it.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from ii_dist.metrics import RankFigures
from ii_dist.metrics.goodput import PARTS
from ii_dist.metrics.words import in_words_bytes, in_words_s, in_words_share
from tools._report_page import Bar, Block, Bullets, Picture, Section, Table, Tiles, Words
from tools._report_verdict import findings, save_advice, stragglers, verdict
from tools._report_words import PHASE_NAMES, gib, ms, number, per_cent, plural, rate_words, share_words
from tools._run_facts import RunFacts
from tools._run_jobs import Attempt, ending_words, minute

MOST_RANKS_SHOWN = 16
Pictures = Mapping[str, Picture]


def run_sections(facts: RunFacts, pictures: Pictures) -> list[Section]:
    """Everything about one run, in the order of reading."""
    sections = [
        Section("What ran", [what_ran(facts)]),
        Section("Figures", [figures(facts)]),
        Section("Curves", curves(facts, pictures)),
        Section("Throughput", [pictures[name] for name in ("rate", "wait") if name in pictures]),
        Section("Where the time of a step goes", step_time(facts, pictures)),
        Section("Hosts and ranks", ranks(facts)),
        Section("Goodput", goodput(facts)),
        Section("Failures and restarts", restarts(facts)),
        Section("Checkpoints", [checkpoints(facts)]),
        Section("Jobs", [jobs(facts)]),
    ]
    if facts.mapped is not None:
        sections = [section for section in sections if section.title not in ("Checkpoints", "Jobs", "Hosts and ranks")]
        sections.append(Section("Tags", tags_read(facts)))
    return [section for section in sections if section.blocks]


def verdict_blocks(facts: RunFacts) -> list[Block]:
    """The headline and what else is worth doing."""
    said = verdict(facts)
    mark = "warn" if "Input bound" in said or "Bound by" in said else "good" if "bound" in said else ""
    return [tiles(facts), Words(said, mark), *([Bullets(more)] if (more := findings(facts)) else [])]


def tiles(facts: RunFacts) -> Block:
    """What a reader wants to know first."""
    top1, found = facts.metrics.last("eval/top1"), facts.goodput
    shown = [
        (per_cent(top1), "top-1"),
        (rate_words(facts.images_per_s), "all ranks, steady"),
        (share_words(facts.data_wait_share), "waiting for data"),
        (share_words(found.share if found else math.nan), "goodput"),
        (in_words_s(facts.running_s), "running time"),
    ]
    if facts.plan.get("total_steps") and not facts.is_done:
        shown.append((in_words_share(facts.last_step / facts.plan["total_steps"]), "of the steps done"))
    return Tiles([(value, name) for value, name in shown if value != "-"])


def what_ran(facts: RunFacts) -> Block:
    """Config and plan in a few rows."""
    setting, plan = facts.setting, facts.plan
    if facts.mapped is not None:
        return Words("Another trainer's run, read from its TensorBoard event files.")
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
    return Table((), rows)


def image_sizes(facts: RunFacts) -> str:
    """Side of the training images, of the first and of the last epoch where they differ."""
    sides = [side for _, side in facts.plan.get("image_sizes", [])] or [facts.setting("data.image_size")]
    return " to ".join(str(side) for side in dict.fromkeys((sides[0], sides[-1])))


def figures(facts: RunFacts) -> Block:
    """The last and best numbers of the run."""
    last = facts.metrics.last
    rows = [("top-1", accuracy(facts))]
    if facts.expected_top1:
        rows.append(("top-1 of the recipe", against_recipe(facts)))
    rows.append(("top-5", per_cent(last("eval/top5"))))
    rows.append(("evaluation loss", number(last("eval/loss"))))
    rows.append(("training loss", number(last("train/loss"))))
    rows.append(("images/s, all ranks, steady", rate_words(facts.images_per_s)))
    rows.append(("images/s, first epoch", rate_words(facts.cold_images_per_s)))
    rows.append(("data wait", share_words(facts.data_wait_share)))
    p50, p99 = last("time/step_p50_s"), last("time/step_p99_s")
    if p50 is not None and p99 is not None:
        rows.append(("step, median / 99th percentile", f"{1000 * p50:.1f} ms / {1000 * p99:.1f} ms"))
    for tag, name in (
        ("throughput/mfu_share", "FLOPs of the network / peak"),
        ("throughput/roofline_share", "roofline"),
    ):
        if math.isfinite(share := facts.mean(tag)):
            rows.append((name, in_words_share(share)))
    rows.append(("steps", f"{facts.last_step:,} of {facts.plan.get('total_steps') or 0:,}"))
    if facts.goodput:
        rows.append(("goodput", f"{share_words(facts.goodput.share)} of the allocated time trained"))
    rows.append(("running time", f"{in_words_s(facts.running_s)} in {plural(len(facts.metrics.starts), 'attempt')}"))
    skipped = sum(facts.metrics.series("train/skipped_updates")[1])
    if skipped:
        rows.append(("updates skipped (not finite)", f"{skipped:.0f}"))
    return Table((), rows)


def accuracy(facts: RunFacts) -> str:
    rows, values = facts.metrics.series("eval/top1")
    if not values:
        return "not evaluated"
    best = max(range(len(values)), key=values.__getitem__)
    return f"{values[-1]:.2f} % at step {rows[-1].step:,}, best {values[best]:.2f} % at step {rows[best].step:,}"


def against_recipe(facts: RunFacts) -> str:
    """What the recipe states, and how far the run is from it."""
    expected, top1 = facts.expected_top1, facts.metrics.last("eval/top1")
    assert expected is not None
    if top1 is None:
        return f"{expected:.2f} % stated"
    gap = f"{abs(top1 - expected):.2f} points {'above' if top1 >= expected else 'below'}"
    return f"{expected:.2f} % stated; this run is {gap}{'' if facts.is_done else ' and not done'}"


def curves(facts: RunFacts, pictures: Pictures) -> list[Block]:
    return [pictures[name] for name in ("loss", "top1", "learning_rate") if name in pictures]


def step_time(facts: RunFacts, pictures: Pictures) -> list[Block]:
    """Phases of a step: the plot over time, and means."""
    if not facts.phase_s:
        return [Words("This run wrote no phases of a step (`time/forward_s` and so on): it is of an earlier version.")]
    whole = sum(facts.phase_s.values())
    rows = [
        (PHASE_NAMES[phase], ms(seconds), in_words_share(seconds / whole)) for phase, seconds in facts.phase_s.items()
    ]
    table = Table(("phase", "a step", "share"), rows, right="12")
    return [pictures["phases"], table] if "phases" in pictures else [table]


def ranks(facts: RunFacts) -> list[Block]:
    """Hosts, then each rank; the slowest first where there are many."""
    said = stragglers(facts)
    blocks: list[Block] = [Words(slowest(facts), "warn" if said else "")]
    named = {slow.rank.rank for slow in said}
    found = sorted(facts.metrics.ranks, key=lambda r: (r.rank not in named, math.isnan(r.images_per_s), r.images_per_s))
    if len({rank.host for rank in found}) > 1:
        blocks.append(hosts(facts))
    shown = found[:MOST_RANKS_SHOWN]
    listed = shown if len(found) > len(shown) else sorted(shown, key=lambda r: r.rank)
    phases = [phase for phase in PHASE_NAMES if any(phase in rank.phase_s for rank in found)]
    phases = [phase for phase in phases if phase not in ("data_wait", "metrics", "other", "copy")]
    rows = [
        (
            str(rank.rank),
            rank.host,
            "-" if math.isnan(rank.images_per_s) else f"{rank.images_per_s:,.1f}",
            share_words(rank.data_wait_share),
            gib(rank.rss_gib),
            gib(rank.device_gib),
            *(ms(rank.phase_s.get(phase, math.nan)) for phase in phases),
        )
        for rank in listed
    ]
    header = ("rank", "host", "images/s", "data wait", "memory", "GPU memory", *(PHASE_NAMES[p] for p in phases))
    blocks.append(Table(header, rows, right="023456789"))
    if len(found) > len(shown):
        blocks.append(Words(f"The {len(shown)} slowest of {len(found)} ranks."))
    return blocks


def hosts(facts: RunFacts) -> Block:
    """A row a host, the slowest first."""
    by_host: dict[str, list[RankFigures]] = {}
    for rank in facts.metrics.ranks:
        by_host.setdefault(rank.host, []).append(rank)
    rows = []
    for host, members in sorted(by_host.items(), key=lambda item: _mean([r.images_per_s for r in item[1]])):
        rate, wait = _mean([r.images_per_s for r in members]), _mean([r.data_wait_share for r in members])
        memory = sum(r.rss_gib for r in members if math.isfinite(r.rss_gib))
        rows.append(
            (
                host,
                str(len(members)),
                "-" if math.isnan(rate) else f"{rate:,.1f}",
                share_words(wait),
                share_words(
                    max((r.data_wait_share for r in members if math.isfinite(r.data_wait_share)), default=math.nan)
                ),
                gib(memory),
            )
        )
    header = ("host", "ranks", "images/s a rank", "data wait", "worst rank's wait", "memory, all ranks")
    return Table(header, rows, right="12345")


def slowest(facts: RunFacts) -> str:
    """Which rank holds the others up."""
    found = [rank for rank in facts.metrics.ranks if not math.isnan(rank.images_per_s)]
    if len(found) < 2:
        return "One rank." if found else "No rank wrote its rate."
    low = min(found, key=lambda rank: rank.images_per_s)
    high = max(found, key=lambda rank: rank.images_per_s)
    behind = 1 - low.images_per_s / high.images_per_s if high.images_per_s else 0.0
    said = f"Slowest: rank {low.rank} on {low.host}, {in_words_share(behind)} behind the fastest."
    for slow in stragglers(facts):
        where = f" Rank {slow.rank.rank} on {slow.rank.host}"
        if slow.phase == "data_wait":
            said += f"{where} waits longest for data ({share_words(slow.rank.data_wait_share)}), and the others for it."
        else:
            said += f"{where} is slowest in {slow.phase} ({share_words(slow.excess_share)} of a step above the median)."
    return said


def goodput(facts: RunFacts) -> list[Block]:
    """The bar, the table, and the best interval between saves."""
    found = facts.goodput
    if found is None or not found.allocated:
        return []
    wait = facts.data_wait_share
    share = f"**{share_words(found.share)}** of {hours(found.allocated)} of allocated rank time trained"
    share += f"; {share_words(wait)} of that waited for data." if math.isfinite(wait) else "."
    if not facts.attempts:
        share += " There are no job records: what came before the first step of an attempt is known only in part."
    if facts.queue_s:
        share += f" The run waited {in_words_s(facts.queue_s)} in the queue, which is not allocated time."
    parts = [(name, found.share_of(name), says) for name, says in PARTS.items() if found.parts[name] > 0]
    rows = [(name, hours(found.parts[name]), in_words_share(part), says) for name, part, says in parts]
    table = Table(("part", "rank time", "share", "what it is"), rows, right="12")
    advice = save_advice(facts, found)
    return [Words(share), Bar(parts), table, *([Words(advice)] if advice else [])]


def restarts(facts: RunFacts) -> list[Block]:
    """Each start of the ranks after the first, in words."""
    lines = [line for attempt in facts.attempts for line in _attempt_lines(attempt)]
    if lines:
        return [Bullets(lines)]
    steps = facts.restart_steps()
    if not steps:
        return [] if facts.mapped is not None else [Words("None: one attempt.")]
    return [Words(f"{plural(len(steps), 'restart')}, after step {', '.join(f'{step:,}' for step in steps)}.")]


def _attempt_lines(attempt: Attempt) -> list[str]:
    """What became of each start of an attempt's ranks."""
    ended = attempt.rounds or ((attempt.whole,) if attempt.whole.end_s is not None else ())
    lines = []
    for ending in ended:
        at = minute(ending.end_s)
        step = f" Step {ending.step_end:,} was the newest that was saved." if ending.step_end is not None else ""
        lines.append(f"{at}, job {attempt.job}: {ending_words(ending)}.{step}")
    if attempt.whole.end_s is None:
        lines.append(f"{minute(attempt.whole.start_s)}, job {attempt.job}: started; its end was not written.")
    return lines


def checkpoints(facts: RunFacts) -> Block:
    rows = [(name, in_words_bytes(size), when) for name, size, when in facts.checkpoints]
    return Table(("committed step", "size", "when"), rows, right="1") if rows else Words("None on disk.")


def jobs(facts: RunFacts) -> Block:
    header = ("job", "attempt", "nodes", "ranks", "start", "lasted", "code", "why it ended")
    rows = []
    for attempt in facts.attempts:
        whole = attempt.whole
        lasted = None if whole.start_s is None or whole.end_s is None else whole.end_s - whole.start_s
        rows.append(
            (
                attempt.job,
                str(attempt.attempt),
                " ".join(attempt.nodes),
                str(attempt.ranks or "?"),
                minute(whole.start_s),
                "-" if lasted is None else in_words_s(lasted),
                "-" if whole.exit_code is None else str(whole.exit_code),
                whole.why or "?",
            )
        )
    return Table(header, rows, right="1356") if rows else Words("No job records: started without `launch`.")


def tags_read(facts: RunFacts) -> list[Block]:
    """Of another trainer's run: what became what, and what is left."""
    rows = [(theirs, ours) for theirs, ours in (facts.mapped or {}).items()]
    blocks: list[Block] = [Table(("their tag", "read as"), rows)]
    if facts.unknown:
        names = ", ".join(facts.unknown)
        blocks.append(
            Words(
                f"Not read: {names}. To read one: `--map theirs=ours`, such as `--map {facts.unknown[0]}=train/loss`."
            )
        )
    return blocks


def hours(seconds: float) -> str:
    """Rank time: rank-hours from one on, else as a time."""
    return f"{seconds / 3600:,.1f} rank-hours" if seconds >= 3600 else in_words_s(seconds)


def made_line(now: datetime | None = None) -> str:
    return f"Made {(now or datetime.now(UTC)).strftime('%Y-%m-%d %H:%M UTC')} by `python -m tools.report_run`."


def _mean(values: Sequence[float]) -> float:
    found = [value for value in values if math.isfinite(value)]
    return sum(found) / len(found) if found else math.nan
