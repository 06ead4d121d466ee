"""The checkpoint that the merge benchmark makes is a real one, and its floor does what the merge must do."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from benchmarks.merge import TENSORS, measure_here, raw, write_step
from ii_dist.checkpoint import verify_step


@pytest.mark.parametrize("shards", [1, 5])
def test_step_and_floor(shards: int, tmp_path: Path) -> None:
    step = write_step(tmp_path / "run", shards, 1 << 20)
    assert verify_step(step) == []
    out = tmp_path / "out.safetensors"
    found = measure_here("merge", step, out, 0)
    assert found["wall_s"] > 0
    assert len(load_file(out)) == TENSORS
    size = out.stat().st_size
    raw(step, tmp_path / "raw", size)
    assert (tmp_path / "raw").stat().st_size == size
    assert size > 1 << 20
