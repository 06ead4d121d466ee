"""Which pictures a run shows in TensorBoard, and when: its first batch, and now and then what its gates see.

In: batches and evaluations as they come. Out: PNG files on the board of rank 0; nothing on other ranks, and nothing
between these two moments.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ii_dist.config import Plan, RunConfig, read_index_header
from ii_dist.config.schema import DataConfig
from ii_dist.data import Batch
from ii_dist.engine import Engine
from ii_dist.metrics import Board
from ii_dist.metrics.pictures import U8, batch_png, gate_png
from ii_dist.models.watching import GateView, gates_of, joined, last_blocks, watch_gates

INNER_IMAGES = 4


class Pictures:
    """The pictures of one attempt, on rank 0. Off without the tensorboard board."""

    def __init__(self, cfg: RunConfig, plan: Plan, board: Board, rank: int) -> None:
        self._cfg, self._plan, self._board = cfg, plan, board
        self._on = rank == 0 and "tensorboard" in cfg.metrics.boards
        self._classes: tuple[str, ...] | None = None
        self.batch_is_due = self._on and cfg.metrics.batch_images > 0
        """Whether `batch` has something to do: once."""

    def batch(self, batch: Batch, step: int) -> None:
        """Show the first images of `batch`, which step `step` + 1 trains on. Waits for the device."""
        self.batch_is_due = False
        count = min(self._cfg.metrics.batch_images, len(batch.labels_N))
        captions = [self._caption(batch, number) for number in range(count)]
        png = batch_png(pixels(batch.images_NCHW[:count], self._cfg.data), captions)
        self._board.pictures(step, {"images/first_batch": png})

    def inner_images_are_due(self, step: int) -> bool:
        every = self._cfg.metrics.inner_images_every_epochs * self._plan.steps_per_epoch
        if not (self._on and every) or self._cfg.engine.compile:
            return False
        before = max(0, step - self._plan.eval_every_steps)
        return step >= self._plan.total_steps or step // every > before // every

    def watch(self, engine: Engine, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an evaluation; what the gates do with some of their images is shown at its end."""
        step = engine.step
        gates = gates_of(engine.evaluated()) if self.inner_images_are_due(step) else {}
        if not gates:
            yield from batches
            return
        # From all over the set: images that stand side by side in it are often of one class.
        chosen = {number * self._plan.eval_steps // INNER_IMAGES for number in range(INNER_IMAGES)}
        seen, views = [], []
        for number, batch in enumerate(batches):
            if number not in chosen:
                yield batch
                continue
            with watch_gates(gates, last_blocks(gates), most=1) as views_of_image:
                yield batch
            if batch.weight_N[0] > 0:  # no padding
                seen.append(pixels(batch.images_NCHW[:1], self._cfg.data))
                views.append(views_of_image)
        if seen:
            self._show(np.concatenate(seen), views, step)

    def _show(self, images_NHWC: U8, views: Sequence[Sequence[GateView]], step: int) -> None:
        pngs = {}
        for views_of_block in zip(*views, strict=True):
            view = joined(views_of_block)
            assert view.scale_NC is not None
            title = f"{self._cfg.model.network}, gate {self._cfg.model.gate}, {view.block}, step {step}"
            pngs[f"inner_images/{view.block}"] = gate_png(
                images_NHWC, title, view.image_NHW, view.view_Nhw, view.scale_NC
            )
        self._board.pictures(step, pngs)

    def _caption(self, batch: Batch, number: int) -> str:
        own = self._name(int(batch.labels_N[number]))
        if batch.partner_labels_N is None or batch.label_share_N is None:
            return own
        share = float(batch.label_share_N[number])
        return own if share == 1 else f"{share:.0%} {own}, {self._name(int(batch.partner_labels_N[number]))}"

    def _name(self, label: int) -> str:
        if self._classes is None:
            data = self._cfg.data
            synthetic = data.source == "synthetic"
            self._classes = () if synthetic else read_index_header(Path(data.root) / "train.index").classes
        return self._classes[label] if self._classes else f"class {label}"


def pixels(images_NCHW: torch.Tensor, cfg: DataConfig) -> U8:
    """What normalized images were before, N x height x width x 3."""
    images_NHWC = images_NCHW.detach().permute(0, 2, 3, 1).float().cpu().numpy()
    whole = images_NHWC * np.array(cfg.std, np.float32) + np.array(cfg.mean, np.float32)
    shown: U8 = (whole * 255).round().clip(0, 255).astype(np.uint8)
    return shown
