"""timm can be imported, on machines with and without CUDA."""

import subprocess
import sys

import pytest

from ii_dist.config.errors import ClusterError
from ii_dist.models.compat import ensure_torchvision


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_a_fresh_process_gets_torchvision_and_timm() -> None:
    code = "import ii_dist.models, torchvision.transforms, timm; print(timm.create_model('resnet18').num_classes)"
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1000"


def test_a_second_call_changes_nothing() -> None:
    before = sys.modules["torchvision"]
    ensure_torchvision()
    assert sys.modules["torchvision"] is before


def test_a_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ClusterError, match="torchvision is missing: pip install torchvision=="):
        ensure_torchvision()
