"""Config of one step, and of what the ranks promise each other. No torch.

In: plain values. Out: `EngineConfig`, `RuntimeConfig`, slices of `RunConfig`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ii_dist.config.slices import NonNegative, Slice


class EngineConfig(Slice):
    """How one step runs."""

    kind: Literal["ddp", "deepspeed"] = "ddp"
    """ddp = torch's DistributedDataParallel; deepspeed = DeepSpeed with `zero_stage`. Checkpoints are the same."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """What DeepSpeed shares out over the ranks instead of keeping it on each: 0 nothing; 1 optimizer state and average;
    2 gradients too; 3 weights too."""
    offload_optimizer: bool = False
    """Optimizer state and update on the host's memory and cores (zero_stage 1 to 3)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = a GPU where there is one for each rank of the node, else CPU."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    ema_half_life_epochs: NonNegative = 0.0
    """Half-life of the exponential moving average of the weights; 0 = none. Where there is one, it is evaluated."""
    deterministic: bool = False
    """Only deterministic kernels (slower on GPU)."""
    checkpoint_activations: bool = False
    """Keep only the inputs of blocks and compute what is inside them again in the backward pass: the same numbers,
    about a third more work, a fraction of the memory."""
    sync_batchnorm: bool = False
    """Statistics of norms over the micro-batches of all ranks instead of each rank's own (GPU only)."""
    static_graph: bool = False
    """Promise DistributedDataParallel that every step uses the same parameters in the same order."""
    compress_gradients: Literal["none", "bf16"] = "none"
    """bf16 = gradients travel between ranks as bfloat16 (kind ddp): half the traffic, sums rounded to 8 bits."""
    memory_gb: NonNegative = 0.0
    """Memory that a rank may use, GB (1e9 bytes), for `train.max_images_per_rank` auto; 0 = what its GPU has. On a CPU
    it must be given."""

    @model_validator(mode="after")
    def _deepspeed(self) -> Self:
        if self.kind != "deepspeed" and self.zero_stage:
            raise ValueError(f"zero_stage {self.zero_stage}: needs engine.kind deepspeed")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer true: needs engine.kind deepspeed and engine.zero_stage 1, 2 or 3")
        if self.kind == "deepspeed" and self.precision == "fp16":
            raise ValueError("precision fp16: not with engine.kind deepspeed; use bf16 or fp32")
        for key, wrong in (("compile", self.compile), ("static_graph", self.static_graph)):
            if self.kind == "deepspeed" and wrong:
                raise ValueError(f"{key} true: not with engine.kind deepspeed; use engine.kind ddp")
        if self.kind == "deepspeed" and self.compress_gradients != "none":
            raise ValueError(f"compress_gradients {self.compress_gradients}: needs engine.kind ddp")
        if self.sync_batchnorm and self.device == "cpu":
            raise ValueError("sync_batchnorm true: torch has it for GPUs only; use false on CPU")
        return self


class RuntimeConfig(Slice):
    """What the ranks promise each other."""

    canonical_shards: Annotated[int, Field(ge=0)] = 0
    """Virtual shards of a global batch (V), each one forward and backward pass with norm statistics of its own; their
    gradients are added in one fixed order. Losses and weights are then bit-identical on any number of ranks that
    divides V, also when a run goes on with another number. 0 = off: ranks are the shards."""
