"""Plain weights into a network with gates: what is new is said, what does not fit is refused and changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ii_dist.config.errors import CheckpointError
from ii_dist.models import GATES
from ii_dist.models.pretrained import load_backbone

SIDE = 64


def _images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def _ours(name: str = "ini_resnet18", **options: object) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = timm.create_model(name, **options)
    return model


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet18")
    model.train()(_images())  # running statistics that are not those of a new network
    return model.eval()


@pytest.fixture
def file(tmp_path: Path, plain: nn.Module) -> Path:
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def test_resnet50_of_torchvision_and_what_is_new(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    save_file(theirs.state_dict(), tmp_path / "tv.safetensors")
    ours = _ours("ini_resnet50").eval()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    line = load_backbone(ours, tmp_path / "tv.safetensors")
    assert line == "320 tensors from tv.safetensors; 16 gates, 80 tensors, start from scratch"
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[key] if ".gate." in key else theirs.state_dict()[key]), key
    for module in ours.modules():
        if hasattr(module, "gate"):
            module.gate = None
    torch.testing.assert_close(ours(_images()), theirs(_images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate(gate: str, file: Path, plain: nn.Module) -> None:
    ours = _ours(gate=gate).eval()
    line = load_backbone(ours, file)
    if gate == "none":
        assert line == "122 tensors from plain.safetensors; none is new"
        assert torch.equal(ours(_images()), plain(_images()))
    else:
        started = [n for n, _ in ours.named_parameters() if ".gate." in n]
        assert line.endswith(f"; 8 gates, {len(started)} tensors, start from scratch")
    assert "\n" not in line


def test_half_precision_and_files_without_counters(tmp_path: Path, plain: nn.Module) -> None:
    state = {k: v.half() for k, v in plain.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "half.safetensors")
    ours = _ours()
    load_backbone(ours, tmp_path / "half.safetensors")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.layer3[0].bn1.running_mean, state["layer3.0.bn1.running_mean"].float())  # type: ignore[index,union-attr]


Change = Callable[[dict[str, Tensor]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "missing": (lambda s: s.pop("layer2.0.conv2.weight"), r"layer2\.0\.conv2\.weight is missing$"),
    "missing statistic": (lambda s: s.pop("bn1.running_var"), r"bn1\.running_var is missing$"),
    "shape": (
        lambda s: s.update({"layer1.0.conv1.weight": torch.zeros(64, 32, 3, 3)}),
        r"layer1\.0\.conv1\.weight is 64x32x3x3, the network needs 64x64x3x3$",
    ),
    "order of sides": (
        lambda s: s.update({"layer1.0.conv1.weight": torch.zeros(64, 64, 9, 1)}),
        r"layer1\.0\.conv1\.weight is 64x64x9x1, the network needs 64x64x3x3$",
    ),
    "classes": (
        lambda s: s.update({"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}),
        r"fc\.weight is 10x512, the network needs 1000x512; .*reset_classifier",
    ),
    "unknown": (lambda s: s.update({"layer9.weight": torch.zeros(1)}), r"layer9\.weight is not in the network$"),
    "integers": (
        lambda s: s.update({"bn1.weight": torch.ones(64, dtype=torch.int8)}),
        r"bn1\.weight is torch\.int8, the network needs torch\.float32$",
    ),
    "gates of its own": (
        lambda s: s.update({"layer1.0.gate.squeeze.weight": torch.zeros(4, 84)}),
        r"layer1\.0\.gate\.squeeze\.weight belongs to a gate",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_anything_else_is_refused_in_one_line_and_changes_nothing(what: str, file: Path) -> None:
    change, said = WRONG[what]
    state = load_file(file)
    change(state)
    save_file(state, file)
    ours = _ours()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(CheckpointError, match=said) as refusal:
        load_backbone(ours, file)
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_the_first_tensor_in_the_networks_order_is_named(file: Path) -> None:
    state = load_file(file)
    del state["layer4.0.conv1.weight"], state["layer1.1.conv2.weight"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"layer1\.1\.conv2\.weight is missing"):
        load_backbone(_ours(), file)


def test_another_network_and_what_is_no_such_file(tmp_path: Path, file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight is 64x64x3x3, the network needs 64x64x1x1"):
        load_backbone(_ours("ini_resnet50"), file)
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_backbone(_ours(), tmp_path / "nowhere.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_backbone(_ours(), broken)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_backbone(_ours(), tmp_path)


def test_a_classifier_of_another_size_comes_after(file: Path) -> None:
    """What the refusal advises."""
    ours = _ours()
    load_backbone(ours, file)
    ours.reset_classifier(10)  # type: ignore[operator]
    assert ours.eval()(_images()).shape == (2, 10)
