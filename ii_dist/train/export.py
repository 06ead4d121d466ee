"""`ii-dist export`: a trained network as one file for other programs.

In: an `ExportRequest`. Out: a file that computes what the eager network computes, checked by running it, or no file.

    safetensors   weights under timm's names, lens in its training form: what `timm.create_model` loads
    onnx, pt2     the computation in evaluation mode for any number of images, every lens one constant filter

images_NCHW are normalized as the run's config says; mean and std stand in the file. `FORMATS` is the only list.
"""

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ii_dist
from ii_dist.checkpoint.disk import describe, sync_folder, write_new_file
from ii_dist.checkpoint.streams import encode_tensors
from ii_dist.checkpoint.weights import load_network, timm_line
from ii_dist.config import CheckpointError, ClusterError
from ii_dist.models import create_model, fuse_lenses
from ii_dist.train.export_request import ExportRequest

LARGEST_DIFFERENCE = 1e-4
"""Between a logit of the file and of the eager network; for logits beyond 1, a share of the largest one."""
CHECKED_BATCHES = (1, 3)
_ONNX_PIP = "pip install onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2"
_TRACED_BATCH = 2  # a tracer takes 0 and 1 for constants

Facts = dict[str, str]
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written and checked."""

    bytes: int
    largest_difference: float
    largest_logit: float
    fused_lenses: int
    how_to_load: str


@dataclass(frozen=True, slots=True)
class Format:
    """How a network becomes the bytes of a file, and the file something that computes logits from images."""

    encode: Callable[[nn.Module, Tensor, Facts], bytes]
    open: Callable[[Path, ExportRequest], Forward]
    fused: bool
    how_to_load: Callable[[ExportRequest], str]


def export_checkpoint(request: ExportRequest) -> Exported:
    """Write and check the file. Raises CheckpointError, ClusterError; then `request.out` is as it was."""
    form = FORMATS[request.file_format]
    if request.file_format == "onnx":
        _onnx_packages()
    network = _eager(request)
    load_network(network, request.step, request.ema)
    images = [_images(request, count) for count in CHECKED_BATCHES]
    with torch.inference_mode():
        expected = [network(images_NCHW) for images_NCHW in images]
    fused = fuse_lenses(network) if form.fused else 0
    data = form.encode(network, _images(request, _TRACED_BATCH), facts_of(request))
    with _draft(request.out, data) as draft:
        forward = form.open(draft, request)
        actual = [forward(images_NCHW) for images_NCHW in images]
        difference = max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True))
        largest = max(float(e.abs().max()) for e in expected)
        if not difference <= LARGEST_DIFFERENCE * max(1.0, largest):
            raise ClusterError(
                f"{request.out}: not written: its logits differ by {difference:.2e} from those of torch "
                f"{torch.__version__} (largest {largest:.3g}); install the versions of pyproject.toml"
            )
    return Exported(len(data), difference, largest, fused, form.how_to_load(request))


def facts_of(request: ExportRequest) -> Facts:
    """What a file says of itself; lists and tables are JSON."""
    data, model = request.cfg.data, request.cfg.model
    return {
        "producer": f"ii-dist {ii_dist.__version__}",
        "network": model.network,
        "model": json.dumps(model.model_dump(mode="json")),
        "num_classes": str(request.num_classes),
        "step": str(request.step.step),
        "weights": "moving average" if request.ema else "as trained",
        "image_size": str(data.eval_image_size),
        "mean": json.dumps(list(data.mean)),
        "std": json.dumps(list(data.std)),
    }


def _eager(request: ExportRequest) -> nn.Module:
    network = create_model(request.cfg.model, request.num_classes)
    return network.eval().requires_grad_(False)


def _images(request: ExportRequest, count: int) -> Tensor:
    """Noise where normalized images would be; the same for the same count."""
    side = request.cfg.data.eval_image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@contextmanager
def _draft(out: Path, data: bytes) -> Iterator[Path]:
    """`data` on disk under another name, which becomes `out` when the block ends well."""
    draft = out.with_name(f".{os.getpid()}.tmp.{out.name}")
    try:
        write_new_file(draft, data)
        yield draft
        draft.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(describe(error, out)) from None
    finally:
        draft.unlink(missing_ok=True)


def _encode_safetensors(network: nn.Module, images_NCHW: Tensor, facts: Facts) -> bytes:
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return encode_tensors(weights, facts)


def _open_safetensors(path: Path, request: ExportRequest) -> Forward:
    network = _eager(request)
    network.load_state_dict(load_file(path))
    return network


def _trace(network: nn.Module, images_NCHW: Tensor) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(network, (images_NCHW,), dynamic_shapes=(batch,))


def _encode_pt2(network: nn.Module, images_NCHW: Tensor, facts: Facts) -> bytes:
    program = _trace(network, images_NCHW)
    program.example_inputs = None  # torch would pickle them into the file
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={f"{key}.txt": value for key, value in facts.items()})
    return file.getvalue()


def _open_pt2(path: Path, request: ExportRequest) -> Forward:
    return torch.export.load(path).module()


def _onnx_packages() -> tuple[Any, Any]:
    """onnx and onnxruntime; torch's exporter also needs onnxscript."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ClusterError(f"--format onnx needs {error.name}: {_ONNX_PIP}") from None
    return onnx, onnxruntime


def _encode_onnx(network: nn.Module, images_NCHW: Tensor, facts: Facts) -> bytes:
    onnx, _ = _onnx_packages()
    with warnings.catch_warnings():
        # torch's exporter calls functions that torch itself has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program: Any = torch.onnx.export(
            _trace(network, images_NCHW),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    encoded: bytes = model.SerializeToString()
    return encoded


def _open_onnx(path: Path, request: ExportRequest) -> Forward:
    _, onnxruntime = _onnx_packages()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images_NCHW: torch.from_numpy(session.run(["logits"], {"images": images_NCHW.numpy()})[0])


def _load_safetensors_line(request: ExportRequest) -> str:
    return timm_line(request.cfg.model.model_dump(mode="json"), request.num_classes, request.out)


FORMATS: dict[str, Format] = {
    "safetensors": Format(_encode_safetensors, _open_safetensors, False, _load_safetensors_line),
    "onnx": Format(
        _encode_onnx,
        _open_onnx,
        True,
        lambda request: (
            f"import onnxruntime; session = onnxruntime.InferenceSession({str(request.out)!r}); "
            "logits = session.run(['logits'], {'images': images})[0]"
        ),
    ),
    "pt2": Format(
        _encode_pt2,
        _open_pt2,
        True,
        lambda request: f"import torch; network = torch.export.load({str(request.out)!r}).module()",
    ),
}
