"""Hostile and broken files of other programs: refused with one line, and nothing of them is run."""

import builtins
import io
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ii_dist.checkpoint.deepspeed_folder import Consent, deepspeed_tensors
from ii_dist.checkpoint.foreign import StandIn, decode_tensor, load_tensors, read_dcp_metadata
from ii_dist.config.errors import CheckpointError

Payload = Callable[[str], tuple[object, tuple[object, ...]]]
# Each would make the file `canary` if it were called.
PAYLOADS: dict[str, Payload] = {
    "os.system": lambda canary: (os.system, (f"touch {canary}",)),
    "eval": lambda canary: (eval, (f"open({canary!r}, 'w')",)),
    "exec": lambda canary: (exec, (f"open({canary!r}, 'w')",)),
    "open": lambda canary: (open, (canary, "w")),
    "subprocess": lambda canary: (subprocess.call, (["touch", canary],)),
    "getattr": lambda canary: (getattr, (canary, "upper")),
    "import": lambda canary: (builtins.__import__, ("antigravity",)),
    "nested": lambda canary: (pickle.loads, (pickle.dumps(Bomb("os.system", canary)),)),
    "torch.load": lambda canary: (torch.load, (canary,)),
    "storage": lambda canary: (
        torch.storage._load_from_bytes,
        (saved(Bomb("os.system", canary)),),
    ),
}


class Bomb:
    def __init__(self, payload: str, canary: str) -> None:
        self._payload, self._canary = payload, canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return PAYLOADS[self._payload](self._canary)


def saved(value: object, **how: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def refused(act: Callable[[], object], canary: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not canary.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_hostile_is_run(payload: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "mp_rank_00_model_states.pt"
    bomb = Bomb(payload, str(canary))
    names = ("deepspeed.runtime.fp16.loss_scaler.LossScaler",)
    for value in (bomb, {"module": bomb}, {"module": {"w": torch.ones(2)}, "param_shapes": [bomb]}):
        for how in ({}, {"_use_new_zipfile_serialization": False}):
            file.write_bytes(saved(value, **how))
            refused(lambda: load_tensors(file), canary)
            refused(lambda: load_tensors(file, names), canary)
            refused(lambda: deepspeed_tensors(tmp_path, Consent(trusted=True)), canary)
        refused(lambda value=value: decode_tensor(saved(value), "here"), canary)
        for protocol in range(2, 6):
            file.write_bytes(pickle.dumps(value, protocol))
            refused(lambda: read_dcp_metadata(file), canary)
    refused(lambda: decode_tensor(pickle.dumps(bomb), "here"), canary)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"garbage",
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81(S'a'\nS'b'\nd\x81.",
        b"\x80\x04\x95",
        b"(lp0\n.",
        b"ctorch\nload\n.",
        b"I1\n.",
    ],
)
def test_broken_metadata(text: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(text)
    refused(lambda: read_dcp_metadata(tmp_path / ".metadata"), tmp_path / "canary")


def test_stored_classes_are_stand_ins(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    text = b"\x80\x02}U\x01acmy.own\nThing\nK\x07\x85Rs."
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("x/data.pkl", text)
        made.writestr("x/version", "3\n")
        made.writestr("x/byteorder", "little")
    with pytest.raises(CheckpointError, match=r"my.own.Thing"):
        load_tensors(file)
    found = load_tensors(file, ["my.own.Thing"])["a"]
    assert type(found) is StandIn
    assert found.values == (7,)
    with pytest.raises(CheckpointError):  # the permission was for that one call
        load_tensors(file)


def test_links_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(saved({"a": torch.ones(1)}))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    assert load_tensors(tmp_path / "real").keys() == {"a"}
    for name in ("link", "pipe", "gone"):
        for act in (load_tensors, read_dcp_metadata):
            refused(lambda act=act, name=name: act(tmp_path / name), tmp_path / "canary")
