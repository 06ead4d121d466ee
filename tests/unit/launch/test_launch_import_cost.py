"""What a rank imports before its first step."""

import resource
import subprocess
import sys

from tests.unit.launch.cases import ROOT

TORCH_AT_WORK = "import torch; torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)"
"""torch as any training has it: making an optimizer imports another part of torch, as large as the first."""


def cpu_s(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_rank_imports_little_more_than_torch_at_work() -> None:
    """Best of two, in turns, so that a machine whose speed drifts treats both alike."""
    pairs = [(cpu_s(TORCH_AT_WORK), cpu_s("import ii_dist.train.commands")) for _ in range(2)]
    torch_s, ours_s = (min(times) for times in zip(*pairs, strict=True))
    assert ours_s <= 1.5 * torch_s, f"{ours_s:.2f} s against {torch_s:.2f} s"
