"""The presets against the published settings, layer by layer, the numbers written out."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib.models import build_model, excluded_pattern, init_and_scale
from lib.presets import digits, mlp_5x2000, mlp_7x4000, resnet18_quarter, resnet34, resnet50
from specscale import spectral_norms

CIFAR = (3, 32, 32)
WIDE = math.sqrt(64 / 3)

# The spectral norm of each layer's init, which is its described target; patterns in order, the first match wins.
GAINS = {
    mlp_5x2000: {"1": 0.8069, "[357]": 1, "9": 0.2236},
    mlp_7x4000: {"1": 1.1411, "[3579]|11": 1, "13": 0.1581},
    resnet34: {"conv1": 4.6188, r"layer[234]\.0\.conv1": 0.7071, "layer.*": 1, "fc": 0.4419},
    resnet50: {
        "conv1": 4.6188,
        r"layer1\.0\.conv1": 1,
        r"layer[234]\.0\.conv1": 0.7071,
        r"layer[234]\.0\.conv2": 0.5,
        r".*conv1": 0.5,
        r".*conv2": 1,
        r".*conv3": 2,
        "fc": 0.2210,
    },
}
# Where the post's code starts otherwise: its tables put ResNet-34's stride on a block's second convolution, and count
# the classifier's input before pooling.
PUBLISHED_GAINS = {
    mlp_5x2000: {},
    mlp_7x4000: {},
    resnet34: {r"layer[234]\.0\.conv1": 1.4142, r"layer[234]\.0\.conv2": 0.5, "fc": 0.1105},
    resnet50: {"fc": 0.05524},
}
FIRST = {mlp_5x2000: 0.8069, mlp_7x4000: 1.1411, resnet34: 4.6188, resnet50: 4.6188}
SHAPES = {
    mlp_5x2000: [(2000, 3072), (2000, 2000), (2000, 2000), (2000, 2000), (100, 2000)],
    mlp_7x4000: [(4000, 3072), *[(4000, 4000)] * 5, (100, 4000)],
    resnet34: [
        (64, 27),
        *[(64, 576)] * 6,
        *[(128, 576), *[(128, 1152)] * 7],
        *[(256, 1152), *[(256, 2304)] * 11],
        *[(512, 2304), *[(512, 4608)] * 5],
        (100, 512),
    ],
    resnet50: [
        (64, 27),
        *[(64, 64), (64, 576), (256, 64)],
        *[(64, 256), (64, 576), (256, 64)] * 2,
        *[(128, 256), (128, 1152), (512, 128)],
        *[(128, 512), (128, 1152), (512, 128)] * 3,
        *[(256, 512), (256, 2304), (1024, 256)],
        *[(256, 1024), (256, 2304), (1024, 256)] * 5,
        *[(512, 1024), (512, 4608), (2048, 512)],
        *[(512, 2048), (512, 4608), (2048, 512)] * 2,
        (100, 2048),
    ],
}


def gain(table, name):
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


# An MLP's init is the same from both sources. One of 7 layers of 4000 takes half a minute.
LARGE = pytest.param(mlp_7x4000, "described", marks=pytest.mark.slow, id="mlp_7x4000-described")
OTHERS = [preset for preset in GAINS if preset is not mlp_7x4000]
QUICK = [(mlp_5x2000, "described"), (resnet34, "published"), (resnet50, "described")]
HELD = [LARGE, *QUICK]
HELD += [
    pytest.param(preset, source, marks=pytest.mark.slow)
    for preset in OTHERS
    for source in ("described", "published")
    if (preset, source) not in QUICK
]


def expected_gains(preset, source, names):
    """The spectral norm of each layer's init."""
    own = PUBLISHED_GAINS[preset] if source == "published" else {}
    return {name: gain(own, name) or gain(GAINS[preset], name) for name in names}


def start_spectral(preset, source):
    """The preset's model under spectral scaling, its handle, and its excluded parameters as they were before."""
    config = replace(preset(), targets=source)
    model = build_model(config, CIFAR, 100)
    excluded = {name: parameter.clone() for name, parameter in model.named_parameters() if "downsample" in name}
    return model, init_and_scale(config, "spectral", model, CIFAR), excluded


@pytest.fixture(scope="module")
def started():
    """`start_spectral`, once for each preset and source: the large models take seconds."""
    return functools.cache(start_spectral)


@pytest.mark.parametrize(("preset", "source"), HELD)
def test_every_layer_starts_and_is_held_as_published(preset, source, started):
    model, scaling, excluded = started(preset, source)
    assert [weight.scaling.view.matrix_shape(weight.parameter) for weight in scaling.weights] == SHAPES[preset]
    metrics = scaling.metrics()
    for name, value in expected_gains(preset, source, [weight.name for weight in scaling.weights]).items():
        assert metrics[f"norm/{name}"] == pytest.approx(value, rel=2e-4), name
        held = FIRST[preset] if source == "published" else value
        assert metrics[f"target/{name}"] == pytest.approx(held, rel=2e-4), name
    state = dict(model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in excluded.items())


def test_every_condition_starts_from_the_same_weights():
    config, shape = digits(), (1, 8, 8)
    models = {norm: build_model(config, shape, 10) for norm in ("none", "frobenius", "spectral")}
    scalings = {norm: init_and_scale(config, norm, model, shape) for norm, model in models.items()}
    assert scalings["none"] is None
    plain = models["none"].state_dict()
    for norm, order in (("frobenius", "fro"), ("spectral", 2)):
        state, metrics = scalings[norm].plain_state_dict(), scalings[norm].metrics()
        assert len(scalings[norm].weights) == 3
        for weight in scalings[norm].weights:
            values = plain[f"{weight.name}.weight"]
            assert torch.equal(state[f"{weight.name}.weight"], values), norm
            exact = torch.linalg.matrix_norm(values.double(), order).item()
            assert metrics[f"target/{weight.name}"] == pytest.approx(exact, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "source"),
    [
        (resnet34, "published"),
        (resnet34, "described"),
        (resnet50, "described"),
        (resnet50, "published"),
        (mlp_5x2000, "described"),
    ],
)
def test_every_condition_of_a_large_preset_starts_from_the_same_weights(preset, source):
    config = replace(preset(), targets=source)
    models = {norm: build_model(config, CIFAR, 100) for norm in ("none", "frobenius", "spectral")}
    scalings = {norm: init_and_scale(config, norm, model, CIFAR) for norm, model in models.items()}
    assert scalings["none"] is None
    # Frobenius targets are the norms after the init, each layer's own.
    targets = scalings["frobenius"].metrics()
    expected = expected_gains(preset, source, [weight.name for weight in scalings["frobenius"].weights])
    for (name, value), (m, n) in zip(expected.items(), SHAPES[preset], strict=True):
        assert targets[f"target/{name}"] == pytest.approx(value * math.sqrt(min(m, n)), rel=2e-4), name
    plain = models["none"].state_dict()
    for norm in ("frobenius", "spectral"):
        state = scalings[norm].plain_state_dict()
        assert all(torch.equal(state[f"{name}.weight"], plain[f"{name}.weight"]) for name in expected), norm


@pytest.mark.parametrize(
    "preset",
    [resnet50, *(pytest.param(other, marks=pytest.mark.slow) for other in (mlp_5x2000, mlp_7x4000, resnet34))],
    ids=lambda preset: preset.__name__,
)
def test_described_gains_are_the_activation_sizes_of_a_forward_pass(preset, started):
    model, *_ = started(preset, "described")
    gains = {}

    def read(name):
        return lambda _, args, output: gains.update({name: math.sqrt(output.numel() / args[0].numel())})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "downsample" not in name:
            module.register_forward_hook(read(name))
    model.eval()(torch.zeros(1, *CIFAR))
    assert spectral_norms(model, exclude=excluded_pattern(model)) == pytest.approx(gains, rel=1e-4)


@pytest.mark.parametrize(
    "preset", [resnet18_quarter, *(pytest.param(large, marks=pytest.mark.slow) for large in (resnet34, resnet50))]
)
def test_channel_targets_do_not_see_the_maps(preset):
    config = replace(preset(), targets="channels")
    model = build_model(config, CIFAR, 100)
    for weight in init_and_scale(config, "spectral", model, CIFAR).weights:
        m, n = weight.parameter.shape[:2]
        assert weight.scaling.target.item() == pytest.approx(math.sqrt(m / n), rel=1e-4), weight.name


@pytest.mark.parametrize("preset", GAINS, ids=lambda preset: preset.__name__)
def test_the_settings_of_training(preset):
    config = preset()
    assert (config.data, config.epochs, config.batch_size, config.lr, config.gamma) == ("cifar100", 200, 512, 1e-3, 0.1)
    assert [round(fraction * config.epochs) for fraction in config.milestones] == [60, 120]
    assert config.norms == ("none", "frobenius", "spectral")


@pytest.mark.parametrize("preset", GAINS, ids=lambda preset: preset.__name__)
def test_the_matrices_are_as_large_as_published(preset):
    with torch.device("meta"):
        model = build_model(preset(), CIFAR, 100)
    layers = [module for name, module in model.named_modules() if "downsample" not in name]
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert [weight.flatten(1).shape for weight in weights] == SHAPES[preset]
