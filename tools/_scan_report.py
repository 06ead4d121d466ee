"""Sums up a scan: how many of each kind, examples, twins by content, the list of bad files.

In: facts, image by image. Out: a table for a person, a tree for a machine, entries for ``quarantine.jsonl``.
"""

import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ii_dist.data.quarantine import BadFile
from tools._scan_file import Facts
from tools._scan_kinds import GRADES, KINDS, Finding

_EXAMPLES = 3


class ScanReport:
    """What was found so far. Sizes are kept of images with a header only, pixels and bytes."""

    def __init__(self, listed: Iterable[BadFile] = ()) -> None:
        """listed: entries of the list of bad files that is there already."""
        self.images: Counter[str] = Counter()
        self.width, self.height, self.length = (array.array("q") for _ in range(3))
        self.bad: list[BadFile] = []
        self._listed = {entry.identity: entry for entry in listed}
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[Finding]] = {}
        self._first: dict[bytes, tuple[str, str, str]] = {}

    def add(self, split: str, path: str, label: str, facts: Facts) -> None:
        self.images[split] += 1
        if facts.width:
            self.width.append(facts.width)
            self.height.append(facts.height)
            self.length.append(facts.length)
        for kind, detail in facts.kinds.items():
            self.note(Finding(kind, split, path, detail, facts.sha256))
        is_bad = any(KINDS[kind].grade == "bad" for kind in facts.kinds)
        before = self._listed.get((split, path, facts.sha256)) if facts.sha256 is not None else None
        if before is not None and not is_bad:
            self.note(Finding("listed", split, path, before.reason, facts.sha256))
        if facts.sha256 is not None and not is_bad:
            self._look_for_twin(split, path, label, facts.sha256)

    def note(self, finding: Finding) -> None:
        self._counts[finding.kind] += 1
        examples = self._examples.setdefault(finding.kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(finding)
        if finding.grade == "bad":
            reason = f"{finding.kind}: {finding.detail}" if finding.detail else finding.kind
            self.bad.append(BadFile(finding.split, finding.path, finding.sha256, reason))

    def _look_for_twin(self, split: str, path: str, label: str, sha256: str) -> None:
        first = self._first.setdefault(bytes.fromhex(sha256), (split, path, label))
        if first == (split, path, label):
            return
        kind = (
            *("same in train and val" for _ in range(first[0] != split)),
            *("same in two classes" for _ in range(first[2] != label)),
        ) or ("same in one class",)
        for name in kind:
            self.note(Finding(name, split, path, f"as {first[0]}/{first[1]}", sha256))

    def count(self, *grades: str) -> int:
        return sum(count for kind, count in self._counts.items() if KINDS[kind].grade in grades)

    def table(self) -> str:
        """Kinds by grade, with a count and an example each."""
        lines = []
        for grade, says in GRADES.items():
            kinds = [kind for kind in KINDS.values() if kind.grade == grade and self._counts[kind.name]]
            if not kinds:
                continue
            lines.append(says)
            for kind in kinds:
                lines.append(f"  {self._counts[kind.name]:>9,}  {kind.name:<22} {kind.says}")
                lines.append(f"  {'':>9}  {'':<22} {_example(self._examples[kind.name][0])}")
        return "\n".join(lines)

    def tree(self) -> dict[str, Any]:
        """The same for a machine."""
        kinds = {
            name: {
                "grade": KINDS[name].grade,
                "count": self._counts[name],
                "examples": [_place(finding) for finding in self._examples[name]],
            }
            for name in KINDS
            if self._counts[name]
        }
        return {"images": dict(self.images), "bad": self.count("bad"), "wrong": self.count("wrong"), "kinds": kinds}


def _place(finding: Finding) -> str:
    return str(Path(finding.split, finding.path))


def _example(finding: Finding) -> str:
    return f"{_place(finding)} ({finding.detail})" if finding.detail else _place(finding)
