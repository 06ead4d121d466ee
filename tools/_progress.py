"""Says on stderr how far long work has come, how fast it goes and how long it will take."""

import collections
import sys
import threading
import time

_WINDOW_S = 30.0  # the rate is that of the last half minute: what a resumed program skips must not count as speed


class Progress:
    """One line that counts; a new line every few seconds where stderr is not a terminal.

    unit, scale: what is counted, and how many of it make one, as in ("GB", 1e9).
    """

    def __init__(self, what: str, unit: str = "", scale: float = 1) -> None:
        self._what, self._unit, self._scale = what, unit, scale
        self._terminal = sys.stderr.isatty()
        self._pause_s = 0.2 if self._terminal else 5.0
        now_s = time.monotonic()
        self._next_s = now_s + self._pause_s
        self._seen: collections.deque[tuple[float, int]] = collections.deque([(now_s, 0)])
        self._lock = threading.Lock()
        self._added = 0
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s and not (done == total and self._shown):
            return
        self._next_s, self._shown = now_s + self._pause_s, True
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        end = "\n" if done == total or not self._terminal else "\x1b[K\r"
        print(self._line(done, total), file=sys.stderr, end=end, flush=True)

    def add(self, amount: int, total: int) -> None:
        """Count `amount` more; may be called from several threads."""
        with self._lock:
            self._added += amount
            self(self._added, total)

    def _line(self, done: int, total: int) -> str:
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        rate = (last - first) / max(last_s - first_s, 1e-9)
        text = f"{self._what}: {self._text(done)} of {self._text(total)}{self._unit and ' ' + self._unit}"
        if rate <= 0 or done >= total:
            return text
        return f"{text}, {self._text(rate)}{self._unit and ' ' + self._unit}/s, {_duration((total - done) / rate)} left"

    def _text(self, amount: float) -> str:
        return f"{amount / self._scale:,.0f}" if self._scale == 1 else f"{amount / self._scale:,.2f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
