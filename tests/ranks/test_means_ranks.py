"""Means over real ranks: one all-reduce gives every rank the same numbers, weighted by images."""

import json
import textwrap
from pathlib import Path

import pytest

from tests.ranks.start import run_ranks

pytestmark = pytest.mark.ranks

SCRIPT = """
import json, math, os, sys, torch, torch.distributed as dist
from pathlib import Path
from ii_dist.metrics.means import RunningMeans

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
means, calls = RunningMeans("cpu"), []
plain = dist.all_reduce
dist.all_reduce = lambda *a, **k: (calls.append(1), plain(*a, **k))[1]
for step in range(4):
    skipped = float(step == 2)  # agreed: on both ranks
    loss = math.nan if skipped and rank else 8.0 * (rank + 1)
    values = {"loss": loss, "images": 4.0 + 4.0 * rank, "top1": float(rank), "top5": 4.0,
              "grad_norm": 1.0 + step, "skipped": skipped, "skipped_in_row": skipped}
    means.add({name: torch.tensor(value) for name, value in values.items()})
read = means.read(reduce=True)
means.add({name: torch.tensor(float(rank)) for name in values} | {"skipped": torch.tensor(0.0)})
alone = means.read()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps({"read": read, "calls": len(calls), "alone": alone["loss"]}))
dist.destroy_process_group()
"""


def test_ranks_read_the_same_weighted_means(tmp_path: Path) -> None:
    script = tmp_path / "means.py"
    script.write_text(textwrap.dedent(SCRIPT))
    assert run_ranks([str(script), str(tmp_path)], 2, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["read"] == second["read"]
    assert (first["calls"], second["calls"]) == (1, 1)
    assert second["alone"] == 1.0  # without reduce: this rank only, and no second all-reduce
    read = first["read"]
    assert read["images"] == 3 * (4 + 8)  # the skipped step counts on no rank
    assert read["loss"] == 3 * (8 + 16) / 36
    assert read["top1"] == pytest.approx(100 * 3 / 36)
    assert read["grad_norm"] == (1 + 2 + 4) / 3
    assert (read["skipped"], read["skipped_in_row"], read["steps"]) == (1.0, 1.0, 4.0)
