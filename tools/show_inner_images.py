"""What the lenses of a trained network see: ``python -m tools.show_inner_images CHECKPOINT IMAGE... --out FILE.png``.

In: a run (its newest whole step) or a step folder, and images. Out: for chosen blocks the pseudo-image before and after
the lens and the gate's factors, as one PNG and, if asked for, in the run's TensorBoard folder. The network itself is
run on the images, prepared as for evaluation; what goes in and out of its gates is only watched.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ii_dist.checkpoint.disk import describe, replace_file
from ii_dist.checkpoint.finder import FoundStep
from ii_dist.checkpoint.weights import check_target, choose_step, load_network, run_of, trained_classes
from ii_dist.config import DataConfig, ModelConfig, load_config
from ii_dist.config.errors import EXIT_DONE, CheckpointError, ConfigError, DataError
from ii_dist.data.augment import eval_windows
from tools._border import run
from tools._inner_images import Scene, draw

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ii_dist.models.watching import GateView

TENSORBOARD_RUN = "inner_images"


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    out: Path | None = args.out
    if out is None and not args.tensorboard:
        raise ConfigError("nothing to make: give --out FILE.png, --tensorboard, or both")
    if out is not None:
        check_target(out, ".png", args.force)
    step, left_out = choose_step(args.checkpoint)
    for newer in left_out:
        print(newer.reason, file=sys.stderr)
    folder = run_of(step)
    cfg = load_config(folder.config)
    pixels = [read_pixels(path, cfg.data) for path in args.images]
    network = _network(cfg.model, trained_classes(folder), step, args.ema)
    views = watch(network, _normalized(pixels, cfg.data), args.blocks)
    title = f"{cfg.model.network}, gate {cfg.model.gate}, step {step.step}{' (EMA)' if args.ema else ''}"
    names = [f"{path.parent.name}/{path.name}" for path in args.images]
    if out is not None:
        _write(out, draw(Scene(title, names, pixels, views)))
        print(f"{out}: {len(names)} images x {', '.join(view.block for view in views)}")
    if args.tensorboard:
        from ii_dist.metrics.tensorboard_board import write_pictures

        pngs = {f"inner_images/{view.block}": draw(Scene(title, names, pixels, [view])) for view in views}
        write_pictures(folder, TENSORBOARD_RUN, step.step, pngs)
        print(f"{folder.tensorboard / TENSORBOARD_RUN}: {', '.join(pngs)}")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.show_inner_images",
        description="Show the pseudo-images that the gates of a trained network make of some images.",
    )
    parser.add_argument("checkpoint", type=Path, help="a step folder, or a run folder for its newest whole step")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="an image file; one row of the picture")
    parser.add_argument(
        "--blocks", nargs="+", default=[], metavar="BLOCK", help="such as layer3.2 (default: the last of each stage)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture to make")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    parser.add_argument("--tensorboard", action="store_true", help="also one picture a block in the run's tb/ folder")
    return parser


def read_pixels(path: Path, cfg: DataConfig) -> NDArray[np.uint8]:
    """The square that evaluation cuts of an image: height x width x 3. Raises DataError."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}); give image files") from None
    width_N, height_N = (np.array([side], dtype=np.int32) for side in image.size)
    cut = eval_windows(width_N, height_N, cfg.eval_resize, cfg.eval_image_size)
    x, y, side = int(cut.x_N[0]), int(cut.y_N[0]), cfg.eval_image_size
    image = image.resize((int(cut.resized_width_N[0]), int(cut.resized_height_N[0])), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((x, y, x + side, y + side)))


def _normalized(pixels: Sequence[NDArray[np.uint8]], cfg: DataConfig) -> "Tensor":
    import torch

    images_NHWC = (np.stack(pixels) / 255 - np.array(cfg.mean)) / np.array(cfg.std)
    return torch.from_numpy(images_NHWC.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def _network(cfg: ModelConfig, num_classes: int, step: FoundStep, ema: bool) -> "nn.Module":
    from ii_dist.models import create_model

    network = create_model(cfg, num_classes)
    load_network(network, step, ema)
    return network.eval()


def watch(network: "nn.Module", images_NCHW: "Tensor", blocks: Sequence[str] = ()) -> list["GateView"]:
    """What the gates of `blocks` see and answer while `network` looks at the images; in the network's order."""
    import torch

    from ii_dist.models.watching import gates_of, last_blocks, watch_gates

    gates = gates_of(network)
    if not gates:
        raise ConfigError("this network has no gates (model.gate none): there is nothing to show")
    if unknown := [block for block in blocks if block not in gates]:
        raise ConfigError(f"--blocks {unknown[0]}: has no gate; those that have: {', '.join(gates)}")
    chosen = [block for block in gates if block in (blocks or last_blocks(gates))]
    with torch.inference_mode(), watch_gates(gates, chosen, most=len(images_NCHW)) as views:
        network(images_NCHW)
    return views


def _write(out: Path, png: bytes) -> None:
    try:
        replace_file(out, png)
    except OSError as error:
        raise CheckpointError(describe(error, out)) from None


if __name__ == "__main__":
    run(main)
