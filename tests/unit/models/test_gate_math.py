"""Gates against the authors' equations written as loops, and their errors."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.networks import FOLD_LAYOUTS, GATE_INITS, GATE_NAMES, LENS_FORMS, fold_widths
from ii_dist.config.schema import ModelConfig
from ii_dist.models import create_model
from ii_dist.models.gates import AUTHORS_FOLD, GATES, GateChoice, make_gate
from ii_dist.models.lens import Lens

Image = list[list[float]]


def _gate(name: str, channels: int = 16, planes: int = 16, **options: Any) -> Any:
    gate = make_gate(name, channels, planes, **options)
    assert gate is not None
    return gate


# The equations, one number at a time ---------------------------------------------------------------------------------


def _linear(layer: nn.Linear, x: list[float]) -> list[float]:
    weight = layer.weight.tolist()
    return [sum(row[j] * x[j] for j in range(len(x))) for row in weight]


def _relu(x: list[float]) -> list[float]:
    return [max(0.0, value) for value in x]


def _sigmoid(x: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-value)) for value in x]


def _squeeze_excite(gate: Any, q: list[float]) -> list[float]:
    return _sigmoid(_linear(gate.excite, _relu(_linear(gate.squeeze, q))))


def _double_fc(gate: Any, u: list[float], v: list[float]) -> list[float]:
    hidden = _relu(_linear(gate.squeeze, u)) + _relu(_linear(gate.squeeze_identity, v))
    return _sigmoid(_linear(gate.excite, hidden))


def _rows(flat: Iterator[float], width: int) -> Image:
    values = list(flat)
    return [values[i : i + width] for i in range(0, len(values), width)]


def _image(gate_name: str, layout: str, k: int, u: list[float], v: list[float]) -> Image:
    channels = len(u)
    pairs = [(u[c], v[c]) for c in range(channels)]
    if gate_name.startswith("pair"):
        return [list(pair) for pair in pairs]
    if layout == "columns":  # (C/k, k, 2) > (C/k, 2, k) > (2C/k, k)
        return _rows((pairs[i * k + j][flow] for i in range(channels // k) for flow in (0, 1) for j in range(k)), k)
    run = channels // k  # (k, C/k, 2) > (k, 2, C/k) > (2k, C/k)
    return _rows((pairs[g * run + j][flow] for g in range(k) for flow in (0, 1) for j in range(run)), run)


def _lens(lens: Lens, images: list[Image], training: bool) -> list[list[float]]:
    """The mean over filters of norm(convolution without padding), flattened row by row."""
    kh, kw = lens.conv.kernel_size
    places = list(product(range(len(images[0]) - kh + 1), range(len(images[0][0]) - kw + 1)))
    views = [[0.0] * len(places) for _ in images]
    norm: Any = lens.norm
    filters = lens.conv.out_channels
    for m in range(filters):
        taps = [(a, b, lens.conv.weight[m, 0, a, b].item()) for a in range(kh) for b in range(kw)]
        maps = [[sum(w * image[i + a][j + b] for a, b, w in taps) for i, j in places] for image in images]
        mean, var = norm.running_mean[m].item(), norm.running_var[m].item()
        if training:
            values = [z for one in maps for z in one]
            mean = sum(values) / len(values)
            var = sum((z - mean) ** 2 for z in values) / len(values)
        gain, shift = norm.weight[m].item() / math.sqrt(var + norm.eps), norm.bias[m].item()
        for n, one in enumerate(maps):
            for place, z in enumerate(one):
                views[n][place] += (gain * (z - mean) + shift) / filters
    return views


CASES = [
    ("pair1x1", "columns", 4, 3),
    ("pair2x1", "columns", 4, 3),
    ("fold3x3", "columns", 4, 3),
    ("fold3x3", "columns", 8, 3),
    ("fold3x3", "groups", 4, 3),
    ("fold3x3", "groups", 2, 3),
    ("fold3x3", "columns", 4, 1),
    ("fold3x3", "groups", 2, 4),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", LENS_FORMS)
@pytest.mark.parametrize(("name", "layout", "k", "kernel"), CASES)
def test_a_gate_with_a_lens_equals_its_equations_by_loops(
    name: str, layout: str, k: int, kernel: int, form: str, training: bool
) -> None:
    torch.manual_seed(0)
    options = {"fold_width": k, "fold_layout": layout, "lens_kernel": kernel}
    gate = _gate(name, reduction=4, lens_filters=3, lens=form, **options).double().train(training)
    with torch.no_grad():
        for vector in (gate.lens.norm.weight, gate.lens.norm.bias, gate.lens.norm.running_mean):
            vector.normal_()
    residual, identity = torch.randn(2, 2, 16, 3, 5, dtype=torch.float64).unbind()
    signals = [(x.flatten(2).sum(2) / 15).tolist() for x in (residual, identity)]
    images = [_image(name, layout, k, u, v) for u, v in zip(*signals, strict=True)]
    expected = [_squeeze_excite(gate, q) for q in _lens(gate.lens, images, training)]
    scale = gate(residual, identity)
    assert scale.shape == (2, 16, 1, 1)
    torch.testing.assert_close(scale[:, :, 0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_se_equals_its_equation_by_loops_and_does_not_look_at_the_identity() -> None:
    torch.manual_seed(0)
    gate = _gate("se", 8, reduction=4).double()
    residual = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    expected = [_squeeze_excite(gate, (residual[n].flatten(1).sum(1) / 9).tolist()) for n in range(2)]
    scale = gate(residual, torch.full_like(residual, torch.nan))
    torch.testing.assert_close(scale[:, :, 0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_double_fc_equals_its_equation_by_loops() -> None:
    torch.manual_seed(0)
    gate = _gate("double_fc", 8, reduction=4).double()
    residual, identity = torch.randn(2, 2, 8, 3, 3, dtype=torch.float64).unbind()
    signals = [(x.flatten(2).sum(2) / 9).tolist() for x in (residual, identity)]
    expected = [_double_fc(gate, u, v) for u, v in zip(*signals, strict=True)]
    scale = gate(residual, identity)
    torch.testing.assert_close(scale[:, :, 0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# The table, the options, the start -----------------------------------------------------------------------------------


def test_the_table_and_the_names_that_a_config_may_use_agree() -> None:
    assert tuple(GATES) == GATE_NAMES
    assert tuple(AUTHORS_FOLD) == FOLD_LAYOUTS


@pytest.mark.parametrize("name", [g for g in GATES if g != "none"])
def test_all_layers_but_the_norm_are_without_bias(name: str) -> None:
    biases = [key for key, _ in _gate(name, 64).named_parameters() if key.endswith("bias")]
    assert biases in ([], ["lens.norm.bias"])


@pytest.mark.parametrize("name", [g for g in GATES if g != "none"])
def test_a_gate_starts_near_one_half(name: str) -> None:
    torch.manual_seed(0)
    scale = _gate(name, 256, 64)(torch.randn(8, 256, 7, 7), torch.rand(8, 256, 7, 7))
    assert scale.mean().item() == pytest.approx(0.5, abs=0.05)
    assert 0 < scale.std().item() < 0.2


def test_a_choice_and_its_fields_by_name_build_the_same() -> None:
    choice = GateChoice("fold3x3", reduction=4, fold_width=10, lens_filters=5, fold_layout="groups", lens_kernel=4)
    gate = _gate(choice, 160, 160)
    named = _gate("fold3x3", 160, 160, reduction=4, fold_width=10, lens_filters=5, fold_layout="groups", lens_kernel=4)
    shapes = {key: tuple(value.shape) for key, value in gate.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in named.state_dict().items()}
    assert shapes["lens.conv.weight"] == (5, 1, 4, 4)
    assert shapes["squeeze.weight"] == (40, (20 - 3) * (16 - 3))


def test_what_is_left_open_is_the_authors() -> None:
    columns, groups = _gate("fold3x3", 640, 64), _gate("fold3x3", 640, 640, fold_layout="groups")
    assert columns.squeeze.weight.shape == (40, (2 * 640 // 16 - 2) * 14)
    assert groups.squeeze.weight.shape == (40, 18 * 62)
    assert columns.lens.conv.weight.shape == (4, 1, 3, 3)
    assert groups.lens.conv.weight.shape == (40, 1, 3, 3)
    assert _gate("pair1x1", 16, 8).lens.conv.weight.shape == (1, 1, 1, 1)
    assert columns.lens.form == "one_filter"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", GATES)
def test_a_network_gives_the_same_with_and_without_gradients(name: str, memory_format: torch.memory_format) -> None:
    """Without, signals and sums are computed in other ways."""
    torch.manual_seed(0)
    cfg = ModelConfig(network="ini_resnet20", gate=name, zero_init_last=False)
    model = create_model(cfg, num_classes=10).to(memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=memory_format)
    model(images)
    model.eval()
    kept = images.clone()
    with_gradients = model(images)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model(images), with_gradients, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, kept)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), with_gradients, rtol=0.1, atol=0.1)


def test_every_gate_field_of_a_config_reaches_the_blocks() -> None:
    options = {"fold_width": 4, "fold_layout": "groups", "lens_kernel": 4, "lens_filters": 5, "gate_reduction": 2}
    network = create_model(ModelConfig(network="ini_resnet20", gate="fold3x3", lens="plain", **options), 10)
    gate: Any = network.get_submodule("layer1.0.gate")
    assert (gate.fold_layout, gate.fold_width, gate.lens.form) == ("groups", 4, "plain")
    assert gate.lens.conv.weight.shape == (5, 1, 4, 4)
    assert gate.squeeze.weight.shape == (8, (8 - 3) * (4 - 3))
    torch.manual_seed(0)
    pairs = {"network": "ini_resnet20", "gate": "pair1x1", "lens_filters": 16}
    for start, positive in (("cured", True), ("authors", False)):
        network = create_model(ModelConfig(gate_init=start, **pairs), 10)
        assert bool((network.get_parameter("layer1.0.gate.lens.conv.weight") > 0).all()) is positive


# Errors --------------------------------------------------------------------------------------------------------------


def test_unknown_words_name_their_tables() -> None:
    with pytest.raises(ConfigError, match=f"gate 'sw' is not one of {', '.join(GATE_NAMES)}$"):
        make_gate("sw", 64, 64)
    for key, words in (("fold_layout", FOLD_LAYOUTS), ("lens", LENS_FORMS), ("gate_init", GATE_INITS)):
        with pytest.raises(ConfigError, match=f"{key} 'sw' is not one of {', '.join(words)}$"):
            make_gate("fold3x3", 64, 64, **{key: "sw"})


@pytest.mark.parametrize("name", [g for g in GATES if g != "none"])
def test_reduction_beyond_the_channels(name: str) -> None:
    with pytest.raises(ConfigError, match="gate_reduction 65: needs 1 to 64"):
        make_gate(name, 64, 64, reduction=65)


@pytest.mark.parametrize(
    ("channels", "width", "options", "possible"),
    [
        (64, 12, {}, "4, 8, 16, 32"),
        (16, 16, {}, "4, 8"),
        (2, 3, {}, "none"),
        (64, 10, {"fold_layout": "groups"}, "2, 4, 8, 16"),
        (64, 32, {"fold_layout": "groups"}, "2, 4, 8, 16"),
        (16, 4, {"lens_kernel": 5}, "none"),
        (64, 4, {"lens_kernel": 5}, "8, 16"),
        (6, 4, {"lens_kernel": 1}, "1, 2, 3, 6"),
    ],
)
def test_a_width_that_does_not_fold_says_which_would(
    channels: int, width: int, options: dict[str, Any], possible: str
) -> None:
    with pytest.raises(ConfigError, match=f"fold_width {width}: .*possible: {possible}$"):
        make_gate("fold3x3", channels, channels, reduction=1, fold_width=width, **options)


def test_a_lens_without_taps() -> None:
    with pytest.raises(ConfigError, match="lens_kernel 0: needs 1 or more"):
        make_gate("fold3x3", 64, 64, lens_kernel=0)


@pytest.mark.parametrize("layout", FOLD_LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_every_possible_width_works_and_no_other(layout: str, kernel: int) -> None:
    maps: tuple[Tensor, Tensor] = torch.randn(2, 2, 48, 1, 1).unbind()  # type: ignore[assignment]
    for width in range(1, 50):
        options = {"fold_width": width, "fold_layout": layout, "lens_kernel": kernel}
        if width in fold_widths([48], layout, kernel):
            assert _gate("fold3x3", 48, 48, **options)(*maps).shape == (2, 48, 1, 1)
        else:
            with pytest.raises(ConfigError):
                make_gate("fold3x3", 48, 48, **options)
    assert fold_widths([16, 32, 64]) == [4, 8]
    assert fold_widths([160, 320, 640], "groups") == [2, 4, 5, 8, 10, 16, 20, 32, 40]
