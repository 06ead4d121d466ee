"""What `ii-dist export` was asked for, checked before torch is imported.

In: arguments. Out: an `ExportRequest` whose step is verified and whose file may be written, or one line that says why
not.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from ii_dist.checkpoint import FoundStep
from ii_dist.checkpoint.weights import check_target, choose_step, run_of, trained_classes, weight_names
from ii_dist.config import RunConfig, load_config
from ii_dist.train.preflight import config_of

logger = logging.getLogger(__name__)

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}
"""Name of a format -> how its files end."""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The weights of `step`, or their moving average, in a file of one of the formats `SUFFIXES`."""

    cfg: RunConfig
    num_classes: int
    step: FoundStep
    file_format: str
    out: Path
    ema: bool


def plan_export(checkpoint: Path, file_format: str, out: Path, ema: bool, force: bool) -> ExportRequest:
    """What to export from a run folder (its newest step that verifies) or a step folder. Reads every byte of the step.

    Raises ConfigError, CheckpointError.
    """
    check_target(out, SUFFIXES[file_format], force)
    cfg = load_config(config_of(checkpoint))
    step, left_out = choose_step(checkpoint)
    for newer in left_out:
        logger.warning("%s", newer.reason)
    weight_names(step.manifest, ema)
    return ExportRequest(cfg, trained_classes(run_of(step)), step, file_format, out, ema)
