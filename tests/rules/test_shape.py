"""The shape of the code: who imports whom, what is public, what is light, how long things are, what never appears."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ii_dist"
OURS = ("ii_dist", "launch", "tools", "benchmarks")

LOW = {"config", "runtime"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "runtime": {"config"},
    "models": {"config"},
    "optim": {"config"},
    "data": LOW,
    "metrics": LOW,
    "checkpoint": LOW,
    "engine": LOW | {"optim"},
    "train": LOW | {"data", "models", "optim", "engine", "metrics", "checkpoint"},
    "cli": {"config", "runtime", "train"},
}
TOOLS_MAY_IMPORT = LOW | {"data", "models", "checkpoint", "metrics"}
# A third party that could be missing or replaced is known to these places only.
ONLY_IN = {
    "nvidia": ("ii_dist/data/dali.py", "benchmarks/"),
    "deepspeed": ("ii_dist/engine/deepspeed_engine.py", "benchmarks/"),
    "submitit": ("launch/",),
    "tensorboard": ("ii_dist/metrics/",),
    "onnx": ("ii_dist/train/export.py",),
    "onnxruntime": ("ii_dist/train/export.py",),
    "onnxscript": ("ii_dist/train/export.py",),
    "timm": ("ii_dist/models/", "ii_dist/optim/", "benchmarks/"),
    "torchvision": ("ii_dist/models/", "benchmarks/"),
}
FORBIDDEN = ("pickle", "weights_only=False", "shell=True", "yaml.load(", "torch.load(", "torch.save(", "_object_list(")
# DeepSpeed and torch.distributed.checkpoint save pickles. One file opens them, restricted to a list of harmless names,
# so that there is one place to look at. The benchmark compares with torch's own, on files that it has just written.
MAY_UNPICKLE = {
    "ii_dist/checkpoint/foreign.py": {"pickle", "torch.load("},
    "benchmarks/checkpoint_ways.py": {"torch.load(", "torch.save("},
}
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 400


def sources(*folders: str) -> list[Path]:
    return sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(file: Path) -> set[str]:
    parts = (name.split(".") for name in imported_modules(file))
    return {p[1] for p in parts if p[0] == "ii_dist" and len(p) > 1 and p[1] in MAY_IMPORT}


def test_every_room_is_in_the_table() -> None:
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room: str) -> None:
    wrong = {relative(f): bad for f in sources(f"ii_dist/{room}") if (bad := rooms(f) - MAY_IMPORT[room] - {room})}
    assert not wrong


def test_launch_knows_only_the_config_and_tools_know_no_training() -> None:
    assert not {relative(f): bad for f in sources("launch") if (bad := rooms(f) - {"config"})}
    assert not {relative(f): bad for f in sources("tools") if (bad := rooms(f) - TOOLS_MAY_IMPORT)}


@pytest.mark.parametrize("library", ONLY_IN)
def test_each_third_party_is_known_to_one_place(library: str) -> None:
    found = [relative(f) for f in sources(*OURS) if any(n.split(".")[0] == library for n in imported_modules(f))]
    if library == "tensorboard":
        found += [
            relative(f)
            for f in sources(*OURS)
            if any(n.startswith("torch.utils.tensorboard") for n in imported_modules(f))
        ]
    assert not [f for f in found if not f.startswith(ONLY_IN[library])]


@pytest.mark.parametrize("name", [f"ii_dist.{room}" for room in MAY_IMPORT])
def test_public_names_are_listed_and_sorted(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert list(module.__all__) == sorted(
        module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    ) or list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None


@pytest.mark.parametrize(
    "name", ["ii_dist.config", "ii_dist.runtime", "ii_dist.cli.main", "ii_dist.train.preflight", "launch", "launch.job"]
)
def test_light_imports_bring_no_torch(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('torch', 'numpy', 'timm', 'submitit') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


def test_functions_and_files_are_short() -> None:
    long = []
    for file in sources(*OURS):
        text = file.read_text()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            long.append(f"{relative(file)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{relative(file)}:{node.lineno} {node.name}: {length} lines")
    assert not long


def test_every_module_says_what_it_is() -> None:
    assert not [relative(f) for f in sources(*OURS) if not ast.get_docstring(ast.parse(f.read_text()))]


def code_only(file: Path) -> str:
    """The source without docstrings and comments, where the forbidden words may be spoken of."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.unparse(tree)


def test_nothing_dangerous_is_written() -> None:
    found = [
        f"{relative(f)}: {word}"
        for f in sources(*OURS)
        for word in FORBIDDEN
        if word in code_only(f) and word not in MAY_UNPICKLE.get(relative(f), set())
    ]
    assert not found


def test_every_torch_load_is_restricted() -> None:
    for name in MAY_UNPICKLE:
        calls = [n for n in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(n, ast.Call)]
        loads = [n for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr in ("load", "loads")]
        direct = [n for n in loads if isinstance(n.func, ast.Attribute) and isinstance(n.func.value, ast.Name)]
        assert {ast.unparse(n.func) for n in direct} == {"torch.load"}
        for call in direct:
            assert {"weights_only": "True"}.items() <= {k.arg: ast.unparse(k.value) for k in call.keywords}.items()


def test_the_environment_is_read_in_one_place() -> None:
    readers = [relative(f) for f in sources("ii_dist") if re.search(r"os\.(environ|getenv)", code_only(f))]
    assert readers == ["ii_dist/runtime/world.py"]


def test_no_path_of_a_build_machine_is_left() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    here = str(ROOT.parent) + "/"
    text_files = [ROOT / f for f in listed if not f.endswith((".png", ".jpg")) and (ROOT / f).exists()]
    assert not [relative(f) for f in text_files if here in f.read_text(errors="ignore")]


def test_changelog_names_the_version() -> None:
    version = importlib.import_module("ii_dist").__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
