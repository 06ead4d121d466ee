"""A report for programs. In: facts of runs. Out: JSON (figures, goodput, ranks, verdict) and CSV (every step)."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from tools._report_verdict import findings, save_interval_s, stragglers, verdict
from tools._run_facts import RunFacts


def to_json(runs: Sequence[RunFacts]) -> str:
    return json.dumps({"runs": [_of_run(facts) for facts in runs]}, indent=1, allow_nan=False)


def to_csv(runs: Sequence[RunFacts]) -> str:
    """A line a step and run: run, step, Unix time, running time, then a column a tag; "" where not written."""
    tags = sorted({tag for facts in runs for row in facts.metrics.rows for tag in row.values})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "step", "time", "running_s", *tags])
    for facts in runs:
        for row, elapsed_s in zip(facts.metrics.rows, facts.elapsed_s, strict=True):
            values = ("" if tag not in row.values else repr(row.values[tag]) for tag in tags)
            writer.writerow([_cell(facts.name), row.step, row.time_s, round(elapsed_s, 3), *values])
    return out.getvalue()


def _cell(text: str) -> str:
    """A name that a spreadsheet would take for a formula is quoted."""
    return f"'{text}" if text[:1] in "=+-@\t\r" else text


def _of_run(facts: RunFacts) -> Any:
    last, found = facts.metrics.last, facts.goodput
    best = facts.metrics.series("eval/top1")[1]
    return _finite(
        {
            "name": facts.name,
            "ranks": facts.ranks,
            "last_step": facts.last_step,
            "total_steps": facts.plan.get("total_steps"),
            "done": facts.is_done,
            "top1": last("eval/top1"),
            "best_top1": max(best, default=None),
            "top5": last("eval/top5"),
            "expected_top1": facts.expected_top1,
            "eval_loss": last("eval/loss"),
            "train_loss": last("train/loss"),
            "images_per_s": facts.images_per_s,
            "cold_images_per_s": facts.cold_images_per_s,
            "data_wait_share": facts.data_wait_share,
            "phase_s": facts.phase_s,
            "running_s": facts.running_s,
            "queue_s": facts.queue_s,
            "restarts": len(facts.restart_steps()),
            "goodput": None
            if found is None
            else {
                "share": found.share,
                "allocated_rank_s": found.allocated,
                "parts_rank_s": found.parts,
                "failures": found.failures,
                "saves": found.saves,
                "lost_steps": found.lost_steps,
                "save_interval_s": save_interval_s(facts),
            },
            "per_rank": [dataclasses.asdict(rank) for rank in facts.metrics.ranks],
            "stragglers": [
                {"rank": s.rank.rank, "host": s.rank.host, "phase": s.phase, "excess_share": s.excess_share}
                for s in stragglers(facts)
            ],
            "verdict": [verdict(facts), *findings(facts)],
            "read_as": facts.mapped,
            "unknown_tags": list(facts.unknown),
        }
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
