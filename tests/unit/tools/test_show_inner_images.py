"""The picture of inner images: what is watched is what the network computes, what is drawn is what was watched."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ii_dist.checkpoint.weights import choose_step
from ii_dist.config import DataConfig, ModelConfig, load_config
from ii_dist.config.errors import ConfigError, DataError
from ii_dist.data import make_eval_source
from ii_dist.models import create_model
from ii_dist.models.watching import GateView
from ii_dist.runtime import World
from tests.images import make_data_set, picture, plan_of, run_config
from tests.tiny_run import ROOT, SIDE, train_tiny_run
from tools import show_inner_images
from tools._inner_images import Scene, draw
from tools.show_inner_images import main, read_pixels, watch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    (tmp_path / "cats").mkdir()
    paths = [tmp_path / "cats" / f"{k}.png" for k in range(3)]
    for k, path in enumerate(paths):
        picture(k, 40, 24 + 8 * k).save(path)
    return [str(path) for path in paths]


def network(gate: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    cfg = ModelConfig.model_validate({"network": "ini_resnet20", "gate": gate, "zero_init_last": False, **options})
    net = create_model(cfg, num_classes=4)
    with torch.no_grad():
        net(torch.randn(8, 3, SIDE, SIDE) * 2 + 1)  # statistics that are not those of the start
    return net.eval()


class Taps:
    """Inputs and outputs of modules by name, of the last forward pass."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name in names:
            net.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = inputs[0].clone(), output.clone()

        return hook


def test_pseudo_image_lens_and_factors_are_those_of_the_block() -> None:
    """From the block's own maps, number by number: the fold, the lens with its norm, and y = relu(U s + I)."""
    net = network("fold3x3")
    taps = Taps(net, ["layer3.2", "layer3.2.bn2"])
    x = torch.randn(2, 3, SIDE, SIDE)
    (view,) = watch(net, x, ["layer3.2"])
    residual, identity = taps.outputs["layer3.2.bn2"], taps.inputs["layer3.2"]
    gate = net.get_submodule("layer3.2.gate")
    assert view.image_NHW is not None and view.view_Nhw is not None and view.scale_NC is not None  # noqa: PT018
    assert (view.image_NHW.shape, view.view_Nhw.shape, view.scale_NC.shape) == ((2, 16, 8), (2, 14, 6), (2, 64))
    for n in range(2):
        for row in range(16):
            for column in range(8):
                maps = residual if row % 2 == 0 else identity
                signal = maps[n, row // 2 * 8 + column].mean()
                assert view.image_NHW[n, row, column] == pytest.approx(float(signal), abs=1e-5)
    norm = gate.lens.norm
    seen = functional.conv2d(torch.from_numpy(view.image_NHW)[:, None], gate.lens.conv.weight)
    seen = functional.batch_norm(seen, norm.running_mean, norm.running_var, norm.weight, norm.bias).mean(1)
    assert np.allclose(view.view_Nhw, seen.detach().numpy(), atol=1e-5)
    joined = functional.relu(residual * torch.from_numpy(view.scale_NC)[:, :, None, None] + identity)
    assert torch.allclose(taps.outputs["layer3.2"], joined, atol=1e-5)


@pytest.mark.parametrize(("gate", "image", "view"), [("se", None, None), ("pair2x1", (2, 64, 2), (2, 64, 1))])
def test_other_gates(gate: str, image: tuple[int, ...] | None, view: tuple[int, ...] | None) -> None:
    views = watch(network(gate), torch.randn(2, 3, SIDE, SIDE))
    assert [v.block for v in views] == ["layer1.2", "layer2.2", "layer3.2"]
    last = views[-1]
    assert (None if last.image_NHW is None else last.image_NHW.shape) == image
    assert (None if last.view_Nhw is None else last.view_Nhw.shape) == view
    assert last.scale_NC is not None
    assert last.scale_NC.shape == (2, 64)
    assert draw(Scene("t", ["a", "b"], [np.zeros((4, 4, 3), np.uint8)] * 2, views)).startswith(b"\x89PNG")


def test_watching_leaves_no_hooks_and_keeps_the_order() -> None:
    net = network("fold3x3")
    views = watch(net, torch.randn(1, 3, SIDE, SIDE), ["layer2.1", "layer1.0"])
    assert [v.block for v in views] == ["layer1.0", "layer2.1"]
    assert not any(module._forward_hooks for module in net.modules())


def test_nothing_to_watch() -> None:
    with pytest.raises(ConfigError, match="no gates"):
        watch(network("none"), torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(ConfigError, match=r"--blocks layer9.9: has no gate; those that have: layer1.0, layer1.1"):
        watch(network("se"), torch.zeros(1, 3, SIDE, SIDE), ["layer9.9"])


def test_images_are_prepared_as_for_evaluation(tmp_path: Path) -> None:
    root = make_data_set(tmp_path / "data", classes=2, train_per_class=2, val_per_class=2, size=(61, 44))
    cfg = DataConfig(source="torch", root=str(root), eval_resize=32, eval_image_size=28, mean=(0.4, 0.5, 0.6))
    plan = plan_of(run_config(cfg, 4), 1, 4, 4, 2)
    source = make_eval_source(cfg, plan, World(), 0, "cpu", False, 4)
    (batch,) = list(source)
    source.close()
    pixels = [read_pixels(path, cfg) for path in sorted((root / "val").glob("*/*.jpg"))]
    prepared = show_inner_images._normalized(pixels, cfg)
    step = 1 / 255 / min(cfg.std)  # two libraries may round a resized pixel apart
    assert prepared.shape == (4, 3, 28, 28)
    assert float((prepared - batch.images_NCHW).abs().max()) <= step * 1.01
    assert float((prepared - batch.images_NCHW.flip(3)).abs().max()) > 10 * step


def yellow_share(png: bytes) -> float:
    """Share of pixels in the brightest colour of the pseudo-image's scale."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return float((np.abs(pixels - (253, 231, 36)).max(-1) <= 3).mean())


def test_panels_show_the_numbers() -> None:
    """Yellow covers as much as there are bright values: one, or four times as much for four."""
    shares = []
    for bright in (1, 4):
        image, seen = np.zeros((1, 8, 8), np.float32), np.zeros((1, 6, 6), np.float32)
        image[0, 2, :bright] = 1
        view = GateView("b", image, seen, np.linspace(0, 1, 32, dtype=np.float32)[None])
        png = draw(Scene("t", ["a"], [np.zeros((4, 4, 3), np.uint8)], [view]))
        shares.append(yellow_share(png))
    assert shares[0] > 0
    assert (shares[1] - shares[0]) / shares[0] == pytest.approx(3, rel=0.35)  # the scale below has some yellow too


def test_a_picture(run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for count in (1, 3):
        out = tmp_path / f"{count}.png"
        assert main([str(run), *images[:count], "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}: {count} images x layer1.2, layer2.2, layer3.2\n"
        with Image.open(out) as picture_:
            sizes.append(picture_.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 1.8 * sizes[0][1]
    chosen = tmp_path / "chosen.png"
    assert main([str(run), images[0], "--blocks", "layer1.0", "--out", str(chosen), "--ema"]) == 0
    with Image.open(chosen) as picture_:
        assert picture_.size[0] < 0.6 * sizes[0][0]
    with pytest.raises(ConfigError, match="exists already"):
        main([str(run), *images, "--out", str(out)])
    assert main([str(run), *images, "--out", str(out), "--force"]) == 0


def test_in_tensorboard(run: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    before = sorted((run / "tb").glob("*"))
    assert main([str(run / "checkpoints" / "step_000000002"), images[0], "--tensorboard"]) == 0
    folder = run / "tb" / "inner_images"
    assert sorted((run / "tb").glob("*")) == sorted([*before, folder])
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.IMAGES: 0})
    events.Reload()
    tags = [f"inner_images/layer{k}.2" for k in (1, 2, 3)]
    assert sorted(events.Tags()["images"]) == tags
    assert capsys.readouterr().out == f"{folder}: {', '.join(tags)}\n"
    (shown,) = events.Images(tags[2])
    assert shown.step == 2
    with Image.open(io.BytesIO(shown.encoded_image_string)) as picture_:
        assert picture_.size == (shown.width, shown.height)


def test_not_an_image(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("no image")
    with pytest.raises(DataError, match=r"x.txt: cannot be read \(not an image\); give image files"):
        main([str(run), str(text), "--out", str(tmp_path / "p.png")])
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        main([str(run), str(tmp_path / "gone.png"), "--out", str(tmp_path / "p.png")])
    with pytest.raises(ConfigError, match=r"needs a name that ends in .png"):
        main([str(run), str(text), "--out", str(tmp_path / "p.jpg")])
    with pytest.raises(ConfigError, match="nothing to make: give --out"):
        main([str(run), str(text)])


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["{tmp}", "x.png", "--out", "{tmp}/p.png"], 4)])
def test_from_the_command_line(tmp_path: Path, arguments: list[str], code: int) -> None:
    command = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "tools.show_inner_images", *command], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (1 if code else 0)


def test_the_network_is_that_of_the_step(run: Path) -> None:
    step, _ = choose_step(run)
    tensors: dict[str, Tensor] = {}
    for shard in step.path.glob("*.safetensors"):
        tensors |= load_file(shard)
    cfg = load_config(run / "config.yaml").model
    for ema, prefix in ((False, "model"), (True, "ema")):
        net = show_inner_images._network(cfg, 4, step, ema)
        assert not net.training
        own = net.state_dict()
        assert torch.equal(own["layer3.2.gate.excite.weight"], tensors[f"{prefix}.layer3.2.gate.excite.weight"])
        assert torch.equal(
            own["layer3.2.gate.lens.norm.running_var"], tensors[f"{prefix}.layer3.2.gate.lens.norm.running_var"]
        )
    assert not torch.equal(tensors["model.fc.weight"], tensors["ema.fc.weight"])
