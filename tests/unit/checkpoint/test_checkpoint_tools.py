"""The three tools, as a user calls them, on steps that the store wrote."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ii_dist.config import ModelConfig, RunConfig, dump_config
from ii_dist.config.errors import CheckpointError, ConfigError
from ii_dist.config.run_folder import RunFolder, shard_name
from ii_dist.models import create_model
from tests.memory import extra_bytes
from tools import list_checkpoints, merge_checkpoint, verify_checkpoint

Commit = Callable[..., list[Exception | None]]
Tensors = Callable[[int], dict[str, Tensor]]
NAMES = ["bn.num_batches_tracked", "bn.weight", "conv.weight", "fc.bias", "fc.weight"]


@pytest.fixture
def run(folder: RunFolder, commit: Commit) -> RunFolder:
    assert commit(10) == commit(20) == [None, None]
    return folder


def test_merged_file_holds_timm_names(run: RunFolder, tensors_of: Tensors, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert merge_checkpoint.main([str(run.step(10)), "--out", str(out)]) == 0
    back = load_file(out)
    assert sorted(back) == NAMES
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors_of(10)[f"model.{name}"]), name
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "10"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_averages_and_what_has_none(run: RunFolder, tensors_of: Tensors, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert merge_checkpoint.main([str(run.root), "--out", str(out), "--ema"]) == 0
    back, tensors = load_file(out), tensors_of(20)
    assert sorted(back) == NAMES
    for name, tensor in back.items():
        source = f"ema.{name}" if f"ema.{name}" in tensors else f"model.{name}"
        assert torch.equal(tensor, tensors[source]), name


@pytest.mark.parametrize("world_size", [1, 3, 16])
def test_any_number_of_shards_and_large_tensors(
    folder: RunFolder, commit: Commit, tmp_path: Path, world_size: int
) -> None:
    tensors = {f"model.t{i}": torch.randint(0, 255, (i * 700_001,), dtype=torch.uint8) for i in range(10)}
    tensors |= {f"optimizer.t{i}.momentum_buffer": torch.randn(3000 * i) for i in range(10)}
    commit(1, tensors, world_size)
    out = tmp_path / "m.safetensors"
    merge_checkpoint.main([str(folder.root), "--out", str(out)])
    back = load_file(out)
    assert sorted(back) == [f"t{i}" for i in range(10)]
    assert all(torch.equal(back[f"t{i}"], tensors[f"model.t{i}"]) for i in range(10))


def test_loading_line(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.config.write_text(
        "model: {network: ini_resnet20, gate: fold3x3, gate_reduction: 16, fold_width: 8, lens_filters: 0}\n"
    )
    merge_checkpoint.main([str(run.root), "--out", str(tmp_path / "m.safetensors")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "import ii_dist.models, timm; model = timm.create_model('ini_resnet20', gate='fold3x3', gate_reduction=16, "
        f"fold_width=8, lens_filters=0, num_classes=10, checkpoint_path='{tmp_path}/m.safetensors')"
    )


def test_loading_line_loads_the_network(
    folder: RunFolder, commit: Commit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = RunConfig(name="x", model=ModelConfig(network="ini_resnet20", gate="fold3x3", fold_width=8))
    torch.manual_seed(1)
    net = create_model(cfg.model, num_classes=10)
    commit(1, {f"model.{name}": tensor for name, tensor in net.state_dict().items()})
    folder.config.write_text(dump_config(cfg))
    merge_checkpoint.main([str(folder.root), "--out", str(tmp_path / "m.safetensors")])
    line = capsys.readouterr().out.splitlines()[-1]
    save = f"; import safetensors.torch as s; s.save_file(model.state_dict(), {str(tmp_path / 'again.safetensors')!r})"
    done = subprocess.run(
        [sys.executable, "-c", line + save], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == net.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in net.state_dict().items())


def test_damaged_shard_leaves_no_file(run: RunFolder, tmp_path: Path) -> None:
    shard = run.step(20) / shard_name(1, 2)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    out = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="content changed"):
        merge_checkpoint.main([str(run.step(20)), "--out", str(out)])
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if "m.safe" in p.name] == []
    out.write_text("old")
    with pytest.raises(CheckpointError):
        merge_checkpoint.main([str(run.step(20)), "--out", str(out), "--force"])
    assert out.read_text() == "old"
    # A run means its newest whole step.
    assert merge_checkpoint.main([str(run.root), "--out", str(out), "--force"]) == 0
    with safe_open(out, "pt") as file:
        assert file.metadata()["step"] == "10"


def test_never_over_something_else(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists already; choose another name or add --force"):
        merge_checkpoint.main([str(run.root), "--out", str(out)])
    assert out.read_text() == "mine"
    for bad, reason in (
        (tmp_path / "m.pt", "ends in .safetensors"),
        (tmp_path / "no" / "m.safetensors", "there is no folder"),
        (run.step(10) / "m.safetensors", "takes no other files"),
    ):
        with pytest.raises(ConfigError, match=reason):
            merge_checkpoint.main([str(run.root), "--out", str(bad), "--force"])


def test_no_averages(folder: RunFolder, commit: Commit, tmp_path: Path) -> None:
    commit(1, {"model.w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="holds no EMA weights"):
        merge_checkpoint.main([str(folder.root), "--out", str(tmp_path / "m.safetensors"), "--ema"])


def test_verify_a_run(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_checkpoint.main([str(run.root)]) == 0
    assert "2 of 2 steps are whole" in capsys.readouterr().out
    os.truncate(run.step(20) / "state.json", 1)
    assert verify_checkpoint.main([str(run.root)]) == 4
    text = capsys.readouterr().out
    assert f"{run.step(10)}: ok" in text
    assert f"{run.step(20)}: DAMAGED\n  state.json: truncated: 1 bytes" in text
    assert verify_checkpoint.main([str(run.step(10))]) == 0
    capsys.readouterr()
    assert verify_checkpoint.main([str(run.root), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert [(s["ok"], len(s["problems"])) for s in told["steps"]] == [(True, 0), (False, 1)]


def test_list_a_run(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.step(20) / "COMMITTED.json").write_text("x")
    assert list_checkpoints.main([str(run.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "epoch", "offset", "engine", "ranks", "size", "written"]
    assert lines[1].split()[:6] == ["10", "1", "640", "ddp", "2", "0.0"]
    assert "COMMITTED.json: not JSON" in lines[2]
    assert list_checkpoints.main([str(run.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in told["steps"]] == [10, 20]


@pytest.mark.parametrize("tool", ["list_checkpoints", "verify_checkpoint", "merge_checkpoint"])
def test_from_the_command_line(tool: str, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"tools.{tool}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])

    shown = call("--help")
    assert shown.returncode == 0
    assert f"python -m tools.{tool}" in shown.stdout
    more = ["--out", str(tmp_path / "m.safetensors")] if tool == "merge_checkpoint" else []
    wrong = call(str(tmp_path / "nothing"), *more)
    assert wrong.returncode == 4
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1
    assert call("--nonsense").returncode == 2


def test_tools_start_without_torch(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    text = (
        "import sys; from tools import list_checkpoints, merge_checkpoint, verify_checkpoint;"
        f"verify_checkpoint.main([{str(run.root)!r}]);"
        f"merge_checkpoint.main([{str(run.root)!r}, '--out', {str(out)!r}]);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", text], check=True, cwd=Path(__file__).parents[3], capture_output=True)


def test_types_and_json(
    run: RunFolder, tensors_of: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        out = tmp_path / f"{name}.safetensors"
        assert merge_checkpoint.main([str(run.root), "--out", str(out), "--dtype", name, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["step"], told["dtype"], told["tensors"], told["bytes"]) == (20, name, 5, out.stat().st_size)
        for key, tensor in load_file(out).items():
            source = tensors_of(20)[f"model.{key}"]
            assert torch.equal(tensor, source.to(dtype) if source.is_floating_point() else source), key


def test_types_of_tensors_in_many_pieces(folder: RunFolder, commit: Commit, tmp_path: Path) -> None:
    whole = torch.randn(1_300_001)
    commit(1, {"model.w": whole, "model.h": whole.half(), "model.c": torch.arange(200_000)}, 1)
    out = tmp_path / "m.safetensors"
    merge_checkpoint.main([str(folder.root), "--out", str(out), "--dtype", "bf16"])
    found = load_file(out)
    assert torch.equal(found["w"], whole.bfloat16())
    assert torch.equal(found["h"], whole.half().bfloat16())
    assert torch.equal(found["c"], torch.arange(200_000))


def test_number_too_large_or_damage(folder: RunFolder, commit: Commit, tmp_path: Path) -> None:
    commit(1, {"model.w": torch.tensor([1.0, 1e30])}, 1)
    out = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="w: a value of 1e\\+30 does not fit in F16"):
        merge_checkpoint.main([str(folder.root), "--out", str(out), "--dtype", "fp16"])
    commit(2, {"model.w": torch.tensor([1.0, 1.0])}, 1)
    shard = folder.step(2) / shard_name(0, 1)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7e")  # 1.0 becomes 1.7e38: it is the damage that is told
    with pytest.raises(CheckpointError, match="content changed"):
        merge_checkpoint.main([str(folder.step(2)), "--out", str(out), "--dtype", "fp16"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_newest_steps_are_damaged(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    (run.step(20) / "state.json").write_text("{}")
    assert merge_checkpoint.main([str(run.root), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "from step 10" in told.out
    assert told.err.count("left out") == 1
    assert "state.json" in told.err
    os.truncate(run.step(10) / shard_name(0, 2), 50)
    out.unlink()
    with pytest.raises(CheckpointError, match="none of its 2 steps is whole"):
        merge_checkpoint.main([str(run.root), "--out", str(out)])
    assert not out.exists()


def test_merge_needs_little_memory_however_many_shards(folder: RunFolder, commit: Commit, tmp_path: Path) -> None:
    tensors = {f"model.t{i}": torch.zeros(250_000) for i in range(64)}
    needed = {}
    for world_size in (8, 64):
        commit(world_size, tensors, world_size)
        for kind in ("fp32", "bf16"):
            out = tmp_path / f"{world_size}{kind}.safetensors"
            arguments = [str(folder.step(world_size)), "--out", str(out), "--dtype", kind]
            needed[world_size, kind] = extra_bytes("ii_dist.checkpoint.casting", "merge_checkpoint", arguments)
            assert 0 < needed[world_size, kind] < 0.5 * out.stat().st_size
    assert needed[64, "fp32"] < needed[8, "fp32"] + 4e6
    shutil.rmtree(folder.checkpoints)
