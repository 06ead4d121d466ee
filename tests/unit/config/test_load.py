"""Wrong config files and overrides: one line that names file, key, value and what would be right."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ii_dist.config import ConfigError, load_config, recipe_differences

MINIMAL = "name: x\nmodel: {network: ini_resnet20}\n"


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_files_bases_and_overrides_in_that_order(tmp_path: Path) -> None:
    write(tmp_path, "name: base\noptim: {lr: 1.0, momentum: 0.5}\ntrain: {epochs: 7, global_batch: 8}", "base.yaml")
    write(tmp_path, "base: base.yaml\noptim: {lr: 2.0}\ntrain: {epochs: 8}", "middle.yaml")
    top = write(tmp_path, "base: middle.yaml\nname: top\ntrain: {epochs: 9}", "top.yaml")
    cfg = load_config(top, ["train.epochs=10", "optim.schedule=constant"])
    assert (cfg.name, cfg.optim.lr, cfg.optim.momentum) == ("top", 2.0, 0.5)
    assert (cfg.train.epochs, cfg.train.global_batch, cfg.optim.schedule) == (10, 8, "constant")
    assert cfg.data.image_size == 224


def test_layers_lie_between_file_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nlaunch: {nodes: 1, time_minutes: 5}")
    layer = write(tmp_path, "launch: {nodes: 2}", "cluster.yaml")
    cfg = load_config(path, ["launch.time_minutes=6"], layers=[layer])
    assert (cfg.launch.nodes, cfg.launch.time_minutes) == (2, 6)


def test_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "name: x\noptim: {lr: 1e-3}")).optim.lr == 0.001
    assert load_config(write(tmp_path, "name: x"), ["optim.weight_decay=5e-5"]).optim.weight_decay == 5e-5


def test_config_is_frozen(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        cfg.optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.imagesize=32", ["data.imagesize = 32", "did you mean data.image_size?"]),
        ("lr=1", ["lr = 1", "did you mean optim.lr?"]),
        ("optim.lr=many", ["optim.lr = 'many'", "needs a number"]),
        ("data.image_size=1.5", ["data.image_size = 1.5", "needs a whole number"]),
        ("data.image_size=0", ["data.image_size = 0", "greater than or equal to 1"]),
        ("optim.nesterov=1", ["optim.nesterov = 1", "needs true or false"]),
        ("data.source=folder", ["data.source = 'folder'", "'dali', 'torch' or 'synthetic'"]),
        ("launch.ranks_per_node=many", ["launch.ranks_per_node = 'many'", "'auto' or a whole number"]),
        ("model.gate=folded", ["model.gate 'folded'", "none, se, double_fc, pair1x1, pair2x1, fold3x3"]),
        ("model.network=resnet50", ["model.network 'resnet50'", "ini_resnet50"]),
        ("model.fold_width=7", ["model.fold_width 7", "16, 32, 64 channels", "possible widths are 4, 8"]),
        ("model.fold_layout=rows", ["model.fold_layout", "'columns' or 'groups'"]),
        ("model.lens=fast", ["model.lens", "'one_filter' or 'plain'"]),
        ("model.gate_init=new", ["model.gate_init", "'cured' or 'authors'"]),
        ("model.gate_reduction=32", ["model.gate_reduction 32", "needs 16 or less"]),
        ("data.augment.crop_scale=[0.5,0.1]", ["data.augment.crop_scale [0.5, 0.1]", "smallest <= largest"]),
        ("name=a/b", ["name = 'a/b'", "letters, digits"]),
        ("name=-rf", ["name = '-rf'", "a letter or digit first"]),
        ("optim.warmup_epochs=1000", ["optim.warmup_epochs 1000", "train.epochs (90.0)"]),
        ("checkpoint.keep_last=1", ["checkpoint.keep_last = 1", "greater than or equal to 2"]),
        ("nonsense", ["'nonsense' is not key.sub=value"]),
        ("engine.zero_stage=2", ["engine.zero_stage 2", "needs engine.kind deepspeed"]),
        ("engine.zero_stage=4", ["engine.zero_stage = 4", "less than or equal to 3"]),
        ("engine.offload_optimizer=true", ["engine.offload_optimizer true", "engine.zero_stage 1, 2 or 3"]),
        ("engine.kind=fsdp", ["engine.kind = 'fsdp'", "'ddp' or 'deepspeed'"]),
        ("name.sub=1", ["name is a value"]),
        ("optim.lr=[1", ["optim.lr = '[1'", "not a YAML value"]),
    ],
)
def test_wrong_override_is_one_line(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = error_of(write(tmp_path, MINIMAL), override)
    assert message.startswith("command line: ")
    for part in parts:
        assert part in message


DEEPSPEED = ["engine.kind=deepspeed", "engine.zero_stage=1"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("engine.precision=fp16", ["engine.precision fp16", "use bf16 or fp32"]),
        ("engine.compile=true", ["engine.compile true", "use engine.kind ddp"]),
        ("optim.optimizer=muon", ["engine.zero_stage 1", "muon", "needs whole"]),
    ],
)
def test_what_deepspeed_cannot_do_is_one_line(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = error_of(write(tmp_path, MINIMAL), *DEEPSPEED, override)
    for part in parts:
        assert part in message
    if override.startswith("optim"):
        load_config(write(tmp_path, MINIMAL), ["engine.kind=deepspeed", override])  # stage 0 cuts nothing


def test_a_yaml_file_among_the_overrides_is_laid_over(tmp_path: Path) -> None:
    layer = write(tmp_path, "engine: {kind: deepspeed, zero_stage: 1}\noptim: {lr: 7.0}", "zero.yaml")
    cfg = load_config(write(tmp_path, MINIMAL), ["optim.lr=0.5", str(layer), "seed=3"])
    assert (cfg.engine.kind, cfg.engine.zero_stage, cfg.optim.lr, cfg.seed) == ("deepspeed", 1, 0.5, 3)
    wrong = write(tmp_path, "engine: {kinds: ddp}", "wrong.yaml")
    assert error_of(write(tmp_path, MINIMAL), str(wrong)).startswith(f"{wrong}: engine.kinds = 'ddp': unknown key")
    assert "no such config file" in error_of(write(tmp_path, MINIMAL), str(tmp_path / "none.yaml"))


def test_wrong_value_in_a_base_names_the_base_file(tmp_path: Path) -> None:
    base = write(tmp_path, "name: x\noptim: {lrr: 1}", "base.yaml")
    message = error_of(write(tmp_path, "base: base.yaml\noptim: {lr: 1.0}"))
    assert message == f"{base}: optim.lrr = 1: unknown key; did you mean optim.lr?"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: [", "is not YAML"),
        ("name: x\n\tlr: 1", "line 2"),
        ("- a\n- b", "holds a list"),
        ("name: a\nname: b", "'name' stands twice"),
        ("base: [a, b]\nname: x", "needs one file name"),
        ("base: c.yaml\nname: x", "circle"),
        ("base: missing.yaml\nname: x", "no such config file"),
        ("name: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("optim: {lr: 0.1}", "name: is missing"),
    ],
)
def test_unusable_file_is_one_line(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, text)
    message = error_of(path)
    assert part in message
    assert str(tmp_path) in message


def test_missing_file_names_the_near_one(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "digits.yaml")
    assert "did you mean" in error_of(tmp_path / "digit.yaml")


def test_binary_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read as text" in error_of(path)


def test_a_wrong_config_ends_the_command_before_torch_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    code = (
        "import sys; from ii_dist.cli.main import main; "
        f"code = main(['train', {str(path)!r}, 'model.gate=x']); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("text", "span"), [("10:20", (10, 20)), ("7:7", (7, 7)), ("100:1005", (100, 1005)), ("", None)]
)
def test_steps_to_trace_are_read_as_they_are_written(tmp_path: Path, text: str, span: tuple[int, int] | None) -> None:
    path = write(tmp_path, MINIMAL + f"profile:\n  steps: {text or repr(text)}\n")
    assert load_config(path).profile.span == span
    assert load_config(write(tmp_path, MINIMAL, "d.yaml"), [f"profile.steps={text}"]).profile.span == span


@pytest.mark.parametrize("text", ["20:10", "0:3", "a:b", "3", "1:2:3", "-1:4"])
def test_steps_that_cannot_be_traced_are_refused(tmp_path: Path, text: str) -> None:
    assert "profile.steps" in error_of(write(tmp_path, MINIMAL), f"profile.steps={text}")


def test_what_is_watched_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    watched = ["profile.steps=3:4", "profile.ranks=[0, 1]", "profile.memory=true", "metrics.batch_images=0"]
    other = load_config(path, [*watched, "metrics.compare=[seed]"])
    assert other.profile.ranks == (0, 1)
    assert recipe_differences(load_config(path), other) == []
