"""Named tensors of a network and its optimizer, out and in again.

In: a module, an optimizer, a dict of saved tensors. Out: `model.<name>`, `ema.<name>`, `optimizer.<name>.<key>`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ii_dist.config.errors import CheckpointError
from ii_dist.engine.engine import EngineState


def model_tensors(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by their timm names below `prefix`; the module's own memory."""
    return {f"{prefix}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}


def named_optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that the optimizer keeps for a parameter, such as `optimizer.conv1.weight.momentum_buffer`.

    A count of steps that an optimizer keeps for a whole group stands under each of the group's parameters.
    """
    tensors = {}
    shared = _group_steps(optimizer)
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
        if id(parameter) in shared:
            tensors[f"optimizer.{name}.step"] = shared[id(parameter)]
    return tensors


def _group_steps(optimizer: torch.optim.Optimizer) -> dict[int, torch.Tensor]:
    """Parameter's id -> the step count of its group, where the optimizer counts so."""
    return {id(p): group["step"] for group in optimizer.param_groups if "step" in group for p in group["params"]}


def loaded_tensors(state: EngineState) -> dict[str, torch.Tensor]:
    """The tensors of a state that came from a checkpoint: each one whole."""
    tensors = {name: tensor for name, tensor in state.tensors.items() if isinstance(tensor, torch.Tensor)}
    assert len(tensors) == len(state.tensors), "a state with scattered tensors is not a loaded one: take whole()"
    return tensors


def check_fits(shapes: Mapping[str, torch.Size], saved: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError for the first of these tensors that is not there, has another shape, or is too many."""
    for name, shape in shapes.items():
        if name not in saved:
            raise CheckpointError(
                f"checkpoint of another model: it has no tensor {name}; use the config it was made with"
            )
        if saved[name].shape != shape:
            raise CheckpointError(
                f"checkpoint of another model: {name} has shape {list(saved[name].shape)} there and "
                f"{list(shape)} here; use the config it was made with"
            )
    prefixes = {name.partition(".")[0] for name in shapes}
    extra = [n for n in saved if n.partition(".")[0] in prefixes and n not in shapes]
    if extra:
        raise CheckpointError(
            f"checkpoint of another model: it has {extra[0]} besides; use the config it was made with"
        )


@torch.no_grad()
def fill(into: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copy each saved tensor into the one of its name. Raises CheckpointError for the first that does not fit."""
    check_fits({name: tensor.shape for name, tensor in into.items()}, saved)
    for name, tensor in into.items():
        tensor.copy_(saved[name])


def optimizer_keys(saved: Mapping[str, torch.Tensor], parameters: Iterable[str]) -> dict[str, list[str]]:
    """Which optimizer tensors are saved for each parameter. Raises CheckpointError for one that is not here."""
    keys: dict[str, list[str]] = {}
    for full in saved:
        if full.startswith("optimizer."):
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            keys.setdefault(name, []).append(key)
    unknown = sorted(set(keys) - set(parameters))
    if unknown:
        raise CheckpointError(f"checkpoint of another model: optimizer state of {unknown[0]}, which is not here")
    return keys


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Give each parameter its saved optimizer tensors, laid out in memory like the parameter."""
    parameters = dict(module.named_parameters())
    keys = optimizer_keys(saved, parameters)
    shared = _group_steps(optimizer)
    for name, parameter in parameters.items():
        for key in keys.get(name, []):
            value, state = saved[f"optimizer.{name}.{key}"], optimizer.state[parameter]
            if key == "step" and id(parameter) in shared:
                shared[id(parameter)].copy_(value)
                continue
            if key not in state:
                state[key] = torch.empty_like(parameter if value.shape == parameter.shape else value)
            state[key].copy_(value)
