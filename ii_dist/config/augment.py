"""The keys of `data.augment`: what happens to a training image beside being read.

In: plain values. Out: an `AugmentConfig`. `data.policies` and `data.augment` draw what it asks for.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from ii_dist.config.slices import Fraction, NonNegative, Pair, Slice

Jitter = Annotated[tuple[NonNegative, NonNegative, NonNegative, NonNegative], Strict(False)]


class AugmentConfig(Slice):
    """Random parameters of a training image; each is a pure function of (seed, epoch, index)."""

    crop_scale: Pair = (0.08, 1.0)
    """Area of the crop window as a share of the image, smallest and largest."""
    crop_ratio: Pair = (3 / 4, 4 / 3)
    """Width / height of the crop window, smallest and largest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    colour_jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation (factors in 1 - s .. 1 + s) and hue (turns, -s .. s, at most 0.5),
    in random order; 0 = that one is off."""
    colour_jitter_probability: Fraction = 1.0
    """Share of the images that are jittered."""
    policy: Literal["none", "randaugment", "trivialaugment", "autoaugment"] = "none"
    """randaugment = timm's, with the five keys below; trivialaugment = torchvision's TrivialAugmentWide; autoaugment =
    torchvision's AutoAugment for ImageNet. These two have no settings but `policy_fill`."""
    policy_ops: Annotated[int, Field(ge=1, le=16)] = 2
    """randaugment: operations drawn for each image (n)."""
    policy_probability: Fraction = 0.5
    """randaugment: probability with which a drawn operation is applied (timm's p; 1 in the paper)."""
    policy_magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = 9.0
    """randaugment: magnitude (m), of 10."""
    policy_magnitude_std: NonNegative = 0.0
    """randaugment: standard deviation of the magnitude (mstd), of 10; above 100 = uniform between 0 and m, as timm."""
    policy_increasing: bool = True
    """randaugment: every operation gets stronger with the magnitude (inc1); false = timm's older tables (inc0)."""
    policy_fill: Literal["mean", "zero"] = "mean"
    """What moves in from outside in shear, translate and rotate: mean = `data.mean`, as timm; zero = black, as
    torchvision's recipes."""
    erase_probability: Fraction = 0.0
    """Share of the images in which a rectangle is erased."""
    erase_scale: Pair = (0.02, 1 / 3)
    """Area of the rectangle as a share of the image, smallest and largest."""
    erase_ratio: Pair = (0.3, 3.3)
    """Width / height of the rectangle, smallest and largest."""
    erase_fill: Literal["zero", "noise"] = "zero"
    """Value of an erased pixel after normalization: zero = the mean colour, noise = normal with deviation 1."""
    mixup_alpha: NonNegative = 0.0
    """Mixup blends an image with its partner, in shares drawn from Beta(alpha, alpha); 0 = no Mixup."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix pastes a box of the partner, its share of the area drawn from Beta(alpha, alpha); 0 = no CutMix."""
    mix_probability: Fraction = 1.0
    """Probability that an image is mixed at all."""
    mix_switch_probability: Fraction = 0.5
    """Probability of CutMix instead of Mixup for an image, where both have an alpha."""
    mix_off_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the end of the run in which nothing is mixed."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with a partner, so that batches must hold whole pairs."""
        return self.mix_probability > 0 and max(self.mixup_alpha, self.cutmix_alpha) > 0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("crop", "erase"):
            scale, ratio = getattr(self, f"{name}_scale"), getattr(self, f"{name}_ratio")
            if not 0.0 < scale[0] <= scale[1] <= 1.0:
                raise ValueError(f"{name}_scale {list(scale)}: needs 0 < smallest <= largest <= 1")
            if not 0.0 < ratio[0] <= ratio[1]:
                raise ValueError(f"{name}_ratio {list(ratio)}: needs 0 < smallest <= largest")
        if self.colour_jitter[3] > 0.5:
            raise ValueError(f"colour_jitter {list(self.colour_jitter)}: needs a hue (the fourth) of 0.5 or less")
        return self
