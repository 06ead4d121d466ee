"""Optimizers by name.

In: a network on its device, `OptimConfig`. Out: a torch optimizer whose rate the engine sets before each update.
"""

from collections.abc import Callable

import torch
from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import OptimConfig
from ii_dist.optim.groups import param_groups


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names. Call it after the network has its device and memory format.

    Its state lies in memory like the parameters, and has to: the fused kernels read parameter, gradient and state as
    flat memory. Whoever fills the state copies into the tensors that are there.
    """
    if cfg.optimizer not in OPTIMIZERS:
        raise ConfigError(f"optim.optimizer {cfg.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[cfg.optimizer](model, cfg)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next update on. A host number: nothing waits for the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _sgd(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum.

    Fused: one pass over memory (on CPU half the time of `foreach`, and the bits do not depend on the number of
    threads) that a `found_inf` on the device can leave out. Momentum starts as zeros: the same first update as from
    torch's own start, without a buffer of unwritten memory where the very first update is left out.
    """
    optimizer = torch.optim.SGD(
        param_groups(model, cfg.weight_decay), lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=True
    )
    if cfg.momentum:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
}
