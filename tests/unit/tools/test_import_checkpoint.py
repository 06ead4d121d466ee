"""Folders of torch.distributed.checkpoint, imported. Those of DeepSpeed: tests/ranks/test_import_deepspeed.py."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from ii_dist.config.errors import CheckpointError
from tests.tiny_run import ROOT
from tools import import_checkpoint


def state() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    model = {
        "conv.weight": torch.randn(6, 3, 3, 3, generator=draw).to(memory_format=torch.channels_last),
        "bn.running_var": torch.rand(6, generator=draw),
        "bn.num_batches_tracked": torch.tensor(5),
        "fc.weight": torch.randn(4, 6, generator=draw).t(),
        "half": torch.randn(7, generator=draw).bfloat16(),
    }
    return {"model": model, "optimizer": {"state": {"conv.weight": {"m": torch.ones(3)}}, "lr": 0.1}, "step": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state(), checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def edit(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items()
    )


def test_the_models_tensors(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w.safetensors"
    assert import_checkpoint.main([str(folder), "--out", str(out), "--json"]) == 0
    assert same(load_file(out), state()["model"])
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["tensors"]) == ("torch.distributed.checkpoint", 5)
    with safe_open(out, "pt") as file:
        assert file.metadata()["imported_from"] == "torch.distributed.checkpoint"


def test_prefix_and_type(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    import_checkpoint.main([str(folder), "--out", str(out), "--prefix", "optimizer.state."])
    assert same(load_file(out), {"conv.weight.m": torch.ones(3)})
    import_checkpoint.main([str(folder), "--out", str(out), "--dtype", "fp16", "--force"])
    halves = {n: t.half() if t.is_floating_point() else t for n, t in state()["model"].items()}
    assert same(load_file(out), halves)
    with pytest.raises(CheckpointError, match=r"no tensor's name begins with 'x.'; there are 6, such as model.bn"):
        import_checkpoint.main([str(folder), "--out", str(tmp_path / "v.safetensors"), "--prefix", "x."])


def test_sharded_tensors_from_two_files(folder: Path, tmp_path: Path) -> None:
    """The metadata and files of a tensor that two ranks saved, a half each: rows 0-3 and 4-5."""
    weight = state()["model"]["fc.weight"]
    for rank, part in enumerate((weight[:4], weight[4:])):
        torch.save(part.clone(), folder / f"__{rank}_9.distcp")

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["model.fc.weight"]
        info = metadata.storage_data.pop(MetadataIndex("model.fc.weight", torch.Size([0, 0]), 0))
        entry.chunks = []
        for rank, (first, rows) in enumerate(((0, 4), (4, 2))):
            corner, sides = torch.Size([first, 0]), torch.Size([rows, 4])
            entry.chunks.append(ChunkStorageMetadata(corner, sides))
            place = type(info)(f"__{rank}_9.distcp", 0, (folder / f"__{rank}_9.distcp").stat().st_size)
            metadata.storage_data[MetadataIndex("model.fc.weight", corner, rank)] = place

    edit(folder, change)
    import_checkpoint.main([str(folder), "--out", str(tmp_path / "w.safetensors")])
    assert same(load_file(tmp_path / "w.safetensors"), state()["model"])


def _entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.fc.weight"]


def _info(metadata: Any, name: str = "fc.weight") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == f"model.{name}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: object.__setattr__(_info(m), "relative_path", "../dcp/__0_0.distcp"), "not in this folder"),
        (lambda m: object.__setattr__(_info(m), "relative_path", "/etc/passwd"), "not in this folder"),
        (lambda m: object.__setattr__(_info(m), "offset", 10**9), "shorter than"),
        (lambda m: object.__setattr__(_info(m), "offset", -5), "shorter than"),
        (lambda m: object.__setattr__(_info(m), "offset", 0), "holds no tensor"),
        (lambda m: vars(_info(m)).update(vars(_info(m, "half"))), "not as .metadata says"),
        (lambda m: object.__setattr__(_info(m), "length", 20), "not opened"),
        (lambda m: object.__setattr__(_info(m), "transform_descriptors", ["zstd"]), "compressed"),
        (lambda m: setattr(_entry(m), "chunks", []), "do not fill it"),
        (lambda m: setattr(_entry(m), "size", torch.Size([6, 5])), "do not fill it"),
        (lambda m: setattr(_entry(m), "size", "six"), "damaged"),
        (lambda m: setattr(_entry(m), "properties", None), "damaged"),
        (lambda m: setattr(m, "storage_data", None), "damaged"),
        (lambda m: setattr(m, "state_dict_metadata", 7), "damaged"),
    ],
)
def test_metadata_that_lies(folder: Path, tmp_path: Path, change: Any, words: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_checkpoint.main([str(folder), "--out", str(tmp_path / "w.safetensors")])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


def test_files_that_end_early(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="shorter than"):
        import_checkpoint.main([str(folder), "--out", str(tmp_path / "w.safetensors")])


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "neither").mkdir()
    for arguments, code, words in (
        (["--help"], 0, "--trust"),
        ([str(tmp_path / "gone"), "--out", str(tmp_path / "w.safetensors")], 4, "no such folder"),
        ([str(tmp_path / "neither"), "--out", str(tmp_path / "w.safetensors")], 4, "neither a DeepSpeed folder"),
    ):
        command = [sys.executable, "-m", "tools.import_checkpoint", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code
        assert words in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == (code != 0)
