"""LARS and LAMB where no rank holds a layer whole.

In: flat vectors, where which parameter lies in them, a sum over the ranks. Out: the updates of timm's `Lars` and
`Lamb`. Both scale a layer's update by norms over the whole layer; here those are put together from the pieces of all
ranks, with one exchange of two numbers a layer.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Cuts = Sequence[tuple[int, int]]
"""(start, count) of this rank's piece of each parameter of a vector; the same parameters in the same order on every
rank, with count 0 where a rank has nothing of one."""


class PieceOptimizer(torch.optim.Optimizer, abc.ABC):
    """Takes over groups and state of a fresh optimizer; then `cuts` and `sum_over_ranks` are to be set."""

    def __init__(self, whole: torch.optim.Optimizer) -> None:
        groups = [{k: v for k, v in g.items() if k not in ("param_names", "step")} for g in whole.param_groups]
        super().__init__(groups, dict(whole.defaults))
        for group in whole.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = dict(whole.state[parameter])
                if "step" in group:
                    self.state[parameter]["step"] = group["step"].clone()
        self.cuts: Mapping[Tensor, Cuts] = {}
        self.sum_over_ranks: Callable[[Tensor], Tensor] = lambda numbers: numbers

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """One update of every vector that has a gradient. Collective."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update(flat, flat.grad, self.state[flat], group)

    @abc.abstractmethod
    def _update(self, flat: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None: ...

    def _norms(self, flat: Tensor, *vectors: Tensor) -> Sequence[Tensor]:
        """Of each vector: the norm of each parameter of `flat` over all ranks."""
        cuts = self.cuts[flat]
        norms = [torch.stack(torch._foreach_norm([v[a : a + n] for a, n in cuts])) for v in vectors]
        return self.sum_over_ranks(torch.stack(norms).square()).sqrt().unbind()

    def _scale(self, flat: Tensor, vector: Tensor, factors: Tensor) -> None:
        """Multiply the piece of each parameter in `vector`, laid out like `flat`, by its factor."""
        torch._foreach_mul_([vector[a : a + n] for a, n in self.cuts[flat]], list(factors.unbind()))


class LarsOnPieces(PieceOptimizer):
    """timm's `Lars`: SGD with the gradient of each decayed layer scaled to the length of its weights."""

    def _update(self, flat: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decay, momentum = group["weight_decay"], group["momentum"]
        if decay:
            weights, gradients = self._norms(flat, flat, gradient)
            trust = group["trust_coeff"] * weights / (gradients + weights * decay + group["eps"])
            gradient = gradient.add(flat, alpha=decay)
            self._scale(flat, gradient, _where_both(weights, gradients, trust))
        if momentum:
            kept = state["momentum_buffer"].mul_(momentum).add_(gradient)
            gradient = gradient.add(kept, alpha=momentum) if group["nesterov"] else kept
        flat.add_(gradient, alpha=-group["lr"])


class LambOnPieces(PieceOptimizer):
    """timm's `Lamb`: Adam's direction, of each decayed layer scaled to the length of its weights."""

    def _update(self, flat: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        state["step"] += 1
        step = int(state["step"])
        mean = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        update = (mean / (1 - beta1**step)).div_(root)
        if decay:
            update.add_(flat, alpha=decay)
            weights, updates = self._norms(flat, flat, update)
            self._scale(flat, update, _where_both(weights, updates, weights / updates))
        flat.add_(update, alpha=-group["lr"])


def _where_both(one: Tensor, other: Tensor, trust: Tensor) -> Tensor:
    """`trust` where both norms are above zero, else 1: no scaling."""
    return torch.where((one > 0) & (other > 0), trust, torch.ones_like(trust))


ON_PIECES: dict[str, Callable[[torch.optim.Optimizer], PieceOptimizer]] = {
    "lamb": LambOnPieces,
    "lars": LarsOnPieces,
}
"""Optimizers that need norms over whole layers, for engines that cut layers into pieces."""
