"""The DALI pipeline: one definition for CPU and GPU. The only file that imports DALI, and only when it is asked for.

In: a `Request`. Out: batches on the rank's device. DALI gets encoded bytes, windows and flips from outside and draws
nothing: it decodes only the window, resizes, flips and normalizes (evaluation: decodes whole, resizes, cuts). Labels,
weights and index rows go round it.
"""

import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from ii_dist.config.errors import ClusterError, ConfigError, DataError
from ii_dist.data.ahead import Ahead, Chunks
from ii_dist.data.positions import Rows
from ii_dist.data.source import Batch, Request

_log = logging.getLogger(__name__)

_READ_THREADS = 4  # files read at once: hides the latency of a network file system; idle where the cache is warm
# All or none of the JPEGs a GPU's hardware decoder can take: a share in between would send an image to one decoder or
# the other by its place in the batch, and the two do not agree in the last bit.
_HARDWARE_DECODER_SHARE = 1.0
_SAMPLE = re.compile(r"sample #(\d+)")


Feed = Callable[[], tuple[Any, ...]]
Cut = tuple[Any, Any, dict[str, Any]]  # images, mirror, arguments of a crop


@dataclass(frozen=True, slots=True)
class _Fed:
    """One batch as DALI is given it. Its arrays must live until DALI has used them: nothing is copied."""

    rows: Rows
    inputs: tuple[Any, ...]


class DaliProducer:
    """Runs a pipeline that is `prefetch_batches` ahead; files are read ahead of that by threads of ours."""

    def __init__(self, request: Request) -> None:
        assert request.index is not None
        _import_dali()
        self._request, self._index = request, request.index
        self._on_gpu = request.device != "cpu"
        if request.cfg.decode == "gpu" and not self._on_gpu:
            raise ConfigError("data.decode gpu: this rank has no GPU; use data.decode auto")
        self._chunks = Chunks(min(_READ_THREADS, request.schedule.batch))
        self._ahead: Ahead[_Fed] | None = None
        self._pipeline: Any = None
        self._waiting: deque[_Fed] = deque()  # fed, not yet handed out: the oldest is the one that run() returns
        self._in_use: deque[_Fed] = deque(maxlen=request.cfg.prefetch_batches + 2)
        self._first = 0
        self._error: DataError | None = None

    def start(self, number: int) -> None:
        self._stop()
        self._first, self._error = number, None

    def next(self) -> Batch:
        if self._error:
            raise self._error
        if self._pipeline is None:
            self._ahead = Ahead(self._prepare, self._first, self._request.cfg.prefetch_batches)
            self._pipeline = _build_pipeline(self._request, self._feed)
        try:
            (output,) = self._pipeline.run(*self._stream())
        except RuntimeError as error:
            self._name_bad_file(error)
        rows = self._waiting.popleft().rows
        # The executor shares the buffer with the tensor and takes it back when the last of the two lets go.
        images_NCHW = torch.utils.dlpack.from_dlpack(output.as_tensor())
        if self._request.channels_last:
            images_NCHW = images_NCHW.permute(0, 3, 1, 2)
        arrays = (self._index.label[rows.index_N].astype(np.int64), rows.weight_N, rows.index_N)
        device = self._request.device
        return Batch(images_NCHW, *(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays))

    def close(self) -> None:
        self._stop()
        self._chunks.close()

    def _stop(self) -> None:
        self._pipeline = None
        if self._ahead:
            self._ahead.close()
            self._ahead = None
        self._waiting.clear()
        self._in_use.clear()

    def _stream(self) -> tuple[Any, ...]:
        """Where results are bound to: torch's stream, so that neither side waits on the host for the other."""
        return (torch.cuda.current_stream(self._request.device),) if self._on_gpu else ()

    def _prepare(self, number: int) -> _Fed:
        """Read the files of batch `number` and compute what is to be done to them."""
        request = self._request
        rows = request.schedule.rows(number)
        encoded: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * len(rows.index_N)

        def read(i: int) -> None:
            encoded[i] = self._index.read_bytes(int(rows.index_N[i]))

        self._chunks.each(read, len(encoded))
        if request.train:
            cut = request.train_windows(rows)
            return _Fed(rows, (encoded, _pairs(cut.x_N, cut.y_N), _pairs(cut.width_N, cut.height_N), cut.flip_N))
        fit, side = request.eval_windows(rows), request.side
        size_N2 = _pairs(fit.resized_height_N, fit.resized_width_N).astype(np.float32)
        x_share_N = _margin_share(fit.x_N, fit.resized_width_N, side)
        y_share_N = _margin_share(fit.y_N, fit.resized_height_N, side)
        return _Fed(rows, (encoded, size_N2, x_share_N, y_share_N))

    def _feed(self) -> tuple[Any, ...]:
        """Called by DALI, in the thread that runs the pipeline, when it has room for another batch."""
        assert self._ahead is not None
        fed = self._ahead.next()
        self._waiting.append(fed)
        self._in_use.append(fed)
        return fed.inputs

    def _name_bad_file(self, error: RuntimeError) -> NoReturn:
        """DALI tells the sample's place in the batch, or nothing: turn that into the file."""
        if not self._waiting:
            raise error
        rows, encoded = self._waiting[0].rows, self._waiting[0].inputs[0]
        found = _SAMPLE.search(str(error))
        bad = int(found[1]) if found else _first_undecodable(encoded)
        self._stop()
        if bad is None:
            raise error
        path = self._index.place(int(rows.index_N[bad]))[0]
        self._error = DataError(f"{path}: cannot be decoded; replace or remove it and make the index again")
        raise self._error from error


def _import_dali() -> None:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise ClusterError(
            "data.source dali: DALI is missing; run: pip install nvidia-dali-cuda130==2.4.0 (or use data.source torch)"
        ) from None


def _build_pipeline(request: Request, feed: Feed) -> Any:
    """The whole graph. Decoding and resizing stay on the CPU for data.decode cpu; normalizing is done where the batch
    is wanted."""
    from nvidia.dali import Pipeline

    on_gpu = request.device != "cpu"
    decoder = "mixed" if on_gpu and request.cfg.decode != "cpu" else "cpu"
    device_id = int(request.device.partition(":")[2] or 0) if on_gpu else None
    pipeline = Pipeline(
        batch_size=request.schedule.batch,
        num_threads=request.threads,
        device_id=device_id,
        prefetch_queue_depth=request.cfg.prefetch_batches,
        exec_dynamic=True,  # outputs own their memory: batches can be handed to torch without a copy
    )
    with pipeline:
        images, mirror, crop = (_train_images if request.train else _eval_images)(request, feed, decoder)
        pipeline.set_outputs(_normalize(request, images.gpu() if on_gpu else images, mirror, crop))
    try:
        pipeline.build()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(f"data.source dali on {request.device}: {reason}") from error
    _log.debug("DALI pipeline: decoder %s, device %s, %d threads", decoder, device_id, request.threads)
    return pipeline


def _train_images(request: Request, feed: Feed, decoder: str) -> Cut:
    from nvidia.dali import fn, types

    encoded, corner, shape, flip = fn.external_source(
        source=feed, num_outputs=4, dtype=[types.UINT8] + [types.INT32] * 3, ndim=[1, 1, 1, 0], no_copy=True
    )
    images = fn.decoders.image_slice(encoded, start=corner, shape=shape, axis_names="WH", **_decoder(decoder))
    return fn.resize(images, size=(request.side, request.side), **_linear()), flip, {}


def _eval_images(request: Request, feed: Feed, decoder: str) -> Cut:
    from nvidia.dali import fn, types

    encoded, size, crop_x, crop_y = fn.external_source(
        source=feed, num_outputs=4, dtype=[types.UINT8] + [types.FLOAT] * 3, ndim=[1, 1, 0, 0], no_copy=True
    )
    images = fn.resize(fn.decoders.image(encoded, **_decoder(decoder)), size=size, **_linear())
    side = (request.side, request.side)
    return images, 0, {"crop": side, "crop_pos_x": crop_x, "crop_pos_y": crop_y, "rounding": "round"}


def _normalize(request: Request, images: Any, mirror: Any, crop: dict[str, Any]) -> Any:
    from nvidia.dali import fn, types

    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="HWC" if request.channels_last else "CHW",
        mean=[255 * value for value in request.cfg.mean],
        std=[255 * value for value in request.cfg.std],
        **crop,
    )


def _decoder(device: str) -> dict[str, Any]:
    from nvidia.dali import types

    # Sizes in the index and PIL's images are those before an EXIF turn.
    arguments = {"device": device, "output_type": types.RGB, "adjust_orientation": False}
    if device == "mixed":
        arguments["hw_decoder_load"] = _HARDWARE_DECODER_SHARE
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


def _first_undecodable(encoded: list[NDArray[np.uint8]]) -> int | None:
    """Place of the first image that PIL cannot decode either."""
    import io

    from PIL import Image

    for place, content in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(content.data)) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return place
    return None
