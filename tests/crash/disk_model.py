"""What a power cut leaves on a disk that promises no more than it must.

In: a folder as it was, all of it on disk; then calls, one by one. Out: folders as they may be found afterwards. Sure is
only what was synced: the content of a file by a sync of the file, a name in a folder (made, removed, renamed) by a sync
of the folder; a name leads to its file whatever the content. Everything since may be there or not.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.shim import Call

BLOCK_BYTES = 512


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    writers: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Folder:
    """changers: who changed a name since the last sync."""

    names: dict[str, "Node"] = field(default_factory=dict)
    synced: dict[str, "Node"] = field(default_factory=dict)
    changers: dict[str, int] = field(default_factory=dict)


Node = File | Folder
Tree = dict[str, Any]
"""What is found: name -> content, or the names of a folder in turn."""


class Disk:
    """A folder `root` of a disk, and what of it is only in memory."""

    def __init__(self, root: Path) -> None:
        self._at = str(root)
        self._top = self._load(root)

    def _load(self, path: Path) -> Folder:
        names: dict[str, Node] = {}
        for entry in path.iterdir():
            assert not entry.is_symlink()
            if entry.is_dir():
                names[entry.name] = self._load(entry)
            else:
                names[entry.name] = File(bytearray(entry.read_bytes()), entry.read_bytes())
        return Folder(names, dict(names))

    def _place(self, path: str) -> tuple[Folder, str]:
        assert path.startswith(self._at + "/"), path
        *folders, name = path[len(self._at) + 1 :].split("/")
        folder = self._top
        for part in folders:
            inner = folder.names[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, name

    def _node(self, path: str) -> Node:
        if path == self._at:
            return self._top
        folder, name = self._place(path)
        return folder.names[name]

    def _file(self, path: str) -> File:
        file = self._node(path)
        assert isinstance(file, File), path
        return file

    def _name(self, path: str, node: Node | None, pid: int) -> None:
        folder, name = self._place(path)
        if node is None:
            del folder.names[name]
        else:
            folder.names[name] = node
        folder.changers[name] = pid

    def apply(self, call: Call) -> None:
        """Let a call have happened, in memory at first."""
        match call.op:
            case "C":
                folder, name = self._place(call.path)
                if name not in folder.names:
                    self._name(call.path, File(), call.pid)
                elif call.number:
                    self._truncate(call, 0)
            case "M":
                self._name(call.path, Folder(), call.pid)
            case "W":
                file = self._file(call.path)
                end = call.number + len(call.data)
                file.data.extend(bytes(max(0, end - len(file.data))))
                file.data[call.number : end] = call.data
                file.writers.add(call.pid)
            case "T":
                self._truncate(call, call.number)
            case "S":
                self._sync(self._node(call.path))
            case "U" | "D":
                self._name(call.path, None, call.pid)
            case "R":
                assert call.number == 0, "a rename with flags is not in the model"
                node = self._node(call.path)
                self._name(call.path, None, call.pid)
                self._name(call.path2, node, call.pid)
            case "A":
                pass
            case _:
                raise AssertionError(f"the model does not know {call.op!r} of {call.path}")

    def _truncate(self, call: Call, length: int) -> None:
        file = self._file(call.path)
        del file.data[length:]
        file.data.extend(bytes(length - len(file.data)))
        file.writers.add(call.pid)

    def _sync(self, node: Node) -> None:
        if isinstance(node, File):
            node.synced = bytes(node.data)
            node.writers.clear()
        else:
            node.synced = dict(node.names)
            node.changers.clear()

    def only_synced(self) -> Tree:
        """Everything else is lost."""
        return self._found(self._top, lambda folder: folder.synced, lambda file: file.synced)

    def names_without_content(self) -> Tree:
        """All names came through, no content that was not synced."""
        return self._found(self._top, lambda folder: folder.names, lambda file: file.synced)

    def zeros_for_content(self) -> Tree:
        """All names and lengths came through, with zeros for what was not synced."""

        def content(file: File) -> bytes:
            return file.synced[: len(file.data)].ljust(len(file.data), b"\0") if file.writers else file.synced

        return self._found(self._top, lambda folder: folder.names, content)

    def all_of_it(self) -> Tree:
        """Nothing was lost: what the next process sees when only this one died."""
        return self._found(self._top, lambda folder: folder.names, lambda file: bytes(file.data))

    def without(self, pid: int) -> Tree:
        """Of one process everything that was not synced is lost, of the others nothing."""

        def names(folder: Folder) -> dict[str, Node]:
            found = dict(folder.names)
            for name, changer in folder.changers.items():
                if changer == pid:
                    found.pop(name, None)
                    if name in folder.synced:
                        found[name] = folder.synced[name]
            return found

        return self._found(self._top, names, lambda file: file.synced if pid in file.writers else bytes(file.data))

    def any_of_it(self, draw: random.Random) -> Tree:
        """Of the changes since the syncs any may have come through, in any order: each name, each block by itself."""

        def names(folder: Folder) -> dict[str, Node]:
            found = dict(folder.synced)
            for name in folder.changers:
                if draw.random() < 0.5:
                    found.pop(name, None)
                    if name in folder.names:
                        found[name] = folder.names[name]
            return found

        def content(file: File) -> bytes:
            if not file.writers:
                return file.synced
            length = draw.choice((0, len(file.synced), len(file.data), draw.randint(0, len(file.data))))
            new = bytes(file.data)[:length]
            blocks = []
            for at in range(0, len(new), BLOCK_BYTES):
                block = new[at : at + BLOCK_BYTES]
                old = file.synced[at : at + BLOCK_BYTES].ljust(len(block), b"\0")[: len(block)]
                blocks.append(draw.choice((block, old, bytes(len(block)))))
            return b"".join(blocks)

        return self._found(self._top, names, content)

    def _found(self, folder: Folder, names, content) -> Tree:  # type: ignore[no-untyped-def]
        return {
            name: content(node) if isinstance(node, File) else self._found(node, names, content)
            for name, node in names(folder).items()
        }


def write_tree(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, found in tree.items():
        if isinstance(found, bytes):
            (folder / name).write_bytes(found)
        else:
            write_tree(found, folder / name)
