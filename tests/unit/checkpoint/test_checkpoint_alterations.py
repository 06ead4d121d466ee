"""1,300 seeded alterations of a committed step: every one is found, and the step before is taken in its place."""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ii_dist.checkpoint import find_newest, load_step, shards, verify_step
from ii_dist.config.run_folder import COMMITTED, STATE, RunFolder, shard_name

TIMES = 100
Files = dict[str, bytes]
Commit = Callable[..., list[Exception | None]]
Alteration = Callable[[Path, Files, Files, random.Random], object]


def any_file(files: Files, draw: random.Random) -> str:
    return draw.choice(sorted(files))


def any_shard(files: Files, draw: random.Random) -> str:
    return draw.choice(sorted(name for name in files if name.startswith("shard_")))


def flip_bit(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    name = any_file(files, draw)
    data = bytearray(files[name])
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (step / name).write_bytes(data)


def truncate(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    name = any_file(files, draw)
    os.truncate(step / name, draw.randrange(len(files[name])))


def lengthen(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    name = any_file(files, draw)
    (step / name).write_bytes(files[name] + draw.randbytes(draw.randint(1, 600)))


def zero_block(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    name = any_file(files, draw)
    data = bytearray(files[name])
    start = draw.randrange(len(data)) // 512 * 512
    end = min(len(data), start + 512)
    data[start:end] = bytes(end - start)
    (step / name).write_bytes(data)


def move_block(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    """A block that was written to the wrong place."""
    name = any_file(files, draw)
    data = bytearray(files[name])
    length = draw.randint(1, min(512, len(data)))
    source, target = (draw.randrange(len(data) - length + 1) for _ in range(2))
    data[target : target + length] = data[source : source + length]
    (step / name).write_bytes(data)


def swap_shards(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    one, other = draw.sample(sorted(name for name in files if name.startswith("shard_")), 2)
    (step / one).write_bytes(files[other])
    (step / other).write_bytes(files[one])


def stale_files(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    """Some files, or all of them, of the step before."""
    for name in draw.sample(sorted(files), draw.randint(1, len(files))):
        (step / name).write_bytes(older[name])


def missing_files(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    for name in draw.sample(sorted(files), draw.randint(1, len(files))):
        (step / name).unlink()


def extra_file(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    source = any_shard(files, draw)
    count = draw.randint(len(files), 99)
    shutil.copy(
        step / source, step / draw.choice((shard_name(len(files), count), source + ".bak", f"copy of {source}"))
    )


def other_kind(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    name = any_file(files, draw)
    (step / name).unlink()
    match draw.randrange(3):
        case 0:
            (step / name).mkdir()
        case 1:
            (step / name).symlink_to(step.parent / "step_000000010" / name)
        case 2:
            os.mkfifo(step / name)


def edit_manifest(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    """One digit or letter of a value, the JSON as valid as before."""
    text = files[COMMITTED].decode()
    at = draw.choice([match.start() for match in re.finditer(r"[0-9a-f]", text) if text[match.start() - 1] != "\\"])
    new = draw.choice([c for c in "0123456789abcdef" if c != text[at]])
    (step / COMMITTED).write_text(text[:at] + new + text[at + 1 :])


def edit_manifest_and_its_hash(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    """What the manifest says of the files, by someone who knows that it is hashed."""
    text = files[COMMITTED].decode()
    entries = json.loads(text)
    entry = draw.choice([*entries["shards"], entries["state"]])
    old = json.dumps(entry, sort_keys=True)
    if draw.random() < 0.5:
        entry["bytes"] += draw.choice((-1, 1))
    else:
        entry["sha256"] = hashlib.sha256(draw.randbytes(8)).hexdigest()
    text = text.replace(old, json.dumps(entry, sort_keys=True))
    body = text[2 : text.index(',\n"manifest_sha256"')]
    sha256 = hashlib.sha256(body.encode()).hexdigest()
    (step / COMMITTED).write_text(f'{{\n{body},\n"manifest_sha256": "{sha256}"\n}}\n')


def edit_state(step: Path, files: Files, older: Files, draw: random.Random) -> None:
    """Another number, as valid as the old one."""
    (step / STATE).write_bytes(re.sub(rb"\d", lambda digit: b"%d" % ((int(digit[0]) + 1) % 10), files[STATE]))


ALTERATIONS: list[Alteration] = [
    *(flip_bit, truncate, lengthen, zero_block, move_block, swap_shards, stale_files, missing_files, extra_file),
    *(other_kind, edit_manifest, edit_manifest_and_its_hash, edit_state),
]


@pytest.fixture
def run(folder: RunFolder, commit: Commit, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Steps 10 and 20 of two ranks, two shards each, of tensors that differ everywhere."""
    monkeypatch.setattr(shards, "PART_BYTES", 3000)
    for step in (10, 20):
        draw = torch.Generator().manual_seed(step)
        tensors = {f"model.t{i}": torch.randn(250, generator=draw) for i in range(8)}
        assert commit(step, tensors, scalars={"step": step, "images": 64 * step}) == [None, None]
    assert len(list(folder.step(20).glob("shard_*-of-00004.safetensors"))) == 4
    return folder


def content(step: Path) -> Files:
    return {path.name: path.read_bytes() for path in step.iterdir()}


def restore(step: Path, files: Files) -> None:
    shutil.rmtree(step)
    step.mkdir()
    for name, data in files.items():
        (step / name).write_bytes(data)


def is_altered(step: Path, files: Files) -> bool:
    """As the file system tells it; some draws change nothing."""
    entries = {path.name: path for path in step.iterdir()}
    if entries.keys() != files.keys():
        return True
    return any(p.is_symlink() or not p.is_file() or p.read_bytes() != files[name] for name, p in entries.items())


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
def test_every_alteration_is_found(run: RunFolder, alter: Alteration) -> None:
    step, draw = run.step(20), random.Random(alter.__name__)
    files, older = content(step), content(run.step(10))
    missed: list[int] = []
    done = 0
    while done < TIMES:
        alter(step, files, older, draw)
        if is_altered(step, files):
            done += 1
            found, left_out = find_newest(run.checkpoints)
            if found is None or found.step != 10 or [left.step for left in left_out] != [20]:
                missed.append(done)
            else:
                assert left_out[0].reason.startswith("step_000000020 left out: "), left_out
                assert "\n" not in left_out[0].reason
        restore(step, files)
    assert not missed, f"{len(missed)} of {TIMES} not found"
    assert verify_step(step) == []


def test_the_step_before_is_whole(run: RunFolder) -> None:
    (run.step(20) / STATE).write_text("{}")
    found, _ = find_newest(run.checkpoints)
    assert found is not None
    tensors, scalars = load_step(found.path, found.manifest)
    assert scalars == {"step": 10, "images": 640}
    draw = torch.Generator().manual_seed(10)
    expected: dict[str, Tensor] = {f"model.t{i}": torch.randn(250, generator=draw) for i in range(8)}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
