"""What bounds a run and what to do about it, in words. In: `RunFacts`. Out: a headline and findings, worst first.

The limits above which something is said stand here, each with what it is a share of.
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from ii_dist.metrics import RankFigures
from ii_dist.metrics.goodput import Goodput, young_interval_s
from ii_dist.metrics.words import in_words_rate, in_words_s
from tools._report_words import plural, share_words
from tools._run_facts import RunFacts
from tools._run_jobs import IN_WORDS

INPUT_BOUND_SHARE, COMPUTE_BOUND_SHARE = 0.15, 0.05  # of the training time, waiting for data
EXCHANGE_SHARE = 0.15  # of a step, waiting for other ranks
STRAGGLER_SHARE = 0.03  # of a step, what one rank takes longer than the median in one phase
BUSY_CORES, IDLE_CORES = 0.85, 0.7  # of the node's cores
LOST_SHARE = {"start-up": 0.1, "restarts": 0.05, "saves": 0.02, "evaluation": 0.1, "lost steps": 0.02, "hang": 0.02}
ACCURACY_GAP = 0.5  # per cent of the evaluation images
OWN_PHASES = ("data_wait", "copy", "forward", "backward", "optimizer")
"""Phases in which a rank is slow by itself: in the others it waits for those."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that holds the others up."""

    rank: RankFigures
    phase: str
    excess_share: float
    """What it takes longer than the median of the ranks / a step."""


def verdict(facts: RunFacts) -> str:
    """One or two sentences: what bounds the run, and what to do about it."""
    share, rate = facts.data_wait_share, facts.images_per_s
    if math.isnan(share) or math.isnan(rate):
        if not math.isnan(rate):
            return f"**{in_words_rate(rate)}**; how long it waits for data was not written."
        return "Too short to judge: no throughput was written yet."
    waits = f"{share_words(share)} of the training time waits for data"
    if share < COMPUTE_BOUND_SHARE:
        exchange = exchange_share(facts)
        if exchange >= EXCHANGE_SHARE:
            return (
                f"**Bound by the exchange between ranks**: {share_words(exchange)} of a step waits for the gradients "
                f"of other ranks, {waits}. Fewer ranks (more images each), a faster network, or mending the slowest "
                "rank would help."
            )
        return f"**Compute bound**: {waits}; faster reading would gain next to nothing."
    most = (
        f"with the data always ready it would run at up to {in_words_rate(rate / (1 - share))} instead of {rate:,.0f}"
    )
    kind = "Nearly balanced" if share < INPUT_BOUND_SHARE else "Input bound"
    return f"**{kind}**: {waits}; {most}. {data_advice(facts)}"


def data_advice(facts: RunFacts) -> str:
    """What to try against waiting for data, with the settings as they are."""
    threads, cores = facts.setting("data.threads_per_rank"), facts.setting("launch.cpus_per_rank")
    now = "the node's cores over its ranks" if threads in (0, None) else str(threads)
    of_cores = f" of {cores} cores" if cores and threads else ""
    busy = facts.mean("machine/cpu_share")
    if busy >= BUSY_CORES:
        return (
            f"The node's cores are busy ({share_words(busy)}): smaller source images, `data.decode=gpu` or more cores "
            f"a rank (`launch.cpus_per_rank`) help, more threads do not (`data.threads_per_rank`, now {now}{of_cores})."
        )
    if busy < IDLE_CORES:  # never true of NaN
        return (
            f"The node's cores are idle ({share_words(busy)} busy): raise `data.threads_per_rank` (now {now}{of_cores})"
            " or `data.prefetch_batches`; if that changes nothing, storage is slow: try `data.stage_to`."
        )
    threads_now = f"`data.threads_per_rank` (now {now}{of_cores})"
    return f"Give it more cores or {threads_now}, smaller source images, or faster storage."


def findings(facts: RunFacts) -> list[str]:
    """What else is worth doing something about, largest loss first."""
    found = [*_time_findings(facts), *_rank_findings(facts), *_machine_findings(facts), *_result_findings(facts)]
    return [text for _, text in sorted(found, key=lambda item: -item[0])]


def exchange_share(facts: RunFacts) -> float:
    """Share of a step that waits for the gradients of other ranks; 0 where not written."""
    whole = sum(facts.phase_s.values())
    return facts.phase_s.get("allreduce", 0.0) / whole if whole else 0.0


def stragglers(facts: RunFacts) -> list[Straggler]:
    """In each phase the slowest rank, where it stands out; the worst first. Ranks step together, so the time of a step
    tells nothing: only what a rank does by itself."""
    found = []
    for phase in OWN_PHASES:
        timed = [rank for rank in facts.metrics.ranks if phase in rank.phase_s and rank.step_s > 0]
        if len(timed) < 2:
            continue
        slow = max(timed, key=lambda rank: rank.phase_s[phase])
        excess_s = slow.phase_s[phase] - statistics.median_low([rank.phase_s[phase] for rank in timed])
        if excess_s / slow.step_s >= STRAGGLER_SHARE:
            found.append(Straggler(slow, phase, excess_s / slow.step_s))
    if not found:
        found = _hungry(facts)
    return sorted(found, key=lambda straggler: -straggler.excess_share)


def _hungry(facts: RunFacts) -> list[Straggler]:
    """Of runs without phases: who waits for data much longer than the others."""
    timed = [rank for rank in facts.metrics.ranks if math.isfinite(rank.data_wait_share)]
    if len(timed) < 2 or any("data_wait" in rank.phase_s for rank in timed):
        return []
    slow = max(timed, key=lambda rank: rank.data_wait_share)
    excess = slow.data_wait_share - statistics.median_low([rank.data_wait_share for rank in timed])
    return [Straggler(slow, "data_wait", excess)] if excess > COMPUTE_BOUND_SHARE else []


def save_advice(facts: RunFacts, goodput: Goodput) -> str:
    """The interval between saves that loses the least, against the present one; "" where nothing is known of saves."""
    if not goodput.saves or not goodput.stall_s:
        return ""
    cost_s, between_s = goodput.stall_s / goodput.saves, goodput.wall_s / max(1, goodput.failures)
    best_s = young_interval_s(cost_s, between_s)
    said = (
        f"A save costs {in_words_s(cost_s)} of training; "
        + (f"a failure came every {in_words_s(between_s)}" if goodput.failures else "no failure was seen")
        + f". By Young's formula saves {in_words_s(best_s)} apart lose the least"
        + ("" if goodput.failures else f" if one failure came every {in_words_s(between_s)}, the length of this run")
    )
    now_s = save_interval_s(facts)
    if math.isnan(now_s):
        return said + "."
    same = 0.5 <= best_s / now_s <= 2
    return f"{said}; now they are {in_words_s(now_s)} apart{', which is near enough' if same else ''}."


def save_interval_s(facts: RunFacts) -> float:
    """Training time between two saves, as configured; NaN where not known."""
    every, step_s = facts.plan.get("save_every_steps") or [], facts.mean("time/step_s")
    return min(every) * step_s if every else math.nan


def _time_findings(facts: RunFacts) -> list[tuple[float, str]]:
    goodput = facts.goodput
    if goodput is None or not goodput.allocated:
        return []
    says = {
        "start-up": "went into starting: longer jobs, or a node-local copy of environment and data, make it count less",
        "restarts": f"went into starting again ({plural(len(facts.metrics.starts) - 1, 'restart')}): see why below",
        "saves": "stood still for saves: save less often (`checkpoint.every_steps`, `checkpoint.every_epochs`)",
        "evaluation": "was evaluation: evaluate less often (`train.eval_every_epochs`, now "
        f"{facts.setting('train.eval_every_epochs') or 1})",
        "lost steps": "was trained and lost to failures: save more often (`checkpoint.every_steps`)",
        "hang": "was silence until a rank was ended: lower `launch.hang_after_s`",
    }
    found = []
    for part, limit in LOST_SHARE.items():
        share = goodput.share_of(part)
        if share >= limit:
            advice = f" {save_advice(facts, goodput)}" if part in ("saves", "lost steps") else ""
            found.append((share, f"**{share_words(share)} of the allocated time** {says[part]}.{advice}"))
    failed = Counter(end.ended_as or "?" for a in facts.attempts for end in (a.rounds or (a.whole,)) if end.failed)
    if failed:
        words = ", ".join(f"{IN_WORDS.get(kind, kind)} ({count} x)" for kind, count in failed.most_common())
        found.append((0.0, f"**{plural(sum(failed.values()), 'failure')}**: {words}."))
    return found


def _rank_findings(facts: RunFacts) -> list[tuple[float, str]]:
    found = []
    for slow in stragglers(facts):
        rank = slow.rank
        found.append(
            (
                slow.excess_share,
                f"**Straggler**: rank {rank.rank} on {rank.host} takes {share_words(slow.excess_share)} of a step "
                f"longer in {slow.phase.replace('_', ' ')} than the median rank, and the others wait for it. Look at "
                "that node (clocks, other processes, its disk), or leave it out (`launch.exclude`).",
            )
        )
    return found


def _machine_findings(facts: RunFacts) -> list[tuple[float, str]]:
    found = []
    throttled = facts.mean("gpu/throttled_share")
    if throttled > 0.05:
        found.append((throttled, f"**GPUs are throttled** {share_words(throttled)} of the time: power or cooling."))
    errors = facts.metrics.last("gpu/ecc_errors")
    if errors:
        found.append((0.1, f"**{errors:.0f} uncorrected memory errors** on GPUs: have the node checked."))
    return found


def _result_findings(facts: RunFacts) -> list[tuple[float, str]]:
    found = []
    skipped = sum(facts.metrics.series("train/skipped_updates")[1])
    if skipped:
        found.append((0.05, f"**{skipped:.0f} updates were skipped** for a loss or gradient that was not finite."))
    top1, expected = facts.metrics.last("eval/top1"), facts.expected_top1
    if facts.is_done and top1 is not None and expected and top1 < expected - ACCURACY_GAP:
        gap = expected - top1
        found.append((gap / 100, f"**Top-1 is {gap:.2f} points below** the {expected:g} % that the recipe states."))
    return found
