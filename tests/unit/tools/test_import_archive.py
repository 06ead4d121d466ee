"""Hostile and damaged archives: one line that names the member, and nothing is written outside the target."""

import contextlib
import gzip
import io
import os
import random
import struct
import tarfile
from pathlib import Path

import pytest

from ii_dist.config import DataError
from tests.archives import devkit_files, make_imagenet, tar_bytes
from tools import _archive, import_dataset
from tools._archive import Member, list_members, read_gzipped, read_member
from tools._matlab import read_matlab

NAMES = (
    "../escaped.JPEG",
    "a/../../escaped.JPEG",
    "/tmp/escaped.JPEG",
    "..",
    "a\\..\\escaped.JPEG",
    "line\nbreak.JPEG",
    "colour\x1b[31m.JPEG",
    "x" * 300 + "/../../escaped.JPEG",
)


def special(name: str, kind: bytes, target: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        tar.addfile(member)
    return buffer.getvalue()


HOSTILE = {
    **{repr(name): tar_bytes([("good.JPEG", b"good"), (name, b"bad")]) for name in NAMES},
    "symlink": special("link.JPEG", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special("link.JPEG", tarfile.LNKTYPE, "../outside"),
    "device": special("null.JPEG", tarfile.CHRTYPE),
    "block device": special("disk.JPEG", tarfile.BLKTYPE),
    "pipe": special("pipe.JPEG", tarfile.FIFOTYPE),
    "folder outside": special("../folder", tarfile.DIRTYPE),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_refused_wherever_they_stand(case: str, tmp_path: Path) -> None:
    """In the training tar, in a class's tar and in the validation tar; nothing appears beside the target."""
    content = HOSTILE[case]
    truth = tmp_path / "truth.txt"
    truth.write_text("good.JPEG n01440764\n")
    inner = tar_bytes([("a.JPEG", b"x")])
    places = {
        "outer": (content, inner),
        "inner": (tar_bytes([("n01440764.tar", content)]), tar_bytes([("good.JPEG", b"x")])),
        "val": (tar_bytes([("n01440764.tar", inner)]), content),
    }
    for place, (train, val) in places.items():
        base = tmp_path / place
        base.mkdir()
        (base / "train.tar").write_bytes(train)
        (base / "val.tar").write_bytes(val)
        arguments = ["imagenet", "--train", base / "train.tar", "--val", base / "val.tar", "--val-labels", truth]
        with pytest.raises(DataError) as error:
            import_dataset.main([*map(str, arguments), "--out", str(base / "out"), "--allow-other-archive"])
        assert "not allowed" in str(error.value)
        assert str(error.value).isprintable()
        assert sorted(p.name for p in base.iterdir()) == ["out", "train.tar", "val.tar"]
        assert not list((base / "out").rglob("*.JPEG"))
    assert not Path("/tmp/escaped.JPEG").exists()


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[257:265] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def big_number(value: int) -> bytes:
    """GNU's form for sizes that do not fit, or are negative."""
    return bytes([0xFF if value < 0 else 0x80]) + (value % 2**88).to_bytes(11, "big")


END = bytes(1024)
BROKEN = {
    "negative size": header(b"a.JPEG", big_number(-512)) + END,
    "negative size behind a good one": header(b"a.JPEG", b"0") + header(b"b.JPEG", big_number(-512)) + END,
    "back to the start": header(b"a.JPEG", b"0") + header(b"b.JPEG", big_number(-1024)) + END,
    "negative size of a long name": header(b"a", big_number(-1024), b"L") + header(b"b", b"0") + END,
    "negative size of attributes": header(b"a", big_number(-512), b"x") + header(b"b", b"0") + END,
    "huge size": header(b"a.JPEG", big_number(1 << 62)) + END,
    "huge long name": header(b"a", big_number(1 << 40), b"L") + END,
    "huge attributes": header(b"a", b"77777777777", b"x") + END,
    "headers in headers": header(b"a", b"0", b"x") * 3000 + END,
    "garbage in the middle": header(b"a.JPEG", b"0") + os.urandom(512) + header(b"b.JPEG", b"0") + END,
    "no end": header(b"a.JPEG", b"0"),
    "attribute with a wrong size": header(b"a", b"24", b"x") + b"99999 size=-5\n".ljust(512, b"\0") + END,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_end_with_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.tar"
    path.write_bytes(BROKEN[case])
    with pytest.raises(DataError, match=r"broken\.tar") as error:
        list_members(path)
    assert str(error.value).isprintable()


@pytest.mark.timeout(60)
def test_random_damage_never_crashes_or_leaves_the_archive(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "a.tar"
    good = tar_bytes([(f"folder/{'long' * 30}{i}.JPEG", b"x" * i * 300) for i in range(6)])
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(draw.randrange(1, 20)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        path.write_bytes(bad)
        members: list[Member] = []
        with contextlib.suppress(DataError):
            members = list_members(path)
        assert all(m.offset >= 0 and m.offset + m.length <= len(bad) for m in members)


def test_members_are_read_where_they_lie(tmp_path: Path) -> None:
    files = {f"{i}.JPEG": os.urandom(100 + 400 * i) for i in range(5)}
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_bytes([("first", b"x" * 700), ("inner.tar", tar_bytes([("./dir/", b""), *files.items()]))]))
    outer = list_members(path)
    assert [m.name for m in outer] == ["first", "inner.tar"]
    inner = [m for m in list_members(path, outer[1]) if m.length]
    file = os.open(path, os.O_RDONLY)
    assert {m.name: read_member(file, path, m) for m in inner} == files
    with pytest.raises(DataError, match=r"cut off in 4\.JPEG"):
        read_member(file, path, Member("4.JPEG", path.stat().st_size - 10, 50))
    with pytest.raises(DataError, match="more than any image"):
        read_member(file, path, Member("big.JPEG", 0, 1 << 40))
    os.close(file)


def test_a_file_that_cannot_be_read_is_named() -> None:
    """This file's first bytes belong to no memory: reading them is a real input/output error."""
    path = Path("/proc/self/mem")
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(DataError, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
        read_member(file, path, Member("a.JPEG", 0, 10))
    os.close(file)
    with pytest.raises(DataError, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
        list(read_gzipped(path))
    with pytest.raises(DataError, match="No such file"):
        list_members(Path("/nowhere.tar"))


def test_gzipped_archives_that_are_damaged_or_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar.gz"
    content = tar_bytes(devkit_files().items(), "w:gz")
    for bad in (content[: len(content) // 2], content[:-6], b"hello", b"", content[:40] + b"\0" * 40 + content[80:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"a\.tar\.gz"):
            list(read_gzipped(path))
    path.write_bytes(tar_bytes([("zeros.bin", bytes(50_000_000))], "w:gz"))
    assert path.stat().st_size < 100_000
    long_name = header(b"a", b"%o" % (1 << 26), b"L") + bytes(1 << 26) + header(b"b", b"0") + END
    path.write_bytes(gzip.compress(long_name, 1))
    with pytest.raises(DataError, match="a header of 67,1"):
        list(read_gzipped(path))
    path.write_bytes(tar_bytes([("zeros.bin", bytes(50_000_000))], "w:gz"))
    monkeypatch.setattr(_archive, "MAX_MEMBER_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"zeros\.bin has 50,000,000 bytes"):
        list(read_gzipped(path))


def test_matlab_files_are_read_as_scipy_reads_them() -> None:
    import numpy as np
    import scipy.io

    rng = np.random.Generator(np.random.PCG64(0))
    for compressed in (True, False):
        values = {
            f"v{i}": rng.integers(-5, 300, (3, i + 1)).astype(t) for i, t in enumerate(("f8", "i2", "u1", "i4", "f4"))
        }
        values |= {"name": "fish, é", "empty": np.zeros((0, 3))}
        buffer = io.BytesIO()
        scipy.io.savemat(buffer, values, do_compression=compressed)
        found = read_matlab(buffer.getvalue(), "x")
        assert found["name"] == "fish, é"
        assert found["empty"] == []
        for name in ("v0", "v1", "v2", "v3", "v4"):
            assert found[name] == values[name].ravel("F").tolist()


@pytest.mark.timeout(60)
def test_damaged_matlab_files_are_refused_never_crash() -> None:
    draw, good = random.Random(0), devkit_files()["ILSVRC2012_devkit_t12/data/meta.mat"]
    plain = bytearray(good[:128] + read_inside(good))
    for _ in range(600):
        bad = bytearray(plain)
        for _ in range(draw.randrange(1, 8)):
            bad[draw.randrange(128, len(bad))] = draw.randrange(256)
        with contextlib.suppress(DataError):
            read_matlab(bytes(bad[: draw.randrange(len(bad))] if draw.random() < 0.3 else bad), "meta.mat")


def read_inside(meta: bytes) -> bytes:
    import zlib

    _, length = struct.unpack_from("<II", meta, 128)
    return zlib.decompress(meta[136 : 136 + length])


def test_make_imagenet_is_what_other_programs_read(tmp_path: Path) -> None:
    """The archives of these tests are real: GNU tar lists them."""
    import subprocess

    source = make_imagenet(tmp_path)
    listed = subprocess.run(
        ["tar", "tf", source / "ILSVRC2012_img_train.tar"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == ["n02084071.tar", "n01443537.tar", "n01440764.tar"]
