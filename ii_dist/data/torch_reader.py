"""The same batches without DALI: PIL decodes in threads.

In: a `Request`. Out: batches on the rank's device. Everything but the decoder is what the DALI reader does on the CPU.
"""

import torch

from ii_dist.data.ahead import Ahead
from ii_dist.data.augment import EvalWindows, TrainWindows
from ii_dist.data.content import Box, NotAnImage, decode
from ii_dist.data.index import UnreadableFile
from ii_dist.data.resample import Finisher
from ii_dist.data.retry import PatientReader
from ii_dist.data.source import Batch, Request, moved, pinned
from ii_dist.data.substitute import Picks


class TorchProducer:
    """Decodes `prefetch_batches` batches ahead, each split over `threads` threads."""

    def __init__(self, request: Request) -> None:
        assert request.index is not None
        self._request, self._index = request, request.index
        self._files = PatientReader(request.index, request.cfg.read_retries, request.bad_files.note_retry)
        self._finisher = Finisher(request)
        self._ahead: Ahead[Batch] | None = None
        self._first = 0

    def start(self, number: int) -> None:
        self._stop()
        self._first = number

    def next(self) -> Batch:
        if self._ahead is None:
            self._ahead = Ahead(self._make, self._first, self._request.cfg.prefetch_batches)
        batch = self._ahead.next()
        if self._request.device == "cpu":
            return batch
        return moved(batch, self._request.device)

    def close(self) -> None:
        self._files.close()
        self._stop()
        self._finisher.close()

    def _stop(self) -> None:
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def _make(self, number: int) -> Batch:
        picks = self._request.picks(number)
        refused = -1
        while len(picks.refused) > refused:  # made again, whole, with the next candidates
            refused = len(picks.refused)
            batch = self._attempt(picks)
        self._request.bad_files.note(number, picks, self._index)
        if self._request.device == "cpu":
            return batch
        return pinned(batch)

    def _attempt(self, picks: Picks) -> Batch:
        """The batch as it is picked now. Good only if no place was refused meanwhile."""
        rows = picks.rows
        windows = self._request.windows(rows)

        def decoded(i: int) -> torch.Tensor:
            """Image i, or what its window holds: uint8, height x width x 3."""
            if i not in picks.blank:
                try:
                    content = self._files.read(int(rows.index_N[i]))
                    return torch.from_numpy(decode(content, _box(windows, i)))
                except UnreadableFile as error:
                    picks.refuse(i, error.reason)
                except NotAnImage as error:
                    picks.refuse(i, f"cannot be decoded ({error})", content)
            return torch.zeros(1, 1, 3, dtype=torch.uint8)

        return self._finisher.batch(rows, windows, decoded)


def _box(windows: TrainWindows | EvalWindows, i: int) -> Box | None:
    if isinstance(windows, EvalWindows):
        return None
    x, y = int(windows.x_N[i]), int(windows.y_N[i])
    return x, y, x + int(windows.width_N[i]), y + int(windows.height_N[i])
