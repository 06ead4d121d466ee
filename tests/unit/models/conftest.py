"""timm cannot be imported on every machine before `ii_dist.models` has made torchvision importable."""

import ii_dist.models  # noqa: F401
