"""The presets against the published settings, written out."""

from dataclasses import replace

import pytest
from models import build, start
from presets import mlp_5x2000, resnet34, resnet50

from specscale import NormScaler


def targets(preset, rule):
    config = replace(preset(), targets=rule)
    model = build(config, (3, 32, 32), 100)
    start(config, "spectral", model, (3, 32, 32))
    metrics = NormScaler.of(model).metrics()
    return {name: value for name, value in metrics.items() if name.startswith(("target/", "norm/"))}


def test_the_medium_mlp():
    described, published = targets(mlp_5x2000, "described"), targets(mlp_5x2000, "published")
    gains = [0.8068, 1, 1, 1, 0.2236]
    assert [v for n, v in described.items() if "target" in n] == pytest.approx(gains, rel=1e-3)
    assert [v for n, v in published.items() if "norm" in n] == pytest.approx(gains, rel=1e-3)
    assert [v for n, v in published.items() if "target" in n] == pytest.approx([0.8068] * 5, rel=1e-3)


@pytest.mark.parametrize(("preset", "count", "fc"), [(resnet34, 34, 512), (resnet50, 50, 2048)])
def test_the_resnets(preset, count, fc):
    described, published = targets(preset, "described"), targets(preset, "published")
    assert described["target/conv1"] == pytest.approx((64 / 3) ** 0.5, rel=1e-4)
    assert described["target/fc"] == pytest.approx((100 / fc) ** 0.5, rel=1e-4)
    assert published["norm/fc"] == pytest.approx((100 / (16 * fc)) ** 0.5, rel=1e-4)
    held = [value for name, value in published.items() if "target" in name]
    assert held == pytest.approx([(64 / 3) ** 0.5] * count, rel=1e-4)
    assert not any("downsample" in name for name in described)
