"""Real ranks compare what they are about to read: every planted fault is refused on all ranks with one line."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.images import make_data_set
from tests.ranks.start import output, run_ranks

pytestmark = pytest.mark.ranks

RANKS = 4
# Two nodes of two ranks, as the planted faults see them: LOCAL_RANK is 0, 1, 0, 1.
SCRIPT = """
import dataclasses, json, sys, time, torch
from pathlib import Path
from ii_dist.config import RunConfig, UserError, data_facts, make_plan
from ii_dist.data import Position, make_eval_source, make_train_source
from ii_dist.runtime import this_process
from ii_dist.runtime.group import close_group, open_group
from ii_dist.train.sharding_check import check_sharding

world = this_process()
open_group(world, torch.device("cpu"), timeout_s=60)
local = world.rank % 2
synthetic = {"source": "synthetic", "synthetic_images": 120, "synthetic_classes": 4}
files = {"source": "torch", "root": sys.argv[2]}
other_files = {"source": "torch", "root": sys.argv[3]}
results = {}

def check(name, data=synthetic, rank=world.rank, seed=0, at=None, plan_ranks=4, eval_rank=world.rank, **train):
    tree = {"name": "x", "data": data, "optim": {"warmup_epochs": 0.0}}
    cfg = RunConfig.model_validate(tree | {"train": {"global_batch": 24, "epochs": 2.0} | train})
    plan = make_plan(cfg, plan_ranks, data_facts(cfg.data))
    source = make_train_source(cfg.data, plan, dataclasses.replace(world, rank=rank), seed, "cpu", False)
    evaluation = make_eval_source(cfg.data, plan, dataclasses.replace(world, rank=eval_rank), 0, "cpu", False, 4)
    if at:
        source.seek(Position(*at))
    started_s = time.process_time()
    try:
        check_sharding(cfg, plan, world, source, evaluation)
        said = [0, ""]
    except UserError as error:
        said = [error.exit_code, str(error)]
    results[name] = [*said, time.process_time() - started_s]
    source.close()
    evaluation.close()

check("right")
check("right, files", data=files)
check("right, resumed", data=files, at=(1, 48))
check("right, accumulated", max_images_per_rank=2)
check("local rank", data=files, rank=local)
check("same number twice", rank=[0, 1, 1, 3][world.rank])
check("swapped", rank=[1, 0, 2, 3][world.rank])
check("evaluation by local rank", eval_rank=local)
check("seed by rank", seed=world.rank)
check("other place", at=(0, 24 * (world.rank == 2)))
check("other recipe", epochs=2.0 + (world.rank == 3))
check("other batch", max_images_per_rank=3 if world.rank == 1 else 0)
check("other index", data=other_files if world.rank == 3 else files)
check("other world", plan_ranks=2)
close_group()
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(results))
"""

APART = "ranks do not agree on what they read in training: "
NOT_LOCAL = "a rank reads by its number in the whole run (RANK), never by that in its node (LOCAL_RANK): "
START = "start the ranks with launch or torchrun, all with the same config"
PLANTED = {
    "local rank": "ranks 0 and 2 read the same images (72 read more than once); rank 2 reads the share of rank 0; "
    f"rank 3 reads the share of rank 1; {NOT_LOCAL}{START}",
    "same number twice": "ranks 1 and 2 read the same images (36 read more than once); rank 2 reads the share of "
    f"rank 1; {NOT_LOCAL}{START}",
    "swapped": f"rank 0 reads the share of rank 1; rank 1 reads the share of rank 0; {NOT_LOCAL}{START}",
    "evaluation by local rank": "ranks 0 and 2 read the same images (8 read more than once); rank 2 reads the share of "
    f"rank 0; rank 3 reads the share of rank 1; {NOT_LOCAL}{START}",
    "seed by rank": f"{APART}seed is 0 on rank 0, 1 on rank 1; {START}",
    "other place": f"{APART}start image is 0 on rank 0, 24 on rank 2; {START}",
    "other recipe": f"{APART}recipe is ",
    "other batch": f"{APART}images a batch is 6 on rank 0, 3 on rank 1; {START}",
    "other index": f"{APART}index is ",
    "other world": f"the plan is for 2 ranks, but 4 have met; {START}",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("check")
    script = folder / "check.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = make_data_set(folder / "set", 4, 30, 4, (40, 30))
    other = make_data_set(folder / "other", 4, 30, 4, (41, 30))
    assert run_ranks([str(script), str(folder), str(root), str(other)], RANKS, folder / "out") == [0] * RANKS
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["right", "right, files", "right, resumed", "right, accumulated"])
def test_a_right_world_passes_at_once(results: list[dict[str, list[Any]]], name: str) -> None:
    assert [result[name][:2] for result in results] == [[0, ""]] * RANKS
    assert max(result[name][2] for result in results) < 0.3  # CPU seconds; the goal is 0.1


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_one_line_and_one_code_on_all_ranks(results: list[dict[str, list[Any]]], name: str) -> None:
    code, line, _ = results[0][name]
    assert [result[name][:2] for result in results] == [[code, line]] * RANKS
    assert code == (3 if name == "other index" else 5)
    assert line.startswith(PLANTED[name]), line
    assert "\n" not in line


TRAIN = """
import dataclasses, sys
import ii_dist.train.opening as opening
from ii_dist.cli.main import main

real = opening.make_train_source
opening.make_train_source = lambda cfg, plan, world, *rest: real(
    cfg, plan, dataclasses.replace(world, rank=world.local_rank), *rest
)
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_whose_source_takes_the_local_rank_ends_before_its_first_step(tmp_path: Path) -> None:
    script, config = tmp_path / "train.py", tmp_path / "run.yaml"
    script.write_text(TRAIN)
    config.write_text(
        f"name: run\nruns_folder: {tmp_path}/runs\n"
        "data: {source: synthetic, synthetic_images: 32, synthetic_classes: 4, image_size: 16, eval_image_size: 16,"
        " eval_resize: 16}\n"
        "model: {network: ini_resnet20}\nengine: {device: cpu}\n"
        "train: {epochs: 1, global_batch: 8}\noptim: {warmup_epochs: 0}\n"
    )
    nodes_of_one = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert run_ranks([str(script), "train", str(config)], 2, tmp_path / "out", **nodes_of_one) == [5, 5]
    said = output(tmp_path / "out")
    assert said.count("error: ranks 0 and 1 read the same images (20 read more than once)") == 2
    assert "Traceback" not in said
    assert not list((tmp_path / "runs" / "run" / "metrics").glob("*")) or "train/loss" not in said
