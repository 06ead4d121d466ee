"""The config tree: frozen pydantic models, strict, every field with its unit and default.

In: plain values (from YAML and ``key.sub=value``). Out: a `RunConfig`, handed to each package as its own slice.
Checks that need one slice stand in that slice; checks across slices stand in `RunConfig`. No torch here.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from ii_dist.config.augment import AugmentConfig
from ii_dist.config.engine import EngineConfig, RuntimeConfig
from ii_dist.config.launch import LaunchConfig
from ii_dist.config.networks import GATE_NAMES, NETWORKS, Shape, fold_widths
from ii_dist.config.profile import ProfileConfig
from ii_dist.config.slices import (
    Count,
    Decay,
    Epochs,
    Fraction,
    Names,
    NonNegative,
    Points,
    Positive,
    Slice,
    Triple,
    Word,
)

ImageDtype = Literal["auto", "float32", "bfloat16", "float16"]

IMAGE_DTYPES: dict[str, ImageDtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""engine.precision -> the type that it computes in, as data.image_dtype names it."""
WHOLE_TENSOR_OPTIMIZERS = ("muon",)
"""Values of optim.optimizer that ZeRO stages 1-3 cannot serve: they cut tensors into pieces."""


class DataConfig(Slice):
    """Where the images are and how they are read."""

    source: Literal["dali", "torch", "synthetic"] = "dali"
    root: str = "data/imagenet"
    """Folder with `train.index` and `val.index` (made by `python -m tools.import_dataset` or `tools.index_dataset`)."""
    stage_to: str = ""
    """Folder on each node's own disk to which the shards of `root` are copied once, in the background, and read from as
    they arrive; "" = read them where they are. The next run on the node finds the copies."""
    image_size: Count = 224
    """Side of a training image, pixels, in every epoch unless there is a `size_schedule`."""
    size_schedule: Points = ()
    """Progressive resizing: [epoch, side] points, epochs ascending. Between two points the side goes in a straight
    line, rounded to `size_multiple`; before the first and after the last it stays. [[0, 160], [65, 160], [76, 192]]
    grows from epoch 65 to 76; points in neighbouring epochs, such as [[0, 128], [17, 128], [18, 224]], are a step."""
    size_multiple: Count = 32
    """What every side of `size_schedule` is a multiple of, pixels."""
    eval_resize: Count = 256
    """Shorter side after the evaluation resize, pixels."""
    eval_image_size: Count = 224
    """Side of the centre crop in evaluation, pixels."""
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)
    """Per-channel mean and standard deviation of pixels in [0, 1]."""
    augment: AugmentConfig = AugmentConfig()
    threads_per_rank: Annotated[int, Field(ge=0)] = 0
    """Decoding threads of a rank; 0 = the node's cores / its ranks."""
    prefetch_batches: Count = 2
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes; auto = on the GPU where the rank has one."""
    hw_decoder_share: Fraction = 1.0
    """Share of the JPEGs that a GPU with a hardware decoder (A100, H100) gives to it. 1 and 0 are exact. Shares between
    may be faster, but send an image to one decoder or the other by its place in the batch, and the two do not agree in
    the last bit: images are then no longer the same on any number of ranks."""
    image_dtype: ImageDtype = "auto"
    """Type of the finished images. auto = on a GPU what `engine.precision` computes in, which is what the first layer
    would round them to anyway; on CPU float32."""
    max_bad_share: Fraction = 1e-3
    """Share of an epoch's images (and of an evaluation's) that may be unreadable before the run stops; three are always
    allowed, unless it is 0: then the first one stops the run."""
    read_retries: Annotated[int, Field(ge=0, le=20)] = 5
    """Further tries of a read that failed for a passing reason (EIO, ESTALE, lost connection), after 0.1, 0.3, 0.9 ...
    s, at most 10 s each: 5 wait 12 s in all."""
    synthetic_images: Count = 4096
    synthetic_classes: Count = 1000
    """Size of the synthetic data set (source: synthetic needs no files)."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.eval_image_size > self.eval_resize:
            raise ValueError(f"eval_image_size {self.eval_image_size}: needs eval_resize ({self.eval_resize}) or less")
        if min(self.std) <= 0:
            raise ValueError(f"std {list(self.std)}: needs three numbers above 0")
        epochs, sides = [epoch for epoch, _ in self.size_schedule], [side for _, side in self.size_schedule]
        said = f"size_schedule {[list(point) for point in self.size_schedule]}: needs"
        if any(epoch < 0 for epoch in epochs) or any(b <= a for a, b in pairwise(epochs)):
            raise ValueError(f"{said} epochs of 0 and more, each after the one before it")
        if any(side < 1 or side % self.size_multiple for side in sides):
            raise ValueError(f"{said} sides that are multiples of size_multiple ({self.size_multiple})")
        return self

    def side_of_epoch(self, epoch: int) -> int:
        """Height and width of the training images of an epoch (the first is 0), pixels. Whole numbers only: exact."""
        points = self.size_schedule
        after = next((i for i, point in enumerate(points) if point[0] > epoch), len(points))
        if not points:
            return self.image_size
        if after in (0, len(points)):
            return points[max(0, after - 1)][1]
        (first, low), (last, high) = points[after - 1], points[after]
        done, length = epoch - first, last - first
        steps = (high - low) // self.size_multiple
        return low + self.size_multiple * ((2 * steps * done + length) // (2 * length))  # half a step rounds up


class ModelConfig(Slice):
    """Which network, which gate."""

    network: str = "ini_resnet50"
    gate: str = "fold3x3"
    gate_reduction: Annotated[int, Field(ge=0)] = 0
    """Channels / hidden units of the gate (r); 0 = the network's own: 16, for ini_resnet20 4."""
    fold_width: Annotated[int, Field(ge=0)] = 0
    """Columns of the folded pseudo-image, or groups of channels (k), which must divide the channels of every stage; 0 =
    the network's own: 16, for ini_resnet20 8, for wide networks 10."""
    fold_layout: Literal["", "columns", "groups"] = ""
    """What `fold_width` counts: columns of the image, or groups of consecutive channels, each a row of the residual and
    a row of the identity; "" = the network's own: columns, for wide networks groups, as in the authors' code."""
    lens_kernel: Count = 3
    """Height and width of the lens of fold3x3."""
    lens_filters: Annotated[int, Field(ge=0)] = 0
    """Filters of the lens convolution (m); 0 = planes / 16, as in the authors' code."""
    lens: Literal["one_filter", "plain"] = "one_filter"
    """one_filter = the m filters, norm and mean computed as the one filter that they are; plain = one after the other,
    as in the authors' code: the same numbers and the same checkpoint, slower."""
    gate_init: Literal["cured", "authors"] = "cured"
    """authors = lens weights of either sign, with which a pair1x1 gate may never learn; cured = positive ones there."""
    zero_init_last: bool = True
    """Start the last norm of each block at 0, so that a block begins as the identity."""
    drop_path: Fraction = 0.0

    @model_validator(mode="after")
    def _known_and_foldable(self) -> Self:
        if self.network not in NETWORKS:
            raise ValueError(f"network {self.network!r} is not one of {', '.join(NETWORKS)}")
        if self.gate not in GATE_NAMES:
            raise ValueError(f"gate {self.gate!r} is not one of {', '.join(GATE_NAMES)}")
        shape = NETWORKS[self.network]
        if self.gate == "fold3x3":
            self._check_fold(shape)
        if self.gate != "none" and (small := min(shape.out_channels)) < self.gate_reduction:
            raise ValueError(f"gate_reduction {self.gate_reduction}: needs {small} or less for {self.network}")
        return self

    def _check_fold(self, shape: Shape) -> None:
        layout, width = self.fold_layout or shape.fold_layout, self.fold_width or shape.fold_width
        channels = sorted(set(shape.out_channels))
        fits = fold_widths(channels, layout, self.lens_kernel)
        if width not in fits:
            lens = "" if self.lens_kernel == 3 else f" and a lens of {self.lens_kernel}x{self.lens_kernel}"
            raise ValueError(
                f"fold_width {width}: {self.network} has stages of {', '.join(map(str, channels))} channels{lens}; "
                f"possible {'widths' if layout == 'columns' else 'groups'} are {', '.join(map(str, fits)) or 'none'}"
            )


class OptimConfig(Slice):
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["sgd", "adamw", "lamb", "lars", "muon"] = "sgd"
    """muon: matrices and convolutions by Muon, the rest by AdamW at the same rate."""
    lr: NonNegative = 0.1
    """Peak learning rate for a global batch of `lr_reference_batch` images."""
    lr_reference_batch: Annotated[int, Field(ge=0)] = 256
    """The rate is scaled by global_batch / this; 0 = `lr` is used as it is."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of sgd, lars and muon."""
    nesterov: bool = True
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = (0.9, 0.999)
    """Decay of the first and second moment of adamw, lamb and muon's AdamW."""
    eps: NonNegative = 0.0
    """Added to a denominator of the optimizer; 0 = its own: adamw 1e-8, lamb 1e-6, lars 1e-8, muon 1e-7."""
    trust_coefficient: Positive = 0.001
    """Of lars: length of an update / length of the weights, before the rate."""
    weight_decay: NonNegative = 1e-4
    """For weights of convolutions and linear layers; for biases and norms only with `decay_norms_and_biases`."""
    decay_norms_and_biases: bool = False
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Rate of a layer / rate of the layer after it; 1 = the same rate for all."""
    schedule: Literal["cosine", "constant", "linear", "polynomial", "step"] = "cosine"
    """After the warm-up."""
    warmup_epochs: NonNegative = 5.0
    final_lr_share: Fraction = 0.0
    """Rate at the last step / peak rate."""
    polynomial_power: Positive = 2.0
    step_epochs: Epochs = (30.0, 60.0, 80.0)
    """Of schedule step: epochs at which the rate is multiplied by `step_factor`."""
    step_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """bce = binary cross entropy of each class, mean over the classes, as in timm. Evaluation always tells cross
    entropy."""
    bce_target_threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Targets above it count as 1, others as 0, after smoothing and mixing; 0 = they stay as they are. For bce."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    clip_norm: NonNegative = 0.0
    """Largest global gradient norm; 0 = no clipping."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and self.momentum == 0.0 and self.optimizer in ("sgd", "lars", "muon"):
            raise ValueError("nesterov true: needs momentum above 0")
        if list(self.step_epochs) != sorted(set(self.step_epochs)):
            raise ValueError(f"step_epochs {list(self.step_epochs)}: needs rising epochs")
        if self.schedule == "step" and self.step_epochs and self.step_epochs[0] <= self.warmup_epochs:
            raise ValueError(
                f"step_epochs {list(self.step_epochs)}: needs epochs after the warm-up of {self.warmup_epochs:g}"
            )
        if self.bce_target_threshold and self.loss != "bce":
            raise ValueError(f"bce_target_threshold {self.bce_target_threshold}: needs optim.loss bce")
        return self


class TrainConfig(Slice):
    """How long and how much at once."""

    epochs: Positive = 90.0
    global_batch: Count = 256
    """Images a step over all ranks. Never changes with the number of ranks."""
    max_images_per_rank: Literal["auto"] | Annotated[int, Field(ge=0)] = 0
    """Largest micro-batch that fits a rank; larger shares are accumulated. 0 = no limit. auto = found by trying when
    the run starts, the least of all ranks, and kept in plan.json for the attempts after it."""
    eval_every_epochs: Positive = 1.0
    eval_batch_per_rank: Count = 64
    max_skipped_in_a_row: Count = 10
    """Updates left out in a row, for a non-finite loss or gradient, after which the run stops (noticed when the
    metrics are read)."""
    stop_after_steps: Annotated[int, Field(ge=0)] = 0
    """Stop as if asked (save, exit code 75) after this step; 0 = never. For trials and tests."""
    hang_timeout_s: NonNegative = 1800.0
    """Without a step for so long, a rank writes the stacks of its threads and ends; 0 = never."""


class CheckpointConfig(Slice):
    """When steps are saved and which stay."""

    every_epochs: NonNegative = 1.0
    """Epochs between saves; 0 = only at the end and when asked to stop."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between saves, besides `every_epochs`; 0 = none."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Newest committed steps to keep (2 or more: the newest may turn out damaged)."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Keep every multiple of this as well; 0 = none."""


class MetricsConfig(Slice):
    """What is written while training."""

    log_every_steps: Count = 50
    boards: Names = ("console", "tensorboard", "jsonl")
    console: Literal["auto", "lines", "quiet"] = "auto"
    """What the console shows of training. auto = one line that is kept up to date in a terminal, a line each time in
    anything else; lines = a line each time; quiet = evaluations only. Warnings and the summary at the end always."""
    compare: Names = (
        *("model.network", "model.gate", "optim.optimizer", "optim.lr", "train.global_batch", "train.epochs"),
        *("optim.weight_decay", "data.image_size", "data.augment.policy", "engine.kind", "engine.precision", "seed"),
    )
    """Keys of this config that TensorBoard's HPARAMS tab compares runs by, the first five as columns from the start;
    name those of a sweep first. The number of ranks is always among them."""
    batch_images: Annotated[int, Field(ge=0, le=64)] = 16
    """Images of an attempt's first batch that TensorBoard shows as the network gets them; 0 = none."""
    inner_images_every_epochs: NonNegative = 10.0
    """Epochs between pictures of the pseudo-images and factors of the gates, in TensorBoard, drawn by rank 0 at the
    first evaluation after them and at the last one, for four of its evaluation images; 0 = never. Networks without
    gates and compiled ones have none."""
    machine: str = "auto"
    """What MFU and the share of the roofline are measured against: auto = the peaks of this GPU in the table of
    `ii_dist.metrics.peaks` (on a CPU nothing), the name of a GPU there, such as H100, a file of
    `python -m tools.measure_machine` that ends in .json, or none = leave both out."""


class RunConfig(Slice):
    """Everything a run is. `runs_folder/name` is the run folder."""

    name: Word
    runs_folder: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    expected_top1: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Top-1 that this recipe is published, or was measured, to reach, per cent; 0 = not known. Reports compare with it;
    training does not look at it."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig = ProfileConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.engine.precision == "fp16" and self.engine.device == "cpu":
            raise ValueError("engine.precision fp16: needs a GPU; on CPU use fp32 or bf16")
        if self.engine.zero_stage and self.optim.optimizer in WHOLE_TENSOR_OPTIMIZERS:
            raise ValueError(
                f"engine.zero_stage {self.engine.zero_stage}: cuts tensors into pieces, which optim.optimizer "
                f"{self.optim.optimizer} needs whole; use engine.zero_stage 0 or engine.kind ddp"
            )
        if self.data.decode == "gpu" and self.engine.device == "cpu":
            raise ValueError("data.decode gpu: needs engine.device cuda or auto")
        if self.optim.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs}: needs train.epochs ({self.train.epochs}) or less"
            )
        if self.runtime.canonical_shards:
            self._check_canonical()
        computed = IMAGE_DTYPES[self.engine.precision]
        if self.data.image_dtype not in ("auto", "float32", computed):
            raise ValueError(
                f"data.image_dtype {self.data.image_dtype}: engine.precision {self.engine.precision} needs auto"
                f"{'' if computed == 'float32' else f', {computed}'} or float32"
            )
        return self

    def _check_canonical(self) -> None:
        said, engine = f"runtime.canonical_shards {self.runtime.canonical_shards}:", self.engine
        if engine.kind != "ddp":
            raise ValueError(f"{said} needs engine.kind ddp")
        if engine.compress_gradients != "none" or engine.sync_batchnorm or engine.static_graph:
            raise ValueError(f"{said} not with engine.compress_gradients, sync_batchnorm or static_graph")
        if self.train.max_images_per_rank == "auto":
            raise ValueError(f"{said} says how large a micro-batch is; needs a number as train.max_images_per_rank")

    def data_on(self, device_kind: str) -> DataConfig:
        """The data slice for "cpu" or "cuda", `image_dtype` auto decided."""
        if self.data.image_dtype != "auto":
            return self.data
        on_gpu = IMAGE_DTYPES[self.engine.precision]
        return self.data.model_copy(update={"image_dtype": on_gpu if device_kind == "cuda" else "float32"})
