"""Where numbers go: TensorBoard (rank 0), JSON lines (every rank), the console (rank 0), or nowhere.

In: names from the config, the run folder, who this process is. Out: one `Board` that writes to all of them. Values
are plain floats; tags are those of the table. To add a board: a class with these three methods and a line in `BOARDS`.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ii_dist.config.errors import CheckpointError, ClusterError, ConfigError
from ii_dist.config.run_folder import RunFolder, parse_rank_metrics
from ii_dist.metrics.console import ConsoleBoard, Manner
from ii_dist.metrics.jsonl import JsonlBoard, cut_to_step
from ii_dist.metrics.tags import TAGS, check_tags

logger = logging.getLogger(__name__)

_FLUSH_S = 15  # how far TensorBoard may lag behind


class Board(Protocol):
    """What the loop needs of a place for numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of one step, by tag; steps never go back. An unknown tag is an AssertionError."""

    def text(self, tag: str, text: str) -> None:
        """Words about the run, such as its config; shown as they stand, where a board shows words."""

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


class NullBoard:
    """Checks the tags and keeps nothing."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        check_tags(values)

    def text(self, tag: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoardBoard:
    """Event files in ``tb/``. A resumed attempt says from which step on earlier events no longer count, so that
    TensorBoard shows each step once. A tag's first value carries its unit and meaning (the card's info sign)."""

    def __init__(self, where: Where) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from torch.utils.tensorboard import FileWriter
            from torch.utils.tensorboard.summary import text
        except ImportError as error:
            raise ClusterError(
                f"metrics.boards tensorboard: {error}; install it (python -m pip install tensorboard==2.21.0) "
                "or leave it out of metrics.boards"
            ) from None
        self._protos: Any = summary_pb2
        self._text: Any = text
        self._described: set[str] = set()
        self._resumed_step = where.resumed_step
        try:
            self._writer: Any = FileWriter(str(where.folder.tensorboard), max_queue=100, flush_secs=_FLUSH_S)
        except OSError as error:
            raise CheckpointError(
                f"{where.folder.tensorboard}: cannot be written ({error.strerror}); free or change it"
            ) from None
        purge_step = where.resumed_step + 1 if where.resumed_step else 0
        start = event_pb2.Event(session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._writer.add_event(start, step=purge_step)
        self._writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        check_tags(values)
        # One event for all values: a third of the cost of one event each.
        summary = self._protos.Summary(value=[self._value(tag, value) for tag, value in values.items()])
        self._writer.add_summary(summary, global_step=step)

    def _value(self, tag: str, value: float) -> Any:
        if tag in self._described:
            return self._protos.Summary.Value(tag=tag, simple_value=value)
        self._described.add(tag)
        unit = TAGS[tag].unit
        says = f"{TAGS[tag].says} Unit: {unit}." if unit else TAGS[tag].says
        metadata = self._protos.SummaryMetadata(
            plugin_data=self._protos.SummaryMetadata.PluginData(plugin_name="scalars"), summary_description=says
        )
        return self._protos.Summary.Value(tag=tag, simple_value=value, metadata=metadata)

    def text(self, tag: str, text: str) -> None:
        code_block = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_summary(self._text(tag, code_block), global_step=self._resumed_step)

    def close(self) -> None:
        self._writer.close()


class CombinedBoard:
    """Writes to several boards. One that cannot write (a full disk) is warned about once and does not stop training."""

    def __init__(self, boards: Mapping[str, Board], folder: RunFolder) -> None:
        self._boards = dict(boards)
        self._folder = folder
        self._failed: set[str] = set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda board: board.write(step, values))

    def text(self, tag: str, text: str) -> None:
        self._each(lambda board: board.text(tag, text))

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


def _make_jsonl(where: Where) -> Board:
    path = where.folder.rank_metrics(where.rank)
    return JsonlBoard(path, rank=where.rank, world_size=where.world_size, resumed_step=where.resumed_step)


def _make_console(where: Where) -> Board:
    return ConsoleBoard(total_steps=where.total_steps, resumed_step=where.resumed_step, manner=where.console)


BOARDS: dict[str, Callable[[Where], Board]] = {
    "tensorboard": TensorBoardBoard,
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
) -> Board:
    """One board that writes to all of `names`; above rank 0 only to those that every rank has.

    Call it on every rank before the first step. Raises ConfigError for an unknown name, ClusterError for a package
    that is missing, CheckpointError for a folder that cannot be written.
    """
    for name in names:
        if name not in BOARDS:
            raise ConfigError(f"metrics.boards: {name!r} is not one of {', '.join(BOARDS)}")
    where = Where(folder, rank, world_size, total_steps, resumed_step, console)
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
