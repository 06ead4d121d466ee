"""Ranks with unlike memory agree on the micro-batch that fits the least of them, and all remember it."""

import json
from pathlib import Path

import pytest

from tests.ranks.start import run_ranks

pytestmark = pytest.mark.ranks
PROGRAM = """
import json, os, sys, torch
from pathlib import Path
from ii_dist.config import RunFolder
from ii_dist.runtime import World
from ii_dist.runtime.group import close_group, open_group
from ii_dist.train import fitting
from tests.unit.train.test_fitting import CPU, config, plan_of

world, folder = World.from_environ(os.environ), Path(sys.argv[1])
open_group(world, CPU, timeout_s=60)
least = {0: 24, 1: 6}[world.rank]
fitting._count_on_cpu = lambda cfg, plan: least
found = [fitting.fitting_plan(config(), plan_of(config(), 2), world, CPU, RunFolder(folder))]
if world.rank == 1:  # what another node would remember does not count
    fitting._remembered = lambda path, fits: 24
found.append(fitting.fitting_plan(config(), plan_of(config(), 2), world, CPU, RunFolder(folder)))
close_group()
(folder / f"{world.rank}.json").write_text(json.dumps([(p.micro_batch, p.accumulate_steps, p.fits) for p in found]))
"""


def test_all_ranks_take_the_least(tmp_path: Path) -> None:
    assert run_ranks(["-c", PROGRAM, str(tmp_path)], 2, tmp_path / "out") == [0, 0]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert [(micro, parts) for micro, parts, _ in one] == [(6, 4), (6, 4)]
    assert one[0][2].startswith("CPU, settings ")
