"""Drawn operations on real batches: what torchvision would make of them, alone as in a batch, from both readers."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ii_dist.config import AugmentConfig, DataConfig
from ii_dist.data import Batch, BatchSource, build_index, make_eval_source, make_train_source, write_index
from ii_dist.data.ahead import Chunks
from ii_dist.data.augment import EraseWindows, erase_windows, noise_strip
from ii_dist.data.dali import _Pipe
from ii_dist.data.policies import Op, Operations, draw_operations
from ii_dist.data.positions import Rows
from ii_dist.data.retouch import Retouch, Touches, is_retouched
from ii_dist.data.source import Request
from ii_dist.models.compat import ensure_torchvision
from ii_dist.runtime import World
from tests.images import make_data_set, picture, plan_of, run_config

ensure_torchvision()
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, autoaugment  # noqa: E402
from torchvision.transforms import functional as tv  # noqa: E402

CLASSES, PER_CLASS, VAL_PER_CLASS, SEED, SIDE = 2, 12, 5, 3, 48
READERS = ("dali", "torch")
POLICIES: dict[str, dict[str, Any]] = {
    "jitter": {"colour_jitter": (0.4, 0.4, 0.4, 0.1)},
    "randaugment": {"policy": "randaugment", "policy_probability": 1.0, "policy_magnitude_std": 0.5},
    "trivialaugment": {"policy": "trivialaugment", "policy_fill": "zero"},
    "autoaugment": {"policy": "autoaugment"},
    "erasing": {"erase_probability": 0.7},
    "everything": {
        "colour_jitter": (0.4, 0.4, 0.4, 0.1),
        "policy": "randaugment",
        "policy_ops": 3,
        "erase_probability": 0.7,
        "erase_fill": "noise",
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("set"), CLASSES, PER_CLASS, VAL_PER_CLASS, (97, 75))


@pytest.fixture(params=POLICIES)
def augment(request: pytest.FixtureRequest) -> AugmentConfig:
    return AugmentConfig(**POLICIES[request.param])


def config(root: Path, source: str, augment: AugmentConfig, **changes: Any) -> DataConfig:
    sizes = {"image_size": SIDE, "eval_resize": 56, "eval_image_size": 48, "threads_per_rank": 2, **changes}
    return DataConfig(source=source, root=str(root), augment=augment, **sizes)  # type: ignore[arg-type]


def train_source(cfg: DataConfig, channels_last: bool = False) -> BatchSource:
    plan = plan_of(run_config(cfg, 12), 1, CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS, CLASSES)
    return make_train_source(cfg, plan, World(), SEED, "cpu", channels_last)


def take(source: BatchSource, batches: int) -> list[Batch]:
    found = list(islice(source, batches))
    source.close()
    return found


def pixels(images_NCHW: torch.Tensor, cfg: DataConfig) -> torch.Tensor:
    """Back to 0 .. 255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (cfg.mean, cfg.std))
    return (images_NCHW * std + mean) * 255


NAMES = {
    Op.SHEAR_X: "ShearX",
    Op.SHEAR_Y: "ShearY",
    Op.TRANSLATE_X: "TranslateX",
    Op.TRANSLATE_Y: "TranslateY",
    Op.ROTATE: "Rotate",
    Op.POSTERIZE: "Posterize",
    Op.SOLARIZE: "Solarize",
    Op.AUTOCONTRAST: "AutoContrast",
    Op.EQUALIZE: "Equalize",
    Op.INVERT: "Invert",
    Op.IDENTITY: "Identity",
}
FACTORS = {
    Op.BRIGHTNESS: tv.adjust_brightness,
    Op.COLOUR: tv.adjust_saturation,
    Op.CONTRAST: tv.adjust_contrast,
    Op.SHARPNESS: tv.adjust_sharpness,
    Op.HUE: tv.adjust_hue,
    Op.SOLARIZE_ADD: lambda x, v: torch.where(x < 128, (x.int() + int(v)).clamp(max=255).to(torch.uint8), x),
}


def by_torchvision(image_CHW: torch.Tensor, ops: list[int], values: list[float]) -> torch.Tensor:
    """The same operations as torchvision's own policies apply them, black from outside."""
    for op, value in zip(map(Op, ops), values, strict=True):
        if op in FACTORS:
            image_CHW = FACTORS[op](image_CHW, value)
        elif op != Op.SOLARIZE or value <= 255:
            image_CHW = autoaugment._apply_op(image_CHW, NAMES[op], value, InterpolationMode.BILINEAR, None)
    return image_CHW


@pytest.mark.parametrize("source", READERS)
def test_batches_hold_what_torchvision_makes_of_the_drawn_operations(
    root: Path, source: str, augment: AugmentConfig
) -> None:
    """From the same reader's plain images, whose resize and flip are tested elsewhere: other streams draw."""
    augment = augment.model_copy(update={"policy_fill": "zero"})
    cfg = config(root, source, augment)
    plain, rich = (take(train_source(c), 3) for c in (config(root, source, AugmentConfig()), cfg))
    off = []
    for step, (before, after) in enumerate(zip(plain, rich, strict=True)):
        index_N, epoch = after.index_N.numpy(), step // 2
        assert torch.equal(before.index_N, after.index_N)
        drawn = draw_operations(SEED, epoch, index_N, augment, SIDE)
        erased = erase_windows(SEED, epoch, index_N, SIDE, augment)
        for i, image_CHW in enumerate(pixels(before.images_NCHW, cfg).round().to(torch.uint8)):
            operations = (
                drawn.op_KN[:, i].tolist(),
                np.where(drawn.op_KN[:, i] == 0, 0, drawn.value_KN[:, i]).tolist(),
            )
            expected = pixels(after.images_NCHW[i], cfg) - by_torchvision(image_CHW, *operations)
            x, y, w, h = (int(n_N[i]) for n_N in (erased.x_N, erased.y_N, erased.width_N, erased.height_N))
            if augment.erase_fill == "noise":
                noise = noise_strip(SEED, int(erased.noise_N[i]) + 3 * SIDE**2)[-3 * SIDE**2 :].reshape(3, SIDE, SIDE)
                inside = after.images_NCHW[i, :, y : y + h, x : x + w].numpy()
                assert np.array_equal(inside, noise[:, y : y + h, x : x + w])
            else:
                assert not after.images_NCHW[i, :, y : y + h, x : x + w].any()
            expected[:, y : y + h, x : x + w] = 0
            off.append(float(expected.abs().mean()))
    # A level aside in one operation can be many in the next (a posterize, an equalize): rare, and of few pixels.
    assert np.median(off) < 0.3
    assert np.mean(off) < 0.8


def test_the_two_readers_still_differ_by_the_decoder_only(root: Path, augment: AugmentConfig) -> None:
    by_dali, by_pil = (take(train_source(config(root, source, augment)), 3) for source in READERS)
    for a, b in zip(by_dali, by_pil, strict=True):
        assert torch.equal(a.index_N, b.index_N)
        gap = (a.images_NCHW - b.images_NCHW).abs()
        assert gap.mean() < 0.01


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_whole_batch_equals_its_images_alone_to_the_last_bit(
    root: Path, augment: AugmentConfig, channels_last: bool
) -> None:
    """What a GPU does with a batch, on tensors of the CPU; what the CPU does image by image."""
    plain, rich = config(root, "torch", AugmentConfig()), config(root, "torch", augment)
    source = train_source(rich, channels_last)
    retouch = Retouch(source._producer._request, "cpu")  # type: ignore[attr-defined]
    for step, (before, after) in enumerate(zip(take(train_source(plain), 3), take(source, 3), strict=True)):
        images_NCHW = pixels(before.images_NCHW, plain).round().to(torch.uint8)
        rows = Rows(step // 2, after.index_N.numpy(), after.weight_N.numpy())
        found = retouch.finished(images_NCHW, rows)
        assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert torch.equal(found, after.images_NCHW)
        assert torch.equal(images_NCHW, pixels(before.images_NCHW, plain).round().to(torch.uint8))


def test_the_graph_for_a_gpu_stops_at_bytes_that_torch_finishes(root: Path) -> None:
    """The same operators on the CPU; DALI's resize rounds otherwise than torch's: no operations that magnify."""
    augment = AugmentConfig(colour_jitter=(0.2, 0.2, 0.2, 0.0), erase_probability=0.5)
    cfg = config(root, "dali", augment)
    source = train_source(cfg)
    request: Request = source._producer._request  # type: ignore[attr-defined]
    reading, retouch = Chunks(1), Retouch(request, "cpu")
    pipe = _Pipe(request, 0, reading, decode_only=False)
    for batch in islice(source, 2):
        fed, output = pipe.run()
        raw_NCHW = torch.from_numpy(np.array(output.as_tensor()))
        assert (raw_NCHW.dtype, raw_NCHW.shape) == (torch.uint8, batch.images_NCHW.shape)
        gap = (pixels(retouch.finished(raw_NCHW, fed.rows), cfg) - pixels(batch.images_NCHW, cfg)).abs()
        assert gap.mean() < 0.7
    for closing in (pipe, reading, source):
        closing.close()


def test_the_image_is_mirrored_before_it_is_moved() -> None:
    image_HWC = torch.zeros(8, 8, 3, dtype=torch.uint8)
    image_HWC[:, 0] = 200
    move = Operations(np.array([[Op.TRANSLATE_X]], np.int8), np.array([[-2.0]]))
    moved = Touches(move, None, torch.zeros(3), None).changed(0, image_HWC, mirrored=True)
    assert moved[0, :, 0].tolist() == [0, 0, 0, 0, 0, 200, 0, 0]


def test_an_image_without_operations_is_left_alone() -> None:
    drawn = Operations(np.array([[0, Op.INVERT], [0, 0]], np.int8), np.zeros((2, 2)))
    touches = Touches(drawn, None, torch.zeros(3), None)
    assert [touches.changes(i) for i in range(2)] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_erasing_keeps_the_type_and_everything_outside(dtype: torch.dtype) -> None:
    erased = EraseWindows(*(np.array(n) for n in ([1, 0], [2, 0], [3, 0], [2, 0], [5, 0])))
    nothing, strip = Operations(np.zeros((0, 2), np.int8), np.zeros((0, 2))), torch.arange(500.0)
    for noise in (None, strip):
        images_NCHW = torch.full((2, 3, 6, 7), -1.0, dtype=dtype)
        touches = Touches(nothing, erased, torch.zeros(3), noise)
        together = images_NCHW.clone()
        touches.erase_all(together)
        for i in range(2):
            touches.erase(i, images_NCHW[i])
        expected = torch.full((2, 3, 6, 7), -1.0, dtype=dtype)
        expected[0, :, 2:4, 1:4] = 0 if noise is None else strip[5 : 5 + 126].view(3, 6, 7)[:, 2:4, 1:4].to(dtype)
        assert torch.equal(images_NCHW, expected)
        assert torch.equal(together, expected)


def test_evaluation_and_the_plain_path_know_nothing_of_it(root: Path, augment: AugmentConfig) -> None:
    plain, rich = config(root, "torch", AugmentConfig()), config(root, "torch", augment)
    plan = plan_of(run_config(plain, 12), 1, CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS, CLASSES)
    a, b = (take(make_eval_source(cfg, plan, World(), SEED, "cpu", False, 4), 2) for cfg in (plain, rich))
    assert all(torch.equal(x.images_NCHW, y.images_NCHW) for x, y in zip(a, b, strict=True))
    source = train_source(plain)
    assert not is_retouched(source._producer._request)  # type: ignore[attr-defined]
    source.close()


# Sizes whose margins are odd, whose longer side is no whole number, very wide and very tall ones.
ODD_SIZES = [(500, 375), (375, 500), (500, 333), (341, 256), (257, 256), (255, 400), (63, 64), (1100, 40), (37, 900)]


@pytest.fixture(scope="module")
def odd_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "val"):
        for label in range(2):
            (root / split / f"class_{label}").mkdir(parents=True)
        for i, (width, height) in enumerate(ODD_SIZES):
            image = picture(i, width, height)
            grain = np.random.Generator(np.random.PCG64(i)).integers(-20, 21, (height, width, 3))
            rough = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
            rough.save(root / split / f"class_{i % 2}" / f"{i:02d}.jpg", quality=90)
        rows, names = build_index(root / split)
        write_index(root / f"{split}.index", rows, names, root=split)
    return root


def eval_pixels_of_reader(cfg: DataConfig) -> Iterator[tuple[int, torch.Tensor]]:
    plan = plan_of(run_config(cfg, 2), 1, len(ODD_SIZES), len(ODD_SIZES), 2)
    for batch in take(make_eval_source(cfg, plan, World(), SEED, "cpu", False, 3), 3):
        yield from zip(batch.index_N.tolist(), pixels(batch.images_NCHW, cfg), strict=True)


def eval_pixels_of_gpu_graph(cfg: DataConfig) -> Iterator[tuple[int, torch.Tensor]]:
    plan = plan_of(run_config(cfg, 2), 1, len(ODD_SIZES), len(ODD_SIZES), 2)
    source = make_eval_source(cfg, plan, World(), SEED, "cpu", False, 3)
    reading = Chunks(1)
    pipe = _Pipe(source._producer._request, 0, reading, decode_only=False)  # type: ignore[attr-defined]
    for _ in range(3):
        fed, output = pipe.run()
        images_NCHW = torch.from_numpy(np.array(output.as_tensor()))
        yield from zip(fed.rows.index_N.tolist(), pixels(images_NCHW, cfg), strict=True)
    for closing in (pipe, reading, source):
        closing.close()


@pytest.mark.parametrize(
    ("source", "read"),
    [("dali", eval_pixels_of_reader), ("torch", eval_pixels_of_reader), ("dali", eval_pixels_of_gpu_graph)],
)
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 225)])
def test_evaluation_equals_torchvisions_on_odd_sizes(
    odd_root: Path,
    source: str,
    read: Callable[[DataConfig], Iterator[tuple[int, torch.Tensor]]],
    resize: int,
    crop: int,
) -> None:
    """Mean difference of 0.5/255 or less; one pixel aside costs several (the rounding of odd margins)."""
    cfg = config(odd_root, source, AugmentConfig(), eval_resize=resize, eval_image_size=crop)
    files = sorted((odd_root / "val").rglob("*.jpg"))
    recipe = Compose([Resize(resize), CenterCrop(crop)])
    seen = 0
    for row, found_CHW in read(cfg):
        with Image.open(files[row]) as file:
            expected_HWC = np.asarray(recipe(file.convert("RGB"))).astype(np.float32)
        gap = (found_CHW.permute(1, 2, 0) - torch.from_numpy(expected_HWC)).abs()
        assert gap.mean() <= 0.5, files[row]
        one_aside = np.abs(expected_HWC[:, 1:] - expected_HWC[:, :-1]).mean()
        assert one_aside > 1
        seen += 1
    assert seen == len(ODD_SIZES)
