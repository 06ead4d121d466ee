"""The two readers of files: the right pixels, and one line that names a bad file."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ii_dist.config import ClusterError, ConfigError, DataConfig, DataError
from ii_dist.data import Batch, BatchSource, Index, Position, make_eval_source, make_train_source
from ii_dist.data.ahead import Chunks
from ii_dist.data.augment import eval_windows, train_windows
from ii_dist.data.dali import _decoder, _Pipe
from ii_dist.data.source import Request
from ii_dist.runtime import World
from ii_dist.runtime.stop import StopRequest
from tests.images import make_data_set, plan_of, run_config

CLASSES, PER_CLASS, VAL_PER_CLASS = 2, 12, 5
SEED = 3
READERS = ("dali", "torch")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_data_set(tmp_path, CLASSES, PER_CLASS, VAL_PER_CLASS, (97, 75))


def config(root: Path, source: str, **changes: object) -> DataConfig:
    fields = {"image_size": 48, "eval_resize": 56, "eval_image_size": 48, "threads_per_rank": 2, **changes}
    return DataConfig.model_validate({"source": source, "root": str(root), **fields})


def train_source(cfg: DataConfig, batch: int = 6) -> BatchSource:
    plan = plan_of(run_config(cfg, batch), 1, CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS, CLASSES)
    return make_train_source(cfg, plan, World(), SEED, "cpu", False)


def eval_source(cfg: DataConfig, batch: int = 4) -> BatchSource:
    plan = plan_of(run_config(cfg, 6, 0, batch), 1, CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS, CLASSES)
    return make_eval_source(cfg, plan, World(), SEED, "cpu", False, batch)


def take(source: BatchSource, batches: int) -> list[Batch]:
    found = list(islice(source, batches))
    source.close()
    return found


def pixels(batch: Batch, cfg: DataConfig) -> NDArray[np.float64]:
    """Back to 0..255, N x height x width x 3."""
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (cfg.mean, cfg.std))
    return ((batch.images_NCHW.numpy() * std + mean) * 255).transpose(0, 2, 3, 1)


def by_hand(index: Index, row: int, epoch: int, cfg: DataConfig) -> NDArray[np.uint8]:
    """One training image: cut, resize, flip, as torchvision's transforms on PIL images do."""
    at = np.array([row])
    cut = train_windows(SEED, epoch, at, index.width[at], index.height[at], cfg.augment)
    box = (cut.x_N[0], cut.y_N[0], cut.x_N[0] + cut.width_N[0], cut.y_N[0] + cut.height_N[0])
    with Image.open(index.place(row)[0]) as file:
        image = file.convert("RGB").crop(tuple(map(int, box))).resize((cfg.image_size,) * 2, Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if cut.flip_N[0] else image)


@pytest.mark.parametrize("source", READERS)
def test_training_images_are_those_cut_by_hand(root: Path, source: str) -> None:
    cfg, index = config(root, source), Index.open(root / "train.index")
    batches = take(train_source(cfg), 6)
    for step, batch in enumerate(batches):
        expected = np.stack([by_hand(index, int(row), step // 4, cfg) for row in batch.index_N])
        gap = np.abs(pixels(batch, cfg) - expected)
        assert gap.mean() < 0.1
        assert gap.max() < 2.001
        assert batch.labels_N.tolist() == [int(row) // PER_CLASS for row in batch.index_N]


@pytest.mark.parametrize("source", READERS)
@pytest.mark.parametrize(("resize", "crop"), [(56, 48), (59, 48), (48, 48)])
def test_evaluation_images_are_torchvisions(root: Path, source: str, resize: int, crop: int) -> None:
    cfg = config(root, source, eval_resize=resize, eval_image_size=crop)
    index = Index.open(root / "val.index")
    fit = eval_windows(index.width[:], index.height[:], resize, crop)
    for batch in take(eval_source(cfg), 3):
        found = pixels(batch, cfg)
        for image, row in zip(found, batch.index_N.tolist(), strict=True):
            with Image.open(index.place(row)[0]) as file:
                size = int(fit.resized_width_N[row]), int(fit.resized_height_N[row])
                whole = file.convert("RGB").resize(size, Image.Resampling.BILINEAR)
            x, y = int(fit.x_N[row]), int(fit.y_N[row])
            gap = np.abs(image - np.asarray(whole.crop((x, y, x + crop, y + crop))))
            assert gap.mean() < 0.1  # one pixel aside it would be several


@pytest.mark.parametrize("make", [train_source, eval_source])
def test_the_two_readers_differ_by_the_decoder_only(root: Path, make: Callable[[DataConfig], BatchSource]) -> None:
    """Both decode as libjpeg-turbo does; with other images a rounding may differ, a place may not."""
    cfg = config(root, "dali")
    by_dali, by_pil = (take(make(config(root, source)), 3) for source in READERS)
    for a, b in zip(by_dali, by_pil, strict=True):
        assert torch.equal(a.index_N, b.index_N)
        gap = np.abs(pixels(a, cfg) - pixels(b, cfg))
        assert gap.mean() < 0.05
        assert gap.max() < 2.001


@pytest.mark.parametrize("make", [train_source, eval_source])
def test_the_graph_for_a_gpu_gives_these_images_too(root: Path, make: Callable[[DataConfig], BatchSource]) -> None:
    """The same operators on the CPU, where they can be tested anywhere."""
    cfg = config(root, "dali")
    source = make(cfg)
    request: Request = source._producer._request  # type: ignore[attr-defined]
    reading = Chunks(1)
    pipe = _Pipe(request, 0, reading, decode_only=False)
    for batch in islice(source, 3):
        fed, output = pipe.run()
        assert fed.rows.index_N.tolist() == batch.index_N.tolist()
        images_NCHW = torch.from_numpy(np.array(output.as_tensor()))
        assert images_NCHW.shape == batch.images_NCHW.shape
        gap = np.abs(pixels(replace(batch, images_NCHW=images_NCHW), cfg) - pixels(batch, cfg))
        assert gap.mean() < 0.5
        assert gap.max() < 6
    pipe.close()
    reading.close()
    source.close()


@pytest.mark.parametrize("source", READERS)
def test_the_thread_that_trains_only_picks_up(root: Path, source: str) -> None:
    running = train_source(config(root, source, image_size=160), batch=24)
    batches = iter(running)
    next(batches)
    process_s, own_s = time.process_time(), time.thread_time()
    for _ in range(10):
        next(batches)
    own_s, process_s = time.thread_time() - own_s, time.process_time() - process_s
    running.close()
    assert own_s < 0.1 * process_s


@pytest.mark.parametrize("source", READERS)
def test_odd_files_are_read_alike(root: Path, source: str) -> None:
    """Grey, palette, transparent, CMYK and PNG content, an EXIF turn: as PIL's RGB, never turned."""
    from ii_dist.data import build_index, write_index

    files = sorted((root / "val").rglob("*.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(files[0]) as file:
        picture = file.convert("RGB")
    picture.convert("L").save(files[0], "JPEG")
    picture.convert("CMYK").save(files[1], "JPEG")
    picture.save(files[2], "JPEG", exif=exif)
    picture.convert("RGBA").save(files[3], "PNG")
    picture.save(files[4], "JPEG", progressive=True)
    rows, classes = build_index(root / "val")
    write_index(root / "val.index", rows, classes, root="val")
    cfg = config(root, source)
    batches = take(eval_source(cfg, batch=10), 1)
    index = Index.open(root / "val.index")
    assert (index.width[2], index.height[2]) == picture.size
    fit = eval_windows(index.width[:5], index.height[:5], 56, 48)
    for row in range(5):
        with Image.open(files[row]) as file:
            whole = file.convert("RGB").resize((int(fit.resized_width_N[row]), int(fit.resized_height_N[row])), 2)
        x, y = int(fit.x_N[row]), int(fit.y_N[row])
        gap = np.abs(pixels(batches[0], cfg)[row] - np.asarray(whole.crop((x, y, x + 48, y + 48))))
        assert gap.mean() < 0.7


def spoil(root: Path, place: int, content: bytes, split: str = "train") -> Path:
    """Give the image at row `place` another content of the same length."""
    path = sorted((root / split).rglob("*.jpg"))[place]
    path.write_bytes(content.ljust(path.stat().st_size, b"\0"))
    return path


@pytest.mark.parametrize("source", READERS)
def test_a_data_set_other_than_planned_is_refused(root: Path, source: str) -> None:
    cfg = config(root, source)
    plan = plan_of(run_config(cfg, 6), 1, CLASSES * PER_CLASS + 1, 10, CLASSES)
    with pytest.raises(DataError, match="planned for 25"):
        make_train_source(cfg, plan, World(), SEED, "cpu", False)


def test_unknown_source_prints_the_table(root: Path) -> None:
    cfg = config(root, "torch").model_copy(update={"source": "tape"})
    with pytest.raises(ConfigError, match="'tape': is not one of dali, torch, synthetic"):
        train_source(cfg)


def test_gpu_decoding_without_a_gpu_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.decode gpu"):
        train_source(config(root, "dali", decode="gpu"))


def test_missing_dali_is_one_line_with_the_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ClusterError, match="pip install nvidia-dali-cuda130==") as error:
        train_source(config(root, "dali"))
    assert "\n" not in str(error.value)


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, ii_dist.data; assert not {'torch', 'nvidia.dali', 'PIL.Image'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_single_thread_batch_of_one_and_a_side_of_one(root: Path) -> None:
    for source in READERS:
        cfg = config(root, source, image_size=1, threads_per_rank=1)
        assert [b.images_NCHW.shape for b in take(train_source(cfg, batch=1), 3)] == [(1, 3, 1, 1)] * 3


@pytest.mark.parametrize("source", [*READERS, "synthetic"])
def test_close_ends_every_thread(root: Path, source: str) -> None:
    before = set(threading.enumerate())
    running = train_source(config(root, source, synthetic_images=24, synthetic_classes=2))
    next(iter(running))
    running.seek(Position(3, 6))
    next(iter(running))
    running.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("source", READERS)
def test_no_decoding_before_it_is_asked_for(root: Path, source: str) -> None:
    """Making a source and seeking cost nothing, so the first batch after a seek costs what a first batch costs."""
    spoil(root, 0, b"")
    running = train_source(config(root, source))
    threads = threading.active_count()
    for epoch in range(3):
        running.seek(Position(epoch, 6))
    assert threading.active_count() == threads
    running.close()


_PROGRAM = """
import sys
from tests.unit.data.test_data_readers import config, train_source
from pathlib import Path
running = train_source(config(Path(sys.argv[1]), sys.argv[2]))
for batch in running:
    print(int(batch.index_N[0]), flush=True)
    if len(sys.argv) > 3:
        raise SystemExit("left without closing")
"""


@pytest.mark.parametrize("source", READERS)
def test_a_rank_that_dies_or_leaves_takes_its_readers_with_it(root: Path, source: str) -> None:
    repository = Path(__file__).parents[3]
    command = [sys.executable, "-c", textwrap.dedent(_PROGRAM), str(root), source]
    left = subprocess.run([*command, "leave"], cwd=repository, capture_output=True, text=True, timeout=60)
    assert left.returncode == 1
    assert "Traceback" not in left.stderr
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, start_new_session=True) as killed:
        assert killed.stdout
        killed.stdout.readline()
        assert not children_of(killed.pid)
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)
        deadline_s = time.monotonic() + 5
        while any_process_of(killed.pid) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not any_process_of(killed.pid)


@pytest.mark.parametrize("source", READERS)
def test_stop_signals_reach_the_stop_request_and_disturb_no_reader(root: Path, source: str) -> None:
    """Nothing of a reader is a process, so a signal to the rank is the rank's alone; no read is lost by it."""
    expected = take(train_source(config(root, source)), 12)
    request, running, ended = StopRequest(), train_source(config(root, source)), threading.Event()

    def shower() -> None:
        while not ended.wait(0.002):
            os.kill(os.getpid(), signal.SIGUSR2)

    threads_before = threading.active_count()
    request.listen()
    os.kill(os.getpid(), signal.SIGTERM)  # a second one would end the process, SIGUSR2 never does
    sender = threading.Thread(target=shower)
    sender.start()
    try:
        found = list(islice(running, 12))
        assert not children_of(os.getpid())
    finally:
        ended.set()
        sender.join()
        request.close()
        running.close()
    assert request.reason == "SIGTERM"
    assert all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in zip(found, expected, strict=True))
    assert threading.active_count() <= threads_before


def living_processes() -> Iterator[tuple[int, int, int]]:
    """Process, parent and session of every process that is no zombie."""
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if entry.name.isdigit() and fields[0] != "Z":
            yield int(entry.name), int(fields[1]), int(fields[3])


def children_of(process: int) -> list[int]:
    return [child for child, parent, _ in living_processes() if parent == process]


def any_process_of(session: int) -> bool:
    """Whether a living process belongs to this session."""
    return any(session == own for _, _, own in living_processes())


def test_process_id_helper_sees_this_process() -> None:
    assert any_process_of(os.getsid(0))
    with subprocess.Popen(["sleep", "30"]) as child:
        assert children_of(os.getpid()) == [child.pid]
        child.kill()


@pytest.mark.parametrize("classes", [2])
def test_synthetic_images_can_be_learned(root: Path, classes: int) -> None:
    """The nearest class mean of one batch names the class of images of the other split."""
    cfg = config(root, "synthetic", synthetic_images=24, synthetic_classes=classes)
    train, held_out = take(train_source(cfg, 24), 1)[0], take(eval_source(cfg, 10), 1)[0]
    means = torch.stack([train.images_NCHW[train.labels_N == label].mean(0) for label in range(classes)])
    distances = (held_out.images_NCHW[:, None] - means[None]).flatten(2).norm(dim=2)
    assert torch.equal(distances.argmin(1), held_out.labels_N)
    shared = [torch.equal(a, b) for a in train.images_NCHW for b in held_out.images_NCHW]
    assert not any(shared)


def test_the_hardware_decoders_share_is_passed_on_and_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for share, warned in ((1.0, False), (0.0, False), (0.75, True)):
        caplog.clear()
        source = train_source(config(root, "dali", hw_decoder_share=share))
        request: Request = source._producer._request  # type: ignore[attr-defined]
        assert _decoder(request, "mixed")["hw_decoder_load"] == share
        assert ("data.hw_decoder_share 0.75: images now depend" in caplog.text) == warned
        assert "hw_decoder_load" not in _decoder(request, "cpu")
        source.close()
