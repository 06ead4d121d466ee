"""The loader doctor: what it measures is of the config's images, what it says follows from the numbers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ii_dist.config import DataConfig, load_config, recipe_differences
from ii_dist.data import Index, Row, write_index
from tests.images import make_data_set
from tools import bench_loader
from tools._loader_speeds import Setting, Speed
from tools._loader_storage import ReadSpeed, _drop, _is_cached, read_cold, spread_rows, write_sample
from tools._loader_verdict import Findings, best_setting, bound, changes, patch_text, remarks

ROOT = Path(__file__).resolve().parents[3]
NOW = Setting("dali", 4, 2)


def speed(images_per_s: float, busy_cores: float = 4.0) -> Speed:
    return Speed(images_per_s, 1000 * busy_cores / images_per_s)


def findings(**changed: object) -> Findings:
    """Four busy threads on a rank's four cores, 1,000 images a second, nothing tried is better."""
    found = Findings(NOW, {NOW: speed(1000)}, {"torch": speed(800)}, noise=0.02, ranks=2, cores=4)
    return dataclasses.replace(found, **changed)  # type: ignore[arg-type]


def tried(images_per_s: float, **changed: object) -> dict[Setting, Speed]:
    return {NOW: speed(1000), dataclasses.replace(NOW, **changed): speed(images_per_s)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "word", "to_set"),
    [
        ({}, "decode", {}),
        ({"cores": 16}, "waiting", {}),
        ({"need": speed(500)}, "network", {}),
        ({"need": speed(950)}, "decode", {}),
        ({"trials": tried(1500, threads_per_rank=8)}, "threads", {"threads_per_rank": 8}),
        ({"trials": tried(1500, prefetch_batches=4)}, "prefetch", {"prefetch_batches": 4}),
        ({"trials": tried(1500, decode="cpu")}, "decode", {"decode": "cpu"}),
        ({"trials": tried(1500, hw_decoder_share=0.0)}, "decode", {"hw_decoder_share": 0.0}),
        ({"trials": tried(1040, threads_per_rank=8)}, "decode", {}),  # below 5 %
        ({"trials": tried(1150, threads_per_rank=8), "noise": 0.2}, "decode", {}),  # below the noise
        ({"trials": tried(9000, threads_per_rank=8), "noise": 0.3}, "decode", {}),  # nothing can be compared
        ({"trials": tried(1500, threads_per_rank=8), "need": speed(500)}, "network", {}),  # nothing to gain
        ({"other": {"torch": speed(1500)}}, "decode", {"source": "torch"}),
        ({"other": {"torch": speed(1500)}, "noise": 0.3}, "decode", {}),
        ({"other": {"synthetic": speed(9000)}}, "decode", {}),  # not a reader of files
        ({"cold": ReadSpeed(1500, 2e8), "fits_memory": False}, "storage", {}),  # 750 for each of two ranks
        ({"cold": ReadSpeed(1500, 2e8), "fits_memory": True}, "decode", {}),
        ({"cold": ReadSpeed(1500, 2e8), "fits_memory": False, "need": speed(500)}, "network", {}),
        ({"cold": ReadSpeed(1000, 2e8), "fits_memory": False, "need": speed(500)}, "storage", {}),
        ({"cold": "cannot be dropped"}, "decode", {}),
    ],
)
def test_the_verdict_follows_from_the_numbers(changed: dict[str, object], word: str, to_set: dict[str, object]) -> None:
    found = findings(**changed)
    assert bound(found)[0] == word
    assert changes(found) == to_set


def test_the_cheapest_of_equally_fast_settings_is_chosen() -> None:
    trials = {
        dataclasses.replace(NOW, threads_per_rank=threads, prefetch_batches=prefetch): speed(images_per_s)
        for threads, prefetch, images_per_s in ((4, 2, 1000), (6, 2, 1490), (6, 1, 1480), (8, 2, 1500), (8, 4, 1510))
    }
    assert best_setting(findings(trials=trials)) == Setting("dali", 6, 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"other": {"torch": speed(1500)}}, "warning: the torch reader is faster here than dali: 1,500 and 1,000"),
        ({"need": speed(1000)}, "warning: the network could take 1,000 images/s a rank, the loader has 1,000"),
        ({"cold": ReadSpeed(1500, 2e8)}, "the first epoch runs at the speed of the storage, 750 images/s a rank"),
        ({"noise": 0.3}, "too much else runs on this machine"),
        ({"missing": {"dali": "pip install it"}}, "dali: not measured: pip install it"),
        ({}, "one rank was measured alone, on its 4 cores"),
    ],
)
def test_what_is_worth_a_remark_is_said(changed: dict[str, object], said: str) -> None:
    assert [line for line in remarks(findings(**changed)) if said in line]


def test_nothing_is_remarked_without_a_reason() -> None:
    assert remarks(findings(ranks=1)) == []


def test_a_patch_loads_and_changes_only_what_it_names(tmp_path: Path) -> None:
    base, patch = ROOT / "configs/imagenet/ini_resnet50.yaml", tmp_path / "patch.yaml"
    settings = Setting("torch", 7, 5, decode="cpu")
    patch.write_text(patch_text(base, settings.keys()))
    cfg = load_config(base)
    assert load_config(patch) == cfg.model_copy(
        update={"data": DataConfig.model_validate(cfg.data.model_dump() | settings.keys())}
    )
    assert load_config(patch).data.prefetch_batches == 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("set"), 3, 12, 3, (60, 44))


def contents(index: Index) -> dict[bytes, tuple[bytes, int, int, int]]:
    """What each image is, by its hash."""
    return {
        index.sha256[row].tobytes(): (
            index.read_bytes(row).tobytes(),
            int(index.label[row]),
            int(index.width[row]),
            int(index.height[row]),
        )
        for row in range(len(index))
    }


def in_a_shard(root: Path, folder: Path) -> Index:
    """The same images, one after the other in one file."""
    files = Index.open(root / "train.index")
    rows, data = [], b""
    for row in range(len(files)):
        content = files.read_bytes(row).tobytes()
        facts = (int(files.label[row]), int(files.width[row]), int(files.height[row]), len(content))
        rows.append(Row(files.name(row), *facts, files.sha256[row].tobytes(), 0, len(data)))
        data += content
    (folder / "parts").mkdir(parents=True)
    (folder / "parts/all.tar").write_bytes(data)
    write_index(folder / "train.index", rows, files.classes, shards=["parts/all.tar"])
    return Index.open(folder / "train.index")


@pytest.mark.parametrize("sharded", [False, True])
def test_the_sample_is_of_the_same_images(root: Path, tmp_path: Path, sharded: bool) -> None:
    index = in_a_shard(root, tmp_path / "packed") if sharded else Index.open(root / "train.index")
    rows = spread_rows(index, 10)
    assert len(set(rows.tolist())) == 10
    assert set(index.label[rows]) == {0, 1, 2}
    (tmp_path / "sample").mkdir()
    write_sample(index, rows, tmp_path / "sample")
    sample, whole = contents(Index.open(tmp_path / "sample/train.index")), contents(index)
    assert len(sample) == 10
    assert all(whole[digest] == image for digest, image in sample.items())


def forgets(path: str) -> bool:
    """Whether the file system lets go of a file's pages, and says so."""
    file = os.open(path, os.O_RDWR)
    try:
        os.fsync(file)  # a page that is not on disk yet stays
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def test_cold_means_not_in_the_page_cache(root: Path) -> None:
    index = Index.open(root / "train.index")
    if not all(forgets(index.place(row)[0]) for row in range(len(index))):
        pytest.skip("this file system keeps files in memory or does not tell")
    speed = read_cold(index, 0.01)
    assert isinstance(speed, ReadSpeed), speed
    assert speed.bytes_per_s == pytest.approx(speed.images_per_s * float(np.mean(index.length)), rel=1e-6)
    assert _is_cached(index, 0)
    _drop(index, 0)
    assert not _is_cached(index, 0)


def test_what_stays_in_memory_is_not_called_cold(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools._loader_storage._drop", lambda index, row: None)
    index = Index.open(root / "train.index")
    for row in range(len(index)):
        index.read_bytes(row)
    answer = read_cold(index, 0.01)
    assert isinstance(answer, str)
    assert "in memory" in answer


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench_loader", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def config(root: Path) -> Path:
    path = root / "run.yaml"
    path.write_text(
        f"name: run\ndata: {{root: {root}, image_size: 24, eval_resize: 24, eval_image_size: 24}}\n"
        "model: {network: ini_resnet20}\nengine: {device: cpu}\n"
        "train: {global_batch: 8, max_images_per_rank: 4, epochs: 9}\nlaunch: {cpu_ranks_per_node: 2}\n"
    )
    return path


def test_it_measures_every_reader_and_the_network(config: Path) -> None:
    staged = config.parent / "staged"
    done = doctor(str(config), f"data.stage_to={staged}", "--seconds", "0.05", "--step", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["batch"]) == (2, 4)
    assert found["cores_per_rank"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert set(found["other"]) == {"torch", "synthetic"}
    speeds = [*found["trials"], *found["other"].values(), found["network"], found["storage_warm"]]
    assert min(each["images_per_s"] for each in speeds) > 0
    assert min(found["decoded_per_core"], found["windows_per_core"]) > 0
    assert {each["prefetch_batches"] for each in found["trials"]} >= {1, 2, 4}
    assert found["bound"] in found["verdict"] or found["bound"] in ("threads", "prefetch", "decode", "waiting")
    assert set(found["patch"].get("data", {})) <= set(DataConfig.model_fields)
    assert not staged.exists()  # a measurement copies nothing
    first, *progress = done.stderr.splitlines()
    assert "measurements, 0.05 s each" in first
    assert [line for line in progress if "torch on CPU" in line]


def test_without_files_only_what_is_there_is_measured(config: Path) -> None:
    done = doctor(str(config), "data.source=synthetic", "data.synthetic_images=64", "--seconds", "0.02")
    assert done.returncode == 0, done.stderr
    assert "synthetic" in done.stdout
    assert "storage," not in done.stdout
    assert "no change to make" in done.stdout


@pytest.mark.parametrize("key", ["threads_per_rank", "source"])
def test_what_is_printed_is_a_config(
    config: Path, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = findings(trials=tried(1500, threads_per_rank=8)) if key == "threads_per_rank" else None
    found = found or findings(other={"torch": speed(1500)})
    monkeypatch.setattr(bench_loader.Doctor, "measure", lambda self, folder: None)
    monkeypatch.setattr(bench_loader.Doctor, "findings", lambda self: found)
    assert bench_loader.main([str(config), "launch.cpu_ranks_per_node=1"]) == 0
    printed = capsys.readouterr().out
    patch = printed[printed.index("# save this") :]
    (tmp_path / "patch.yaml").write_text(patch)
    assert recipe_differences(load_config(config), load_config(tmp_path / "patch.yaml")) == (
        ["data.source: dali -> torch"] if key == "source" else []
    )
    assert ("for new runs" in patch) == (key == "source")
    override = patch.splitlines()[0].split()[-1]
    assert load_config(config, [override]) == load_config(tmp_path / "patch.yaml") != load_config(config)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--seconds", "0"], 2, "--seconds 0: needs a number above 0"),
        (["train.global_batch=7"], 2, "train.global_batch 7"),
        (["data.root=/nowhere"], 3, "/nowhere/train.index"),
        (["data.threads=3"], 2, "did you mean data.threads_per_rank"),
        (["engine.device=cuda"], 2, "has no GPU"),
    ],
)
def test_what_the_user_can_mend_is_one_line(config: Path, arguments: list[str], code: int, said: str) -> None:
    done = doctor(str(config), *arguments)
    if said == "has no GPU" and done.returncode == 0:
        pytest.skip("there is a GPU")
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
