"""Folders that DeepSpeed itself saved on two ranks, imported without DeepSpeed."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ii_dist.config.errors import CheckpointError
from tests.ranks.start import ROOT, run_ranks
from tools import import_checkpoint

pytestmark = pytest.mark.ranks

NAMES = [*(f"fp32_{stage}" for stage in range(4)), *(f"bf16_{stage}" for stage in (1, 2, 3))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    assert run_ranks(["-m", "tests.ranks.deepspeed_folders", str(folder)], 2, folder) == [0, 0]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_float32_weights_bit_for_bit(folders: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "w.safetensors"
    more = [] if name == "fp32_0" else ["--trust"]  # stage 0 has no optimizer files: nothing to trust
    assert import_checkpoint.main([str(folders / name), "--out", str(out), *more]) == 0
    found, expected = load_file(out), load_file(folders / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def test_no_consent_no_import(folders: Path, tmp_path: Path) -> None:
    step, out = folders / "fp32_2" / "step2", tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match=r"optim_states.pt: holds stored Python objects.*--trust.*--hashes FILE"):
        import_checkpoint.main([str(step), "--out", str(out)])
    sums = tmp_path / "sums"
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p}\n" for p in step.glob("*_optim_states.pt")]
    sums.write_text("".join(lines))
    assert import_checkpoint.main([str(step), "--out", str(out), "--hashes", str(sums)]) == 0
    out.unlink()
    sums.write_text("".join(lines)[:-1].replace(lines[1][:4], "beef", 1))
    with pytest.raises(CheckpointError, match="its sha256 is not the one of --hashes"):
        import_checkpoint.main([str(step), "--out", str(out), "--hashes", str(sums)])
    sums.write_text("x\n")
    with pytest.raises(CheckpointError, match="not a list as sha256sum writes it"):
        import_checkpoint.main([str(step), "--out", str(out), "--hashes", str(sums)])
    assert not out.exists()


@pytest.mark.parametrize("name", ["fp32_1", "fp32_3"])
def test_a_rank_is_missing(folders: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / name
    shutil.copytree(folders / name, copy)
    (copy / "step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="1 optimizer files of"):
        import_checkpoint.main([str(copy), "--out", str(tmp_path / "w.safetensors"), "--trust"])
    (copy / "step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError):
        import_checkpoint.main([str(copy), "--out", str(tmp_path / "w.safetensors"), "--trust"])


@pytest.mark.parametrize("tag", ["../fp32_1/step2", "/etc", "..", "", "gone"])
def test_the_tag_stays_in_the_folder(folders: Path, tmp_path: Path, tag: str) -> None:
    copy = tmp_path / "c"
    shutil.copytree(folders / "fp32_0", copy)
    (copy / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="latest"):
        import_checkpoint.main([str(copy), "--out", str(tmp_path / "w.safetensors"), "--trust"])


def test_deepspeed_is_not_needed(folders: Path, tmp_path: Path) -> None:
    text = (
        "import sys; sys.modules['deepspeed'] = None; from tools import import_checkpoint as i\n"
        f"i.main([{str(folders / 'fp32_3')!r}, '--trust', '--out', {str(tmp_path / 'w.safetensors')!r}])"
    )
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True, capture_output=True)
