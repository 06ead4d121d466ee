"""YAML files and ``key.sub=value`` overrides to a `RunConfig`, with errors that say what to write instead.

In: a file (whose ``base:`` names one parent file, which may have a parent of its own), more layers such as a cluster
file, overrides. Out: a frozen `RunConfig`. Every value remembers which file it came from, so that an error can name it.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import RunConfig

Tree = dict[str, Any]
Origins = dict[str, str]
"""Dotted key -> the file (or "command line") that set it last."""

COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice and, as YAML 1.2, reads 1e-3 as a number and 10:20 as a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"),
    list("-+0123456789."),
)
for _digit in "0123456789":  # ahead of the rule by which 10:20 is a whole number of base 60
    _as_text = ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$"))
    _Loader.yaml_implicit_resolvers[_digit] = [_as_text, *_Loader.yaml_implicit_resolvers[_digit]]


def load_config(path: Path | str, overrides: Sequence[str] = (), layers: Sequence[Path | str] = ()) -> RunConfig:
    """Read `path`, lay `layers` over it in order, then `overrides`. Raises ConfigError (one line).

    An override is key.sub=value, or a YAML file (configs/engines/zero2.yaml): files are laid over first.
    """
    origins: Origins = {}
    tree = _read_with_bases(Path(path), origins, ())
    files = [text for text in overrides if "=" not in text and text.endswith((".yaml", ".yml"))]
    for layer in (*layers, *files):
        _merge(tree, _read_with_bases(Path(layer), origins, ()), "", origins, "")
    for override in overrides:
        if override not in files:
            _apply_override(tree, override, origins)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path), origins)) from None


def dump_config(cfg: RunConfig) -> str:
    """The whole resolved tree as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_with_bases(path: Path, origins: Origins, below: tuple[Path, ...]) -> Tree:
    if path.resolve() in below:
        raise ConfigError(f"{path}: base: comes back to a file that already stands in the chain; break the circle")
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        merged: Tree = {}
    elif isinstance(base, str):
        merged = _read_with_bases(path.parent / base, origins, (*below, path.resolve()))
    else:
        raise ConfigError(f"{path}: base = {base!r}: needs one file name, relative to this file")
    _merge(merged, tree, str(path), origins, "")
    return merged


def _read_yaml(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_near_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give a YAML file") from None
    try:
        tree = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}:{where} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; needs `key: value` lines")
    return cast(Tree, tree)


def _near_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _merge(into: Tree, new: Mapping[str, Any], file: str, origins: Origins, prefix: str) -> None:
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, file, origins, f"{dotted}.")
        else:
            into[key] = value
            if file:
                _note_origin(value, dotted, file, origins)
        if file:
            origins[dotted] = file


def _note_origin(value: object, dotted: str, file: str, origins: Origins) -> None:
    origins[dotted] = file
    if isinstance(value, dict):
        for key, inner in value.items():
            _note_origin(inner, f"{dotted}.{key}", file, origins)


def _apply_override(tree: Tree, override: str, origins: Origins) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not key.sub=value (such as optim.lr=0.1)")
    try:
        value = _Loader(text).get_single_data() if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"{COMMAND_LINE}: {key} = {text!r}: is not a YAML value") from None
    node = tree
    for part in parts[:-1]:
        inner = node.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{COMMAND_LINE}: {key}: {part} is a value, not a group of keys")
        node = inner
    node[parts[-1]] = value
    _note_origin(value, key, COMMAND_LINE, origins)


def _explain(error: ValidationError, path: str, origins: Origins) -> str:
    by_key: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        loc = tuple(str(part) for part in detail["loc"] if not _is_branch(str(part)))
        by_key.setdefault(loc, []).append(detail)
    loc, details = next(iter(by_key.items()))
    text = _explain_one(details[0], list(loc), path, origins)
    text += "".join(f" or {_needs(other).removeprefix('needs ')}" for other in details[1:])
    return text + (f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else "")


def _is_branch(part: str) -> bool:
    """Pydantic names the branch of a union that it tried ("int", "literal['auto']"); users have no such key."""
    return (not part.isidentifier() and not part.isdigit()) or part in {"int", "float", "str", "bool"}


def _explain_one(first: ErrorDetails, loc: list[str], path: str, origins: Origins) -> str:
    key, value, kind = ".".join(loc), first["input"], first["type"]
    if kind == "value_error":  # our own checks: "<key in this slice> <value>: needs ..."
        said = str(first["msg"]).removeprefix("Value error, ")
        key = ".".join([*loc, said.split(" ")[0]])
        prefix = ".".join(loc)
        return f"{_file(origins, key, path)}: {prefix}{'.' if prefix else ''}{said}"
    file = _file(origins, key, path)
    if kind == "extra_forbidden":
        return f"{file}: {key} = {_short(value)}: unknown key{_near_key(loc)}"
    if kind == "missing":
        return f"{file}: {key}: is missing; needs a value"
    return f"{file}: {key} = {_short(value)}: {_needs(first)}"


def _file(origins: Origins, key: str, path: str) -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_NEEDS = {
    "int_type": "needs a whole number",
    "int_from_float": "needs a whole number",
    "float_type": "needs a number",
    "bool_type": "needs true or false",
    "string_type": "needs a text",
    "tuple_type": "needs a list",
    "model_type": "needs a group of keys",
    "string_pattern_mismatch": "needs 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first",
}


def _needs(first: ErrorDetails) -> str:
    context = first.get("ctx") or {}
    if first["type"] == "literal_error":
        return f"needs one of {context['expected']}"
    return _NEEDS.get(first["type"]) or str(first["msg"]).replace("Input should be", "needs to be")


def _near_key(loc: list[str]) -> str:
    slice_, parent = _slice_at(loc[:-1]), "".join(f"{part}." for part in loc[:-1])
    keys = list(slice_.model_fields)
    near = difflib.get_close_matches(loc[-1], keys, n=1)
    if near:
        return f"; did you mean {parent}{near[0]}?"
    everywhere = _all_keys(RunConfig, "")
    near = [dotted for dotted in everywhere if dotted.rpartition(".")[2] == loc[-1]]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; {parent.rstrip('.') or 'the top level'} has {', '.join(keys)}"


def _slice_at(loc: Sequence[str]) -> type[BaseModel]:
    slice_: type[BaseModel] = RunConfig
    for part in loc:
        slice_ = cast(type[BaseModel], slice_.model_fields[part].annotation)
    return slice_


def _all_keys(slice_: type[BaseModel], prefix: str) -> list[str]:
    keys: list[str] = []
    for name, field in slice_.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and not get_args(inner) and issubclass(inner, BaseModel):
            keys += _all_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
