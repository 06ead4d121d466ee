"""Every engine says where its step stands, in the same order; being measured changes no bit."""

from dataclasses import replace

import pytest
import torch

from ii_dist.metrics.phases import PhaseTimer
from ii_dist.runtime.phases import Phase, Phases
from tests.contract.test_engines import (
    MakeEngine,
    every_row,
    images,
    make_engine,  # noqa: F401
    micro,
    network,
    parts,
)


class Listener(Phases):
    sampling = True

    def __init__(self) -> None:
        self.said: list[Phase] = []

    def begin(self, phase: Phase) -> None:
        self.said.append(phase)


@every_row
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_phases_of_a_step_in_order(
    make_engine: MakeEngine,  # noqa: F811
    row: dict[str, object],
    accumulate: int,
) -> None:
    listener = Listener()
    engine = make_engine(network(), replace(parts(accumulate=accumulate, engine=row), phases=listener))
    engine.train_step(micro(images(0), accumulate))
    listener.said.clear()
    engine.train_step(micro(images(1), accumulate))
    alone = [phase for phase in listener.said if phase != "allreduce"]
    if row["kind"] == "canonical":  # adding a shard's gradients up belongs to backward
        assert alone == ["copy", "forward", "backward", "metrics", "backward"] * accumulate + ["optimizer", "other"]
    else:
        assert alone == ["copy", "forward", "backward", "metrics"] * accumulate + ["optimizer", "other"]


@every_row
def test_a_measured_run_trains_the_same_bits(
    make_engine: MakeEngine,  # noqa: F811
    row: dict[str, object],
) -> None:
    timer = PhaseTimer(2)
    timer.start()
    states, losses = [], []
    for phases in (timer, Phases()):
        engine = make_engine(network(), replace(parts(accumulate=2, engine=row), phases=phases))
        losses.append([])
        for step in range(6):
            losses[-1].append(engine.train_step(micro(images(step), 2))["loss"].item())
            if phases is timer:
                timer.end_step()
        states.append(engine.state().whole())
    assert losses[0] == losses[1]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    reading = timer.read()
    assert reading.steps == 3
    assert all(reading.mean_s(phase) > 0 for phase in ("forward", "backward", "optimizer"))
