"""Start from a plain network: weights of timm's or torchvision's ResNet, while the gates start from scratch.

In: a network of ours and a .safetensors file. Out: the network with the file's tensors, and a line that says what is
new.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ii_dist.config.errors import CheckpointError

_COUNTER = "num_batches_tracked"
"""Of a norm: not in the files of older versions, and without influence here."""


def load_backbone(model: nn.Module, file: Path | str) -> str:
    """Load all tensors of `model` but the gates' from `file`; returns one line that says which tensors are new.

    Raises CheckpointError, naming the first tensor that does not fit, for any other file; `model` is then unchanged.
    """
    tensors = _read(Path(file))
    gates = [name for name, module in model.named_modules() if name.endswith(".gate") and [*module.parameters()]]
    own = model.state_dict()
    new = {key for key in own if any(key.startswith(f"{gate}.") for gate in gates)}
    for key, tensor in own.items():
        if key not in new:
            _check(key, tensor, tensors.get(key), file)
    for key in tensors:
        if key in new:
            raise CheckpointError(f"{file}: {key} belongs to a gate: this is not a plain network, load it as a whole")
        if key not in own:
            raise CheckpointError(f"{file}: {key} is not in the network")
    model.load_state_dict({key: tensors.get(key, tensor) for key, tensor in own.items()})
    started = sum(1 for name, _ in model.named_parameters() if name in new)
    taken = f"{len(own) - len(new)} tensors from {Path(file).name}"
    return f"{taken}; {len(gates)} gates, {started} tensors, start from scratch" if gates else f"{taken}; none is new"


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from error


def _check(key: str, own: Tensor, theirs: Tensor | None, file: Path | str) -> None:
    if theirs is None:
        if key.endswith(_COUNTER):
            return
        raise CheckpointError(f"{file}: {key} is missing")
    if own.shape != theirs.shape:
        hint = "; create the network with that many classes, then reset_classifier" if key.startswith("fc.") else ""
        raise CheckpointError(f"{file}: {key} is {_size(theirs)}, the network needs {_size(own)}{hint}")
    if own.is_floating_point() != theirs.is_floating_point():
        raise CheckpointError(f"{file}: {key} is {theirs.dtype}, the network needs {own.dtype}")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"
