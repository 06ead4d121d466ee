"""The check of the nodes before training: what the ranks measured, which nodes stand out, in words.

In: `jobs/<job>/preflight.json`, rows of one rank each (`ii_dist.train.node_check` writes it). Out: lines for the
log, and the hosts that the next attempt shall avoid.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ii_dist.config import RunFolder
from launch.fields import JobFields
from launch.records import Facts, preflight_path
from launch.verdict import Ending

LIMIT_S = 55.0
SLOW_SHARE = 0.7
"""A node below this share of the median of all nodes stands out."""
CLOCK_S = 2.0
FREE_BYTES = 1 << 30
RATES = {
    "multiply_gflops": "matrix products, GFLOP/s a rank",
    "link_mb_per_s": "link to the neighbour nodes, MB/s",
    "read_mb_per_s": "reading training files, MB/s a rank",
    "decode_images_per_s": "decoding images a second a rank",
}


def fields(job: JobFields) -> JobFields:
    """The job with the limits of the check: whoever is silent for longer is named and ended."""
    return replace(job, watch=replace(job.watch, hang_after_s=LIMIT_S, start_timeout_s=LIMIT_S))


def command(job: JobFields, folder: RunFolder, name: str) -> tuple[str, ...]:
    path = preflight_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return (*job.check_command, str(folder.config), str(path))


def judge_file(folder: RunFolder, name: str, ending: Ending) -> tuple[list[str], list[str]]:
    """Lines to print, hosts to avoid. A check that did not end well says so, and names the host it failed on."""
    if ending.exit_code:
        hosts = [ending.failed_host] if ending.failed_host else []
        return [f"check of the nodes: not finished ({ending.why})"], hosts
    path = preflight_path(folder, name)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["ranks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"check of the nodes: {path} cannot be read ({error})"], []
    return judge(rows)


def judge(rows: Sequence[Facts]) -> tuple[list[str], list[str]]:
    """What is usual, and each node that is not. A rate needs three nodes: of two, neither is the usual one."""
    hosts = list(dict.fromkeys(str(row["host"]) for row in rows))
    lines, avoid = [f"check of the nodes: {len(hosts)} node(s), {len(rows)} rank(s)"], list[str]()
    for key, words in RATES.items():
        by_host = {host: _slowest(rows, host, key) for host in hosts}
        known = {host: rate for host, rate in by_host.items() if rate is not None}
        if not known:
            continue
        usual = statistics.median(known.values())
        lines.append(f"  {words}: {usual:.0f}")
        for host, rate in known.items():
            if len(known) > 2 and rate < SLOW_SHARE * usual:
                lines.append(f"  {host}: {rate:.0f} instead of {usual:.0f} ({words})")
                avoid.append(host)
    for host, words in _faults(rows):
        lines.append(f"  {host}: {words}")
        avoid.append(host)
    avoid = list(dict.fromkeys(avoid))
    if len(avoid) > len(hosts) // 2:  # a fault of most nodes (a full shared disk) is no node's
        avoid = []
    if avoid:
        lines.append(f"  the next attempt of this job avoids {', '.join(avoid)}")
    return lines, avoid


def _slowest(rows: Sequence[Facts], host: str, key: str) -> float | None:
    rates = [float(row[key]) for row in rows if row["host"] == host and row.get(key) is not None]
    return min(rates) if rates else None


def _faults(rows: Sequence[Facts]) -> list[tuple[str, str]]:
    """Clocks, disks and versions that differ from the others'."""
    found: list[tuple[str, str]] = []
    middle_s = statistics.median(float(row["clock_s"]) for row in rows)
    for row in rows:
        if abs(float(row["clock_s"]) - middle_s) > CLOCK_S:
            found.append((row["host"], f"its clock is {float(row['clock_s']) - middle_s:+.1f} s off"))
        for place, free in dict(row["free_bytes"]).items():
            if free < FREE_BYTES:
                found.append((row["host"], f"{free / 1e6:.0f} MB free in {place}"))
    for name in sorted({name for row in rows for name in row["versions"]}):
        usual = Counter(str(row["versions"].get(name)) for row in rows).most_common(1)[0][0]
        for row in rows:
            if (here := str(row["versions"].get(name))) != usual:
                found.append((row["host"], f"{name} is {here}, elsewhere {usual}"))
    return list(dict.fromkeys(found))
