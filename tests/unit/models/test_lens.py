"""The one-filter lens against the plain form: convolution, torch's batch norm, mean."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ii_dist.models import fuse_lenses
from ii_dist.models.lens import Lens, patches_PL

# kernel, filters, image (N, H, W): the folds of ImageNet and wide networks in small, pairs, one row of views, one view.
CASES = [
    ((3, 3), 4, (3, 8, 16)),
    ((3, 3), 7, (2, 20, 6)),
    ((3, 3), 2, (2, 6, 32)),
    ((3, 3), 1, (4, 3, 3)),
    ((5, 5), 3, (2, 8, 9)),
    ((1, 2), 3, (2, 24, 2)),
    ((1, 1), 3, (2, 24, 2)),
    ((2, 1), 3, (2, 5, 4)),
]
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-5)}  # outputs, gradients


def _twins(kernel: Any, filters: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Lens, Lens]:
    """The same lens in both forms, with gains of both signs and shifts."""
    torch.manual_seed(seed)
    one = Lens(filters, kernel)
    with torch.no_grad():
        for vector in (one.norm.weight, one.norm.bias, one.norm.running_mean):
            vector.normal_()  # type: ignore[operator]
        one.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[operator]
    plain = copy.deepcopy(one)
    plain.form = "plain"
    return one.to(dtype), plain.to(dtype)


def _image(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 1, level: float = 0.5
) -> Tensor:
    """Rows of residuals around 0 and of identities around `level`, in turn."""
    batch, height, width = shape
    image = torch.randn(batch, 1, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    image[:, :, 1::2] += level
    return image.to(dtype)


def _results(lens: Callable[..., Tensor], module: Any, image: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one step."""
    module.zero_grad()
    image = image.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        view = lens(image)
    torch.manual_seed(2)
    view.backward(torch.randn(view.shape, dtype=torch.float64).to(view.dtype))
    assert image.grad is not None
    found = {"view": view.detach(), "grad image": image.grad}
    found |= {f"grad {name}": p.grad.clone() for name, p in module.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], outputs: float, grads: float) -> None:
    """Within a share of each tensor's largest value; of parameters' gradients, of the largest of them all.

    (The gradient of a one-tap filter is what large numbers leave when they cancel.)
    """
    assert list(actual) == list(expected)
    largest = {name: max(1.0, float(value.double().abs().max())) for name, value in expected.items()}
    largest_grad = max(value for name, value in largest.items() if name.startswith("grad"))
    for name, value in expected.items():
        share = grads if name.startswith("grad") else outputs
        assert actual[name].dtype == value.dtype
        scale = largest_grad if name.startswith("grad") and name != "grad image" else largest[name]
        torch.testing.assert_close(actual[name], value, rtol=0, atol=share * scale, msg=lambda m, n=name: f"{n}: {m}")


# The same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kernel", "filters", "shape"), CASES)
def test_both_forms_are_the_same(
    kernel: Any, filters: int, shape: tuple[int, int, int], training: bool, dtype: torch.dtype
) -> None:
    one, plain = (lens.train(training) for lens in _twins(kernel, filters, dtype))
    for seed in range(3):  # running statistics move on
        image = _image(shape, dtype, seed)
        _assert_same(_results(one, one, image), _results(plain, plain, image), *TOLERANCE[dtype])


def test_gradients_are_exact() -> None:
    one, _ = _twins((3, 3), 3, torch.float64)
    names, parameters = zip(*one.named_parameters(), strict=True)

    def lens(image: Tensor, *values: Tensor) -> Tensor:
        view: Tensor = torch.func.functional_call(one, dict(zip(names, values, strict=True)), image)
        return view

    image = _image((2, 5, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lens, (image, *parameters))


def test_gradients_of_gradients_are_refused_not_wrong() -> None:
    one, plain = _twins((3, 3), 2)
    image = _image((2, 6, 6)).requires_grad_()
    for lens in (plain, one):
        (grad,) = torch.autograd.grad(lens(image).square().sum(), image, create_graph=True)
        if lens is plain:
            grad.square().sum().backward()
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.square().sum().backward()


@pytest.mark.parametrize(("level", "offset"), [(0.5, 0.0), (30.0, 0.0), (0.5, 1000.0)])
def test_float32_is_as_exact_as_the_plain_form_for_any_level_of_the_signals(level: float, offset: float) -> None:
    one, plain = _twins((3, 3), 8)
    exact = copy.deepcopy(plain).double()
    image = _image((4, 32, 16), level=level) + offset
    expected = _results(exact, exact, image.double())
    errors = [
        {key: float((value.double() - expected[key]).abs().max()) for key, value in _results(lens, lens, image).items()}
        for lens in (one, plain)
    ]
    for key, error in errors[0].items():
        scale = max(1.0, float(expected[key].abs().max()))
        assert error <= 3 * errors[1][key] + 2e-6 * scale, key


@pytest.mark.parametrize("options", [{"momentum": 0.01}, {"momentum": None}, {"eps": 0.5}])
def test_the_norms_options_count(options: dict[str, Any]) -> None:
    one, plain = _twins((3, 3), 3)
    for lens in (one, plain):
        for key, value in options.items():
            setattr(lens.norm, key, value)
    for seed in range(3):
        image = _image((2, 8, 8), seed=seed)
        _assert_same(_results(one, one, image), _results(plain, plain, image), 1e-6, 1e-5)


def test_a_norm_without_running_statistics_uses_the_batch_in_evaluation_too() -> None:
    one, plain = _twins((3, 3), 3)
    for lens in (one, plain):
        lens.norm = nn.BatchNorm2d(3, track_running_stats=False)
        lens.eval()
    image = _image((2, 8, 8))
    _assert_same(_results(one, one, image), _results(plain, plain, image), 1e-6, 1e-5)


def test_a_frozen_norm_in_a_lens_that_trains() -> None:
    one, plain = _twins((3, 3), 3)
    for lens in (one, plain):
        lens.norm.eval()
    before = one.norm.running_mean.clone()  # type: ignore[operator, union-attr]
    image = _image((2, 8, 8))
    _assert_same(_results(one, one, image), _results(plain, plain, image), 1e-6, 1e-5)
    assert torch.equal(one.norm.running_mean, before)  # type: ignore[arg-type]


def test_state_dicts_are_interchangeable() -> None:
    one, plain = _twins((3, 3), 3)
    one(_image((2, 8, 8)))
    assert [(k, v.shape, v.dtype) for k, v in one.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in plain.state_dict().items()
    ]
    plain.load_state_dict(one.state_dict())
    image = _image((2, 8, 8), seed=5)
    torch.testing.assert_close(one.eval()(image), plain.eval()(image), rtol=0, atol=1e-6)


def test_one_patch_has_no_variance() -> None:
    for lens in _twins((3, 3), 2):
        with pytest.raises(ValueError, match="more than 1"):
            lens(torch.randn(1, 1, 3, 3))
        assert lens.eval()(torch.randn(1, 1, 3, 3)).shape == (1, 1, 1)


def test_patches_written_out() -> None:
    image = torch.arange(12.0).view(1, 3, 4)
    expected = [[0.0, 1, 2, 4, 5, 6], [1.0, 2, 3, 5, 6, 7], [4.0, 5, 6, 8, 9, 10], [5.0, 6, 7, 9, 10, 11]]
    assert torch.equal(patches_PL(image, (2, 2)), torch.tensor(expected))


# Under what networks are run with ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_touch_statistics(dtype: torch.dtype, backward_too: bool) -> None:
    one, plain = _twins((3, 3), 4)
    image = _image((2, 16, 8)).to(dtype)
    expected = _results(plain, plain, image.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_too):
        actual = _results(one, one, image, autocast=True)
    for key in ("view", "grad image"):
        assert actual[key].dtype == dtype
        actual[key] = actual[key].float()
    share = 1e-6 if dtype == torch.float32 else 2**-7
    _assert_same(actual, expected, share, max(share, 1e-5))


def test_a_lens_in_half_precision() -> None:
    one, plain = (lens.bfloat16() for lens in _twins((3, 3), 4))
    image = _image((4, 16, 8)).bfloat16()
    for training in (True, False):
        actual, expected = (_results(lens, lens, image) for lens in (one.train(training), plain.train(training)))
        _assert_same(actual, expected, 2**-6, 2**-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_lens_weight_its_gradient_and_its_momentum_stay_plain(memory_format: torch.memory_format) -> None:
    for lens in _twins((3, 3), 4):
        lens.to(memory_format=memory_format)  # type: ignore[call-overload]
        lens(_image((2, 8, 16)).contiguous(memory_format=memory_format)).sum().backward()
        weight = lens.conv.weight
        assert weight.grad is not None
        assert weight.stride() == weight.grad.stride() == torch.zeros_like(weight).stride() == (9, 9, 3, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_of_the_image_do_not_matter(transposed: bool) -> None:
    one, plain = _twins((3, 3), 4)
    image = _image((2, 16, 8))
    strided = image.mT.contiguous().mT if transposed else image.contiguous(memory_format=torch.channels_last)
    _assert_same(_results(one, one, strided), _results(plain, plain, image), 1e-6, 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole(training: bool) -> None:
    one, plain = (lens.train(training) for lens in _twins((3, 3), 4))
    torch._dynamo.reset()
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        image = _image((2, 8, 16), seed=seed)
        _assert_same(_results(compiled, one, image), _results(plain, plain, image), 1e-6, 1e-5)


def test_compiled_whole_under_autocast() -> None:
    """Outputs and statistics in float32; gradients in bfloat16, as a compiler traces the backward pass of anything."""
    one, plain = _twins((3, 3), 4)
    torch._dynamo.reset()
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    image = _image((2, 8, 16))
    actual = _results(compiled, one, image, autocast=True)
    _assert_same(actual, _results(plain, plain, image), 1e-6, 2**-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_moves_statistics_as_often_as_torchs(reentrant: bool) -> None:
    one, plain = _twins((3, 3), 4)
    image = _image((2, 8, 16))
    results = []
    for lens in (one, plain):
        block = nn.Sequential(lens, nn.Sigmoid())
        results.append(_results(partial(checkpoint, block, use_reentrant=reentrant), lens, image))
    _assert_same(results[0], results[1], 1e-6, 1e-5)
    assert int(results[0]["norm.num_batches_tracked"]) == 2  # torch's own: once forward, once again backward


def test_statistics_move_without_gradients_and_parameters_may_be_frozen() -> None:
    one, plain = _twins((3, 3), 4)
    image = _image((2, 8, 16))
    with torch.no_grad():
        torch.testing.assert_close(one(image), plain(image), rtol=0, atol=1e-6)
    torch.testing.assert_close(one.norm.running_var, plain.norm.running_var, rtol=0, atol=1e-6)
    one.requires_grad_(False)
    with_grad = image.clone().requires_grad_()
    one(with_grad).sum().backward()
    assert with_grad.grad is not None
    assert one.conv.weight.grad is None


def test_a_norm_for_many_ranks_is_an_ordinary_one_in_one_process() -> None:
    one, plain = _twins((3, 3), 4)
    one = nn.SyncBatchNorm.convert_sync_batchnorm(one)
    assert isinstance(one.norm, nn.SyncBatchNorm)
    image = _image((2, 8, 16))
    _assert_same(_results(one, one, image), _results(plain, plain, image), 1e-6, 1e-5)


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Bytes of every storage that is kept for a backward pass."""
    bytes_by_storage: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        bytes_by_storage[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield bytes_by_storage


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_filters() -> None:
    image = _image((8, 256, 16)).requires_grad_()
    found = {}
    for filters in (4, 32):
        for form, lens in zip(("one", "plain"), _twins((3, 3), filters), strict=True):
            with _kept() as kept:
                lens(image)
            found[form, filters] = sum(kept.values()) / (image.numel() * 4)
    assert found["one", 4] < 1.05
    assert found["one", 32] < 1.1
    assert found["plain", 32] > 25


# One filter for good -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one_filter", "plain"])
@pytest.mark.parametrize(("kernel", "filters", "shape"), CASES)
def test_a_fused_lens_is_one_convolution(form: str, kernel: Any, filters: int, shape: tuple[int, int, int]) -> None:
    _, lens = _twins(kernel, filters)
    lens.form = form
    image = _image(shape)
    expected = lens.eval()(image)
    assert lens.fuse() is lens
    torch.testing.assert_close(lens(image), expected, rtol=0, atol=1e-6)
    assert {k: tuple(v.shape) for k, v in lens.state_dict().items()} == {
        "conv.weight": (1, 1, *kernel),
        "conv.bias": (1,),
    }
    again = lens.fuse().state_dict()
    assert torch.equal(lens(image), nn.functional.conv2d(image, again["conv.weight"], again["conv.bias"])[:, 0])


def test_a_fused_lens_keeps_dtype_mode_and_what_is_trained() -> None:
    lens = Lens(4, 3).to(torch.float64).eval().requires_grad_(False)
    lens.fuse()
    assert {p.dtype for p in lens.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in lens.parameters())
    assert not any(module.training for module in lens.modules())


@pytest.mark.parametrize("gate", ["fold3x3", "pair1x1", "pair2x1", "double_fc", "none"])
def test_all_lenses_of_a_network_are_fused(gate: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("ini_resnet20", gate=gate)
    images = torch.randn(4, 3, 32, 32)
    model(images)
    expected = model.eval()(images)
    blocks = 9 if gate in ("fold3x3", "pair1x1", "pair2x1") else 0
    assert fuse_lenses(model) == blocks
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert sum(k.endswith("lens.conv.bias") for k in model.state_dict()) == blocks
    assert not any("lens.norm" in k for k in model.state_dict())


def test_a_network_trains_the_same_with_either_form() -> None:
    results = []
    for form in ("one_filter", "plain"):
        torch.manual_seed(0)
        model = timm.create_model("ini_resnet20", gate="fold3x3", lens=form, zero_init_last=False).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
            nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
            optimizer.step()
        results.append(model.state_dict())
    for (name, one), plain in zip(results[0].items(), results[1].values(), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
