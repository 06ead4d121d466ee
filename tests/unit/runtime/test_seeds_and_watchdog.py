"""Step-wise seeds are pure; the watchdog ends a rank that hangs, and only such a one."""

import subprocess
import sys
import time

import torch

from ii_dist.runtime.seeds import mix, seed_step

CPU = torch.device("cpu")


def draw(seed: int, step: int, rank: int) -> list[float]:
    seed_step(seed, step, rank, CPU)
    numbers: list[float] = torch.rand(4).tolist()
    return numbers


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    first = draw(1, 7, 0)
    torch.rand(1000)
    assert draw(1, 7, 0) == first


def test_seed_step_and_rank_all_matter() -> None:
    drawn = [tuple(draw(*key)) for key in ((1, 7, 0), (2, 7, 0), (1, 8, 0), (1, 7, 1), (7, 1, 0), (0, 7, 1))]
    assert len(set(drawn)) == len(drawn)


def test_mix_never_changes() -> None:
    # A checkpoint relies on it: the same numbers in every version and on every machine.
    assert [mix(0), mix(1), mix(0, 1), mix(2**63, 5)] == [
        16294208416658607535,
        10451216379200822465,
        3069472533636442495,
        4690409342598643007,
    ]


HANG = """
import sys, time
from ii_dist.runtime import Watchdog
dog = Watchdog(0.5, sys.stderr)
dog.beat()
def stuck_in_here():
    time.sleep(60)
stuck_in_here()
"""
BUSY = """
import sys, time
from ii_dist.runtime import Watchdog
dog = Watchdog(0.5, sys.stderr)
for _ in range(30):
    dog.beat()
    time.sleep(0.1)
dog.close()
time.sleep(2)
print("alive")
"""


def test_a_hang_is_ended_with_its_stack() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "stuck_in_here" in done.stderr
    assert time.monotonic() - start < 20


def test_steps_keep_the_watchdog_quiet() -> None:
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
