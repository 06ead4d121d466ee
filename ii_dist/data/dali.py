"""The DALI pipeline. The only file that imports DALI, and only when it is asked for.

In: a `Request`. Out: batches on the rank's device. DALI gets encoded bytes, windows and flips from outside and draws
nothing. Labels, weights and index rows go round it.

On a GPU the pipeline is the whole work: decode (only the window in training), resize, flip or cut, normalize; where
colours or shapes are to be changed it stops before that, and torch does the rest on the device (`retouch`). On the
CPU it only decodes: its linear resize takes several times as long there as torch's, so `Finisher` does the rest, in a
thread that works ahead. `_Pipe` runs either pipeline; it belongs to one thread, from the first `run` to `close`.

On a GPU the next batches are made on DALI's own streams while the step runs. torch's stream waits for the oldest one
(the host does not), mixes and converts it, and takes labels and shares from pinned memory. Image sizes are an input of
the graph: they change from epoch to epoch, between two prefetched batches, and nothing is built anew.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from ii_dist.config.errors import ClusterError, ConfigError, DataError
from ii_dist.data.ahead import Ahead, Chunks
from ii_dist.data.augment import EvalWindows, TrainWindows
from ii_dist.data.content import why_undecodable
from ii_dist.data.index import UnreadableFile
from ii_dist.data.mix import Mixing
from ii_dist.data.mix_images import mix_batch
from ii_dist.data.positions import Rows
from ii_dist.data.resample import Finisher
from ii_dist.data.retouch import is_retouched, make_retouch
from ii_dist.data.retry import PatientReader
from ii_dist.data.source import Batch, Request, beside_images
from ii_dist.data.substitute import BLANK_PNG, Picks

_log = logging.getLogger(__name__)

_READ_THREADS = 4  # files read at once: hides the latency of a network file system; idle where the cache is warm
_SUSPICIOUSLY_MANY = 8  # a batch of so many images, all of them refused, means that the decoder is broken, not they

Feed = Callable[[], tuple[Any, ...]]
Cut = tuple[Any, Any, dict[str, Any]]  # images, mirror, arguments of a crop


@dataclass(frozen=True, slots=True)
class _Fed:
    """One batch as DALI is given it. Its arrays must live until DALI has used them: nothing is copied."""

    number: int
    picks: Picks
    rows: Rows
    windows: TrainWindows | EvalWindows
    inputs: tuple[Any, ...]
    mixing: Mixing | None = None


class DaliProducer:
    """On the CPU: a thread that runs the pipeline and finishes batches ahead. On a GPU: the pipeline, and no more."""

    def __init__(self, request: Request) -> None:
        _import_dali()
        self._request, self._on_gpu = request, request.device != "cpu"
        if request.cfg.decode == "gpu" and not self._on_gpu:
            raise ConfigError("data.decode gpu: this rank has no GPU; use data.decode auto")
        self._reading = Chunks(min(_READ_THREADS, request.schedule.batch))
        self._finisher = Finisher(request)
        self._retouch = make_retouch(request, request.device) if self._on_gpu else None
        self._pipe: _Pipe | None = None
        self._finished: Ahead[Batch] | None = None
        self._first = 0

    def start(self, number: int) -> None:
        self._stop()
        self._first = number

    def next(self) -> Batch:
        if self._pipe is None:
            self._pipe = _Pipe(self._request, self._first, self._reading, decode_only=not self._on_gpu)
        if self._on_gpu:
            return self._on_device(self._pipe)
        if self._finished is None:
            pipe = self._pipe
            self._finished = Ahead(lambda _: self._finish(pipe), self._first, self._request.cfg.prefetch_batches)
        return self._finished.next()

    def close(self) -> None:
        self._stop()
        self._reading.close()
        self._finisher.close()

    def _stop(self) -> None:
        if self._finished:
            self._finished.close()  # before the pipe, which its thread is using
        if self._pipe:
            self._pipe.close()
        self._pipe, self._finished = None, None

    def _finish(self, pipe: "_Pipe") -> Batch:
        fed, output = pipe.run()
        return self._finisher.batch(fed.rows, fed.windows, lambda i: torch.utils.dlpack.from_dlpack(output[i]))

    def _on_device(self, pipe: "_Pipe") -> Batch:
        # Results are bound to torch's stream, so that neither side waits on the host for the other.
        fed, output = pipe.run(torch.cuda.current_stream(self._request.device))
        # The executor shares the buffer with the tensor and takes it back when the last of the two lets go.
        images_NCHW = torch.utils.dlpack.from_dlpack(output.as_tensor())
        if self._retouch:
            images_NCHW = self._retouch.finished(images_NCHW, fed.rows)
        elif self._request.channels_last:
            images_NCHW = images_NCHW.permute(0, 3, 1, 2)
        assert self._request.index is not None
        labels_N = self._request.index.label[fed.rows.index_N].astype(np.int64)
        if fed.mixing is not None:
            images_NCHW = mix_batch(images_NCHW, self._moved(fed.mixing.own_N), self._moved(fed.mixing.box_N4))
        beside = beside_images(labels_N, fed.rows, fed.mixing)
        return Batch(images_NCHW.to(getattr(torch, self._request.dtype)), *map(self._moved, beside))

    def _moved(self, array: NDArray[Any]) -> torch.Tensor:
        """On its way to the GPU: from pinned memory, so that the host does not wait for the steps before."""
        return torch.from_numpy(array).pin_memory().to(self._request.device, non_blocking=True)


class _Pipe:
    """A pipeline that is `prefetch_batches` ahead; files are read ahead of that by threads of ours."""

    def __init__(self, request: Request, first: int, reading: Chunks, decode_only: bool) -> None:
        assert request.index is not None
        self._request, self._index, self._reading, self._decode_only = request, request.index, reading, decode_only
        self._files = PatientReader(request.index, request.cfg.read_retries, request.bad_files.note_retry)
        self._ahead: Ahead[_Fed] = Ahead(self._prepare, first, request.cfg.prefetch_batches)
        self._pipeline: Any = None
        self._again: deque[_Fed] = deque()  # to be fed once more, to the pipeline after one that failed
        self._waiting: deque[_Fed] = deque()  # fed, not yet handed out: the oldest is the one that run() returns
        self._in_use: deque[_Fed] = deque(maxlen=request.cfg.prefetch_batches + 2)
        self._error: DataError | None = None

    def run(self, *stream: Any) -> tuple[_Fed, Any]:
        """What the next batch was made of, and DALI's images. Raises DataError, again by every later call."""
        while self._error is None:
            if self._pipeline is None:
                self._pipeline = _build_pipeline(self._request, self._feed, self._decode_only)
            try:
                (output,) = self._pipeline.run(*stream)
            except RuntimeError as error:
                self._repair(error)
            else:
                fed = self._waiting.popleft()
                self._request.bad_files.note(fed.number, fed.picks, self._index)
                return fed, output
        raise self._error

    def close(self) -> None:
        self._files.close()
        self._pipeline = None
        self._ahead.close()
        self._again.clear()
        self._waiting.clear()
        self._in_use.clear()

    def _prepare(self, number: int) -> _Fed:
        """Read the files of batch `number` and compute what is to be done to them."""
        return self._fed(number, self._request.picks(number), {})

    def _fed(self, number: int, picks: Picks, known: dict[int, NDArray[np.uint8]]) -> _Fed:
        """known: encoded images that were read before, by their place."""
        encoded: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(picks.rows.index_N)

        def read(i: int) -> None:
            encoded[i] = known[i] if i in known else self._read(picks, i)

        self._reading.each(read, len(encoded))
        rows = picks.rows  # now: a file that cannot be read has given way to another one
        windows = self._request.windows(rows)
        arguments = self._arguments(windows, self._request.side(rows.epoch))
        mixing = None if self._decode_only else self._request.mixing(rows)
        return _Fed(number, picks, rows, windows, (encoded, *arguments), mixing)

    def _read(self, picks: Picks, place: int) -> NDArray[np.uint8]:
        while place not in picks.blank:
            try:
                return self._files.read(int(picks.rows.index_N[place]))
            except UnreadableFile as error:
                picks.refuse(place, error.reason)
        return np.frombuffer(BLANK_PNG, np.uint8)

    def _arguments(self, windows: TrainWindows | EvalWindows, side: int) -> tuple[Any, ...]:
        """What the pipeline takes beside the encoded images, in the order of its inputs."""
        if isinstance(windows, TrainWindows):
            corner_N2, shape_N2 = _pairs(windows.x_N, windows.y_N), _pairs(windows.width_N, windows.height_N)
            if self._decode_only:
                return corner_N2, shape_N2
            return corner_N2, shape_N2, windows.flip_N, np.full_like(shape_N2, side, dtype=np.float32)
        if self._decode_only:
            return ()
        size_N2 = _pairs(windows.resized_height_N, windows.resized_width_N).astype(np.float32)
        x_share_N = _margin_share(windows.x_N, windows.resized_width_N, side)
        y_share_N = _margin_share(windows.y_N, windows.resized_height_N, side)
        return size_N2, x_share_N, y_share_N

    def _feed(self) -> tuple[Any, ...]:
        """Called by DALI, in the thread that runs the pipeline, when it has room for another batch."""
        fed = self._again.popleft() if self._again else self._ahead.next()
        self._waiting.append(fed)
        self._in_use.append(fed)
        return fed.inputs

    def _repair(self, error: RuntimeError) -> None:
        """A failed run takes the pipeline with it: feed a new one with the same batches, the bad images replaced."""
        failed, self._pipeline = [*self._waiting, *self._again], None
        self._waiting.clear()
        self._again.clear()
        repaired = False
        for fed in failed:
            # The oldest is the one that failed; a later one is looked at only where that proves good.
            good = fed if repaired else self._without_bad_images(fed, error)
            repaired = repaired or good is not fed
            self._again.append(good)
        if not repaired:
            raise error

    def _without_bad_images(self, fed: _Fed, error: RuntimeError) -> _Fed:
        """The same batch with each image that DALI refuses replaced by one that it takes; `fed` where there is none."""
        places = list(range(len(fed.rows.index_N)))
        while bad := self._refused(fed, places):
            if len(bad) == len(fed.rows.index_N) >= _SUSPICIOUSLY_MANY:
                self._error = DataError(f"data.source dali: refuses all {len(bad)} images of a batch ({_said(error)})")
                raise self._error from error.with_traceback(None)  # it holds the pipeline, and that our arrays
            encoded = fed.inputs[0]
            for place in bad:
                reason = f"cannot be decoded ({why_undecodable(encoded[place])})"
                fed.picks.refuse(place, reason, encoded[place])
            known = {place: content for place, content in enumerate(encoded) if place not in bad}
            fed = self._fed(fed.number, fed.picks, known)
            places = bad
        return fed

    def _refused(self, fed: _Fed, places: list[int]) -> list[int]:
        """Those of the `places` of a batch whose image DALI does not take, each tried alone in the same graph."""
        singles = [tuple(column[i : i + 1] for column in fed.inputs) for i in places]
        bad, done = [], 0
        while (done := done + self._taken(singles[done:])) < len(singles):
            bad.append(places[done])
            done += 1
        return bad

    def _taken(self, singles: Sequence[tuple[Any, ...]]) -> int:
        """How many batches of one image go through a pipeline until one fails."""
        following = chain(singles, repeat(singles[-1] if singles else ()))  # DALI asks for more than it is run for
        pipeline = _build_pipeline(self._request, lambda: next(following), self._decode_only, batch=1)
        for done in range(len(singles)):
            try:
                pipeline.run()
            except RuntimeError:
                return done
        return len(singles)


def _import_dali() -> None:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise ClusterError(
            "data.source dali: DALI is missing; run: pip install nvidia-dali-cuda130==2.4.0 (or use data.source torch)"
        ) from None


def _build_pipeline(request: Request, feed: Feed, decode_only: bool, batch: int = 0) -> Any:
    """The graph, for batches of the schedule's size or of `batch`.

    With a GPU and data.decode cpu, decoding and resizing stay on the CPU, normalizing does not.
    """
    from nvidia.dali import Pipeline

    on_gpu = request.device != "cpu"
    decoder = "mixed" if on_gpu and request.cfg.decode != "cpu" else "cpu"
    device_id = int(request.device.partition(":")[2] or 0) if on_gpu else None
    pipeline = Pipeline(
        batch_size=batch or request.schedule.batch,
        num_threads=request.threads,
        device_id=device_id,
        prefetch_queue_depth=request.cfg.prefetch_batches,
        exec_dynamic=True,  # outputs own their memory: they can be handed to torch without a copy
    )
    with pipeline:
        pipeline.set_outputs((_decoding_graph if decode_only else _whole_graph)(request, feed, decoder))
    try:
        pipeline.build()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(f"data.source dali on {request.device}: {reason}") from error
    _log.debug("DALI pipeline: decoder %s, device %s, %d threads", decoder, device_id, request.threads)
    return pipeline


def _decoding_graph(request: Request, feed: Feed, decoder: str) -> Any:
    """Windows of training images, whole evaluation images: uint8, each of its own size."""
    from nvidia.dali import fn

    if request.train:
        encoded, corner, shape = _inputs(feed, ("INT32", 1), ("INT32", 1))
        return fn.decoders.image_slice(
            encoded, start=corner, shape=shape, axis_names="WH", **_decoder(request, decoder)
        )
    (encoded,) = _inputs(feed)
    return fn.decoders.image(encoded, **_decoder(request, decoder))


def _whole_graph(request: Request, feed: Feed, decoder: str) -> Any:
    """Images of one size: normalized float32; uint8 channel by channel where torch has operations to apply first."""
    images, mirror, crop = (_train_images if request.train else _eval_images)(request, feed, decoder)
    return _normalize(request, images.gpu() if request.device != "cpu" else images, mirror, crop)


def _train_images(request: Request, feed: Feed, decoder: str) -> Cut:
    from nvidia.dali import fn

    encoded, corner, shape, flip, size = _inputs(feed, ("INT32", 1), ("INT32", 1), ("INT32", 0), ("FLOAT", 1))
    images = fn.decoders.image_slice(encoded, start=corner, shape=shape, axis_names="WH", **_decoder(request, decoder))
    return fn.resize(images, size=size, **_linear()), flip, {}


def _eval_images(request: Request, feed: Feed, decoder: str) -> Cut:
    from nvidia.dali import fn

    encoded, size, crop_x, crop_y = _inputs(feed, ("FLOAT", 1), ("FLOAT", 0), ("FLOAT", 0))
    images = fn.resize(fn.decoders.image(encoded, **_decoder(request, decoder)), size=size, **_linear())
    side = (request.side(0), request.side(0))
    return images, 0, {"crop": side, "crop_pos_x": crop_x, "crop_pos_y": crop_y, "rounding": "round"}


def _inputs(feed: Feed, *arguments: tuple[str, int]) -> Any:
    """The encoded images, then the arguments: name of a DALI type and number of axes of each."""
    from nvidia.dali import fn, types

    columns = (("UINT8", 1), *arguments)
    return fn.external_source(
        source=feed,
        num_outputs=len(columns),
        dtype=[getattr(types, name) for name, _ in columns],
        ndim=[axes for _, axes in columns],
        no_copy=True,
    )


def _normalize(request: Request, images: Any, mirror: Any, crop: dict[str, Any]) -> Any:
    from nvidia.dali import fn, types

    if is_retouched(request):
        return fn.crop_mirror_normalize(images, mirror=mirror, dtype=types.UINT8, output_layout="CHW", **crop)
    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="HWC" if request.channels_last else "CHW",
        mean=[255 * value for value in request.cfg.mean],
        std=[255 * value for value in request.cfg.std],
        **crop,
    )


def _decoder(request: Request, device: str) -> dict[str, Any]:
    from nvidia.dali import types

    # Sizes in the index and PIL's images are those before an EXIF turn.
    arguments = {"device": device, "output_type": types.RGB, "adjust_orientation": False}
    if device == "mixed":
        arguments["hw_decoder_load"] = share = request.cfg.hw_decoder_share
        if 0 < share < 1:
            _log.warning("data.hw_decoder_share %g: images now depend on the number of ranks; 0 and 1 are exact", share)
    return arguments


def _linear() -> dict[str, Any]:
    from nvidia.dali import types

    return {"interp_type": types.INTERP_LINEAR, "antialias": True}


def _pairs(a_N: NDArray[np.int32], b_N: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.stack([a_N, b_N], axis=1)


def _margin_share(at_N: NDArray[np.int32], size_N: NDArray[np.int32], side: int) -> NDArray[np.float32]:
    """A crop's place as DALI wants it, a share of the margin; it rounds share x margin back to the very pixel."""
    share_N: NDArray[np.float32] = (at_N / np.maximum(size_N - side, 1)).astype(np.float32)
    return share_N


def _said(error: RuntimeError) -> str:
    """The one line of DALI's report that tells what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else lines
    return next(iter(after), "no message")[:200]
