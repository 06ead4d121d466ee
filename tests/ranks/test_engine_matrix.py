"""Every engine trains alike, and takes over what every engine saved, on any number of ranks, bit for bit."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ii_dist.checkpoint import read_manifest
from ii_dist.config import RunFolder
from tests.ranks.engine_program import MAIN, OFFLOADED, STEPS
from tests.ranks.start import finish, output, run_ranks, start_ranks
from tests.tiny_run import CONFIG

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]
PROGRAM = "tests.ranks.engine_program"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]]]:
    """2 ranks train and save; then 1, 2, 3 and 4 ranks take over. What each world saw."""
    folder = tmp_path_factory.mktemp("engines")
    for ranks in (2, 1, 3, 4):
        arguments = ["-m", PROGRAM, str(folder), *(["train"] if ranks == 2 else [])]
        environment = {"TORCH_EXTENSIONS_DIR": str(folder / "compiled"), "PYTHONWARNINGS": "error"}
        assert run_ranks(arguments, ranks, folder / f"out_{ranks}", **environment) == [0] * ranks
    return folder, {n: json.loads((folder / f"world_{n}.json").read_text()) for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("row", MAIN | OFFLOADED)
def test_losses_agree(worlds: tuple[Path, dict[int, dict[str, Any]]], row: str) -> None:
    trained = worlds[1][2]["trained"]
    mine, ddp = trained[row], trained["ddp"]
    assert [s["loss"] for s in mine["curve"]] == pytest.approx([s["loss"] for s in ddp["curve"]], abs=1e-6, rel=0)
    assert [s["norm"] for s in mine["curve"]] == pytest.approx([s["norm"] for s in ddp["curve"]], rel=1e-5)
    assert mine["evaluations"] == pytest.approx(ddp["evaluations"], abs=1e-6, rel=0)
    losses = [s["loss"] for s in mine["curve"]]
    assert len(set(losses)) == STEPS  # it did train


@pytest.mark.parametrize("row", MAIN | OFFLOADED)
def test_a_non_finite_gradient_on_one_rank_is_left_out_on_all(
    worlds: tuple[Path, dict[int, dict[str, Any]]], row: str
) -> None:
    trained = worlds[1][2]["trained"]
    assert (trained[row]["left_out"], trained[row]["changed"]) == (1.0, [])
    assert trained[row]["back"]["skipped"] == 0.0
    assert trained[row]["back"]["loss"] == pytest.approx(trained["ddp"]["back"]["loss"], abs=1e-6)


def test_inner_imaging_trains_under_zero3(worlds: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    seen = worlds[1][2]["inner_imaging"]
    assert seen["zero3"] == pytest.approx(seen["ddp"], abs=2e-6, rel=0)


def test_a_run_goes_on_with_another_engine(tmp_path: Path) -> None:
    """The commands of the page on engines: ZeRO 3 on two ranks, stopped, then DDP on one."""
    (tmp_path / "run.yaml").write_text(f"{CONFIG}\nruns_folder: {tmp_path}\n")
    arguments = ["-m", "ii_dist", "train", str(tmp_path / "run.yaml")]
    zero3 = [*arguments, "configs/engines/zero3.yaml", "train.stop_after_steps=3"]
    assert finish(start_ranks(zero3, 2, tmp_path / "zero3")) == [75, 75], output(tmp_path / "zero3")
    assert run_ranks(arguments, 1, tmp_path / "ddp") == [0]
    assert "resuming after step 3" in output(tmp_path / "ddp")
    first, last = (read_manifest(tmp_path / "run" / "checkpoints" / f"step_{n:09d}") for n in (3, 4))
    assert (first.engine, first.world_size, last.engine, last.world_size) == ("deepspeed", 2, "ddp", 1)
    assert {n: (t.dtype, t.shape) for n, t in first.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in last.tensors.items()
    }


@pytest.mark.parametrize("name", ["adamw", "lars", "lamb"])
def test_other_optimizers_agree(worlds: tuple[Path, dict[int, dict[str, Any]]], name: str) -> None:
    """LARS and LAMB look at whole layers, of which a rank of ZeRO has only pieces."""
    seen = worlds[1][2]["optimizers"]
    expected = seen[f"{name} ddp"]["losses"]
    assert len(set(expected)) == 9
    for row in MAIN:
        mine = seen[f"{name} {row}"]
        assert mine["losses"] == pytest.approx(expected, abs=2e-6, rel=0), row
        assert (mine["wrong"], mine["same"]) == ([], True)


@pytest.mark.parametrize(("ranks", "target"), [*product((1, 2, 3, 4), MAIN), *product((2,), OFFLOADED)])
def test_state_moves_bit_for_bit(worlds: tuple[Path, dict[int, dict[str, Any]]], ranks: int, target: str) -> None:
    moved = worlds[1][ranks]["moved"][target]
    assert {source: seen["wrong"] for source, seen in moved.items()} == {source: [] for source in MAIN}
    assert all(seen["scalars"] for seen in moved.values())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_training_goes_on_alike(worlds: tuple[Path, dict[int, dict[str, Any]]], ranks: int) -> None:
    moved = worlds[1][ranks]["moved"]
    expected = moved["ddp"]["ddp"]["losses"]
    for seen in moved.values():
        for source in MAIN:
            losses = seen[source]["losses"]
            assert losses == pytest.approx(expected[: len(losses)], abs=2e-6, rel=0)


@pytest.mark.parametrize("row", MAIN)
def test_resume_is_as_if_never_stopped(worlds: tuple[Path, dict[int, dict[str, Any]]], row: str) -> None:
    """Training went on while the step was written, too: none of that is in the files."""
    trained = worlds[1][2]["trained"][row]
    assert worlds[1][2]["moved"][row][row]["losses"] == trained["following"]
    assert trained["torn"] == []


@pytest.mark.parametrize("row", MAIN)
def test_every_rank_wrote_its_share(worlds: tuple[Path, dict[int, dict[str, Any]]], row: str) -> None:
    manifest = read_manifest(RunFolder(worlds[0] / row).step(STEPS))
    sizes = [shard.bytes for shard in manifest.shards]
    largest = 180 * 7 * 4
    assert len(sizes) == 2
    assert max(sizes) - min(sizes) <= largest + 1024  # and a header each
    assert {name.split(".")[0] for name in manifest.tensors} == {"model", "ema", "optimizer"}


def test_scattered_tensors_are_collected_bit_for_bit(worlds: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    assert {ranks: seen["collects"] for ranks, seen in worlds[1].items()} == dict.fromkeys((1, 2, 3, 4), True)


def test_nothing_was_compiled(worlds: tuple[Path, dict[int, dict[str, Any]]]) -> None:
    assert not (worlds[0] / "compiled").exists()
