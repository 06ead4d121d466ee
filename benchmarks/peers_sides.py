"""The trainers that `benchmarks.peers` compares: the same network, images, batch, optimizer and augmentation.

In: `Work`. Out: for each name of `SIDES` a `Side`, which trains some steps at each call.

    timm         the way of timm's training script, through timm's public functions
    reference    the way of torchvision's classification reference: ImageFolder, DataLoader, SGD, meters
    ours         ii_dist's `fit`, whole, with images from DALI
    ours_torch   the same with its torch reader

All start from the same weights. All compute in channels_last, each peer in the form that its options give for it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.loader_variants import MEAN, STD
from ii_dist.config import RunConfig, data_facts, make_plan
from ii_dist.metrics import Board
from ii_dist.models import create_model, ensure_torchvision
from ii_dist.runtime import World
from ii_dist.runtime.seeds import seed_init

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-4
SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5
SEED = 0
LOG_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True)
class Work:
    """What every side does. workers: processes or threads that decode; device: cpu or cuda."""

    root: Path
    network: str
    side: int
    batch: int
    total_steps: int
    classes: int
    workers: int
    device: str


@dataclass(frozen=True, slots=True)
class Turn:
    """Some steps. loss: mean over their images."""

    wait_s: float
    loss: float


class Side(Protocol):
    """One trainer."""

    def train(self, steps: int) -> Turn: ...

    def close(self) -> None: ...


def config(work: Work, source: str, folder: str) -> RunConfig:
    """ii_dist's view of the work."""
    on_gpu = work.device == "cuda"
    side = work.side
    return RunConfig.model_validate(
        {
            "name": "peers",
            "runs_folder": folder,
            "seed": SEED,
            "data": {
                "source": source,
                "root": str(work.root),
                "image_size": side,
                "eval_resize": side,
                "eval_image_size": side,
                "threads_per_rank": work.workers,
                "augment": {"crop_scale": SCALE, "crop_ratio": RATIO, "flip": FLIP},
            },
            "model": {"network": f"ini_{work.network}", "gate": "none"},
            "engine": {"device": work.device, "precision": "bf16" if on_gpu else "fp32"},
            "optim": {
                "lr": LR,
                "lr_reference_batch": 0,
                "momentum": MOMENTUM,
                "nesterov": False,
                "weight_decay": WEIGHT_DECAY,
                "warmup_epochs": 0,
                "label_smoothing": 0.0,
            },
            "train": {"global_batch": work.batch, "epochs": 1},
            "checkpoint": {"every_epochs": 0},
            "metrics": {"boards": ["tensorboard", "jsonl"], "log_every_steps": LOG_EVERY_STEPS},
        }
    )


# Peers ---------------------------------------------------------------------------------------------------------------


class _Peer:
    """What the loops of both peers share: a network, and batches that never end."""

    def __init__(self, work: Work) -> None:
        import timm

        self.work, self.device = work, torch.device(work.device)
        self.model: nn.Module = timm.create_model(work.network, num_classes=work.classes)
        seed_init(SEED)
        start = create_model(config(work, "torch", "unused").model, work.classes)
        self.model.load_state_dict(start.state_dict())
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if work.device == "cuda":
            self.autocast = lambda: torch.autocast("cuda", torch.bfloat16)
        self.loader: Any = self.make_loader()
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self.step = 0

    def make_loader(self) -> Any:
        raise NotImplementedError

    def epoch_begins(self) -> None: ...

    def train_step(self, images_NCHW: Tensor, labels_N: Tensor) -> float:
        raise NotImplementedError

    def train(self, steps: int) -> Turn:
        wait_s, losses = 0.0, []
        for _ in range(steps):
            before_s = time.monotonic()
            images_NCHW, labels_N = self._next()
            wait_s += time.monotonic() - before_s
            losses.append(self.train_step(images_NCHW, labels_N))
            self.step += 1
        return Turn(wait_s, sum(losses) / len(losses))

    def close(self) -> None:
        self._batches = None
        self.loader = None  # ends its workers

    def _next(self) -> tuple[Tensor, Tensor]:
        if self._batches is not None:
            with contextlib.suppress(StopIteration):
                return next(self._batches)
        self.epoch_begins()
        self._batches = iter(self.loader)
        return next(self._batches)


class TimmSide(_Peer):
    """As timm's training script does with: --amp only on a GPU, --channels-last --opt sgd --sched cosine
    --train-interpolation bilinear --color-jitter 0, its prefetcher on a GPU; EMA, Mixup and random erasing stay off."""

    def __init__(self, work: Work) -> None:
        import timm.optim
        import timm.scheduler
        import timm.utils

        super().__init__(work)
        self._optimizer = timm.optim.create_optimizer_v2(
            self.model, opt="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        updates = max(1, len(self.loader))
        epochs = max(1, -(-work.total_steps // updates))
        self._scheduler, _ = timm.scheduler.create_scheduler_v2(
            self._optimizer,
            sched="cosine",
            num_epochs=epochs,
            warmup_epochs=0,
            step_on_epochs=False,
            updates_per_epoch=updates,
        )
        self._loss = nn.CrossEntropyLoss().to(self.device)
        self._losses = timm.utils.AverageMeter()

    def make_loader(self) -> Any:
        from timm.data import create_dataset, create_loader

        work, on_gpu = self.work, self.work.device == "cuda"
        dataset = create_dataset("", root=str(work.root), split="train", is_training=True, batch_size=work.batch)
        return create_loader(
            dataset,
            input_size=(3, work.side, work.side),
            batch_size=work.batch,
            is_training=True,
            scale=SCALE,
            ratio=RATIO,
            hflip=FLIP,
            color_jitter=0.0,
            interpolation="bilinear",
            mean=MEAN,
            std=STD,
            num_workers=work.workers,
            pin_memory=on_gpu,
            use_prefetcher=on_gpu,
            device=self.device,
        )

    def epoch_begins(self) -> None:
        self._losses.reset()

    def train_step(self, images_NCHW: Tensor, labels_N: Tensor) -> float:
        if self.work.device != "cuda":  # there the prefetcher has done it
            images_NCHW, labels_N = images_NCHW.to(self.device), labels_N.to(self.device)
        images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            loss = self._loss(self.model(images_NCHW), labels_N)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        value: float = loss.item()
        self._losses.update(value, len(images_NCHW))
        self._scheduler.step_update(num_updates=self.step + 1, metric=self._losses.avg)
        return value


class ReferenceSide(_Peer):
    """As torchvision's classification reference does: transforms on PIL images, loss and accuracies each step."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        parameters = self.model.parameters()
        self._optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, work.total_steps)
        self._loss = nn.CrossEntropyLoss()
        self._meters: dict[str, list[float]] = {"loss": [], "top1": [], "top5": []}

    def make_loader(self) -> Any:
        ensure_torchvision()
        from torchvision import datasets, transforms
        from torchvision.transforms import InterpolationMode

        steps = [
            transforms.RandomResizedCrop(self.work.side, SCALE, RATIO, interpolation=InterpolationMode.BILINEAR),
            transforms.RandomHorizontalFlip(FLIP),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(MEAN, STD),
        ]
        folder = datasets.ImageFolder(str(self.work.root / "train"), transforms.Compose(steps))
        return torch.utils.data.DataLoader(
            folder,
            self.work.batch,
            shuffle=True,
            num_workers=self.work.workers,
            pin_memory=self.work.device == "cuda",
            drop_last=True,
            # The reference starts new workers each epoch, which the long epochs of ImageNet hide.
            persistent_workers=self.work.workers > 0,
        )

    def train_step(self, images_NCHW: Tensor, labels_N: Tensor) -> float:
        images_NCHW = images_NCHW.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        labels_N = labels_N.to(self.device, non_blocking=True)
        with self.autocast():
            logits_NC = self.model(images_NCHW)
            loss = self._loss(logits_NC, labels_N)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        top = min(5, logits_NC.shape[1])
        hits_kN = logits_NC.topk(top).indices.T.eq(labels_N)
        values: dict[str, float] = {"loss": loss.item(), "top1": hits_kN[:1].sum().item(), "top5": hits_kN.sum().item()}
        for name, value in values.items():
            self._meters[name].append(value)
        return values["loss"]


# ii_dist -------------------------------------------------------------------------------------------------------------


class _LossBoard:
    """Keeps the last training loss, and passes everything on."""

    def __init__(self, board: Board) -> None:
        self._board, self.losses = board, list[float]()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self.losses.append(values["train/loss"])
        self._board.write(step, values)

    def text(self, tag: str, text: str) -> None:
        self._board.text(tag, text)

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        self._board.pictures(step, pngs)

    def close(self) -> None:
        self._board.close()


class OurSide:
    """`fit` of a whole session: votes, clock, metrics, TensorBoard and JSON lines; no save and no evaluation."""

    def __init__(self, work: Work, source: str) -> None:
        import tempfile

        from ii_dist.train.opening import open_session

        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        cfg = config(work, source, folder)
        facts = data_facts(cfg.data)
        epochs = work.total_steps / (facts.train_images // work.batch)
        cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"epochs": epochs})})
        world = World(gpus=int(work.device == "cuda"), threads=torch.get_num_threads())
        self._run = self._stack.enter_context(open_session(cfg, make_plan(cfg, 1, facts), world))
        self._board = _LossBoard(self._run.board)
        self._run.board = self._board

    def train(self, steps: int) -> Turn:
        from ii_dist.train.loop import fit

        run = self._run
        last = run.engine.step + steps
        run.plan = dataclasses.replace(run.plan, total_steps=last, eval_every_steps=10**9, save_every_steps=())
        run.results.evaluated_step = run.saved_step = last
        before_s, self._board.losses = self._waited_s(), []
        assert fit(run)
        return Turn(self._waited_s() - before_s, self._board.losses[-1])

    def close(self) -> None:
        self._stack.close()

    def _waited_s(self) -> float:
        totals = self._run.clock.totals()
        return totals.cold.data_wait_s + totals.steady.data_wait_s


SIDES: dict[str, Callable[[Work], Side]] = {
    "timm": TimmSide,
    "timm_twin": TimmSide,
    "reference": ReferenceSide,
    "ours": lambda work: OurSide(work, "dali"),
    "ours_torch": lambda work: OurSide(work, "torch"),
}
"""The twin is timm's side once more: the ratio of the two is the noise to read the other ratios by."""
