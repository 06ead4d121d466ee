"""What a training step minimizes, and what counts as a right answer, for images with one label or two.

In: logits, labels of a batch, the recipe's loss. Out: sums over the images as 0-dim float32, on the device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ii_dist.config.schema import OptimConfig
from ii_dist.engine.engine import BatchLike


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of one batch. partner_N and share_N (share of the own label): None where no image is mixed."""

    own_N: torch.Tensor
    partner_N: torch.Tensor | None = None
    share_N: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: BatchLike, device: torch.device) -> "Labels":
        """The labels of `batch` on the engine's device."""
        three = (batch.labels_N, batch.partner_labels_N, batch.label_share_N)
        own_N, partner_N, share_N = (each if each is None else each.to(device, non_blocking=True) for each in three)
        assert own_N is not None
        return cls(own_N, partner_N, share_N)

    @property
    def main_N(self) -> torch.Tensor:
        """The label with the larger share: the one that accuracy on mixed images is counted against."""
        if self.partner_N is None or self.share_N is None:
            return self.own_N
        return torch.where(self.share_N < 0.5, self.partner_N, self.own_N)


def loss_sum(logits_NC: torch.Tensor, labels: Labels, optim: OptimConfig) -> torch.Tensor:
    """The loss of the recipe, with label smoothing, summed over the images, in float32.

    A mixed image has share * loss(own label) + (1 - share) * loss(partner's label).
    """
    if optim.loss == "bce":
        return _binary_cross_entropy(logits_NC.float(), labels, optim)
    if labels.partner_N is None or labels.share_N is None:
        return F.cross_entropy(logits_NC.float(), labels.own_N, label_smoothing=optim.label_smoothing, reduction="sum")
    log_share_NC = F.log_softmax(logits_NC.float(), dim=1)
    own_N, partner_N = (log_share_NC.gather(1, each[:, None])[:, 0] for each in (labels.own_N, labels.partner_N))
    told = (labels.share_N * own_N + (1 - labels.share_N) * partner_N).sum()
    smoothed = log_share_NC.mean(1).sum()
    return -((1 - optim.label_smoothing) * told + optim.label_smoothing * smoothed)


def _binary_cross_entropy(logits_NC: torch.Tensor, labels: Labels, optim: OptimConfig) -> torch.Tensor:
    """Each class is a question of its own; mean over the classes (as timm's default), sum over the images."""
    classes = logits_NC.shape[1]
    class_C = torch.arange(classes, device=logits_NC.device)
    # Comparisons, not a scatter: that has no fixed order of additions on a GPU.
    target_NC = (labels.own_N[:, None] == class_C).to(logits_NC.dtype)
    if labels.partner_N is not None and labels.share_N is not None:
        share_N1 = labels.share_N[:, None]
        target_NC = share_N1 * target_NC + (1 - share_N1) * (labels.partner_N[:, None] == class_C)
    target_NC = (1 - optim.label_smoothing) * target_NC + optim.label_smoothing / classes
    if optim.bce_target_threshold:
        target_NC = (target_NC > optim.bce_target_threshold).to(logits_NC.dtype)
    return F.binary_cross_entropy_with_logits(logits_NC, target_NC, reduction="sum") / classes
