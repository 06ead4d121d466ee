"""The seam of one training step: what the loop needs of DDP, DeepSpeed or anything else that trains.

In: micro-batches of one global step. Out: sums over this rank's images as device tensors (never a host number), and
the whole state as named tensors plus JSON scalars.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ii_dist.runtime.scattered import Scattered

Sums = Mapping[str, torch.Tensor]
"""0-dim device tensors. Sums over this rank's images: loss, images, top1, top5 (of a mixed image the label with the
larger share counts); with virtual shards rank 0 has the sums over all images, the other ranks zeros. Equal on all
ranks: grad_norm, skipped (1 when this update was left out for a non-finite number, else 0; loss and grad_norm of such a
step may be no numbers), skipped_in_row."""


class BatchLike(Protocol):
    """What an engine reads of a batch. The last two belong to images mixed in pairs; None for others."""

    @property
    def images_NCHW(self) -> torch.Tensor: ...
    @property
    def labels_N(self) -> torch.Tensor: ...
    @property
    def weight_N(self) -> torch.Tensor: ...
    @property
    def partner_labels_N(self) -> torch.Tensor | None: ...
    @property
    def label_share_N(self) -> torch.Tensor | None: ...


@dataclass(slots=True)
class EngineState:
    """Everything that training depends on.

    tensors: `model.<name>`, `ema.<name>`, `optimizer.<name>.<key>`, with timm's parameter names, the same on all
    ranks; the memory of the engine, not copies. What is sharded comes as `Scattered`, collected one at a time where
    it is wanted. scalars: JSON values (step, images, scaler, seed rule).
    """

    tensors: Mapping[str, torch.Tensor | Scattered] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    def whole(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors, whole, on every rank. Collective. For small networks and tests."""
        found = {}
        for name, tensor in self.tensors.items():
            whole = tensor.collect() if isinstance(tensor, Scattered) else tensor.clone()
            assert whole is not None
            found[name] = whole
        return found


class Engine(Protocol):
    """Owns model, optimizer, average and scaler. Every rank makes the same calls in the same order."""

    @property
    def step(self) -> int:
        """Updates made so far, skipped ones included."""
        ...

    def train_step(self, micro_batches: Sequence[BatchLike]) -> Sums:
        """One update from all micro-batches of this rank's share. No host sync."""
        ...

    def begin_eval(self) -> None:
        """Called by all ranks before the first `eval_step` of an evaluation."""
        ...

    def eval_step(self, batch: BatchLike) -> Sums:
        """loss, images, top1, top5 of one batch; images of weight 0 do not count."""
        ...

    def evaluated(self) -> torch.nn.Module:
        """The network that `eval_step` runs: to be watched, not to be changed."""
        ...

    def state(self) -> EngineState:
        """The state after the last step. Collective."""
        ...

    def load_state(self, state: EngineState) -> None:
        """Take over a saved state. Raises CheckpointError, naming a tensor, when it is of another network."""
        ...

    def close(self) -> None:
        """Let go of the other ranks. Called before the process group is closed; `state` may not be asked afterwards."""
        ...
