"""One shard file: the bytes, against the safetensors package and hashlib as independent readers."""

import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ii_dist.checkpoint import assign_shards
from ii_dist.checkpoint.disk import PAGE_BYTES, SLAB_BYTES
from ii_dist.checkpoint.shards import (
    DTYPES,
    MOST_PARTS,
    PART_BYTES,
    ShardFile,
    TensorSpec,
    plan_shards,
    read_header,
    spec_of,
    write_shard,
)
from ii_dist.checkpoint.staging import make_image
from ii_dist.config.errors import CheckpointError


def odd_tensors() -> dict[str, Tensor]:
    """What careless writers change: NaN payloads, negative zero, strides, tensors without dimensions or elements."""
    nan_bits = torch.tensor([0x7FC00001, 0x7F800001, -1, -0x80000000, 0x00000001], dtype=torch.int32)
    return {
        "nan": nan_bits.view(torch.float32),
        "bf16": torch.tensor([0x7FC1, -32768, 0x0001, 0x7F80], dtype=torch.int16).view(torch.bfloat16),
        "fp16": torch.tensor([0x7E01, -32768, 0x0001], dtype=torch.int16).view(torch.float16),
        "double": torch.tensor([-0.0, 5e-324, float("inf")], dtype=torch.float64),
        "count": torch.tensor(2**62 + 1),
        "mask": torch.tensor([[True, False], [False, True]]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6).t(),
        "slice": torch.randn(10, 10)[2:5, ::2],
        'name with " and ü': torch.ones(1),
    }


def write(path: Path, tensors: Mapping[str, Tensor], step: int = 0) -> ShardFile:
    image, views = make_image(spec_of(name, tensor) for name, tensor in tensors.items())
    for name, view in views.items():
        view.copy_(tensors[name])
    return write_shard(path, image, step)


def bits(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def test_every_bit_comes_back_through_another_reader(tmp_path: Path) -> None:
    tensors = odd_tensors()
    written = write(tmp_path / "a.safetensors", tensors, step=7)
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor), name
    content = (tmp_path / "a.safetensors").read_bytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_of_the_table(tmp_path: Path, code: str) -> None:
    dtype = getattr(torch, DTYPES[code][0])
    tensor = torch.arange(24, dtype=torch.uint8).view(torch.uint8)[: 3 * DTYPES[code][1]].clone().view(dtype)
    if code == "BOOL":
        tensor = torch.tensor([True, False, True])
    write(tmp_path / "a.safetensors", {"x": tensor})
    back = load_file(tmp_path / "a.safetensors")["x"]
    assert back.dtype == dtype
    assert bits(back) == bits(tensor)
    assert spec_of("x", tensor).bytes == tensor.nbytes


@pytest.mark.parametrize("extra", [-PAGE_BYTES, -1, 0, 1, PAGE_BYTES - 1, SLAB_BYTES])
def test_sizes_around_pages_and_slabs(tmp_path: Path, extra: int) -> None:
    header = write(tmp_path / "b.safetensors", {"x": torch.zeros(SLAB_BYTES, dtype=torch.uint8)}).bytes - SLAB_BYTES
    large = torch.randint(0, 256, (SLAB_BYTES + extra - header,), dtype=torch.uint8)
    written = write(tmp_path / "a.safetensors", {"x": large})
    assert written.bytes == SLAB_BYTES + extra
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], large)
    assert written.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFAULT])
def test_disk_that_must_have_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real, flags = os.write, []

    def write_through(file: int, data: memoryview) -> int:
        flags.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
        if flags[-1]:
            raise OSError(number, os.strerror(number))
        return real(file, data)

    monkeypatch.setattr(os, "write", write_through)
    tensors = {"x": torch.randn(10_000)}
    write(tmp_path / "a.safetensors", tensors)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensors["x"])
    assert flags in ([os.O_DIRECT, 0, 0], [0, 0])  # asked once a file; some file systems know no O_DIRECT


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: 2 * PAGE_BYTES + 5]))
    tensors = {"x": torch.randn(20_000)}
    written = write(tmp_path / "a.safetensors", tensors)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensors["x"])
    assert written.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


def test_many_small_tensors(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((i % 5,), i) for i in range(3000)}
    write(tmp_path / "a.safetensors", tensors)
    back = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_bytes_depend_on_names_and_values_alone(tmp_path: Path) -> None:
    tensors = odd_tensors()
    turned = {name: tensor.contiguous() for name, tensor in reversed(tensors.items())}
    first = write(tmp_path / "a.safetensors", tensors)
    second = write(tmp_path / "b.safetensors", turned)
    assert first.sha256 == second.sha256


def test_tensors_are_aligned(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", odd_tensors())
    start, specs = read_header(tmp_path / "a.safetensors")
    assert start % 8 == 0
    for spec in specs:
        assert start % DTYPES[spec.dtype][1] == 0, spec.name
        start += spec.bytes


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}
    assert read_header(tmp_path / "a.safetensors")[1] == []


def test_never_over_an_existing_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.safetensors", odd_tensors())
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write(tmp_path / "b.safetensors", odd_tensors())
    assert not (tmp_path / "elsewhere").exists()


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a.safetensors", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_failed_flush_is_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "a.safetensors", odd_tensors())


def test_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor x: dtype torch\.complex128 cannot be saved"):
        write(tmp_path / "a.safetensors", {"x": torch.ones(1, dtype=torch.complex128)})


def test_header_as_the_other_reader_sees_it(tmp_path: Path) -> None:
    tensors = odd_tensors()
    write(tmp_path / "a.safetensors", tensors)
    _, specs = read_header(tmp_path / "a.safetensors")
    assert sorted(specs, key=lambda s: s.name) == [spec_of(name, tensors[name]) for name in sorted(tensors)]


def _file(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
MALFORMED = {
    "empty file": b"",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "not JSON": _file(b"{oops}", b"1234"),
    "deep JSON": _file(b"[" * 100_000, b""),
    "a list": _file([1], b""),
    "offsets overlap": _file(GOOD | {"y": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, b"123456"),
    "a hole": _file(GOOD | {"y": {"dtype": "U8", "shape": [4], "data_offsets": [6, 10]}}, b"1234567890"),
    "shape against offsets": _file({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "unknown dtype": _file({"x": {"dtype": "F3", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "negative offset": _file({"x": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, b""),
    "data cut off": _file(GOOD, b"123"),
    "data too long": _file(GOOD, b"12345"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_headers_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(MALFORMED[kind])
    with pytest.raises(CheckpointError, match=r"^a\.safetensors: "):
        read_header(tmp_path / "a.safetensors")


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 1000), max_size=40),
    world_size=st.integers(1, 9),
    turn=st.randoms(use_true_random=False),
)
def test_shares_are_a_balanced_partition(sizes: dict[str, int], world_size: int, turn: object) -> None:
    shares = assign_shards(sizes.items(), world_size)
    assert len(shares) == world_size
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    shuffled = list(sizes.items())
    turn.shuffle(shuffled)  # type: ignore[attr-defined]
    assert assign_shards(shuffled, world_size) == shares


def specs_of(sizes: Iterable[int]) -> list[TensorSpec]:
    return [TensorSpec(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "world_size", "parts"),
    [
        ([], 2, 1),
        ([100] * 9, 3, 1),
        ([PART_BYTES // 8] * 8, 1, 1),
        ([PART_BYTES // 8] * 9, 1, 2),
        ([PART_BYTES // 8] * 64, 2, 4),
        ([PART_BYTES] * 100, 2, MOST_PARTS),
    ],
)
def test_parts_of_a_share(sizes: list[int], world_size: int, parts: int) -> None:
    specs = specs_of(sizes)
    shards = plan_shards(specs, world_size)
    assert len(shards) == world_size * parts
    assert sorted(name for names in shards for name in names) == sorted(spec.name for spec in specs)
    # A rank has the share that it would have in one file.
    shares = [sorted(chain(*shards[r * parts : (r + 1) * parts])) for r in range(world_size)]
    assert shares == assign_shards(((s.name, s.bytes) for s in specs), world_size)
    loads = [sum(sizes[int(name[1:])] for name in names) for names in shards]
    assert max(loads) - min(loads) <= max(sizes, default=0)
