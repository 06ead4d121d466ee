"""Where ZeRO keeps which part of which weight: flat vectors of float32, one a parameter group, each rank a stretch.

In: DeepSpeed's optimizer of stages 1-3 and the torch optimizer inside it. Out: every weight, average and optimizer
tensor by name as `Scattered`, and the same filled from saved ones. Imports nothing of DeepSpeed: it reads attributes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ii_dist.config.errors import CheckpointError
from ii_dist.engine.states import optimizer_keys
from ii_dist.runtime.scattered import Scattered

Template = list[dict[str, Tensor]]
"""Of each parameter group: what the optimizer keeps for its first parameter before any step."""


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's part of one parameter: `count` elements from `start` of flat vector `flat`, from `first` of it."""

    flat: int
    start: int
    first: int
    count: int


def take_template(optimizer: torch.optim.Optimizer) -> Template:
    """What a fresh optimizer keeps for each group. Empties its state: ZeRO gives it other parameters."""
    template = [
        {key: value for key, value in optimizer.state.get(group["params"][0], {}).items() if torch.is_tensor(value)}
        for group in optimizer.param_groups
    ]
    optimizer.state.clear()
    return template


class Partitions:
    """The flat vectors of this rank, and what of which parameter lies where in them."""

    def __init__(self, module: nn.Module, zero: Any, stage: int, optimizer: torch.optim.Optimizer) -> None:
        self._zero, self._stage, self._optimizer = zero, stage, optimizer
        self.keys: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        )
        """The vectors of weights as the optimizer knows them."""
        self.flats = [flat.detach() for flat in self.keys]
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
        self.shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, Piece] = {}
        for flat, parameters in enumerate(groups):
            for parameter in parameters:
                name = names.pop(id(parameter))
                self.shapes[name] = parameter.ds_shape if stage == 3 else parameter.shape
                self._pieces[name] = _piece(zero, parameter, flat) if stage == 3 else _piece_of_slice(parameter, flat)
        assert not names, f"ZeRO does not train {', '.join(names.values())}"

    def start_state(self, template: Template) -> None:
        """Give each vector what a fresh optimizer keeps for a parameter: zeros of its size, and copies of counters."""
        for flat, key in enumerate(self.keys):
            group = self._zero.sub_group_to_group_id[flat] if self._stage == 3 else flat
            for name, value in template[group].items():
                self._optimizer.state[key][name] = value.clone() if value.ndim == 0 else torch.zeros_like(key.detach())

    def scattered(self, prefix: str, flats: list[Tensor]) -> dict[str, Scattered]:
        """`<prefix>.<name>` of each parameter, out of vectors laid out like `flats`."""
        return {f"{prefix}.{name}": self._cut(name, flats[piece.flat]) for name, piece in self._pieces.items()}

    def optimizer_tensors(self) -> dict[str, Tensor | Scattered]:
        """`optimizer.<name>.<key>`: a stretch of what is kept for each element, counters whole."""
        found: dict[str, Tensor | Scattered] = {}
        for name, piece in self._pieces.items():
            key = self.keys[piece.flat]
            for what, value in self._optimizer.state.get(key, {}).items():
                if torch.is_tensor(value):
                    found[f"optimizer.{name}.{what}"] = self._cut(name, value) if value.shape == key.shape else value
        return found

    def cuts(self) -> dict[Tensor, list[tuple[int, int]]]:
        """Of each vector: this rank's piece (start, count) of each parameter, in the same order on every rank."""
        found: dict[Tensor, list[tuple[int, int]]] = {key: [] for key in self.keys}
        for piece in self._pieces.values():
            found[self.keys[piece.flat]].append((piece.start, piece.count))
        return found

    @torch.no_grad()
    def fill(self, flats: list[Tensor], prefix: str, saved: Mapping[str, Tensor]) -> None:
        """Take this rank's stretches of `<prefix>.<name>` over into vectors laid out like `flats`."""
        for name, piece in self._pieces.items():
            _put(flats[piece.flat], piece, saved[f"{prefix}.{name}"])

    @torch.no_grad()
    def fill_optimizer(self, saved: Mapping[str, Tensor]) -> None:
        """Take the optimizer's tensors over. Raises CheckpointError for a parameter or a counter that does not fit."""
        counted: set[tuple[int, str]] = set()
        for name, keys in optimizer_keys(saved, self._pieces).items():
            piece, shape = self._pieces[name], self.shapes[name]
            key = self.keys[piece.flat]
            state = self._optimizer.state[key]
            for what in keys:
                value = saved[f"optimizer.{name}.{what}"]
                if value.shape == shape:
                    if what not in state:
                        state[what] = torch.zeros_like(key.detach(), dtype=value.dtype)
                    _put(state[what], piece, value)
                elif (piece.flat, what) not in counted:
                    counted.add((piece.flat, what))
                    state[what] = value.to(state[what].device if what in state else value.device, copy=True)
                elif not torch.equal(state[what].cpu(), value):
                    raise CheckpointError(
                        f"optimizer.{name}.{what} is not the same for all parameters of its group, which ZeRO cannot "
                        "hold; use engine.kind=ddp or engine.zero_stage=0"
                    )

    @torch.no_grad()
    def publish(self) -> None:
        """Make the network compute with what stands in the vectors now. Collective."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for flat in range(len(self.keys)):
            self._zero._reassign_or_swap_out_partitioned_parameters(flat)
        if kept := self._zero.persistent_parameters:  # small ones stay gathered from step to step: gather them anew
            kept[0].partition(kept)

    def _cut(self, name: str, flat: Tensor) -> Scattered:
        piece = self._pieces[name]
        return Scattered(self.shapes[name], flat[piece.start : piece.start + piece.count], piece.first)


def _piece_of_slice(parameter: Any, flat: int) -> Piece:
    """Stages 1 and 2: the parameters of a group stand one after the other, ranks take equal slices of the row."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return Piece(flat, 0, 0, 0)
    place = mapping.hp_fragment_address
    return Piece(flat, place.start, mapping.lp_fragment_address.start, place.numel)


def _piece(zero: Any, parameter: Any, flat: int) -> Piece:
    """Stage 3: every parameter is cut into equal parts, one a rank; the last ones may be padded or empty."""
    in_flat, start, size = zero.grad_position[zero.get_param_id(parameter)]
    assert in_flat == flat
    first = min(parameter.ds_numel, size * zero._get_param_partition_rank(parameter))
    return Piece(flat, start, first, min(size, parameter.ds_numel - first))


def _put(flat: Tensor, piece: Piece, value: Tensor) -> None:
    flat[piece.start : piece.start + piece.count] = value.reshape(-1)[piece.first : piece.first + piece.count]
