"""The sections of a report that compare several runs. In: facts of runs. Out: sections."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ii_dist.metrics.words import in_words_s, in_words_share
from tools._report_page import Block, Picture, Section, Table, Words
from tools._report_words import per_cent, rate_words, share_words
from tools._run_facts import RunFacts

NOT_COMPARED = ("name", "runs_folder")
MOST_DIFFERENCES = 60


def compare_sections(runs: Sequence[RunFacts], pictures: Mapping[str, Picture]) -> list[Section]:
    """Figures side by side, scaling, differences of the configs, curves on top of each other."""
    sections = [
        Section("Runs side by side", [comparison(runs)]),
        Section("Scaling", scaling(runs, pictures)),
        Section("Settings that differ", differences(runs)),
        Section("Curves", [pictures[name] for name in ("loss", "top1", "learning_rate") if name in pictures]),
        Section("Throughput", [pictures[name] for name in ("rate", "wait", "phases_of_runs") if name in pictures]),
    ]
    return [section for section in sections if section.blocks]


def comparison(runs: Sequence[RunFacts]) -> Block:
    rows = []
    for facts in runs:
        best = facts.metrics.series("eval/top1")[1]
        network = f"{facts.setting('model.network')}, {facts.setting('model.gate')}"
        rows.append(
            (
                facts.name,
                "another trainer" if facts.mapped is not None else network,
                str(facts.ranks or "?"),
                per_cent(best[-1] if best else None),
                per_cent(max(best, default=None)),
                rate_words(facts.images_per_s),
                share_words(facts.data_wait_share),
                share_words(facts.goodput.share if facts.goodput else math.nan),
                in_words_s(facts.running_s),
            )
        )
    header = (
        "run",
        "network, gate",
        "ranks",
        "top-1",
        "best top-1",
        "images/s",
        "data wait",
        "goodput",
        "running time",
    )
    return Table(header, rows, right="2345678")


def scaling(runs: Sequence[RunFacts], pictures: Mapping[str, Picture]) -> list[Block]:
    """Images/s a rank against the smallest run."""
    known = [(facts.ranks, facts) for facts in runs if facts.ranks and facts.images_per_s > 0]
    known.sort(key=lambda item: item[0])
    if len({ranks for ranks, _ in known}) < 2:
        return []
    fewest, smallest = known[0]
    base = smallest.images_per_s / fewest
    rows = [
        (
            facts.name,
            str(ranks),
            rate_words(facts.images_per_s),
            rate_words(facts.images_per_s / ranks),
            f"{facts.images_per_s / smallest.images_per_s:.2f} of {ranks / fewest:g}",
            in_words_share(facts.images_per_s / ranks / base),
        )
        for ranks, facts in known
    ]
    header = ("run", "ranks", "images/s", "a rank", "speed-up", "efficiency")
    blocks: list[Block] = [
        Words(f"Against the smallest run, {smallest.name} on {fewest}."),
        Table(header, rows, right="12345"),
    ]
    return [*blocks, pictures["scaling"]] if "scaling" in pictures else blocks


def differences(runs: Sequence[RunFacts]) -> list[Block]:
    """Each setting that is not the same in all runs of ours."""
    ours = [facts for facts in runs if facts.config]
    if len(ours) < 2:
        return []
    flat = [_flat(facts.config) for facts in ours]
    keys = dict.fromkeys(key for each in flat for key in each)
    differ = [key for key in keys if key not in NOT_COMPARED and len({repr(each.get(key)) for each in flat}) > 1]
    if not differ:
        return [Words("None: the same settings, up to the name.")]
    rows = [(key, *(_shown(each.get(key)) for each in flat)) for key in differ[:MOST_DIFFERENCES]]
    blocks: list[Block] = [Table(("setting", *(facts.name for facts in ours)), rows)]
    if len(differ) > len(rows):
        blocks.append(Words(f"And {len(differ) - len(rows)} more."))
    return blocks


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
