"""Which parameters are decayed, and which learn more slowly.

In: a network. Out: parameter groups for a torch optimizer, each parameter in exactly one, with its name.
"""

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ii_dist.config.errors import ConfigError

_DECAYED = (nn.Linear, _ConvNd)


def param_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers, decayed; everything else (biases, norms), not, unless `decay_all`.

    Decided by what a module is, never by a name. A group's `params` are (name, parameter) pairs, so the optimizer
    keeps the names as `param_names`; `lr_scale` is its rate / the rate of the schedule. A parameter that several
    modules share counts once, decayed if one of them would decay it.
    layer_decay: below 1, each layer (as the network's `group_matcher` counts them, timm's convention) has this share of
    the rate of the layer after it; the last one has the full rate. Raises ConfigError for a network that counts none.
    """
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, _DECAYED)}
    scales = _lr_scales(model, layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    named = list(model.named_parameters())
    for is_decayed in (True, False):
        for name, parameter in named:
            if (id(parameter) in decayed) is not is_decayed:
                continue
            decay = weight_decay if is_decayed or decay_all else 0.0
            group = groups.setdefault(
                (scales[name], is_decayed), {"params": [], "weight_decay": decay, "lr_scale": scales[name]}
            )
            group["params"].append((name, parameter))
    return list(groups.values())


def _lr_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    names = [name for name, _ in model.named_parameters()]
    if layer_decay == 1.0:
        return dict.fromkeys(names, 1.0)
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ConfigError(f"optim.layer_decay {layer_decay}: {type(model).__name__} does not say what its layers are")
    from timm.models import group_parameters

    layer_of = group_parameters(model, matcher(coarse=False), reverse=True)
    last = max(layer_of.values())
    return {name: layer_decay ** (last - layer_of[name]) for name in names}
