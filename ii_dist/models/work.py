"""What one training step asks of a machine: floating-point operations and bytes, counted from the network itself.

In: a network without memory (meta device) and the side of its images. Out: a `TrainingWork`: every kernel of the
forward and the backward pass, with its operations and the elements that it reads and writes, a part that grows with
the images and a part that does not (weights). From it: the least time that a step can take on a machine, kernel by
kernel the longer of arithmetic and memory ("roofline", Williams et al. 2009).

Two tiers of memory traffic. Plain: every operator reads its inputs and writes its outputs, as in eager mode; a norm
reads its input twice (statistics, result) and in its backward pass input and gradient twice. Fused: what a compiler
leaves of that. The output of a norm goes straight into what reads it first; a ReLU is a part of what it follows and
keeps one byte an element for its gradient; that gradient is a part of the norm's, where only the norm reads it; a
product is a part of the sum that alone reads it. Caches are not modelled: every read comes from memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ii_dist.models.table import count_macs, count_parameters

Bound = Literal["arithmetic", "memory"]

_FEW, _MORE = 2, 4  # images; two passes tell what grows with them from what does not
_MASK = 0.5  # one byte in the place of a half-precision element
_NORM_READS = 2
_VIEWS = frozenset({"alias", "detach", "empty", "empty_strided", "new_empty", "new_empty_strided", "promote_types"})
_KINDS = {
    "convolution": "conv",
    "native_batch_norm": "norm",
    "relu": "relu",
    "threshold_backward": "relu",
    "add": "sum",
    "addcmul": "sum",
    "max_pool2d_with_indices": "pool",
    "avg_pool2d": "pool",
    "mul": "product",
    "sum": "reduction",
    "mean": "reduction",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of a pass with n images: flops + n * flops_per_image operations; reads and writes the same way.

    elements: of the plain tier; fused: of the fused tier. kind: conv, norm, relu, sum, pool, product, reduction, other.
    """

    kind: str
    forward: bool
    flops: float
    flops_per_image: float
    elements: float
    elements_per_image: float
    fused: float
    fused_per_image: float

    def seconds(self, images: float, rate: "Rate") -> tuple[float, float]:
        """Of arithmetic and of memory."""
        flops = self.flops + images * self.flops_per_image
        fixed, each = (self.fused, self.fused_per_image) if rate.fused else (self.elements, self.elements_per_image)
        return flops / rate.flops_per_s, (fixed + images * each) * rate.bytes_per_element / rate.bytes_per_s


@dataclass(frozen=True, slots=True)
class Rate:
    """What a machine can do at most; fused: the network runs compiled."""

    flops_per_s: float
    bytes_per_s: float
    bytes_per_element: int = 4
    fused: bool = False


@dataclass(frozen=True)
class TrainingWork:
    """Of one network at one image size."""

    parameters: int
    """Trainable."""
    macs: int
    """Multiply-adds of one image forward, as the table of networks counts them."""
    kernels: tuple[Kernel, ...]

    @property
    def flops_per_image(self) -> int:
        """Two for a multiply-add, and twice the forward pass for the backward pass: what MFU is reckoned with by
        convention. The gradient of the images themselves, which nobody computes, is in it (about 1 %)."""
        return 6 * self.macs

    @cached_property
    def counted_flops_per_image(self) -> float:
        """Of the kernels that run."""
        return sum(kernel.flops_per_image for kernel in self.kernels)

    def elements_per_image(self, fused: bool = False, kind: str = "") -> float:
        """Read and written for one image, weights left out; of one kind of kernel, or of all."""
        kernels = [kernel for kernel in self.kernels if kind in ("", kernel.kind)]
        return sum(kernel.fused_per_image if fused else kernel.elements_per_image for kernel in kernels)

    def pass_seconds(self, images: float, rate: Rate) -> tuple[float, float]:
        """The least time of a forward and of a backward pass with `images` images."""
        forward = backward = 0.0
        for kernel in self.kernels:
            longest = max(kernel.seconds(images, rate))
            forward, backward = forward + longest * kernel.forward, backward + longest * (not kernel.forward)
        return forward, backward

    def bound(self, images: float, rate: Rate) -> Bound:
        """Whether most of that time is arithmetic or memory."""
        times = [kernel.seconds(images, rate) for kernel in self.kernels]
        memory = sum(moved for computed, moved in times if moved >= computed)
        return "memory" if 2 * memory >= sum(map(max, times)) else "arithmetic"


def training_work(build: Callable[[], nn.Module], side: int) -> TrainingWork:
    """Count the network that `build` makes, for square images of `side` pixels. Takes a second or less and no memory.

    build: called on the meta device.
    """
    with torch.device("meta"):
        model = build().train()
        shape = (3, side, side)
        few, more = (_record(model, torch.empty(images, *shape)) for images in (_FEW, _MORE))
        macs = count_macs(model, torch.empty(1, *shape))
    assert len(few) == len(more), "a network whose operators depend on the number of images cannot be counted so"
    kernels = tuple(_kernel(a, b) for a, b in zip(few, more, strict=True) if b.elements or b.flops)
    return TrainingWork(count_parameters(model), macs, kernels)


def _kernel(few: "_Call", more: "_Call") -> Kernel:
    def line(at_few: float, at_more: float) -> tuple[float, float]:
        each = (at_more - at_few) / (_MORE - _FEW)
        return at_few - _FEW * each, each

    numbers = (line(few.flops, more.flops), line(few.elements, more.elements), line(few.fused, more.fused))
    return Kernel(few.kind, few.forward, *(value for pair in numbers for value in pair))


# Recording -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Call:
    """One operator as it was called. reads, writes: (value, elements); a value is what an operator made."""

    name: str
    forward: bool
    flops: float
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    fused: float = 0.0

    @property
    def kind(self) -> str:
        return _KINDS.get(self.name.removesuffix("_").removesuffix("_backward"), _KINDS.get(self.name, "other"))

    @property
    def backward_of(self) -> str:
        return self.name.removesuffix("_backward") if self.name.endswith("_backward") else ""

    @property
    def elements(self) -> float:
        read = sum(elements for _, elements in self.reads)
        return (_NORM_READS if self.kind == "norm" else 1) * read + sum(elements for _, elements in self.writes)


class _Recorder(TorchDispatchMode):
    """Notes each operator; tells values apart by the memory they lie in and how often that was written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.forward = True
        self._value_of: dict[int, int] = {}
        self._values = 0
        self._kept: list[Any] = []  # a storage that is let go could come back as another one

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs, outputs = _floats((args, kwargs)), _floats(result)
        if name in _VIEWS or not outputs:
            self._kept += [tensor.untyped_storage() for tensor in outputs]
            return result
        in_place = function._schema.is_mutable and name.endswith("_")
        if not in_place and {_key(t) for t in outputs} <= {_key(t) for t in inputs}:
            return result  # a view
        if name == "convolution_backward":
            self._convolution_backward(args, result)
            return result
        # What a norm keeps a channel is counted too: it is next to nothing.
        self._note(name, _flops(name, args, result), inputs, outputs)
        return result

    def _note(self, name: str, flops: float, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        reads = [(self._value(tensor), _size(tensor)) for tensor in inputs]
        writes = [(self._value(tensor, new=True), _size(tensor)) for tensor in outputs]
        self.calls.append(_Call(name, self.forward, flops, reads, writes))

    def _convolution_backward(self, args: tuple[Any, ...], result: tuple[Tensor | None, ...]) -> None:
        """Two kernels: the gradient of the input, where it is asked for, and that of the weights."""
        grad_out, images, weight = args[:3]
        flops = 2.0 * grad_out.numel() * weight[0].numel()
        if result[0] is not None:
            self._note("convolution_backward", flops, [grad_out, weight], [result[0]])
        if result[1] is not None:
            self._note("convolution_backward", flops, [grad_out, images], [result[1]])

    def _value(self, tensor: Tensor, new: bool = False) -> int:
        key = _key(tensor)
        if new or key not in self._value_of:
            self._kept.append(tensor.untyped_storage())
            self._values += 1
            self._value_of[key] = self._values
        return self._value_of[key]


def _record(model: nn.Module, images_NCHW: Tensor) -> list[_Call]:
    model.zero_grad(set_to_none=True)
    recorder = _Recorder()
    with recorder:
        logits_NK = model(images_NCHW)
        recorder.forward = False
        logits_NK.sum().backward()
    _fuse(recorder.calls)
    return recorder.calls


def _floats(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _size(tensor: Tensor) -> int:
    """Elements in memory: an expanded tensor has fewer than its shape says."""
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())


def _flops(name: str, args: tuple[Any, ...], result: Tensor) -> float:
    inner: int
    if name == "convolution":
        inner = args[1][0].numel()
    elif name in ("mm", "bmm", "mv"):
        inner = args[0].shape[-1]
    elif name in ("addmm", "addmv"):
        inner = args[1].shape[-1]
    else:
        return 0.0
    return 2.0 * result.numel() * inner


# Fusing --------------------------------------------------------------------------------------------------------------


def _fuse(calls: list[_Call]) -> None:
    """Set `fused` of each call: its elements when a compiler has joined it with its neighbours."""
    maker = {value: call for call in calls for value, _ in call.writes}
    readers: dict[int, list[_Call]] = {}
    for call in calls:
        call.fused = call.elements
        for value, _ in call.reads:
            readers.setdefault(value, []).append(call)
    for call in calls:
        if call.name == "threshold_backward":
            _fuse_relu_gradient(call, maker, readers)
            continue
        joined = next((pair for pair in call.reads if _joins(call, maker.get(pair[0]), readers[pair[0]])), None)
        if joined is not None:
            value, elements = joined
            maker[value].fused -= elements
            call.fused -= elements


def _joins(reader: _Call, maker: _Call | None, readers: list[_Call]) -> bool:
    """Whether `reader` takes what `maker` made without a way through memory."""
    if maker is None or readers[0] is not reader:
        return False
    if maker.kind == "norm" and not maker.backward_of:
        return reader.kind in ("relu", "sum", "reduction")
    if reader.kind == "relu":
        return maker.kind == "sum" and len(readers) == 1
    return reader.kind == "reduction" and maker.kind == "product" and len(readers) == 1


def _fuse_relu_gradient(call: _Call, maker: dict[int, _Call], readers: dict[int, list[_Call]]) -> None:
    """The mask costs half an element to write, and to read as often as it is read."""
    value, elements = call.writes[0]
    source = maker.get(call.reads[1][0])
    if source is not None:
        source.fused += _MASK * elements
    following = readers.get(value, [])
    if len(following) == 1 and following[0].backward_of == "native_batch_norm":
        call.fused = _NORM_READS * _MASK * elements  # the norm's gradient reads the ReLU's instead of its own
    else:
        call.fused = (2 + _MASK) * elements
