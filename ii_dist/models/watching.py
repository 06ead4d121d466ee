"""What the gates of a network see and answer, looked at from outside while it runs.

In: a network, names of blocks. Out: a `GateView` a block. Nothing in the network is changed.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

F32 = NDArray[np.float32]


@dataclass(slots=True)
class GateView:
    """What one gate saw and answered in the last forward pass; a gate without a lens has no images."""

    block: str
    image_NHW: F32 | None = None
    """The pseudo-image."""
    view_Nhw: F32 | None = None
    """What the lens made of it."""
    scale_NC: F32 | None = None
    """The factor of each channel."""


def gates_of(network: nn.Module) -> dict[str, nn.Module]:
    """Block (such as layer3.2) -> its gate, in the network's order."""
    return {name.removesuffix(".gate"): module for name, module in network.named_modules() if name.endswith(".gate")}


def last_blocks(gates: Mapping[str, nn.Module]) -> list[str]:
    """Of the blocks with gates, the last of each stage."""
    return list({block.rpartition(".")[0]: block for block in gates}.values())


@contextlib.contextmanager
def watch_gates(gates: Mapping[str, nn.Module], blocks: Sequence[str], most: int) -> Iterator[list[GateView]]:
    """Inside, each forward pass notes what the gates of `blocks` do with its first `most` images."""
    views = [GateView(block) for block in blocks]
    with contextlib.ExitStack() as stack:
        for view in views:
            gate: Any = gates[view.block]
            stack.callback(gate.register_forward_hook(_keep_factors(view, most)).remove)
            if (lens := getattr(gate, "lens", None)) is not None:
                stack.callback(lens.register_forward_hook(_keep_images(view, most)).remove)
        yield views


def joined(views: Sequence[GateView]) -> GateView:
    """What one gate did with several images one after the other, as if they had been one batch."""
    return GateView(
        views[0].block,
        _stacked([view.image_NHW for view in views]),
        _stacked([view.view_Nhw for view in views]),
        _stacked([view.scale_NC for view in views]),
    )


def _stacked(arrays: Sequence[F32 | None]) -> F32 | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None


def _keep_factors(view: GateView, most: int) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...], scale_NC11: Tensor) -> None:
        view.scale_NC = _on_host(scale_NC11[:most].flatten(1))

    return hook


def _keep_images(view: GateView, most: int) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...], view_Nhw: Tensor) -> None:
        image_N1HW = inputs[0]
        view.image_NHW = _on_host(image_N1HW[:most].flatten(0, 1))
        view.view_Nhw = _on_host(view_Nhw.reshape(len(image_N1HW), *view_Nhw.shape[-2:])[:most])

    return hook


def _on_host(tensor: Tensor) -> F32:
    array: F32 = tensor.detach().float().cpu().numpy()
    return array.copy()
