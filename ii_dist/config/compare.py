"""Whether two configs describe the same training.

In: two `RunConfig`s. Out: the dotted keys in which their recipes differ, or the refusal of them; of one, a digest of
its recipe. Keys that change where, how fast or how closely watched a run is, but not what it computes, do not count.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import RunConfig

FREE_KEYS = (
    "runs_folder",
    "expected_top1",
    "data.root",
    "data.stage_to",
    "data.threads_per_rank",
    "data.prefetch_batches",
    "data.max_bad_share",
    "data.read_retries",
    "engine.device",
    "engine.kind",
    "engine.zero_stage",
    "engine.offload_optimizer",
    "engine.checkpoint_activations",
    "engine.static_graph",
    "engine.memory_gb",
    "train.max_images_per_rank",
    "train.eval_batch_per_rank",
    "train.eval_every_epochs",
    "train.max_skipped_in_a_row",
    "train.stop_after_steps",
    "train.hang_timeout_s",
    "checkpoint",
    "metrics",
    "profile",
    "launch",
)


NEW_CONFIG_HELP = (
    "go on in an existing run folder although these settings differ, such as optim.lr,train.epochs; others are refused"
)
MOST_SHOWN = 8


def recipe_differences(old: RunConfig, new: RunConfig, named: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for each key of the recipe that differs, in the order of the schema, but for those `named`."""
    before, after = _flat(old.model_dump(mode="json"), ""), _flat(new.model_dump(mode="json"), "")
    changed = (key for key in after if before.get(key) != after[key] and not _is_free(key) and key not in named)
    return [f"{key}: {before.get(key)} -> {after[key]}" for key in changed]


def refuse_unnamed_changes(file: Path, old: RunConfig, new: RunConfig, named: Sequence[str]) -> None:
    """Raises ConfigError with both values of each key of the recipe that differs and is not `named`.

    file: the run's own config, for the message.
    """
    changed = recipe_differences(old, new, named)
    if not changed:
        return
    more = f" and {len(changed) - MOST_SHOWN} more" if len(changed) > MOST_SHOWN else ""
    keys = ",".join([*named, *(line.partition(":")[0] for line in changed)])
    raise ConfigError(
        f"{file}: this run was started with other settings ({'; '.join(changed[:MOST_SHOWN])}{more}); "
        f"restore them, use another name=..., or ask for them by name: --new-config {keys}"
    )


def key_list(text: str) -> tuple[str, ...]:
    """What follows --new-config: keys with commas between. For argparse: refuses a key that no config has."""
    keys = tuple(part.strip() for part in text.split(",") if part.strip())
    known = _flat(RunConfig(name="x").model_dump(mode="json"), "")
    if unknown := [key for key in keys if key not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no key of a config")
    return keys


def recipe_sha256(cfg: RunConfig) -> str:
    """Hex digest that two configs share exactly if their recipes are the same."""
    recipe = {key: value for key, value in _flat(cfg.model_dump(mode="json"), "").items() if not _is_free(key)}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
