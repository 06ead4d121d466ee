"""Which parameters are decayed.

In: a network. Out: parameter groups for a torch optimizer, each parameter in exactly one, with its name.
"""

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

_DECAYED = (nn.Linear, _ConvNd)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights of convolutions and linear layers, decayed; everything else (biases, norms), not.

    Decided by what a module is, never by a name. A group's `params` are (name, parameter) pairs, so the optimizer
    keeps the names as `param_names`. A parameter that several modules share counts once, decayed if one of them
    would decay it. Empty groups are left out.
    """
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, _DECAYED)}
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
