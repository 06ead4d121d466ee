"""The network's weights of a step, for programs that do not go on training.

In: what a user typed (a run or a step folder, a file of weights, a file to make). Out: the step meant, the names of its
weights, a network filled with them. Only `load_network` and `load_network_file` import torch.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ii_dist.checkpoint.finder import FoundStep, LeftOut, check_step, find_newest, step_folders
from ii_dist.checkpoint.manifest import Manifest
from ii_dist.config.errors import CheckpointError, ConfigError
from ii_dist.config.run_folder import COMMITTED, RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

# Keys of the config's `model` that say how to train, or that timm is given in another place.
_NOT_ARGUMENTS = ("network", "gate", "zero_init_last", "drop_path")


def choose_step(path: Path) -> tuple[FoundStep, list[LeftOut]]:
    """The step folder `path`, or the newest step of a run that verifies, and the newer ones left out.

    Every byte of it was hashed. Raises CheckpointError when there is none.
    """
    folders = step_folders(path)
    if folders == [path]:
        manifest, problems = check_step(path)
        if manifest is None or problems:
            raise CheckpointError(f"{path}: {problems[0]}; choose another step")
        return FoundStep(manifest.step, path, manifest), []
    found, left_out = find_newest(folders[0].parent)
    if found is None:
        raise CheckpointError(f"{path}: none of its {len(folders)} steps is whole ({left_out[0].reason})")
    return found, left_out


def run_of(step: FoundStep) -> RunFolder:
    """The run folder that a step stands in."""
    return RunFolder(step.path.resolve().parent.parent)


def trained_classes(run: RunFolder) -> int:
    """Classes of the data set that a run was planned for, from its plan.json. Raises CheckpointError."""
    try:
        classes = json.loads(run.plan.read_text(encoding="utf-8"))["num_classes"]
    except OSError as error:
        raise CheckpointError(f"{run.plan}: {error.strerror}; a step is used inside its run folder") from None
    except (ValueError, KeyError, TypeError):
        classes = None
    if not isinstance(classes, int) or classes < 1:
        raise CheckpointError(f"{run.plan}: says no num_classes; a step is used inside its run folder")
    return classes


def weight_names(manifest: Manifest, ema: bool) -> dict[str, str]:
    """timm's names -> names in the checkpoint. A tensor that has no average is taken as it is."""
    names = {name.removeprefix("model."): name for name in manifest.tensors if name.startswith("model.")}
    if not names:
        raise CheckpointError(f"step {manifest.step}: holds no tensors named model.*")
    if not ema:
        return names
    averages = {name.removeprefix("ema."): name for name in manifest.tensors if name.startswith("ema.")}
    if not averages:
        raise CheckpointError(f"step {manifest.step}: holds no EMA weights (engine.ema_half_life_epochs was 0)")
    return names | averages


def load_network(network: "nn.Module", step: FoundStep, ema: bool) -> None:
    """Fill `network` with the weights of a verified step; every tensor of both must fit. Raises CheckpointError."""
    from ii_dist.checkpoint.loader import load_step

    names = weight_names(step.manifest, ema)
    tensors, _ = load_step(step.path, step.manifest, names.values(), verified=True)
    _fill(network, {name: tensors[old] for name, old in names.items()}, step.path)


def load_network_file(network: "nn.Module", path: Path) -> dict[str, str]:
    """Fill `network` with a safetensors file of weights under timm's names; what the file says of itself.

    Every tensor of both must fit. Raises CheckpointError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            facts = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    _fill(network, tensors, path)
    return facts


def _fill(network: "nn.Module", tensors: Mapping[str, "Tensor"], source: Path) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{source}: {name} is {_shape(theirs.get(name))} there and {_shape(own.get(name))} in the "
                "network of the config"
            )
    network.load_state_dict(dict(tensors))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def check_target(out: Path, suffix: str, force: bool) -> None:
    """Refuse a file name that a result should not be written to. Raises ConfigError."""
    if out.suffix != suffix:
        raise ConfigError(f"--out {out}: needs a name that ends in {suffix}")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    if (out.parent / COMMITTED).exists():
        raise ConfigError(f"--out {out}: a checkpoint folder takes no other files; choose another place")
    if os.path.lexists(out) and not (force and out.is_file()):
        raise ConfigError(f"--out {out}: exists already; choose another name or add --force")


def timm_line(model: Mapping[str, Any], num_classes: int | None, file: Path) -> str:
    """The Python that loads a safetensors file of weights; `model` is that part of the run's config."""
    name = model.get("network", "NETWORK")
    gate = model.get("gate", "none")
    arguments = [repr(name), f"gate={gate!r}"]
    if gate != "none":
        arguments += [f"{key}={value!r}" for key, value in model.items() if key not in _NOT_ARGUMENTS]
    if num_classes is not None:
        arguments.append(f"num_classes={num_classes}")
    arguments.append(f"checkpoint_path={str(file)!r}")
    return f"import ii_dist.models, timm; model = timm.create_model({', '.join(arguments)})"


def loading_line(step: Path, manifest: Manifest, file: Path) -> str:
    """`timm_line` for weights of a step folder, from its run's config.yaml if that is there."""
    config = RunFolder(step.resolve().parent.parent).config
    model: dict[str, Any] = {}
    if config.is_file():
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        model = tree.get("model", {}) if isinstance(tree, dict) else {}
    head = manifest.tensors.get("model.fc.weight")
    return timm_line(model, head.shape[0] if head is not None and head.shape else None, file)
