"""COMMITTED.json: everything that is not exactly what was written is refused in one line."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ii_dist.checkpoint import Manifest, read_manifest
from ii_dist.checkpoint import manifest as manifest_module
from ii_dist.checkpoint.manifest import MANIFEST_LIMIT_BYTES, PositionEntry, ShardEntry, StateEntry, TensorEntry
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import shard_name


def make_manifest(**changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "step": 12,
        "position": PositionEntry(epoch=1, offset=64),
        "world_size": 2,
        "engine": "ddp",
        "global_batch": 64,
        "fence": 3,
        "config_sha256": "a" * 64,
        "index_sha256": "",
        "versions": {"python": "3.11"},
        "tensors": {
            "model.ü": TensorEntry(shard=shard_name(0, 2), dtype="BF16", shape=(2, 3)),
            "model.n": TensorEntry(shard=shard_name(1, 2), dtype="I64", shape=()),
        },
        "shards": tuple(ShardEntry(file=shard_name(r, 2), bytes=200 + r, sha256=f"{r}" * 64) for r in range(2)),
        "state": StateEntry(bytes=3, sha256="c" * 64),
    }
    return Manifest(**facts | changes)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    path = tmp_path / "step_000000012"
    path.mkdir()
    (path / "COMMITTED.json").write_bytes(make_manifest().encode())
    return path


def refused(step: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_manifest(step)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("COMMITTED.json: ")
    return text


def test_comes_back_equal(step: Path) -> None:
    manifest = read_manifest(step)
    assert manifest == make_manifest()
    assert manifest.total_bytes == 404
    text = (step / "COMMITTED.json").read_text()
    # The hash in the file is sha256 of the lines before it, without the braces: anyone can check it.
    body = text[2 : text.index(',\n"manifest_sha256"')]
    assert json.loads(text)["manifest_sha256"] == hashlib.sha256(body.encode()).hexdigest() == manifest.sha256()


def test_any_changed_byte_is_noticed(step: Path) -> None:
    good = (step / "COMMITTED.json").read_bytes()
    draw = random.Random(0)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        (step / "COMMITTED.json").write_bytes(bad)
        refused(step)


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -2])
def test_truncated(step: Path, cut: int) -> None:
    good = (step / "COMMITTED.json").read_bytes()
    (step / "COMMITTED.json").write_bytes(good[:cut])
    refused(step)


def test_longer(step: Path) -> None:
    with (step / "COMMITTED.json").open("ab") as file:
        file.write(b"\n")
    refused(step)


def _resealed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """An edited manifest whose own hash was computed again: only its meaning can betray it."""
    values = json.loads(make_manifest().encode())
    del values["manifest_sha256"]
    change(values)
    body = manifest_module._lines(values)
    sha256 = hashlib.sha256(body.encode()).hexdigest()
    return f'{{\n{body},\n"manifest_sha256": "{sha256}"\n}}\n'.encode()


EVIL: dict[str, Callable[[dict[str, Any]], None]] = {
    "shard above the folder": lambda v: v["shards"][0].update(file="../../etc/passwd"),
    "absolute shard": lambda v: v["shards"][0].update(file="/etc/passwd"),
    "shard of another count": lambda v: v["shards"][0].update(file=shard_name(0, 3)),
    "swapped shards": lambda v: v["shards"].reverse(),
    "shards that no number of ranks wrote": lambda v: v.update(world_size=3),
    "no shards": lambda v: v.update(shards=[], tensors={}),
    "missing shard": lambda v: v["shards"].pop(),
    "tensor in no shard": lambda v: v["tensors"]["model.n"].update(shard="../x"),
    "tensor larger than its shard": lambda v: v["tensors"]["model.n"].update(shape=[1000]),
    "negative dimension": lambda v: v["tensors"]["model.n"].update(shape=[-1]),
    "huge dimensions": lambda v: v["tensors"]["model.n"].update(shape=[2**39] * 16),
    "unknown dtype": lambda v: v["tensors"]["model.n"].update(dtype="OBJECT"),
    "unknown key": lambda v: v.update(code="print()"),
    "missing key": lambda v: v.pop("engine"),
    "step as text": lambda v: v.update(step="12"),
    "step as truth": lambda v: v.update(step=True),
    "negative size": lambda v: v["shards"][0].update(bytes=-1),
    "hash of another kind": lambda v: v["shards"][0].update(sha256="md5"),
    "other format": lambda v: v.update(format="pickle"),
    "later version": lambda v: v.update(format_version=2),
}


def test_sealing_again_is_what_the_writer_does() -> None:
    assert _resealed(lambda values: None) == make_manifest().encode()


@pytest.mark.parametrize("kind", EVIL)
def test_edited_with_a_plan(step: Path, kind: str) -> None:
    (step / "COMMITTED.json").write_bytes(_resealed(EVIL[kind]))
    refused(step)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"{" * 100_000,
        b'{"a":1}',
        b'{"step": NaN, "manifest_sha256": "x"}',
        b"\xff\xfe",
        b"[" * 200_000,
    ],
)
def test_not_a_manifest(step: Path, text: bytes) -> None:
    (step / "COMMITTED.json").write_bytes(text)
    refused(step)


def test_same_key_twice(step: Path) -> None:
    good = (step / "COMMITTED.json").read_bytes()
    (step / "COMMITTED.json").write_bytes(good.replace(b'"step": 12', b'"step": 13,\n"step": 12'))
    assert "changed after it was written" in refused(step)


def test_too_large_is_not_even_read(step: Path) -> None:
    os.truncate(step / "COMMITTED.json", MANIFEST_LIMIT_BYTES + 1)
    assert "more than the limit" in refused(step)


def test_missing_link_pipe_and_folder(step: Path) -> None:
    path = step / "COMMITTED.json"
    path.rename(step.parent / "real.json")
    assert refused(step) == "COMMITTED.json: missing"
    path.symlink_to(step.parent / "real.json")
    assert "symbolic link" in refused(step)
    path.unlink()
    os.mkfifo(path)
    assert "not a plain file" in refused(step)
    path.unlink()
    path.mkdir()
    assert "not a plain file" in refused(step)


def test_of_another_step(step: Path) -> None:
    assert "is of step 12" in refused(step.rename(step.with_name("step_000000013")))
