"""What the measurements of the loader doctor mean, in words, and what to set. Pure.

In: `Findings`. Out: sentences, the best setting, a YAML patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tools._loader_speeds import Setting, Speed
from tools._loader_storage import ReadSpeed

_WORTH = 0.05  # a smaller gain is not worth a change
_ENOUGH = 1.1  # a loader this many times as fast as the network keeps it fed
_BUSY = 0.8
_TOO_NOISY = 0.25  # two measurements of one thing differ by so much: settings cannot be compared


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was measured. Speeds are of one rank, storage of the whole node."""

    current: Setting
    trials: Mapping[Setting, Speed]
    """The config's reader under several settings, the current one among them."""
    other: Mapping[str, Speed]
    """Readers that the config does not use, by name, at the current setting."""
    noise: float
    """Two measurements of the current setting differ by this share."""
    ranks: int
    """Ranks of this node."""
    cores: int
    """This rank's share of the node's cores."""
    cold: ReadSpeed | str | None = None
    """A text: why it could not be measured. None: no files."""
    fits_memory: bool = True
    """The whole data set fits this node's free memory."""
    decoded_per_core: float | None = None
    """Whole images that one core decodes in a second."""
    windows_per_core: float | None = None
    """Crop windows that the configured reader decodes in a second on one core."""
    need: Speed | None = None
    """Images that the network takes; None: not measured."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""


def rate(images_per_s: float) -> str:
    """Images a second, as short as they can be told."""
    return f"{images_per_s:,.0f}" if images_per_s >= 10 else f"{images_per_s:.2g}"


def best_setting(f: Findings) -> Setting:
    """The fastest of those tried; the current one unless the gain is above noise and 5 %; ties go to the cheaper."""
    if f.noise > _TOO_NOISY:
        return f.current
    margin = 1 + max(_WORTH, f.noise)
    fastest = max(speed.images_per_s for speed in f.trials.values())
    if fastest < f.trials[f.current].images_per_s * margin:
        return f.current
    near = [setting for setting, speed in f.trials.items() if speed.images_per_s * (1 + _WORTH) >= fastest]
    return min(near, key=lambda setting: (setting.threads_per_rank, setting.prefetch_batches))


def storage_per_rank(f: Findings) -> float | None:
    """Images a second that storage has for each rank, where epochs after the first need it too."""
    return f.cold.images_per_s / f.ranks if isinstance(f.cold, ReadSpeed) and not f.fits_memory else None


def bound(f: Findings) -> tuple[str, str]:
    """What bounds the run as it is configured: one word, and a sentence with the numbers."""
    loader, storage = f.trials[f.current], storage_per_rank(f)
    reach = min(loader.images_per_s, storage or loader.images_per_s)
    if f.need and reach >= _ENOUGH * f.need.images_per_s:
        return "network", (
            f"the network bounds the run: it takes {rate(f.need.images_per_s)} images/s a rank, "
            f"images are there for {reach / f.need.images_per_s:.1f} times that"
        )
    if storage is not None and storage < loader.images_per_s:
        return "storage", (
            f"storage bounds the run: {rate(storage)} images/s for each of {f.ranks} ranks, where the loader could do "
            f"{rate(loader.images_per_s)}; stage its shards to a local disk (data.stage_to), or pack smaller images"
        )
    best = best_setting(f)
    gain = f"{rate(f.trials[best].images_per_s)} instead of {rate(loader.images_per_s)} images/s"
    if best.threads_per_rank != f.current.threads_per_rank:
        return "threads", f"the number of threads bounds the loader: {best.threads_per_rank} do {gain}"
    if best.prefetch_batches != f.current.prefetch_batches:
        return "prefetch", f"prefetching bounds the loader: with {best.prefetch_batches} batches it does {gain}"
    if best != f.current:
        return "decode", f"decoding bounds the loader: elsewhere ({_where(best)}) it does {gain}"
    if loader.busy_cores >= _BUSY * f.cores:
        return "decode", (
            f"decoding and resizing bound the loader: {loader.busy_cores:.1f} of the rank's {f.cores} cores are busy "
            f"at {rate(loader.images_per_s)} images/s; more cores a rank, a GPU decoder or smaller images would help"
        )
    return "waiting", (
        f"no ceiling is reached: {loader.busy_cores:.1f} of the rank's {f.cores} cores are busy at "
        f"{rate(loader.images_per_s)} images/s; other programs, or waiting between threads, take the rest"
    )


def _where(setting: Setting) -> str:
    share = "" if setting.hw_decoder_share is None else f", hw_decoder_share {setting.hw_decoder_share:g}"
    return f"decode {setting.decode}{share}"


def remarks(f: Findings) -> list[str]:
    """What else the reader should know, each one line."""
    loader, lines = f.trials[f.current], []
    comparable = f.noise <= _TOO_NOISY and bound(f)[0] != "network"
    for name, speed in f.other.items() if comparable else ():
        if name in ("dali", "torch") and speed.images_per_s > loader.images_per_s * (1 + max(_WORTH, f.noise)):
            lines.append(
                f"warning: the {name} reader is faster here than {f.current.source}: "
                f"{rate(speed.images_per_s)} and {rate(loader.images_per_s)} images/s; set data.source: {name}"
            )
    if f.need and loader.images_per_s < _ENOUGH * f.need.images_per_s:
        lines.append(
            f"warning: the network could take {rate(f.need.images_per_s)} images/s a rank, the loader has "
            f"{rate(loader.images_per_s)}: training will wait"
        )
    if isinstance(f.cold, ReadSpeed) and f.fits_memory and f.cold.images_per_s / f.ranks < loader.images_per_s:
        lines.append(
            f"the first epoch runs at the speed of the storage, {rate(f.cold.images_per_s / f.ranks)} images/s a rank; "
            "then the data set, which fits this machine's memory, comes out of it"
        )
    lines += [f"{name}: not measured: {why}" for name, why in f.missing.items()]
    if f.noise > _WORTH:
        lines.append(f"two measurements of one setting differ by {f.noise:.0%}: a smaller difference means nothing")
    if f.noise > _TOO_NOISY:
        lines.append("warning: too much else runs on this machine to compare settings; try again when it is quiet")
    if f.ranks > 1:
        lines.append(f"one rank was measured alone, on its {f.cores} cores; {f.ranks} ranks share memory and storage")
    return lines


def changes(f: Findings) -> dict[str, object]:
    """Keys of `data` to set otherwise than now; none where the loader is not what the run waits for."""
    if f.noise > _TOO_NOISY or bound(f)[0] in ("network", "storage"):
        return {}
    best, now = best_setting(f), f.current.keys()
    changed = {key: value for key, value in best.keys().items() if now.get(key) != value}
    rivals = {name: s.images_per_s for name, s in f.other.items() if name in ("dali", "torch")}
    for name, images_per_s in rivals.items():
        if images_per_s > f.trials[best].images_per_s * (1 + max(_WORTH, f.noise)):
            changed = {"source": name}  # the trials were of the other reader
    return changed


def patch_text(base: Path, data: Mapping[str, object]) -> str:
    """A config file that lays `data` over the file `base`."""
    return yaml.safe_dump({"base": str(base), "data": dict(data)}, sort_keys=False, allow_unicode=True)
