"""Makes numbered items in order, a few ahead of their use, in threads.

Threads, not processes: reading, decoding and resizing all release the interpreter lock, nothing is copied between
processes, signals reach only the main thread, and no worker can outlive its rank.
"""

import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
QUICK_S = 2e-4


class Ahead(Generic[Item]):
    """Calls ``make(first)``, ``make(first + 1)``, ... in one thread of its own, at most `depth` items ahead."""

    def __init__(self, make: Callable[[int], Item], first: int, depth: int) -> None:
        self._make, self._first = make, first
        self._free_places = threading.Semaphore(depth)
        self._made: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        self._closed = False
        # A daemon: an error in the main thread ends the process without waiting for a `close` that never comes. But
        # native code that meets an interpreter in pieces aborts the process, so the item in the making is waited for.
        self._thread = threading.Thread(target=self._run, name="data-ahead", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    def next(self) -> Item:
        """The next item, in order. What `make` raised is raised here, and again by every later call."""
        item = self._made.get()
        if isinstance(item, BaseException):
            self._made.put(item)
            raise item
        self._free_places.release()
        return item

    def close(self) -> None:
        """Stop after the item in the making and wait for that."""
        atexit.unregister(self.close)
        self._closed = True
        self._free_places.release()
        self._thread.join()

    def _run(self) -> None:
        number = self._first
        while True:
            self._free_places.acquire()
            if self._closed:
                return
            try:
                self._made.put(self._make(number))
            except BaseException as error:  # the border of this thread: `next` raises it in the thread that waits
                self._made.put(error)
                return
            number += 1


class Chunks:
    """Does a job for 0 .. count-1; returns when all are done.

    One after the other while they are quick (a file in the page cache is read in less time than a thread is woken);
    as soon as they turn out to take more than `quick_s` each, the rest in equal runs, one a thread.
    """

    def __init__(self, threads: int, quick_s: float = QUICK_S) -> None:
        self._threads, self._quick_s = threads, quick_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="data-read") if threads > 1 else None

    def each(self, job: Callable[[int], None], count: int) -> None:
        start_s = time.monotonic()
        for i in range(count):
            job(i)
            if self._pool and time.monotonic() - start_s > self._quick_s * (i + 1):
                self._share(job, range(i + 1, count))
                return

    def _share(self, job: Callable[[int], None], rest: range) -> None:
        assert self._pool is not None
        runs = [
            rest[len(rest) * i // self._threads : len(rest) * (i + 1) // self._threads] for i in range(self._threads)
        ]
        for done in [self._pool.submit(_run_through, job, run) for run in runs if run]:
            done.result()

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _run_through(job: Callable[[int], None], run: Sequence[int]) -> None:
    for i in run:
        job(i)
