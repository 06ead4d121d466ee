"""The line that long work prints: what is done, how fast now, and how long it will still take."""

import time

import pytest

from tools._progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("images")
    progress(10, 100_000)  # quick work says nothing
    for _ in range(10):
        clock[0] += 6
        progress(int((clock[0] - 100) * 50), 100_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "images: 3,000 of 100,000, 50/s, 32 min left"
    progress(100_000, 100_000)
    assert capsys.readouterr().err == "images: 100,000 of 100,000\n"


def test_what_is_skipped_after_a_restart_does_not_count_as_speed_for_long(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("archive", "GB", 1e9)
    progress.add(50_000_000_000, 138_000_000_000)
    for _ in range(10):
        clock[0] += 6
        progress.add(600_000_000, 138_000_000_000)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "archive: 56.00 of 138.00 GB, 0.10 GB/s, 14 min left"
