"""Sizes of the data set that a config names, without opening more than the indexes' headers."""

from pathlib import Path

from ii_dist.config.index_header import read_index_header
from ii_dist.config.plan import DataFacts
from ii_dist.config.schema import DataConfig


def data_facts(cfg: DataConfig) -> DataFacts:
    """Images of both splits and the number of classes. Raises DataError when an index is missing or not an index."""
    if cfg.source == "synthetic":
        return DataFacts(cfg.synthetic_images, max(1, cfg.synthetic_images // 8), cfg.synthetic_classes)
    train, val = (read_index_header(Path(cfg.root) / f"{split}.index") for split in ("train", "val"))
    return DataFacts(train.images, val.images, len(train.classes))
