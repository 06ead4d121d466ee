"""Reads encoded images, patiently: what a network file system refuses once, it often gives a moment later.

In: an index and a row. Out: its bytes. An error that may pass (EIO, ESTALE, a lost connection) is tried again with
growing waits, then the file is given up (`UnreadableFile`): the caller puts another one in its place. Several files
given up in a row, with none read between them, are an outage and end the run: no image could be put anywhere.
"""

import errno
import logging
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import DataError
from ii_dist.data.index import Index, UnreadableFile

_log = logging.getLogger(__name__)

PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR"),
        *("ENOTCONN", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENETDOWN", "ENETUNREACH"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENOLINK", "ESHUTDOWN"),
    )
)
"""Errors that say more of the way to the file than of the file."""
MISSING = frozenset({errno.ENOENT, errno.ENOTDIR})
OF_THIS_MACHINE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_LOOKS_FOR_MISSING = 2  # a file that was renamed or copied over is back at once; one that is gone stays gone
_FIRST_WAIT_S, _LONGER, _LONGEST_WAIT_S = 0.1, 3.0, 10.0
_OUTAGE_FILES = 8


class PatientReader:
    """`Index.read_bytes` with `retries` further tries. Used by several threads at once."""

    def __init__(self, index: Index, retries: int, tell: Callable[[], None]) -> None:
        """tell: called for each further try."""
        self._index, self._retries, self._tell = index, retries, tell
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._given_up_in_a_row = 0
        self._warned = False

    def read(self, row: int) -> NDArray[np.uint8]:
        """The encoded image. Raises UnreadableFile for this file alone, DataError for what is wrong with all."""
        try:
            content = self._index.read_bytes(row)
        except UnreadableFile as error:
            content = self._read_again(row, error)
        self._given_up_in_a_row = 0
        return content

    def close(self) -> None:
        """End all waiting; a thread in the middle of it gives its file up."""
        self._closing.set()

    def _read_again(self, row: int, error: UnreadableFile) -> NDArray[np.uint8]:
        wait_s = _FIRST_WAIT_S
        for turn in range(self._retries):
            if not self._is_worth_it(error, turn) or self._closing.wait(wait_s):
                break
            self._warn_once(error)
            self._tell()
            wait_s = min(wait_s * _LONGER, _LONGEST_WAIT_S)
            try:
                return self._index.read_bytes(row)
            except UnreadableFile as again:
                error = again
        if error.number in OF_THIS_MACHINE:
            raise DataError(f"{error.what}; this machine ran out of open files or memory, the file may be good")
        if error.number in PASSING and not self._closing.is_set():
            self._count_outage(error)
        raise error

    def _is_worth_it(self, error: UnreadableFile, turn: int) -> bool:
        if error.number in MISSING:
            return turn < _LOOKS_FOR_MISSING
        return error.number in PASSING or error.number in OF_THIS_MACHINE

    def _warn_once(self, error: UnreadableFile) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            _log.warning(
                "%s; trying again up to %d times (data.read_retries); later ones are only counted",
                error.what,
                self._retries,
            )

    def _count_outage(self, error: UnreadableFile) -> None:
        with self._lock:
            self._given_up_in_a_row += 1
            outage = self._given_up_in_a_row >= _OUTAGE_FILES
        if outage:
            raise DataError(
                f"{error.what}; and so were the {_OUTAGE_FILES - 1} files before it, each tried {1 + self._retries} "
                "times: the storage is not reachable; start the run again when it is"
            )
