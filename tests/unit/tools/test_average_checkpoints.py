"""Averages of checkpoints, as a user makes them, against torch's arithmetic."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ii_dist.config.errors import CheckpointError, ConfigError, UserError
from tests.memory import extra_bytes
from tests.tiny_run import CLASSES, ROOT, train_tiny_run
from tools import average_checkpoints
from tools._soup import greedy

Networks = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_run(tmp_path_factory.mktemp("trained"))


def networks(count: int = 3) -> Networks:
    draw = torch.Generator().manual_seed(7)
    return [
        {
            "conv.weight": torch.randn(300_000, generator=draw).reshape(300, 100, 10),
            "fc.weight": torch.randn(5, 3, generator=draw),
            "bn.num_batches_tracked": torch.tensor(10 * k),
            "empty": torch.zeros(0, 4),
        }
        for k in range(count)
    ]


def saved(folder: Path, nets: Networks) -> list[str]:
    paths = []
    for k, net in enumerate(nets):
        save_file(net, folder / f"n{k}.safetensors")
        paths.append(str(folder / f"n{k}.safetensors"))
    return paths


def mean(nets: Networks, shares: list[float], name: str) -> Tensor:
    return sum((s * net[name].double() for s, net in zip(shares, nets, strict=True)), torch.zeros(())).float()


def test_uniform(tmp_path: Path) -> None:
    nets, out = networks(), tmp_path / "a.safetensors"
    assert average_checkpoints.main([*saved(tmp_path, nets), "--out", str(out)]) == 0
    found = load_file(out)
    for name in ("conv.weight", "fc.weight"):
        stacked = torch.stack([net[name].double() for net in nets])
        assert torch.allclose(found[name], stacked.mean(0).float(), rtol=2e-7, atol=0), name
    assert found["bn.num_batches_tracked"] == 20  # the last one's
    assert found["empty"].shape == (0, 4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_exponential_is_torchs_average_in_order(tmp_path: Path) -> None:
    nets, out = networks(), tmp_path / "a.safetensors"
    average_checkpoints.main([*saved(tmp_path, nets), "--out", str(out), "--mode", "ema", "--decay", "0.8"])
    model = torch.nn.Linear(3, 5, bias=False).double()
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    for net in nets:
        model.weight.data.copy_(net["fc.weight"])
        averaged.update_parameters(model)
    assert torch.allclose(load_file(out)["fc.weight"], averaged.module.weight.float(), rtol=2e-7, atol=0)


def test_types(tmp_path: Path) -> None:
    nets = networks(2)
    nets[1]["fc.weight"] = nets[1]["fc.weight"].bfloat16()
    paths, out = saved(tmp_path, nets), tmp_path / "a.safetensors"
    average_checkpoints.main([*paths, "--out", str(out)])
    expected = (nets[0]["fc.weight"] + nets[1]["fc.weight"].float()) / 2
    assert load_file(out)["fc.weight"].dtype == torch.float32
    assert torch.allclose(load_file(out)["fc.weight"], expected)
    average_checkpoints.main([*paths, "--out", str(out), "--dtype", "bf16", "--force"])
    assert torch.equal(load_file(out)["fc.weight"], expected.bfloat16())
    assert load_file(out)["bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net: net | {"fc.weight": torch.zeros(5, 4)}, r"fc.weight is \[5, 3\] and \[5, 4\]"),
        (lambda net: net | {"more": torch.zeros(1)}, r"more is absent and \[1\]"),
        (lambda net: {k: v for k, v in net.items() if k != "empty"}, r"empty is \[0, 4\] and absent"),
    ],
)
def test_different_networks(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    nets = networks(2)
    paths, out = saved(tmp_path, [nets[0], change(nets[1])]), tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=f"are of different networks: {words}$"):
        average_checkpoints.main([*paths, "--out", str(out)])
    assert not out.exists()


def test_memory_does_not_grow_with_the_network(tmp_path: Path) -> None:
    paths = saved(tmp_path, [{"w": torch.full((12_000_000,), float(k))} for k in range(2)])
    arguments = [*paths, "--out", str(tmp_path / "a.safetensors")]
    assert 0 < extra_bytes("numpy", "average_checkpoints", arguments) < 0.35 * 48e6


def brute_force(points: list[float], score: Callable[[float], float]) -> tuple[list[int], float]:
    """The published recipe, written down with lists of numbers."""
    order = sorted(range(len(points)), key=lambda k: -score(points[k]))
    soup: list[int] = []
    for k in order:
        new = [*soup, k]
        means = [sum(points[i] for i in s) / len(s) for s in (soup, new) if s]
        if len(means) == 1 or score(means[1]) >= score(means[0]):
            soup = new
    return soup, score(sum(points[i] for i in soup) / len(soup))


def test_greedy_as_by_hand(tmp_path: Path) -> None:
    points = [0.0, 4.0, -9.0, 1.5, 3.0]
    paths = saved(tmp_path, [{"w": torch.tensor([p])} for p in points])
    program = tmp_path / "score.py"
    program.write_text(
        "import sys; from safetensors.numpy import load_file\n"
        "print('one line more'); print(-abs(float(load_file(sys.argv[1])['w'][0]) - 2))\n"
    )
    soup, best = brute_force(points, lambda w: -abs(w - 2))
    assert len(soup) in (2, 3, 4)
    out = tmp_path / "a.safetensors"
    command = ["--", sys.executable, str(program), "{file}"]
    text = _json_of([*paths, "--out", str(out), "--mode", "greedy", "--json", *command])
    assert [k for k, row in enumerate(text["inputs"]) if row["share"]] == sorted(soup)
    w = float(load_file(out)["w"][0])
    assert -abs(w - 2) == pytest.approx(best)
    assert len(text["tried"]) == 2 * len(points) - 1
    kept = [t["score"] for t in text["tried"] if t["kept"]]
    assert all(a <= b for a, b in pairwise(kept))


def _json_of(arguments: list[str]) -> dict[str, list[dict[str, float]]]:
    command = [sys.executable, "-m", "tools.average_checkpoints", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told: dict[str, list[dict[str, float]]] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("seed", range(20))
def test_greedy_against_brute_force(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    points = (torch.randint(-8, 9, (6,), generator=draw) / 2).tolist()

    def score(w: float) -> float:
        return -((w - 1) ** 2)

    soup, tried = greedy(6, lambda members: score(sum(points[k] for k in members) / len(members)))
    assert list(soup) == brute_force(points, score)[0]
    assert tried[0].score == max(map(score, points))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('no number')", "its last line is 'no number', not a score"),
        ("print('nan')", "not a score"),
        ("", "its last line is '', not a score"),
        ("raise SystemExit(3)", "ended with exit code 3"),
    ],
)
def test_bad_scores(tmp_path: Path, program: str, words: str) -> None:
    paths, out = saved(tmp_path, networks(2)), tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match=words):
        average_checkpoints.main(
            [*paths, "--out", str(out), "--mode", "greedy", "--", sys.executable, "-c", program, "{file}"]
        )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path == out]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--mode", "greedy"], "needs an evaluation command after --"),
        (["--mode", "greedy", "--", "score", "me"], "with {file} where"),
        (["--mode", "greedy", "--", "./no-such-program", "{file}"], "No such file"),
        (["--", "x", "{file}"], "goes with --mode greedy only"),
        (["--mode", "ema", "--decay", "1"], "0 <= decay < 1"),
    ],
)
def test_bad_arguments(tmp_path: Path, more: list[str], words: str) -> None:
    paths = saved(tmp_path, networks(1))
    with pytest.raises(ConfigError, match=words):
        average_checkpoints.main([*paths, "--out", str(tmp_path / "a.safetensors"), *more])


def test_the_command_goes_through_no_shell(tmp_path: Path) -> None:
    paths = saved(tmp_path, networks(1))
    words = [sys.executable, "-c", "import sys; print(len(sys.argv[1]))", "{file}; touch " + str(tmp_path / "canary")]
    average_checkpoints.main([*paths, "--out", str(tmp_path / "a.safetensors"), "--mode", "greedy", "--", *words])
    assert not (tmp_path / "canary").exists()


def test_steps_recalibrated_and_evaluated(run: Path, tmp_path: Path) -> None:
    """From checkpoints to an accuracy: average, statistics, `ii-dist eval`, timm."""
    steps, config, out = (
        [str(run / "checkpoints" / f"step_{s:09d}") for s in (2, 4)],
        run.parent / "run.yaml",
        tmp_path / "a.safetensors",
    )
    plain = tmp_path / "plain.safetensors"
    assert average_checkpoints.main([*steps, "--out", str(plain)]) == 0
    more = ["--recalibrate", str(config), "--images", "20", "--dtype", "bf16"]
    assert average_checkpoints.main([*steps, "--out", str(out), *more]) == 0
    raw, found = load_file(plain), load_file(out)
    moved = {name for name in raw if not torch.equal(raw[name].bfloat16().double(), found[name].double())}
    assert {name.rsplit(".", 1)[1] for name in moved} == {"running_mean", "running_var", "num_batches_tracked"}
    assert {int(found[name]) for name in found if name.endswith("tracked")} == {2}  # 20 images are 2 batches of 12
    command = [sys.executable, "-m", "ii_dist", "eval", str(out), "--config", str(config), "--score"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, score = done.stdout.splitlines()[-2:]
    assert told.startswith("a.safetensors: top-1 ")
    assert f"top-1 {float(score):.2f} %" in told


def test_the_line_that_is_told_loads_with_timm(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    average_checkpoints.main([str(run), "--ema", "--out", str(out)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"num_classes={CLASSES}" in line
    check = "; import safetensors.torch as s; s.save_file(model.state_dict(), 'back.safetensors')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {line}{check}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    back, made = load_file(tmp_path / "back.safetensors"), load_file(out)
    assert back.keys() == made.keys()
    assert all(torch.equal(back[name], made[name]) for name in made)


def test_a_refusal_of_recalibrate_is_one_line(run: Path, tmp_path: Path) -> None:
    paths = saved(tmp_path, networks(2))
    with pytest.raises(
        UserError, match=r"^--recalibrate .*: .*bn.num_batches_tracked is \[\] there and absent"
    ) as caught:
        average_checkpoints.main(
            [*paths, "--out", str(tmp_path / "a.safetensors"), "--recalibrate", str(run.parent / "run.yaml")]
        )
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.safetensors").exists()
