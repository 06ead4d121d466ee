"""The HTML page, JSON and CSV of a report: complete, self-contained, harmless, and right about made runs."""

import csv
import dataclasses
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.made_runs import COLD, EVALUATION_S, SHUT_DOWN_S, SILENCE_S, STALL_S, START_UP_S, Made, write_run
from ii_dist.config import ConfigError
from ii_dist.metrics.read import PHASES
from tools._report_verdict import findings, stragglers, verdict
from tools._run_facts import RunFacts, read_facts
from tools.report_run import main

SMALL = Made(ranks=4, ranks_per_node=2, epochs=4, steps_per_epoch=100, log_every_steps=10, step_s=1.0)
NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)> | [a](javascript:alert(3)) **b** `c`'


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, the text, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data + "\n"

    def headings(self) -> list[str]:
        return [attrs["id"] or "" for tag, attrs in self.tags if tag in ("h2", "h3")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a slow rank and one failure, whose name and settings are an attack."""
    root = tmp_path_factory.mktemp("runs") / "plain"
    settings = (("name", NASTY), ("model.network", NASTY), ("data.root", NASTY))
    write_run(root, Made(ranks=4, ranks_per_node=2, epochs=4, steps_per_epoch=100, log_every_steps=10, step_s=1.0,
                         slow_rank=2, failures=(0.6,), settings=settings))  # fmt: skip
    return root


@pytest.fixture(scope="module")
def page(made: Path) -> tuple[str, Page]:
    out = made.parent / "page.html"
    assert main([str(made), "--html", str(out)]) == 0
    text = out.read_text()
    return text, Page(text)


def test_nothing_of_a_run_becomes_code(page: tuple[str, Page], made: Path) -> None:
    text, parsed = page
    assert "<script>alert" not in text
    assert len(parsed.scripts) == 1
    assert "alert" not in parsed.scripts[0]
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "object", "embed", "base", "form")]
    assert not [a for _, attrs in parsed.tags for a in attrs if a.startswith("on")]
    assert "<script>alert(1)</script>" in parsed.text  # as words
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)
    out = made.parent / "page.md"
    assert main([str(made), "--markdown", str(out), "--no-plots"]) == 0
    markdown = out.read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)


def test_the_page_needs_nothing_from_anywhere(page: tuple[str, Page]) -> None:
    text, parsed = page
    attributes = [(key.split(":")[-1], value or "") for _, attrs in parsed.tags for key, value in attrs.items()]
    links = [value for key, value in attributes if key in ("href", "src")]
    assert links
    assert all(link.startswith("#") for link in links)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", text)
    assert len(text) < 1_500_000


def test_every_link_has_its_place_and_every_picture_its_own_names(page: tuple[str, Page]) -> None:
    _, parsed = page
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {(attrs.get("href") or "")[1:] for tag, attrs in parsed.tags if tag == "a"}
    assert targets == set(parsed.headings())
    used = {(attrs.get("xlink:href") or "")[1:] for tag, attrs in parsed.tags if tag == "use"}
    assert used <= set(ids)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 6


def test_colours_of_plots_are_those_of_the_page(page: tuple[str, Page]) -> None:
    text, _ = page
    pictures = text[text.index("<svg") :]
    assert "var(--c0)" in pictures
    assert not re.findall(r"#[0-9a-f]{6}\b", pictures[: pictures.rindex("</svg>")])


def test_goodput_of_a_made_run_is_what_it_was_made_with(made: Path) -> None:
    """Two starts: 240 steps and a failure at 240, back to 200; then 200 to the end."""
    found = read_facts(made).goodput
    assert found is not None
    expected = {
        "start-up": START_UP_S,
        "restarts": START_UP_S,
        "training": 400.0,
        "warm-up": 2 * 10 * (COLD - 1),
        "evaluation": 4 * EVALUATION_S,
        "saves": 4 * STALL_S,
        "lost steps": 40.0 + SILENCE_S,
        "shut-down": SHUT_DOWN_S,
    }
    assert sum(found.parts.values()) == pytest.approx(found.allocated)
    assert found.allocated / 4 == pytest.approx(sum(expected.values()), abs=0.1)
    for part, seconds in expected.items():
        assert found.parts[part] / 4 == pytest.approx(seconds, abs=2.5), part
    assert (found.failures, found.saves) == (1, 4)


def test_the_slow_rank_is_named(made: Path, page: tuple[str, Page]) -> None:
    facts = read_facts(made)
    (slow,) = stragglers(facts)
    assert (slow.rank.rank, slow.rank.host, slow.phase) == (2, "node001", "forward")
    assert slow.excess_share == pytest.approx(0.12, abs=0.01)
    assert any("rank 2 on node001 takes 12 % of a step longer in forward" in said for said in findings(facts))
    assert "a rank was killed: rank 3 was killed by SIGKILL (on node001)" in page[1].text
    assert "step 200 was the newest" in page[1].text.lower()


def facts_of(tmp_path: Path, made: Made) -> RunFacts:
    write_run(tmp_path / "run", made)
    return read_facts(tmp_path / "run")


def changed(facts: RunFacts, **tags: float) -> RunFacts:
    """The same with other values of tags on all lines."""
    for row in facts.metrics.rows:
        if "time/step_s" in row.values:
            row.values |= {tag.replace("__", "/"): value for tag, value in tags.items()}
    return facts


def test_the_verdict_says_what_bounds_a_run_and_what_to_try(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, SMALL)
    assert verdict(facts).startswith("**Compute bound**: 2.2 %")
    said = verdict(changed(facts, time__data_wait_share=0.38, machine__cpu_share=0.5))
    assert said.startswith("**Input bound**: 38 % of the training time waits for data")
    assert "cores are idle (50 % busy): raise `data.threads_per_rank` (now 4 of 16 cores)" in said
    assert "cores are busy (90 %)" in verdict(changed(facts, machine__cpu_share=0.9))
    assert verdict(changed(facts, time__data_wait_share=0.1)).startswith("**Nearly balanced**")
    del facts.__dict__["phase_s"]
    exchange = changed(facts, time__data_wait_share=0.01, time__backward_s=0.7, time__allreduce_s=0.3)
    assert verdict(exchange).startswith("**Bound by the exchange between ranks**")


def test_findings_speak_of_what_cost_most_first(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, SMALL)
    said = findings(facts)
    assert "was evaluation: evaluate less often (`train.eval_every_epochs`, now 1.0)" in said[0]
    assert "went into starting: " in said[1]
    assert len(said) == 2
    facts = changed(facts, gpu__throttled_share=0.5, train__skipped_updates=1.0)
    del facts.__dict__["goodput"]
    more = findings(changed(facts, time__checkpoint_stall_s=1.0))
    assert "GPUs are throttled" in more[0]
    assert any("40 updates were skipped" in text for text in more)
    assert any("save less often" in text and "By Young's formula" in text for text in more)


def test_a_run_below_its_recipe_is_told_so(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, Made(ranks=2, epochs=2, steps_per_epoch=100, top1=70.0))
    assert any("6.30 points below** the 76.3 %" in said for said in findings(facts))


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    write_run(tmp_path / "small", SMALL)
    settings = (("optim.lr", 0.2), ("data.threads_per_rank", 8))
    write_run(tmp_path / "large", dataclasses.replace(SMALL, ranks=8, step_s=0.625, settings=settings))
    out = tmp_path / "both.html"
    runs = [str(tmp_path / "large"), str(tmp_path / "small")]
    assert main([*runs, "--html", str(out), "--markdown", str(tmp_path / "m.md")]) == 0
    markdown = (tmp_path / "m.md").read_text()
    # 1.6 times the images/s of the smaller run on twice the ranks.
    line = next(line for line in markdown.splitlines() if line.startswith("| large | 8 |"))
    assert line.split(" | ")[4] == "1.60 of 2"
    assert line.rstrip(" |").endswith("80 %")
    assert "| optim.lr | 0.2 | 0.1 |" in markdown
    assert "| data.threads_per_rank | 8 | 4 |" in markdown
    assert "expected_top1 |" not in markdown
    parsed = Page(out.read_text())
    assert "Against the smallest run, small on 4." in parsed.text
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_peer_s_event_files_beside_a_run_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    write_run(tmp_path / "ours", SMALL)
    writer = SummaryWriter(str(tmp_path / "peer"))
    for step in range(10, 110, 10):
        writer.add_scalar("train_loss", 1.0, step)
        writer.add_scalar("val_acc", 0.755, step)
        writer.add_scalar("speed", 1234.0, step)
    writer.close()
    both = [str(tmp_path / "ours"), str(tmp_path / "peer"), "--markdown", str(tmp_path / "m.md"), "--no-plots"]
    assert main(both) == 0
    assert "tags that were not read: speed (--map theirs=ours" in capsys.readouterr().out
    assert main([*both, "--map", "speed=throughput/images_per_s"]) == 0
    line = next(line for line in (tmp_path / "m.md").read_text().splitlines() if line.startswith("| peer |"))
    assert line.split(" | ")[1:6] == ["another trainer", "?", "75.50 %", "75.50 %", "1,234 images/s"]
    with pytest.raises(ConfigError, match="THEIRS=OURS"):
        main([*both, "--map", "speed"])


def test_json_is_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", SMALL)
    assert main([str(tmp_path / "run"), "--json"]) == 0
    said = capsys.readouterr().out
    found: dict[str, Any] = json.loads(said, parse_constant=lambda text: pytest.fail(text))["runs"][0]
    assert (found["name"], found["ranks"], found["last_step"], found["done"]) == ("run", 4, 400, True)
    assert found["images_per_s"] == pytest.approx(1024, rel=0.01)
    parts = found["goodput"]["parts_rank_s"]
    assert sum(parts.values()) == pytest.approx(found["goodput"]["allocated_rank_s"])
    assert len(found["per_rank"]) == 4
    assert found["per_rank"][0]["device_gib"] == 21.5
    assert "Compute bound" in found["verdict"][0]
    assert not (tmp_path / "run" / "report.html").exists()


def test_csv_has_every_step_to_the_last_bit(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    folder.config.write_text(yaml.safe_dump({"name": "=cmd()"}))
    out = tmp_path / "numbers.csv"
    assert main([str(folder.root), "--csv", str(out)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    metrics = read_facts(folder.root).metrics
    assert [int(row["step"]) for row in rows] == [row.step for row in metrics.rows]
    assert [float(row["time/step_s"]) for row in rows] == [row.values["time/step_s"] for row in metrics.rows]
    assert [row["eval/top1"] != "" for row in rows] == ["eval/top1" in row.values for row in metrics.rows]
    assert {row["run"] for row in rows} == {"'=cmd()"}  # no formula for a spreadsheet


def test_a_run_of_an_earlier_version_has_no_phases_and_is_told_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SMALL)
    phases = {f"time/{phase}_s" for phase in PHASES}
    for path in folder.metrics.iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{key: value for key, value in line.items() if key not in phases} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(folder.jobs)
    assert main([str(folder.root)]) == 0
    text = (folder.root / "report.md").read_text()
    assert "wrote no phases of a step" in text
    assert "There are no job records" in text
    assert (folder.root / "report.html").stat().st_size > 20_000


def test_names_that_a_plot_would_read_as_mathematics(tmp_path: Path) -> None:
    for name in ("a$\\frac{$", "_hidden"):
        write_run(tmp_path / name, dataclasses.replace(SMALL, settings=(("name", name),)))
    out, runs = tmp_path / "both.html", [str(path) for path in tmp_path.iterdir()]
    assert main([*runs, "--html", str(out), "--markdown", str(tmp_path / "m.md")]) == 0
    assert sum(tag == "svg" for tag, _ in Page(out.read_text()).tags) == 8
