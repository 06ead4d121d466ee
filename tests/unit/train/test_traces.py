"""Profiler traces of a small loop, read back from the JSON that Perfetto opens; and of a whole run."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ii_dist.config import ProfileConfig, RunFolder
from ii_dist.metrics import StepClock
from ii_dist.metrics.phases import PhaseTimer
from ii_dist.train.traces import MOST_STEPS_ON_REQUEST, Traces
from tests.tiny_run import train_tiny_run

PHASES = ("data_wait", "forward", "backward", "optimizer")


class Rank:
    """One rank of a training loop that is as small as can be, with the real clock, phases and traces."""

    def __init__(self, root: Path, rank: int = 0, resumed_step: int = 0, **profile: Any) -> None:
        self.step, self.folder = resumed_step, RunFolder(root)
        self.clock = StepClock(phases=PhaseTimer(0))
        cfg = ProfileConfig.model_validate(profile)
        self.traces = Traces(cfg, self.folder, rank, torch.device("cpu"), self.clock)
        self.traces.plan(resumed_step)
        self.model = torch.nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def train(self, steps: int, log_at: tuple[int, ...] = ()) -> "Rank":
        phases = self.clock.phases
        for _ in range(steps):
            self.traces.begin_step(self.step)
            with self.clock.data_wait():
                x_NF = torch.ones(2, 4)
            phases.begin("forward")
            loss = self.model(x_NF).sum()
            phases.begin("backward")
            loss.backward()
            phases.begin("optimizer")
            self.optimizer.step()
            phases.begin("other")
            self.clock.tick(2)
            self.step += 1
            if self.step in log_at:
                self.traces.look(self.step)
        return self

    def files(self) -> list[str]:
        folder = self.folder.profile
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def ranges(path: Path) -> list[tuple[str, float, float]]:
    """(name, start, end) of the ranges that the run named, in the order of time."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [e for e in events if e.get("cat") == "user_annotation" and "#" not in e["name"]]
    return [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in sorted(named, key=lambda e: (e["ts"], -e["dur"]))]


def steps_in(path: Path) -> list[int]:
    return [int(name.removeprefix("step ")) for name, _, _ in ranges(path) if name.startswith("step ")]


def test_the_steps_asked_for_are_traced_with_their_phases(tmp_path: Path) -> None:
    rank = Rank(tmp_path, steps="3:5").train(8)
    rank.traces.close()
    assert rank.files() == ["steps_000000003-000000005_rank_00000.json.gz"]
    found = ranges(rank.folder.trace(3, 5, 0))
    steps = [one for one in found if one[0].startswith("step ")]
    assert [name for name, _, _ in steps] == ["step 3", "step 4", "step 5"]
    for _, start, end in steps:
        within = [name for name, s, e in found if start <= s and e <= end and name in PHASES]
        assert within == list(PHASES)
    assert all(any(s <= start and end <= e for _, s, e in steps) for _, start, end in found)  # none outside
    assert rank.clock.phases.listener is None


def test_the_first_step_can_be_traced(tmp_path: Path) -> None:
    rank = Rank(tmp_path, steps="1:2").train(3)
    assert steps_in(rank.folder.trace(1, 2, 0)) == [1, 2]


def test_steps_that_are_done_are_not_traced_again(tmp_path: Path) -> None:
    assert Rank(tmp_path, resumed_step=5, steps="3:5").train(4).files() == []
    rank = Rank(tmp_path, resumed_step=5, steps="3:7").train(4)
    assert steps_in(rank.folder.trace(6, 7, 0)) == [6, 7]


def test_only_the_ranks_asked_for_trace(tmp_path: Path) -> None:
    for rank in range(3):
        Rank(tmp_path, rank, steps="2:2", ranks=[1]).train(3)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps_000000002-000000002_rank_00001.json.gz"]


def test_a_trace_that_the_end_cuts_short_is_named_by_what_it_holds(tmp_path: Path) -> None:
    rank = Rank(tmp_path, steps="3:9").train(4)
    rank.traces.close()
    rank.traces.close()
    assert rank.files() == ["steps_000000003-000000004_rank_00000.json.gz"]
    warming = Rank(tmp_path / "b", steps="3:9").train(2)  # warmed up, and nothing recorded
    warming.traces.close()
    assert warming.files() == []
    assert warming.clock.phases.listener is None


@pytest.mark.parametrize(("text", "steps"), [("", 3), ("2\n", 2), ("many", 3), (str(MOST_STEPS_ON_REQUEST + 1), 3)])
def test_a_file_in_the_run_folder_asks_for_a_trace_once(
    tmp_path: Path, text: str, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Rank(tmp_path).train(4, log_at=(2, 4))
    assert rank.files() == []
    rank.folder.profile_now.write_text(text)
    with caplog.at_level(logging.WARNING):
        rank.train(12, log_at=(6, 8, 10, 12, 14))
    assert rank.files() == [rank.folder.trace(8, 7 + steps, 0).name]
    assert steps_in(rank.folder.trace(8, 7 + steps, 0)) == list(range(8, 8 + steps))
    assert not rank.folder.profile_now.exists()
    assert len(caplog.records) == (len(text) > 2)
    rank.folder.profile_now.write_text("1")
    rank.train(5, log_at=(18,))
    assert rank.files()[1:] == [rank.folder.trace(20, 20, 0).name]


def test_ranks_see_the_same_request_and_rank_0_takes_it_away(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, number, ranks=[1]) for number in range(3)]  # a process has one profiler
    ranks[0].folder.profile_now.write_text("2")
    there = []
    for step in range(1, 14):
        for rank in (ranks[1], ranks[2], ranks[0]):  # rank 1 is done before rank 0 has taken it away
            rank.train(1, log_at=tuple(range(2, 14)))
        there.append((step, ranks[0].folder.profile_now.exists()))
    assert ranks[0].files() == [ranks[0].folder.trace(4, 5, 1).name]
    assert [step for step, exists in there if exists] == [1, 2, 3, 4, 5]


def test_a_trace_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        rank = Rank(tmp_path, steps="2:2").train(4)
    assert rank.step == 4
    (record,) = caplog.records
    assert "training goes on" in record.getMessage()


def test_shapes_and_memory_are_there_when_asked_for(tmp_path: Path) -> None:
    for memory in (False, True):
        (tmp_path / str(memory)).mkdir()
        rank = Rank(tmp_path / str(memory), steps="2:2", memory=memory).train(3)
        with gzip.open(rank.folder.trace(2, 2, 0), "rt") as file:
            text = file.read()
        assert ("Input Dims" in text) == memory
        assert ("[memory]" in text) == memory


def test_a_traced_run_computes_the_same_bits(tmp_path: Path) -> None:
    """The real command: once plain, once with a trace by config and one by a file that lies there from the start."""
    longer = ["train.epochs=5", "checkpoint.keep_last=2"]
    (tmp_path / "plain").mkdir()
    plain = train_tiny_run(tmp_path / "plain", *longer, "metrics.log_every_steps=1")
    folder = RunFolder(tmp_path / "traced" / "run")
    folder.root.mkdir(parents=True)
    folder.profile_now.write_text("2")
    traced = train_tiny_run(
        tmp_path / "traced",
        *longer,
        *("metrics.log_every_steps=1", "metrics.boards=[jsonl, tensorboard]", "profile.steps=2:3"),
        *("metrics.inner_images_every_epochs=2", "metrics.batch_images=4"),
    )
    (mine,) = (traced / "checkpoints" / "step_000000010").glob("*.safetensors")
    (theirs,) = (plain / "checkpoints" / "step_000000010").glob("*.safetensors")
    ours, expected = load_file(mine), load_file(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert steps_in(folder.trace(2, 3, 0)) == [2, 3]
    assert len(list(folder.profile.iterdir())) == 2
    by_file = next(path for path in folder.profile.iterdir() if path != folder.trace(2, 3, 0))
    assert len(steps_in(by_file)) == 2
    for path in folder.profile.iterdir():
        names = [name for name, _, _ in ranges(path)]
        assert all(names.count(phase) == 2 for phase in (*PHASES, "copy"))
    assert not folder.profile_now.exists()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder.tensorboard)).Reload()
    assert [image.step for image in found.Images("images/first_batch")] == [0]
    assert [image.step for image in found.Images("inner_images/layer3.2")] == [4, 8, 10]
    assert {"run/1_overview", "run/2_config", "run/3_plan"} <= set(found.Tags()["tensors"])
