"""Optimizers by name: torch's and timm's.

In: a network on its device, `OptimConfig`. Out: a torch optimizer whose rate the engine sets before each update.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import OptimConfig
from ii_dist.optim.groups import param_groups

LAYER_WISE = ("lamb", "lars", "muon")
"""Optimizers whose update of a tensor needs the whole tensor; `ON_PIECES` has those that can do without."""


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `cfg` names. Call it after the network has its device and memory format.

    Its state lies in memory like the parameters, and has to: the fused kernels read parameter, gradient and state as
    flat memory. Whoever fills the state copies into the tensors that are there.
    """
    if cfg.optimizer not in OPTIMIZERS:
        raise ConfigError(f"optim.optimizer {cfg.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
    groups = param_groups(model, cfg.weight_decay, layer_decay=cfg.layer_decay, decay_all=cfg.decay_norms_and_biases)
    return OPTIMIZERS[cfg.optimizer](groups, cfg)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` (times the group's own share of it) from the next update on. A host number: nothing waits for it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a `found_inf` on the device can leave out an update; if not, the host has to look."""
    return bool(optimizer.defaults.get("fused"))


def _sgd(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum.

    Fused: one pass over memory (on CPU half the time of `foreach`, and the bits do not depend on the number of
    threads) that a `found_inf` on the device can leave out. Momentum starts as zeros: the same first update as from
    torch's own start, without a buffer of unwritten memory where the very first update is left out.
    """
    optimizer = torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, fused=True)
    if cfg.momentum:
        _start_at_zero(optimizer, "momentum_buffer")
    return optimizer


def _adamw(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Loshchilov and Hutter 2019; fused, for the reasons of SGD."""
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps or 1e-8, fused=True)
    _start_at_zero(optimizer, "exp_avg", "exp_avg_sq")
    for parameter, state in optimizer.state.items():
        state["step"] = torch.zeros((), device=parameter.device)
    return optimizer


def _lamb(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """You et al. 2020, timm's. Its own clipping is off: `optim.clip_norm` is the one that the config states."""
    from timm.optim import Lamb

    optimizer: torch.optim.Optimizer = Lamb(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps or 1e-6, max_grad_norm=None)
    _start_at_zero(optimizer, "exp_avg", "exp_avg_sq")
    for group in optimizer.param_groups:
        group["step"] = torch.zeros(())
    return optimizer


def _lars(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """You et al. 2017, timm's. What is not decayed (norms, biases) is not rescaled either, as in the paper's code."""
    from timm.optim import Lars

    optimizer: torch.optim.Optimizer = Lars(
        groups,
        lr=cfg.lr,
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        trust_coeff=cfg.trust_coefficient,
        eps=cfg.eps or 1e-8,
    )
    if cfg.momentum:
        _start_at_zero(optimizer, "momentum_buffer")
    return optimizer


def _muon(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Jordan 2024, timm's, with convolutions as matrices (outputs x inputs and taps); AdamW for what is no matrix.

    Updates are scaled to the size of AdamW's, so that one rate and one weight decay serve both.
    """
    from timm.optim import Muon

    optimizer: torch.optim.Optimizer = Muon(
        groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, betas=cfg.betas, eps=cfg.eps or 1e-7
    )
    return optimizer


def _start_at_zero(optimizer: torch.optim.Optimizer, *keys: str) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key in keys:
                optimizer.state[parameter][key] = torch.zeros_like(parameter, requires_grad=False)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lamb": _lamb,
    "lars": _lars,
    "muon": _muon,
}
