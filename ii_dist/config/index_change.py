"""Says in words how two versions of a data set differ.

In: the headers of two indexes, or what a run folder remembers of one (`index_facts`). Out: one line. The digest of an
index decides whether anything differs; the summary in its header says what.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ii_dist.config.index_header import IndexHeader

Facts = Mapping[str, Any]
_NAMED = 3


def index_facts(header: IndexHeader) -> dict[str, Any]:
    """What a run folder keeps of an index, to tell a later one from it; plain JSON."""
    facts: dict[str, Any] = {"sha256": header.sha256, "images": header.images, "classes": list(header.classes)}
    try:
        summary = json.loads(header.summary or "{}")
        per_class = zip(summary["class_images"], summary["class_contents"], strict=True)
        facts["by_class"] = {name: list(pair) for name, pair in zip(header.classes, per_class, strict=True)}
        facts["digests"] = {str(kind): str(digest) for kind, digest in summary["digests"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        facts |= {"by_class": {}, "digests": {}}
    return facts


def describe_change(old: Facts, new: Facts) -> str:
    """One line that names each kind of difference: classes, images added, removed or changed, labels, order, places."""
    try:
        parts = [*_classes_changed(old["classes"], new["classes"]), *_images_changed(old, new)]
    except (KeyError, TypeError, ValueError, AttributeError):
        parts = []
    return "; ".join(parts) or "the difference is not recorded"


def _classes_changed(old: Sequence[str], new: Sequence[str]) -> list[str]:
    if list(old) == list(new):
        return []
    gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    if not gone and not added:
        return [f"the {len(new):,} classes are in another order"]
    words = [f"{len(old):,} classes then, {len(new):,} now"]
    words += [f"without {_some(gone)}"] if gone else []
    words += [f"with the new {_some(added)}"] if added else []
    return [", ".join(words)]


def _images_changed(old: Facts, new: Facts) -> list[str]:
    parts, more = [], new["images"] - old["images"]
    if more:
        what = f"{abs(more):,} {'added' if more > 0 else 'removed'}"
        parts.append(f"{old['images']:,} images then, {new['images']:,} now ({what})")
    then, now = old["by_class"], new["by_class"]
    if not then or not now:
        return parts
    both = {name: (then[name], now[name]) for name in now if name in then}
    counts = [f"{name} ({a[0]:,} then, {b[0]:,} now)" for name, (a, b) in both.items() if a[0] != b[0]]
    contents = [name for name, (a, b) in both.items() if a[0] == b[0] and a[1] != b[1]]
    same_images = not more and _sum(then) == _sum(now)
    if same_images and (counts or contents):
        moved = [name for name, (a, b) in both.items() if a != b]
        return [*parts, f"the same images, but labels changed: class {_some(moved)}"]
    if counts:
        parts.append(f"another number of images in class {_some(counts)}")
    if contents:
        parts.append(f"images changed in class {_some(contents)}")
    if not same_images or _differ(old, new, "order"):
        return [*parts, "the same images in another order"] if same_images else parts
    kinds = {
        "paths": "the same images at other paths",
        "places": "the same images at other places in shards",
        "sizes": "other widths or heights of the same images",
    }
    return parts + [words for kind, words in kinds.items() if _differ(old, new, kind)]


def _differ(old: Facts, new: Facts, kind: str) -> bool:
    return bool(old["digests"][kind] != new["digests"][kind])


def _sum(by_class: Mapping[str, Sequence[Any]]) -> int:
    """The same for the same images, whatever their order and labels."""
    return sum(int(contents, 16) for _, contents in by_class.values()) % 2**64


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
