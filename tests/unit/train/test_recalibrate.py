"""BatchNorm statistics measured anew, against averages made by hand; files of weights in `ii-dist eval`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ii_dist.cli import main
from ii_dist.config import ConfigError
from ii_dist.train.recalibrate import recompute_statistics
from tests.tiny_run import train_tiny_run

CPU = torch.device("cpu")


def test_statistics_are_plain_averages_over_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3))
    batches = [torch.randn(5, 3, 6, 6) for _ in range(3)]
    nn.init.uniform_(network[3].running_mean)
    recompute_statistics(network, iter(batches), CPU)
    first = [network[0](x) for x in batches]
    normalized = [
        nn.functional.relu(
            (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        )
        for y in first
    ]
    for layer, inputs in ((network[1], first), (network[3], normalized)):
        assert torch.allclose(layer.running_mean, torch.stack([y.mean((0, 2, 3)) for y in inputs]).mean(0), atol=1e-5)
        assert torch.allclose(layer.running_var, torch.stack([y.var((0, 2, 3)) for y in inputs]).mean(0), atol=1e-5)
    assert network[3].momentum == 0.3


def test_no_batch_norm() -> None:
    with pytest.raises(ConfigError, match="no BatchNorm layers"):
        recompute_statistics(nn.Linear(2, 2), iter([]), CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_run(tmp_path_factory.mktemp("trained"))


def weights_of(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    (shard,) = (run / "checkpoints" / "step_000000004").glob("*.safetensors")
    return {name.removeprefix(prefix): t for name, t in load_file(shard).items() if name.startswith(prefix)}


def test_eval_of_a_file_is_eval_of_the_step(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.safetensors"
    save_file(weights_of(run, "ema."), file)  # what the run itself evaluates
    assert main(["eval", str(run)]) == 0
    of_step = capsys.readouterr().out.splitlines()[-1]
    assert main(["eval", str(file), "--config", str(run.parent / "run.yaml"), "--score"]) == 0
    *_, of_file, score = capsys.readouterr().out.splitlines()
    assert of_step.removeprefix("step 4: ") == of_file.removeprefix("w.safetensors: ")
    assert float(score) == pytest.approx(float(of_file.split("top-1 ")[1].split(" ")[0]), abs=0.005)
    for arguments, words in (
        ([str(file)], "a file of weights needs --config CONFIG"),
        ([str(run), "--config", "x.yaml"], "--config goes with a file only"),
    ):
        assert main(["eval", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_recalibrate_is_the_same_twice_and_refuses(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = tmp_path / "w.safetensors", str(run.parent / "run.yaml")
    save_file(weights_of(run, "model."), file, {"kept": "yes"})
    outs = [tmp_path / f"{k}.safetensors" for k in "ab"]
    for out in outs:
        assert main(["recalibrate", str(file), "--config", config, "--out", str(out), "--images", "24"]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert f"{outs[1]}: BatchNorm statistics of 24 training images" in capsys.readouterr().out
    assert b'"kept":"yes"' in outs[0].read_bytes()[:20_000]
    assert main(["recalibrate", str(file), "--config", config, "--out", str(outs[0])]) == 2
    assert "exists already" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, file)
    assert main(["recalibrate", str(file), "--config", config, "--out", str(tmp_path / "c.safetensors")]) == 4
    assert "in the network of the config" in capsys.readouterr().err
    assert (
        main(["recalibrate", str(tmp_path / "no.safetensors"), "--config", config, "--out", str(outs[0]), "--force"])
        == 4
    )
