"""Fast reading against a slow oracle: Python's json, one dictionary a step, the last value wins."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ii_dist.config import RunFolder
from ii_dist.metrics import TAGS, Start, read_run
from ii_dist.metrics.columns import _decoder, read_columns
from ii_dist.metrics.read import read_rank_metrics

SHAPES = [
    ("train/loss", "time/step_s", "train/epoch"),
    ("train/loss", "time/step_s", "throughput/images_per_s_rank", "time/step_p99_s"),
    ("eval/top1", "eval/seconds"),
    ("of another version", "train/loss"),
    ('caf\u00e9 "x"/\\', "checkpoint/bytes"),
    (),
]
NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 1),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -0.0, 5e-324, 2.2250738585072011e-308, 1.7976931348623157e308, 1e22, 9007199254740993, 0.1]),
)
ODD = st.one_of(
    st.sampled_from(["NaN", "Infinity", "-Infinity", "null", "true", '"words"', "[1, 2]", '{"a": 1}', "1E5", "1e400"]),
    st.just("1" + "0" * 320),
)
VALUES = st.one_of(NUMBERS.map(json.dumps), NUMBERS.map(json.dumps), ODD)
STEPS = st.integers(0, 6)


@st.composite
def rows(draw: st.DrawFn) -> bytes:
    tags = draw(st.sampled_from(SHAPES))
    values = draw(st.lists(VALUES if draw(st.integers(0, 3)) == 0 else NUMBERS.map(json.dumps), min_size=9, max_size=9))
    step = draw(
        st.one_of(STEPS.map(str), STEPS.map(str), STEPS.map(str), st.sampled_from(["1.5", '"1"', "null", "2.0"]))
    )
    parts = [f'"step": {step}', f'"time": {draw(NUMBERS.map(json.dumps))}']
    parts += [f"{json.dumps(tag)}: {value}" for tag, value in zip(tags, values, strict=False)]
    if draw(st.integers(0, 9)) == 0:
        parts.append(parts[-1])  # a key twice
    if draw(st.integers(0, 9)) == 0:
        parts.reverse()
    return ("{" + ", ".join(parts) + "}").encode()


@st.composite
def starts(draw: st.DrawFn) -> bytes:
    facts = {"rank": 0, "world_size": draw(st.integers(1, 4)), "host": draw(st.sampled_from(["a", "b"]))}
    return json.dumps({"step": draw(STEPS), "time": draw(st.floats(0, 9)), "event": "start", **facts}).encode()


TORN = rows().flatmap(lambda line: st.integers(0, len(line)).map(lambda cut: line[:cut]))
JUNK = st.sampled_from(
    [b"", b"\0\0\0", b"[1]", b"5", b'{"time": 1.0}', b"\xff\xfe{", b'{"step": 3, "event": "x"}', b" "]
)
FILES = st.builds(
    lambda lines, tail: b"".join(line + b"\n" for line in lines) + tail,
    st.lists(st.one_of(rows(), rows(), rows(), starts(), TORN, JUNK), max_size=25),
    st.one_of(st.just(b""), TORN.filter(lambda line: b"\n" not in line)),
)
Oracle = tuple[dict[int, dict[str, float]], dict[int, float], list[tuple[Any, ...]]]


def slow(content: bytes) -> Oracle:
    """Values by step and tag, the time of each step's first line, and the starts."""
    found: list[dict[str, Any]] = []
    for line in content.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found = [earlier for earlier in found if earlier["step"] <= row["step"]] + [row]
    values: dict[int, dict[str, float]] = {}
    times: dict[int, float] = {}
    begun = []
    for row in found:
        if "event" in row:
            if row["event"] == "start":
                begun.append((row["step"], row["time"], row["world_size"], row["host"]))
            continue
        times.setdefault(row["step"], number(row.get("time")))
        mine = values.setdefault(row["step"], {})
        mine.update({tag: number(value) for tag, value in row.items() if tag not in ("step", "time")})
    return values, times, begun


def number(value: Any) -> float:
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def same(a: dict[str, float], b: dict[str, float]) -> bool:
    return a.keys() == b.keys() and all(a[k] == b[k] or (math.isnan(a[k]) and math.isnan(b[k])) for k in a)


@settings(max_examples=100, deadline=None)
@given(content=FILES)
@example(content=b'{"step": 1, "time": 1.0, "a": 1}\n{"step": 1, "time": 1.0, "a": 1, "event": 2}\n')
@example(content=b'{"step": 3,\n"time": 1.0}\n{"step": 4, "time": 1.0}{"step": 5, "time": 1.0}\n')
@example(content=b'{"step": 4, "time": 1.0}{"step": 5, "time": 1.0}\n')
@example(content=b'{"step": 4, "time": 1.0} \n\n  {"step": 5, "time": 2.0}\n')
@example(content=b'{"step": 9, "a": 1.0}\n{"step": 9, "a": 2.0}\n{"step": 3, "a": null}\n')
def test_a_file_reads_as_json_would(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "rank_00000.jsonl"
    path.write_bytes(content)
    values, times, begun = slow(content)
    read = read_rank_metrics(path)
    assert [row.step for row in read] == sorted(values)
    for row in read:
        assert same(row.values, values[row.step])
        assert row.time_s == times[row.step] or math.isnan(times[row.step])
    found = [(s.step, s.time_s, s.world_size, s.host) for s in read_columns(path).starts]
    assert found == begun


def combined(contents: list[bytes]) -> dict[int, dict[str, float]]:
    """What a slow loop makes of several ranks' files."""
    rows: dict[int, dict[str, float]] = {}
    seen: dict[tuple[int, str], int] = {}
    for content in contents:
        for step, tags in slow(content)[0].items():
            row = rows.setdefault(step, {})
            for tag, value in tags.items():
                if tag not in TAGS:
                    continue
                count = seen[step, tag] = seen.get((step, tag), 0) + 1
                old, how = row.get(tag), TAGS[tag].combine
                if old is None:
                    row[tag] = value
                elif how == "sum":
                    row[tag] = old + value
                elif how == "max":
                    row[tag] = value if value > old else old
                elif how == "mean":
                    row[tag] = old + (value - old) / count
    return rows


def check_run(root: Path, contents: list[bytes]) -> None:
    folder = RunFolder(root)
    folder.metrics.mkdir()
    for rank, content in enumerate(contents):
        folder.rank_metrics(rank).write_bytes(content)
    read, expected = read_run(folder).rows, combined(contents)
    assert [row.step for row in read] == sorted(expected)
    for row in read:
        assert same(row.values, expected[row.step]), row.step
    times = {step: time_s for content in reversed(contents) for step, time_s in slow(content)[1].items()}
    assert all(row.time_s == times[row.step] or math.isnan(times[row.step]) for row in read)


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(FILES, min_size=2, max_size=4))
def test_any_files_combine_as_slowly(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    check_run(tmp_path_factory.mktemp("run"), contents)


@pytest.mark.parametrize("seed", range(24))
def test_files_as_runs_leave_them_combine_as_a_slow_loop_would(tmp_path: Path, seed: int) -> None:
    """Training and evaluation, attempts that go back, now and then a null, a torn line, a rank that differs."""
    draw = random.Random(seed)
    attempts, first = [], 0
    for _ in range(draw.randint(1, 3)):
        attempts.append((first, last := first + draw.randint(1, 12)))
        first = draw.randint(0, last)
    contents = [ranks_file(draw, rank, attempts, odd=seed % 3) for rank in range(draw.randint(2, 5))]
    check_run(tmp_path, contents)


def ranks_file(draw: random.Random, rank: int, attempts: list[tuple[int, int]], odd: int) -> bytes:
    """odd: 0 = all ranks write the same tags at the same steps, 1 = rank 0 writes more, 2 = anything may be missing."""
    train = ["train/loss", "time/step_s", "throughput/images_per_s_rank", "time/step_p99_s", "train/learning_rate"]
    lines = []
    for first, last in attempts:
        start = {"step": first, "time": draw.random(), "event": "start", "rank": rank, "world_size": 2, "host": "h"}
        lines.append(json.dumps(start))
        for step in range(first + 1, last + 1):
            tags = [*train, "checkpoint/bytes"] if odd and rank == 0 and step % 3 == 0 else list(train)
            if odd == 2:
                tags = [tag for tag in tags if draw.random() < 0.9]
            values = {tag: None if odd and draw.random() < 0.03 else draw.uniform(-5, 500) for tag in tags}
            lines.append(json.dumps({"step": step, "time": draw.random(), **values}))
            if step % 4 == 0:  # evaluated, and once more in the same step
                for _ in range(2):
                    evaluated = {"eval/seconds": draw.random(), "eval/top1": draw.random()}
                    lines.append(json.dumps({"step": step, "time": 9.0, **evaluated}))
            if odd == 2 and draw.random() < 0.05:
                lines.append(lines[-1][: draw.randint(0, 30)])
    return "\n".join([*lines, "" if draw.random() < 0.5 else '{"step": 3, "ti']).encode()


def test_without_msgspec_the_same_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": s, "time": s / 7, "train/loss": s / 3, "eval/top1": None if s % 5 else 7} for s in range(40)]
    path = tmp_path / "rank_00000.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fast = [(row.step, row.time_s, row.values["train/loss"]) for row in read_rank_metrics(path)]
    monkeypatch.setitem(sys.modules, "msgspec", None)
    _decoder.cache_clear()
    try:
        assert [(row.step, row.time_s, row.values["train/loss"]) for row in read_rank_metrics(path)] == fast
    finally:
        _decoder.cache_clear()
    assert fast == [(s, s / 7, s / 3) for s in range(40)]


def test_more_shapes_than_decoders(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    lines = [{"step": s, "time": 0.0, f"tag {s % 40}": s / 3} for s in range(120)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row.values for row in read_rank_metrics(path)] == [{f"tag {s % 40}": s / 3} for s in range(120)]


def test_a_start_is_told_with_its_host(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    path.write_text('{"step": 4, "time": 2.5, "event": "start", "rank": 3, "world_size": 8, "host": "node7"}\n')
    assert read_columns(path).starts == [Start(4, 2.5, 3, 8, "node7")]
