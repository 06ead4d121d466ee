"""Work ahead in threads: in order, bounded, and an error never becomes an endless wait."""

import subprocess
import sys
import threading
import time

import pytest

from ii_dist.data.ahead import Ahead, Chunks


def test_items_come_in_order_and_at_most_depth_ahead() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    ahead = Ahead(make, 5, depth=3)
    time.sleep(0.05)
    assert made == [5, 6, 7]
    assert [ahead.next() for _ in range(10)] == list(range(5, 15))
    time.sleep(0.05)
    assert made == list(range(5, 18))
    ahead.close()


def test_an_error_comes_after_the_items_before_it_and_stays() -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("disk")
        return number

    ahead = Ahead(make, 0, depth=4)
    assert [ahead.next(), ahead.next()] == [0, 1]
    for _ in range(3):
        with pytest.raises(OSError, match="disk"):
            ahead.next()
    ahead.close()


def test_close_ends_the_thread_also_while_it_waits_for_room() -> None:
    before = threading.active_count()
    ahead = Ahead(lambda number: number, 0, depth=1)
    time.sleep(0.02)
    ahead.close()
    assert threading.active_count() == before


def test_a_process_that_leaves_waits_for_the_item_in_the_making_and_no_more() -> None:
    code = (
        "import threading, time; from ii_dist.data.ahead import Ahead\n"
        "begun = threading.Event()\n"
        "def make(n): begun.set(); time.sleep(0.3); print('made', n, flush=True)\n"
        "ahead = Ahead(make, 0, depth=9); begun.wait(); raise SystemExit(3)"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (left.returncode, left.stdout, left.stderr) == (3, "made 0\n", "")


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_chunks_do_every_part_once(threads: int, count: int) -> None:
    chunks, done = Chunks(threads), [0] * count

    def job(i: int) -> None:
        done[i] += 1

    chunks.each(job, count)
    chunks.close()
    assert done == [1] * count


def test_slow_parts_are_shared_out_and_quick_ones_are_not() -> None:
    for quick_s, threads_used in ((1.0, 1), (0.0, 4)):
        chunks, seen = Chunks(3, quick_s), set[int]()
        meeting = threading.Barrier(3, timeout=20)

        def job(i: int, seen: set[int] = seen, quick_s: float = quick_s, meeting: threading.Barrier = meeting) -> None:
            seen.add(threading.get_ident())
            if not quick_s and i:
                meeting.wait()  # all three at once, or never

        chunks.each(job, 4)
        chunks.close()
        assert len(seen) == threads_used


def test_an_error_in_a_chunk_is_raised() -> None:
    chunks = Chunks(3)

    def job(i: int) -> None:
        if i == 4:
            raise ValueError("four")

    with pytest.raises(ValueError, match="four"):
        chunks.each(job, 6)
    chunks.close()
