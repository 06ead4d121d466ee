"""The comparison with peers: what its ratios mean, that it counts workers, that all sides do the same; and a run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.peers_images import CLASSES, arrange
from benchmarks.peers_sides import SIDES, OurSide, ReferenceSide, TimmSide, Work
from benchmarks.peers_usage import cpu_s, family, memory_bytes
from ii_dist.data import Index
from tests.images import make_image_folder

ROOT = Path(__file__).resolve().parents[3]
SPIN = "import time\nwhile time.process_time() < {}: pass\nprint(flush=True)\ninput()"


def _turn(cpu_s: float, wall_s: float, loss: float = 1.0) -> dict[str, float]:
    return {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "wait_share": 0.25,
        "loss": loss,
        "memory_bytes": 2e9,
        "gpu_memory_bytes": 0,
    }


def test_a_ratio_above_one_means_that_ii_dist_is_the_faster_one() -> None:
    found = peers.figures_of(
        {
            "timm": [_turn(0.02, 0.03), _turn(0.04, 0.06, loss=0.5)],
            "timm_twin": [_turn(0.02, 0.03), _turn(0.04, 0.03)],
            "ours": [_turn(0.01, 0.03), _turn(0.02, 0.02)],
        }
    )
    assert set(found["ratios"]) == {"ours / timm", "timm_twin / timm"}
    assert found["ratios"]["ours / timm"] == pytest.approx({"cpu": 2.0, "wall": 2.0})
    assert found["ratios"]["timm_twin / timm"] == pytest.approx({"cpu": 1.0, "wall": 1.5})
    assert found["sides"]["ours"]["images_per_cpu_s"] == pytest.approx(1 / 0.015)
    assert (found["sides"]["timm"]["first_loss"], found["sides"]["timm"]["loss"]) == (1.0, 0.5)
    work = {"network": "resnet18", "side": 64, "batch": 32, "workers": 1, "device": "cpu"}
    text = peers.to_markdown(found, work, 300)
    assert "resnet18, 64 px, batch 32, 300 steps of each side" in text
    assert "| ours / timm | 2.000 | 2.000 | >= 1.0 |" in text
    assert "| ii_dist, DALI | 66.7 | 40.0 | 25.0% | 2.00 GB | - | 1.000, 1.000 |" in text


def test_cpu_time_and_memory_count_workers_alive_and_ended() -> None:
    before_s = cpu_s()
    child = subprocess.Popen(
        [sys.executable, "-c", SPIN.format(0.3)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout
    child.stdout.readline()
    alive_s = cpu_s() - before_s
    assert family() == [os.getpid(), child.pid]
    with_child = memory_bytes()
    child.communicate("\n")
    ended_s = cpu_s() - before_s
    assert 0.28 <= alive_s <= ended_s <= alive_s + 0.3
    assert with_child - memory_bytes() > 1e6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("jpegs"), 2, 16)


@pytest.fixture
def work(images: Path, tmp_path: Path) -> Work:
    arrange(images, tmp_path / "set", 32, 1)
    return Work(tmp_path / "set", "resnet18", 32, 4, 20, len(CLASSES), 1, "cpu")


def test_images_are_sorted_by_colour_and_linked_often(images: Path, tmp_path: Path) -> None:
    arrange(images, tmp_path, images=24, copies=3)
    index = Index.open(tmp_path / "train.index")
    assert len(index) == 72
    assert list(index.classes) == sorted(CLASSES)
    assert len(list((tmp_path / "train" / "even").iterdir())) == 3 * 6
    assert len({path.resolve() for path in (tmp_path / "train").rglob("*.jpg")}) == 24
    assert (tmp_path / "val.index").read_bytes() == (tmp_path / "train.index").read_bytes()


@pytest.fixture
def as_before() -> Iterator[None]:
    """Sides set the process's threads and random state."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_before")
def test_all_sides_start_from_the_same_weights_and_train(work: Work) -> None:
    starts, ends = [], []
    for name in ("timm", "reference", "ours", "ours_torch"):
        side = SIDES[name](work)
        starts.append(_weights(side))
        turn = side.train(2)
        ends.append(_weights(side))
        assert 0 < turn.loss < 20
        assert 0 <= turn.wait_s < 60
        side.close()
    names = starts[0].keys()
    assert all(start.keys() == names for start in starts)
    for key in names:
        for other in starts[1:]:
            assert torch.equal(starts[0][key], other[key]), key
    moved = ["conv1.weight", "layer4.1.bn2.bias", "fc.bias"]
    assert all(not torch.equal(start[key], end[key]) for start, end in zip(starts, ends, strict=True) for key in moved)
    # Both of ours see the same images in the same order: what differs is how they are decoded.
    assert torch.allclose(ends[2]["fc.bias"], ends[3]["fc.bias"], atol=0.02)


def _weights(side: object) -> dict[str, torch.Tensor]:
    if isinstance(side, TimmSide | ReferenceSide):
        tensors = side.model.state_dict()
    else:
        assert isinstance(side, OurSide)
        state = side._run.engine.state().tensors
        tensors = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    return {name: tensor.clone() for name, tensor in tensors.items() if "num_batches" not in name}


def test_a_short_run_of_two_sides(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--sides", "timm", "ours_torch"]
    done = subprocess.run([*command, "--data", images, "--out", out], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "| ours_torch / timm |" in done.stdout
    found = json.loads(out.read_text())
    for side in ("timm", "ours_torch"):
        row = found["sides"][side]
        assert row["images_per_cpu_s"] > 0.1
        assert row["images_per_s"] > 0.1
        assert row["memory_gb"] > 0.05
        assert len(found["turns"][side]) == 2
