"""The float32 weights of a folder that DeepSpeed saved (ZeRO stages 0 to 3); only read, never written.

In: the folder, and why its pickled classes may be opened. Out: the network's tensors by name, put together from the
ranks' partitions when asked for, one at a time. DeepSpeed itself is not needed. Layout as of DeepSpeed 0.19:

    latest                                                     the newest tag
    <tag>/mp_rank_00_model_states.pt                           stages 0-2: weights (of the step's type) and buffers
    <tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt          stage 3: buffers, shapes
    <tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   stages 1-3: rank r's part of the float32 weights, flat
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ii_dist.checkpoint.disk import hash_file, read_small
from ii_dist.checkpoint.foreign import load_tensors
from ii_dist.checkpoint.foreign_tensor import ForeignTensor
from ii_dist.checkpoint.shards import TensorSpec, spec_of
from ii_dist.config.errors import CheckpointError

LATEST = "latest"
_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM_STATES = re.compile(r"(?:\w+?_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_STORED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


@dataclass(frozen=True, slots=True)
class Consent:
    """Why files with pickled classes may be opened: the user made them (trusted), or their sha256 are known.

    hashes: file name -> sha256 in hex.
    """

    trusted: bool = False
    hashes: Mapping[str, str] = field(default_factory=dict)

    def check(self, path: Path) -> None:
        """Raises CheckpointError, saying how consent is given, where there is none."""
        if self.trusted:
            return
        if path.name not in self.hashes:
            raise CheckpointError(
                f"{path}: holds stored Python objects, and such a file may run programs; if you know who "
                "made it, say --trust, or give its sha256 with --hashes FILE (lines of sha256sum)"
            )
        if hash_file(path)[1] != self.hashes[path.name]:
            raise CheckpointError(f"{path}: its sha256 is not the one of --hashes; it was changed or is another file")


def is_deepspeed(folder: Path) -> bool:
    return (folder / LATEST).is_file() or any(_MODEL_STATES.fullmatch(path.name) for path in folder.iterdir())


def deepspeed_tensors(folder: Path, consent: Consent) -> dict[str, ForeignTensor]:
    """Parameters and buffers, floating-point ones as float32. Raises CheckpointError."""
    step = _tag_folder(folder)
    models = _by_rank(step, _MODEL_STATES)
    if not models:
        raise CheckpointError(f"{step}: holds no DeepSpeed model states (mp_rank_00_model_states.pt)")
    states = [load_tensors(path) for path in models]
    try:
        if states[0]["param_shapes"] is None:  # stage 0: no partitions
            return _renamed({name: _whole(name, tensor) for name, tensor in states[0]["module"].items()})
        return _renamed(_from_partitions(step, states, consent))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{step}: not as DeepSpeed 0.19 writes it ({type(error).__name__}: {text})") from None


def _tag_folder(folder: Path) -> Path:
    """The folder of the newest tag, or `folder` itself when it is one."""
    if not (folder / LATEST).exists():
        return folder
    tag = read_small(folder / LATEST, 4096).decode(errors="replace").strip()
    if Path(tag).name != tag or tag in ("", ".", ".."):
        raise CheckpointError(f"{folder / LATEST}: {tag[:80]!r} is not the name of a folder in it")
    if not (folder / tag).is_dir():
        raise CheckpointError(f"{folder / LATEST}: names {tag!r}, which is not there")
    return folder / tag


def _by_rank(step: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Files of a kind in the order of their ranks. Raises CheckpointError where a rank is missing."""
    found: dict[int, Path] = {}
    for path in step.iterdir():
        if match := pattern.fullmatch(path.name):
            if int(match[2]) != 0:
                raise CheckpointError(f"{path}: this network was split over ranks by tensor parallelism; not supported")
            found[int(match[1] or 0)] = path
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{step}: files of ranks {sorted(found)}; some are missing")
    return [found[rank] for rank in range(len(found))]


def _from_partitions(step: Path, states: list[dict[str, Any]], consent: Consent) -> dict[str, ForeignTensor]:
    files = _by_rank(step, _OPTIM_STATES)
    for path in files:
        consent.check(path)
    parts = [load_tensors(path, _STORED_CLASSES)["optimizer_state_dict"] for path in files]
    counts = parts[0]["partition_count"] if parts else 1
    if len(parts) != (max(counts) if isinstance(counts, list) else counts):
        raise CheckpointError(f"{step}: {len(parts)} optimizer files of {counts} ranks")
    module = states[0]["module"]
    shapes = {name: tuple(shape) for group in states[0]["param_shapes"] for name, shape in group.items()}
    flat = _stage3(parts, shapes) if "fp32_flat_groups" in parts[0] else _stage1_2(parts, shapes)
    # Buffers, and below stage 3 also what was not trained, stand whole among the step's weights.
    found = {name: _whole(name, tensor) for name, tensor in module.items() if name not in shapes} | _frozen(states)
    for name, shape in shapes.items():
        pieces = list(flat[name])
        if sum(piece.numel() for piece in pieces) < prod(shape):
            raise CheckpointError(f"{step}: its partitions do not hold all of {name}")
        spec = TensorSpec(name, "F32", shape)
        found[name] = ForeignTensor(spec, partial(_joined, pieces, shape))
    for alias, name in (states[0]["shared_params"] or {}).items():
        if name in found:
            found[alias] = found[name]
    return found


def _stage1_2(parts: list[dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Tensor]]:
    """Stretches of each parameter, in order: each rank says which of them its flat vectors hold."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for part in parts:
        groups = zip(part["single_partition_of_fp32_groups"], part["param_slice_mappings"], strict=True)
        for vector, mapping in groups:
            for name, address in mapping.items():
                pieces[name].append(vector.narrow(0, address.start, address.numel))
    return pieces


def _stage3(parts: list[dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Tensor]]:
    """Stretches of each parameter, in order: every rank holds an equal share of it, the last one padded."""
    pieces: dict[str, list[Tensor]] = {}
    at = 0
    for name, shape in shapes.items():
        share = -(-prod(shape) // len(parts))
        pieces[name] = [piece for part in parts for piece in _cut(part["fp32_flat_groups"], at, share)]
        at += share
    if any(sum(group.numel() for group in part["fp32_flat_groups"]) != at for part in parts):
        raise ValueError("the flat weights are longer than all parameters")
    return pieces


def _cut(groups: list[Tensor], start: int, count: int) -> Iterator[Tensor]:
    """Elements [start, start + count) of vectors that lie one after the other."""
    for group in groups:
        first, last = max(0, start), min(group.numel(), start + count)
        if first < last:
            yield group[first:last]
        start -= group.numel()


def _frozen(states: list[dict[str, Any]]) -> dict[str, ForeignTensor]:
    """Parameters that were not trained; in stage 3 every rank holds a stretch of each."""
    found = {}
    for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
        pieces = [state["frozen_param_fragments"][name].reshape(-1) for state in states]
        spec = TensorSpec(name, "F32", tuple(shape))
        found[name] = ForeignTensor(spec, partial(_joined, pieces, tuple(shape)))
    return found


def _joined(pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.cat([piece.to(torch.float32) for piece in pieces])[: prod(shape)].view(shape)


def _whole(name: str, tensor: Tensor) -> ForeignTensor:
    wide = torch.float32 if tensor.is_floating_point() else tensor.dtype
    spec = spec_of(name, tensor.to("meta", wide))
    return ForeignTensor(spec, lambda: tensor.to(wide))


def _renamed(found: dict[str, ForeignTensor]) -> dict[str, ForeignTensor]:
    """Without the prefix that a wrapper around the network leaves."""
    if found and all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found
