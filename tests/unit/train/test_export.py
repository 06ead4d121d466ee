"""`ii-dist export` as a user calls it, its files read by the libraries they are made for."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ii_dist.models  # noqa: F401  # registers the networks; before timm, which it makes importable
from ii_dist.cli import main
from ii_dist.train import export
from tests.tiny_run import CLASSES, ROOT, SIDE, train_tiny_run

timm = pytest.importorskip("timm")
FORMATS = ("safetensors", "onnx", "pt2")
Forward = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_run(tmp_path_factory.mktemp("trained"))


def step_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:09d}"


def network_of(step: Path, prefix: str = "model.") -> nn.Module:
    """The eager network, filled from the shards without the project's own reader."""
    tensors: dict[str, Tensor] = {}
    for shard in step.glob("*.safetensors"):
        tensors |= load_file(shard)
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    weights |= {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    network: nn.Module = timm.create_model("ini_resnet20", gate="fold3x3", num_classes=CLASSES)
    network.load_state_dict(weights)
    return network.eval()


def opened(path: Path) -> Forward:
    """What another program would make of the file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    network: nn.Module = timm.create_model(
        "ini_resnet20", gate="fold3x3", num_classes=CLASSES, checkpoint_path=str(path)
    )
    return network.eval()


def largest_difference(one: Forward, other: Forward) -> float:
    """Over batches that the command itself does not check, images far from each other in scale."""
    worst = 0.0
    with torch.inference_mode():
        for count in (1, 2, 5, 8):
            images = torch.randn(count, 3, SIDE, SIDE) * torch.linspace(0.1, 2, count)[:, None, None, None]
            worst = max(worst, float((one(images) - other(images)).abs().max()))
    return worst


@dataclasses.dataclass(frozen=True)
class Made:
    out: Path
    lines: list[str]


@pytest.fixture(scope="module", params=FORMATS)
def made(run: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Made:
    """One file of each format and what the command printed."""
    out = tmp_path_factory.mktemp("made") / f"net.{request.param}"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["export", str(run), "--format", request.param, "--out", str(out)]) == 0
    return Made(out, printed.getvalue().splitlines())


def test_file_computes_what_the_network_computes(run: Path, made: Made) -> None:
    assert largest_difference(opened(made.out), network_of(step_of(run, 4))) < 1e-4
    assert largest_difference(opened(made.out), network_of(step_of(run, 2))) > 1e-2  # the oracle tells weights apart
    assert [p.name for p in made.out.parent.iterdir()] == [made.out.name]


def test_what_it_prints(made: Made) -> None:
    size, form = f"{made.out.stat().st_size / 1e6:.1f} MB", made.out.suffix
    lenses = "" if form == ".safetensors" else ", 9 lenses folded into one filter each"
    assert made.lines[0] == f"{made.out}: {size}, ini_resnet20 with gate fold3x3 at step 4{lenses}"
    told = re.match(r"checked on random images: largest difference from the eager network (\S+) in", made.lines[1])
    assert told
    assert float(told[1]) < 1e-4
    assert made.lines[2] == "images: float32 N x 3 x 16 x 16, (pixel / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]"


def test_the_printed_line_loads_it(made: Made) -> None:
    images = f"import numpy; images = numpy.zeros((2, 3, {SIDE}, {SIDE}), 'float32'); "
    done = subprocess.run([sys.executable, "-c", images + made.lines[3]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_files_say_what_they_are(made: Made) -> None:
    told = facts(made.out)
    assert (told["network"], told["step"], told["image_size"]) == ("ini_resnet20", "4", str(SIDE))
    assert json.loads(told["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(told["std"]) == [0.2, 0.25, 0.3]
    assert told["weights"] == "as trained"


def facts(path: Path) -> dict[str, str]:
    if path.suffix == ".onnx":
        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    if path.suffix == ".pt2":
        files = {f"{key}.txt": "" for key in ("network", "step", "mean", "std", "image_size", "weights")}
        torch.export.load(path, extra_files=files)
        return {key.removesuffix(".txt"): value for key, value in files.items()}
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_inside_the_file(made: Made) -> None:
    if made.out.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(made.out), providers=["CPUExecutionProvider"])
        assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", 3, SIDE, SIDE])]
        assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", CLASSES])]
        shapes = [tuple(tensor.dims) for tensor in onnx.load(made.out).graph.initializer]
        # The lenses of the stages have 1, 2 and 4 filters; the file has one of each.
        assert [shape for shape in shapes if len(shape) == 4 and shape[1] == 1] == 9 * [(1, 1, 3, 3)]
    if made.out.suffix == ".pt2":
        with zipfile.ZipFile(made.out) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        # No pickle: neither sample inputs nor weights.
        assert [len(data) for name, data in content.items() if "sample_inputs" in name] == [0]
        told = [data for name, data in content.items() if name.endswith("_config.json")]
        assert any(b'"use_pickle": false' in data for data in told)
        assert not any(b'"use_pickle": true' in data for data in told)


def test_a_step_folder(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    assert main(["export", str(step_of(run, 2)), "--format", "safetensors", "--out", str(out)]) == 0
    assert largest_difference(opened(out), network_of(step_of(run, 2))) < 1e-6


def test_averages(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.safetensors"
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out), "--ema"]) == 0
    assert "at step 4 (EMA)" in capsys.readouterr().out
    assert largest_difference(opened(out), network_of(step_of(run, 4), "ema.")) < 1e-6
    assert largest_difference(opened(out), network_of(step_of(run, 4))) > 1e-3


def test_damage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    shard = next(step_of(broken, 4).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    out = tmp_path / "net.safetensors"
    call = ["--format", "safetensors", "--out", str(out)]
    assert main(["export", str(step_of(broken, 4)), *call]) == 4
    assert "content changed" in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(broken), *call]) == 0
    assert "step_000000004 left out" in caplog.text
    assert largest_difference(opened(out), network_of(step_of(run, 2))) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["{run}", "--format", "onnx", "--out", "{tmp}/n.pt2"], 2, "needs a name that ends in .onnx"),
        (["{run}", "--format", "onnx", "--out", "{tmp}/no/n.onnx"], 2, "there is no folder"),
        (["{run}", "--format", "onnx", "--out", "{tmp}/old.onnx"], 2, "exists already; choose another name or add"),
        (["{run}", "--format", "onnx", "--out", "{run}/checkpoints/step_000000004/n.onnx"], 2, "takes no other files"),
        (["{run}", "more", "--format", "onnx", "--out", "{tmp}/n.onnx"], 2, "'more' is one argument too many"),
        (["{tmp}", "--format", "onnx", "--out", "{tmp}/n.onnx"], 2, "give a run folder"),
        (["{run}/checkpoints/step_000000099", "--format", "pt2", "--out", "{tmp}/n.pt2"], 4, "no such step folder"),
    ],
)
def test_errors_are_one_line_and_need_no_torch(
    run: Path, tmp_path: Path, arguments: list[str], code: int, part: str
) -> None:
    (tmp_path / "old.onnx").write_text("mine")
    argv = ["export", *(a.replace("{run}", str(run)).replace("{tmp}", str(tmp_path)) for a in arguments)]
    text = (
        f"import sys; from ii_dist.cli import main; c = main({argv!r}); assert 'torch' not in sys.modules; sys.exit(c)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert part in done.stderr
    assert (tmp_path / "old.onnx").read_text() == "mine"


def test_unknown_format_is_a_usage_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(run), "--format", "pickle", "--out", str(tmp_path / "n.pkl")])
    assert caught.value.code == 2


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_a_file_that_computes_something_else_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    right = export.FORMATS[form]

    def wrong(network: nn.Module, images: Tensor, told: dict[str, str]) -> bytes:
        with torch.no_grad():
            next(p for name, p in network.named_parameters() if name == "fc.bias").add_(2e-3)
        return right.encode(network, images, told)

    monkeypatch.setitem(export.FORMATS, form, dataclasses.replace(right, encode=wrong))
    out = tmp_path / f"net.{form}"
    out.write_text("old")
    assert main(["export", str(run), "--format", form, "--out", str(out), "--force"]) == 5
    assert "not written: its logits differ by 2.00e-03" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(out.name, "old")]


def test_force_replaces(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    out.write_text("old")
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out), "--force"]) == 0
    assert largest_difference(opened(out), network_of(step_of(run, 4))) < 1e-6


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_package(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "net.onnx"
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 5
    error = capsys.readouterr().err
    assert error.startswith(f"error: --format onnx needs {package}: pip install onnx==")
    assert not out.exists()
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(pin in error for pin in pins["export"])
    assert set(pins["export"]) <= set(pins["test"])


def test_config_that_does_not_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("gate: fold3x3", "gate: se"))
    assert main(["export", str(other), "--format", "pt2", "--out", str(tmp_path / "n.pt2")]) == 4
    assert "layer1.0.gate.lens.conv.weight is [1, 1, 3, 3] there and absent in the network" in capsys.readouterr().err
    (other / "plan.json").unlink()
    assert main(["export", str(other), "--format", "pt2", "--out", str(tmp_path / "n.pt2")]) == 4
    assert "a step is used inside its run folder" in capsys.readouterr().err
