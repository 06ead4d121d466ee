"""What a real TensorBoard answers over HTTP, one that watched while a run was killed and went on, and a later one."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import RunFolder
from ii_dist.metrics.pictures import batch_png
from ii_dist.metrics.tags import TAGS

np = pytest.importorskip("numpy")
pytest.importorskip("tensorboard")

TAGS_OF_RUN = ["train/loss", "ranks/step_min_s", "ranks/step_median_s", "ranks/step_max_s", "time/step_s"]
LATE_TAG = "eval/top1"  # of one step of an attempt only
ATTEMPT = """
import json, os, sys, time
from pathlib import Path
from ii_dist.config import RunFolder
from ii_dist.metrics.boards import make_boards
folder, resumed, last, tags = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
board = make_boards(("tensorboard",), folder, rank=0, world_size=1, total_steps=10, resumed_step=resumed,
                    settings={"model.gate": folder.root.name, "optim.lr": 0.5})
board.text("run/1_overview", "| network | gate |\\n| --- | --- |\\n| resnet | se |")
for step in range(resumed + 1, last + 1):
    board.write(step, {tag: float(step) for tag in tags})
    if step == 4:
        board.write(step, {"eval/top1": 4.0})
print("written", flush=True)
time.sleep(60)
"""


def attempt(folder: Path, resumed: int, last: int) -> None:
    """Writes its steps and is killed."""
    arguments = [str(folder), str(resumed), str(last), json.dumps(TAGS_OF_RUN)]
    process = subprocess.Popen([sys.executable, "-c", ATTEMPT, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.kill()
    process.wait()
    process.stdout.close()


class Server:
    """A TensorBoard as a user starts it."""

    def __init__(self, logdir: Path, fast: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(logdir)]
        options = [f"--port={port}", "--host=127.0.0.1", "--reload_interval=1", f"--load_fast={str(fast).lower()}"]
        self._process = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        self._address = f"http://127.0.0.1:{port}/data/"

    def get(self, what: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        url = self._address + what + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            raw = answer.read()
        return json.loads(raw) if answer.headers.get_content_type() == "application/json" else raw

    def steps(self, run: str, tag: str) -> list[int]:
        try:
            points = self.get("plugin/scalars/scalars", run=run, tag=tag)
        except (urllib.error.URLError, ConnectionError):  # not started, or it has not seen the run yet
            return []
        return [step for _, step, _ in points]

    def wait_for_steps(self, steps: list[int]) -> None:
        wait(lambda: self.steps("fold3x3/tb", "train/loss") == steps, f"{steps}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def wait(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module", params=["fast", "slow"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Over two runs, of which one was killed after step 8 and went on from step 3 before its eyes."""
    runs = tmp_path_factory.mktemp("runs")
    found = Server(runs, fast=request.param == "fast")
    try:
        attempt(runs / "fold3x3", 0, 8)
        found.wait_for_steps(list(range(1, 9)))
        attempt(runs / "fold3x3", 3, 6)
        found.wait_for_steps(list(range(1, 7)))
        attempt(runs / "fold3x3", 6, 10)
        attempt(runs / "none", 0, 10)
        found.wait_for_steps(list(range(1, 11)))
        wait(lambda: found.steps("none/tb", "train/loss") == list(range(1, 11)), "the other run")
        yield found
    finally:
        found.close()


def test_each_step_of_every_number_is_shown_once(server: Server) -> None:
    assert sorted(server.get("runs")) == ["fold3x3/tb", "none/tb"]
    for tag in TAGS_OF_RUN:
        assert server.steps("fold3x3/tb", tag) == list(range(1, 11))
    assert server.steps("fold3x3/tb", LATE_TAG) == [4]


def test_numbers_come_with_their_meaning(server: Server) -> None:
    tags = server.get("plugin/scalars/tags")["fold3x3/tb"]
    assert set(tags) == {*TAGS_OF_RUN, LATE_TAG}
    for tag in tags:
        assert TAGS[tag].says.split(":")[0] in re.sub("<[^>]*>", "", tags[tag]["description"])


def test_each_chart_of_the_layout_finds_its_numbers(server: Server) -> None:
    groups = {group["title"]: group["chart"] for group in server.get("plugin/custom_scalars/layout")["category"]}
    assert list(groups) == ["Where the time goes", "Learning"]
    patterns = [
        tag for charts in groups.values() for chart in charts for tag in chart.get("multiline", {}).get("tag", [])
    ]
    found: list[str] = []
    for pattern in patterns:
        answer = server.get("plugin/custom_scalars/scalars", run="fold3x3/tb", tag=pattern)
        assert answer["regex_valid"]
        found += answer["tag_to_events"]
    (band,) = (chart["margin"]["series"][0] for chart in groups["Where the time goes"] if "margin" in chart)
    assert sorted([*found, *band.values()]) == sorted([*TAGS_OF_RUN, LATE_TAG])


def test_a_resumed_run_is_one_row_among_those_compared(server: Server) -> None:
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    asked = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 99}
    rows = {row["name"]: row for row in server.get("plugin/hparams/session_groups", asked)["sessionGroups"]}
    assert set(rows) == {"fold3x3", "none"}
    for name, row in rows.items():
        assert row["hparams"] == {"model.gate": name, "optim.lr": 0.5}
        assert len(row["sessions"]) == 1
        assert row["sessions"][0]["status"] == "STATUS_SUCCESS"
        values = {metric["name"]["tag"]: metric["value"] for metric in row["metricValues"]}
        assert values["eval/top1"] == 4.0
        assert values["train/loss"] == 10.0


def test_words_are_shown_as_markdown(server: Server) -> None:
    texts = server.get("plugin/text/text", run="fold3x3/tb", tag="run/1_overview")
    assert [text["step"] for text in texts] == [0, 3, 6]
    assert "<td>resnet</td>" in texts[0]["text"]


def test_pictures_come_back_bit_by_bit(tmp_path: Path) -> None:
    from ii_dist.metrics.tensorboard_board import write_pictures

    png = batch_png(np.zeros((3, 8, 8, 3), np.uint8), ["a", "b", "c"])
    write_pictures(RunFolder(tmp_path / "x"), "inner_images", 7, {"inner_images/layer1.2": png})
    mine = Server(tmp_path, fast=True)
    run = "x/tb/inner_images"
    try:

        def there() -> bool:
            try:
                return run in mine.get("plugin/images/tags")
            except (urllib.error.URLError, ConnectionError):
                return False

        wait(there, "the picture")
        (row,) = mine.get("plugin/images/images", run=run, tag="inner_images/layer1.2", sample="0")
        assert row["step"] == 7
        with urllib.request.urlopen(
            f"{mine._address}plugin/images/individualImage?{row['query']}", timeout=20
        ) as answer:
            assert answer.read() == png
    finally:
        mine.close()
