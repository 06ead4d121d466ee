"""Where numbers go: TensorBoard (rank 0), JSON lines (every rank), the console (rank 0), or nowhere.

In: names from the config, the run folder, who this process is. Out: one `Board` that writes to all of them. Values
are plain floats; tags are those of the table. To add a board: a class with these four methods and a line in `BOARDS`.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ii_dist.config.errors import ConfigError
from ii_dist.config.run_folder import RunFolder, parse_rank_metrics
from ii_dist.metrics.console import ConsoleBoard, Manner
from ii_dist.metrics.hparams import Setting
from ii_dist.metrics.jsonl import JsonlBoard, cut_to_step
from ii_dist.metrics.tags import check_tags
from ii_dist.metrics.tensorboard_board import TensorBoardBoard

logger = logging.getLogger(__name__)


class Board(Protocol):
    """What the loop needs of a place for numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of one step, by tag; steps never go back. An unknown tag is an AssertionError."""

    def text(self, tag: str, markdown: str) -> None:
        """Words about the run, such as its config, where a board shows words."""

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        """PNG files by tag, where a board shows pictures."""

    def close(self) -> None:
        """Everything written is on disk or on the screen afterwards."""


@dataclass(frozen=True, slots=True)
class Where:
    """What a board may need to know when it is made."""

    folder: RunFolder
    rank: int
    world_size: int
    total_steps: int
    resumed_step: int
    """The committed step that this attempt goes on from; 0 = from the start."""
    console: Manner = "auto"
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """What the run is compared by."""


class NullBoard:
    """Checks the tags and keeps nothing."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        check_tags(values)

    def text(self, tag: str, markdown: str) -> None:
        pass

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        pass

    def close(self) -> None:
        pass


class CombinedBoard:
    """Writes to several boards. One that cannot write (a full disk) is warned about once and does not stop training."""

    def __init__(self, boards: Mapping[str, Board], folder: RunFolder) -> None:
        self._boards = dict(boards)
        self._folder = folder
        self._failed: set[str] = set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda board: board.write(step, values))

    def text(self, tag: str, markdown: str) -> None:
        self._each(lambda board: board.text(tag, markdown))

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        self._each(lambda board: board.pictures(step, pngs))

    def close(self) -> None:
        self._each(lambda board: board.close())

    def _each(self, call: Callable[[Board], None]) -> None:
        for name, board in self._boards.items():
            try:
                call(board)
            except OSError as error:
                if name not in self._failed:
                    free = shutil.disk_usage(self._folder.root).free
                    logger.warning(
                        "%s: the %s board cannot write (%s; %d bytes free); training goes on without these numbers",
                        self._folder.root,
                        name,
                        error.strerror or error,
                        free,
                    )
                self._failed.add(name)


def _make_tensorboard(where: Where) -> Board:
    return TensorBoardBoard(
        where.folder, resumed_step=where.resumed_step, total_steps=where.total_steps, settings=where.settings
    )


def _make_jsonl(where: Where) -> Board:
    path = where.folder.rank_metrics(where.rank)
    return JsonlBoard(path, rank=where.rank, world_size=where.world_size, resumed_step=where.resumed_step)


def _make_console(where: Where) -> Board:
    return ConsoleBoard(total_steps=where.total_steps, resumed_step=where.resumed_step, manner=where.console)


BOARDS: dict[str, Callable[[Where], Board]] = {
    "tensorboard": _make_tensorboard,
    "jsonl": _make_jsonl,
    "console": _make_console,
    "null": lambda _: NullBoard(),
}
_EVERY_RANK = frozenset({"jsonl"})


def make_boards(
    names: Sequence[str],
    folder: RunFolder,
    *,
    rank: int,
    world_size: int,
    total_steps: int,
    resumed_step: int,
    console: Manner = "auto",
    settings: Mapping[str, Setting] | None = None,
) -> Board:
    """One board that writes to all of `names`; above rank 0 only to those that every rank has.

    settings: what the run is compared by (`compared_settings`). Call it on every rank before the first step. Raises
    ConfigError for an unknown name, ClusterError for a package that is missing, CheckpointError for a folder that
    cannot be written.
    """
    for name in names:
        if name not in BOARDS:
            raise ConfigError(f"metrics.boards: {name!r} is not one of {', '.join(BOARDS)}")
    where = Where(folder, rank, world_size, total_steps, resumed_step, console, settings or {})
    if rank == 0:
        _cut_ranks_that_left(where)
    mine = [name for name in dict.fromkeys(names) if rank == 0 or name in _EVERY_RANK]
    return CombinedBoard({name: BOARDS[name](where) for name in mine}, folder)


def _cut_ranks_that_left(where: Where) -> None:
    """Cut the files of ranks that an earlier, larger attempt had: their later steps are trained again by others."""
    if not where.folder.metrics.is_dir():
        return
    for path in where.folder.metrics.iterdir():
        rank = parse_rank_metrics(path.name)
        if rank is not None and rank >= where.world_size:
            cut_to_step(path, where.resumed_step)
