"""Every config file loads, and says how to run it and what to expect."""

import re
from pathlib import Path

import pytest

from ii_dist.config import RunConfig, dump_config, load_config, recipe_differences

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LAYERS = [p for p in CONFIGS if p.parent.name in {"clusters", "engines"}]
RUN_FILES = [p for p in CONFIGS if p not in LAYERS and p.parent.name != "base"]
HEADER = ("command", "hardware", "hours", "top-1")


@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in LAYERS], ids=lambda p: p.stem)
def test_config_loads_and_says_how_to_run_it(path: Path) -> None:
    cfg = load_config(path)
    header = re.match(r"((?:#.*\n)+)", path.read_text())
    assert header, f"{path} has no header"
    for key in HEADER:
        assert re.search(rf"^# {key}: \S", header[1], re.MULTILINE), f"{path} does not state its {key}"
    if path in RUN_FILES:
        assert f"configs/{path.parent.name}/{path.name}" in header[1]
        assert re.search(r"^# top-1: (\d+\.\d+ %|not yet measured)", header[1], re.MULTILINE)
        assert cfg.name != "unnamed"
        stated = re.search(
            r"^# top-1: (?:not yet measured[^:]*; published[^:]*: |)(?:plain )?(\d+\.\d+) %", header[1], re.MULTILINE
        )
        assert cfg.expected_top1 == (float(stated[1]) if stated else 0.0)


def test_there_are_run_files_with_names_of_their_own() -> None:
    names = [load_config(p).name for p in RUN_FILES]
    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "clusters"], ids=lambda p: p.stem)
def test_cluster_file_loads_over_a_run(path: Path) -> None:
    assert load_config(RUN_FILES[0], layers=[path]).launch.executor == "slurm"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/engines").glob("*.yaml")), ids=lambda p: p.stem)
def test_engine_file_is_laid_over_a_run(path: Path) -> None:
    plain = load_config(RUN_FILES[0])
    cfg = load_config(RUN_FILES[0], [str(path), "optim.lr=0.25"])
    assert cfg.engine.kind == ("ddp" if path.stem == "ddp" else "deepspeed")
    assert f"zero{cfg.engine.zero_stage}" in path.stem or path.stem == "ddp"
    assert cfg.optim.lr == 0.25
    assert recipe_differences(plain, cfg) == [f"optim.lr: {plain.optim.lr} -> 0.25"]
    header = path.read_text()
    assert f"# command: ii-dist train CONFIG configs/engines/{path.name}" in header
    assert re.search(r"^# hardware: \S", header, re.MULTILINE)


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    cfg = load_config(RUN_FILES[0], ["optim.lr=1e-3", "launch.ranks_per_node=3"])
    (tmp_path / "c.yaml").write_text(dump_config(cfg))
    again = load_config(tmp_path / "c.yaml")
    assert isinstance(again, RunConfig)
    assert again == cfg
