"""Small pieces of a step that do not know how gradients are exchanged.

In: logits, labels, gradients, buffers. Out: sums, norms, averages. All on the device.
"""

import torch
import torch.nn.functional as F
from torch import nn


def count_correct(
    logits_NC: torch.Tensor, labels_N: torch.Tensor, weight_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-1 and top-5 correct images, each counted by its weight (1 without weights); 0-dim float32.

    Top-5 is top-C where there are fewer classes.
    """
    k = min(5, logits_NC.shape[1])
    hits_Nk = logits_NC.topk(k, dim=1).indices == labels_N[:, None]
    at_place_k = hits_Nk.sum(0, dtype=torch.float32) if weight_N is None else weight_N @ hits_Nk.to(weight_N.dtype)
    return at_place_k[0], at_place_k.sum()


def image_losses(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each image, in float32."""
    return F.cross_entropy(logits_NC.float(), labels_N, reduction="none")


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all gradients, 0-dim; not finite as soon as one element is not."""
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


class FlatBuffers:
    """The floating-point buffers of a network (running means and variances) as views of one vector.

    One copy then keeps or restores all of them, one broadcast sends them. Names and shapes in the state dict stay.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [
            (prefix, module, name, buffer)
            for prefix, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        device = named[0][-1].device if named else None
        self.flat = torch.empty(sum(b.numel() for *_, b in named), device=device)
        self._places: dict[str, tuple[int, torch.Size]] = {}
        start = 0
        for prefix, module, name, buffer in named:
            self._places[f"{prefix}.{name}" if prefix else name] = (start, buffer.shape)
            # .data: the same memory with a version counter of its own. Otherwise a module that updates its statistics
            # in place would make autograd think that those of all others, saved for their backward, had changed.
            view = self.flat[start : start + buffer.numel()].view(buffer.shape).data
            view.copy_(buffer)
            module._buffers[name] = view
            start += buffer.numel()

    def named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The buffers by name, as views of a vector that is laid out like `flat`."""
        return {name: flat[at : at + shape.numel()].view(shape) for name, (at, shape) in self._places.items()}


class Average:
    """Exponential moving average of a network's parameters and floating-point buffers."""

    def __init__(self, model: nn.Module, buffers: FlatBuffers, twin: nn.Module, decay: float) -> None:
        self.model = twin.requires_grad_(False).eval()
        self.buffers = FlatBuffers(twin)
        self._source_buffers = buffers
        self._share = 1.0 - decay
        self._mine: list[torch.Tensor] = list(twin.parameters())
        self._theirs = [p.detach() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the network by one step's share."""
        torch._foreach_lerp_(self._mine, self._theirs, self._share)
        self.buffers.flat.lerp_(self._source_buffers.flat, self._share)

    @torch.no_grad()
    def take_counters(self, model: nn.Module) -> None:
        """Copy what cannot be averaged (integer counters)."""
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            if not mine.is_floating_point():
                mine.copy_(theirs)
