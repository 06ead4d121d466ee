"""The losses of mixed and unmixed labels against timm's: its Mixup targets with its soft losses."""

import ii_dist.models  # noqa: F401  # isort: skip  # makes timm importable on every machine

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from ii_dist.config import OptimConfig
from ii_dist.engine.losses import Labels, loss_sum

IMAGES, CLASSES = 10, 7


def case(seed: int, mixed: bool) -> tuple[torch.Tensor, Labels, torch.Tensor]:
    """Logits, labels and timm's soft targets without smoothing; timm pairs the first image with the last."""
    g = torch.Generator().manual_seed(seed)
    logits_NC = torch.randn(IMAGES, CLASSES, generator=g) * 3
    own_N = torch.randint(CLASSES, (IMAGES,), generator=g)
    share_N = torch.rand(IMAGES, generator=g)
    labels = Labels(own_N, own_N.flip(0), share_N) if mixed else Labels(own_N)
    return logits_NC, labels, share_N[:, None] if mixed else torch.ones(IMAGES, 1)


@given(seed=st.integers(0, 999), smoothing=st.sampled_from([0.0, 0.1]), mixed=st.booleans())
def test_cross_entropy_is_timms(seed: int, smoothing: float, mixed: bool) -> None:
    logits_NC, labels, share_N1 = case(seed, mixed)
    found = loss_sum(logits_NC, labels, OptimConfig(label_smoothing=smoothing))
    targets_NC = mixup_target(labels.own_N, CLASSES, share_N1, smoothing)
    assert found.item() / IMAGES == pytest.approx(SoftTargetCrossEntropy()(logits_NC, targets_NC).item(), rel=1e-5)
    if not mixed:
        plain = LabelSmoothingCrossEntropy(smoothing)(logits_NC, labels.own_N)
        assert found.item() / IMAGES == pytest.approx(plain.item(), rel=1e-5)


@given(
    seed=st.integers(0, 999),
    smoothing=st.sampled_from([0.0, 0.1]),
    threshold=st.sampled_from([0.0, 0.2, 0.5]),
    mixed=st.booleans(),
)
def test_binary_cross_entropy_is_timms(seed: int, smoothing: float, threshold: float, mixed: bool) -> None:
    logits_NC, labels, share_N1 = case(seed, mixed)
    optim = OptimConfig(loss="bce", label_smoothing=smoothing, bce_target_threshold=threshold)
    theirs = BinaryCrossEntropy(smoothing, threshold or None)
    target = mixup_target(labels.own_N, CLASSES, share_N1, smoothing) if mixed else labels.own_N
    assert loss_sum(logits_NC, labels, optim).item() / IMAGES == pytest.approx(
        theirs(logits_NC, target).item(), rel=1e-5
    )


def test_gradients_of_a_mixed_batch_are_timms() -> None:
    logits_NC, labels, share_N1 = case(3, mixed=True)
    for optim, theirs in (
        (OptimConfig(label_smoothing=0.1), SoftTargetCrossEntropy()),
        (OptimConfig(label_smoothing=0.1, loss="bce"), BinaryCrossEntropy()),
    ):
        one, two = logits_NC.clone().requires_grad_(), logits_NC.clone().requires_grad_()
        (loss_sum(one, labels, optim) / IMAGES).backward()
        theirs(two, mixup_target(labels.own_N, CLASSES, share_N1, 0.1)).backward()
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_a_share_of_one_is_the_own_label_alone_and_equal_labels_are_one(loss: str) -> None:
    logits_NC, labels, _ = case(5, mixed=False)
    optim = OptimConfig.model_validate({"loss": loss})
    alone = loss_sum(logits_NC, labels, optim)
    others = Labels(labels.own_N, labels.own_N.flip(0), torch.ones(IMAGES))
    equal = Labels(labels.own_N, labels.own_N, torch.full((IMAGES,), 0.3))
    for mixed in (others, equal):
        assert loss_sum(logits_NC, mixed, optim).item() == pytest.approx(alone.item(), rel=1e-6)


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits_NC, labels, _ = case(6, mixed=True)
    for loss in ("cross_entropy", "bce"):
        optim = OptimConfig.model_validate({"loss": loss})
        low = loss_sum(logits_NC.bfloat16(), labels, optim)
        assert low.dtype == torch.float32
        assert low.item() == loss_sum(logits_NC.bfloat16().float(), labels, optim).item()


def test_the_label_with_the_larger_share_counts() -> None:
    own_N, partner_N = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    assert Labels(own_N, partner_N, torch.tensor([0.49, 0.5, 1.0])).main_N.tolist() == [4, 2, 3]
    assert Labels(own_N).main_N is own_N
