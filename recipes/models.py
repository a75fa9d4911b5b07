"""The models, and the gains and targets that each condition starts from."""

import math
from itertools import pairwise
from typing import Any

import torch
from presets import Config
from torch import nn

from specscale import NormScaler, apply_norm_scaling, orthogonal_init_

# Channels x side of the activations, input first, as the post's code lists them.
PUBLISHED_SIZES = {
    "resnet34": [
        *[(3, 32), (64, 32), *[(64, 32)] * 6],
        *[(128, 32), *[(128, 16)] * 7],
        *[(256, 16), *[(256, 8)] * 11],
        *[(512, 8), *[(512, 4)] * 5],
    ],
    "resnet50": [
        *[(3, 32), (64, 32), *[(64, 32), (64, 32), (256, 32)] * 3],
        *[(128, 32), (128, 16), (512, 16), *[(128, 16), (128, 16), (512, 16)] * 3],
        *[(256, 16), (256, 8), (1024, 8), *[(256, 8), (256, 8), (1024, 8)] * 5],
        *[(512, 8), (512, 4), (2048, 4), *[(512, 4), (512, 4), (2048, 4)] * 2],
    ],
}
CIFAR_RESNETS = ("resnet18-quarter", *PUBLISHED_SIZES)
"""The ResNets that get a 3x3 first convolution and no first pooling."""


def build(config: Config, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The configuration's model for images of `shape (C, H, W)`."""
    if config.model == "mlp":
        sizes = [math.prod(shape), *[config.width] * (config.depth - 1), num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for d_in, d_out in pairwise(sizes):
            layers += [nn.Linear(d_in, d_out, bias=False), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if config.model in CIFAR_RESNETS:
        model = _resnet(config.model, num_classes)
        model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model
    import timm

    # Most transformers are built for one size of image; give those the data's.
    size = {"img_size": shape[1:]} if timm.models.get_pretrained_cfg(config.model).fixed_input_size else {}
    return timm.create_model(config.model, num_classes=num_classes, in_chans=shape[0], **size)


def _resnet(name: str, num_classes: int) -> nn.Module:
    if name in PUBLISHED_SIZES:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=num_classes)
    import timm

    return timm.create_model("resnet18", num_classes=num_classes, channels=(16, 32, 64, 128))


def is_known(name: str) -> bool:
    """Whether `build` knows the model."""
    if name == "mlp" or name in CIFAR_RESNETS:
        return True
    import timm

    return timm.is_model(name)


def published_gains(config: Config, model: nn.Module) -> dict[str, float] | str:
    """The init's gains of the post's code, by layer; for what it has no table of, an MLP too, the sizes are real."""
    if config.model not in PUBLISHED_SIZES:
        return "features"
    sizes = [channels * side**2 for channels, side in PUBLISHED_SIZES[config.model]] + [100]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    return {n: math.sqrt(b / a) for n, a, b in zip(names, sizes[:-1], sizes[1:], strict=True)}


def left_alone(model: nn.Module) -> str | None:
    """The pattern of the layers that no condition touches, for a model that has such layers."""
    return "*downsample*" if any("downsample" in name for name, _ in model.named_modules()) else None


def start(config: Config, norm: str, model: nn.Module, shape: tuple[int, int, int]) -> NormScaler | None:
    """The scaled orthogonal init of every condition, and the scaling of those that have one."""
    example = torch.zeros(1, *shape)
    rules = {"described": "features", "channels": "channels"}
    gains: Any = rules.get(config.targets) or published_gains(config, model)
    options: dict[str, Any] = {"exclude": left_alone(model), "example_input": example}
    gain = gains if isinstance(gains, str) else lambda name, module: gains[name]
    orthogonal_init_(model, gain, generator=torch.Generator().manual_seed(config.seed), **options)
    if norm == "none":
        return None
    target: Any = "initial"
    if norm != "frobenius" and config.targets == "published":
        # The post's code never advances past the first layer's target.
        weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        first = next(iter(gains.values())) if isinstance(gains, dict) else None
        target = first or math.sqrt(weights[0].weight.shape[0] / weights[0].weight.shape[1])
    return apply_norm_scaling(model, norm, target=target, solver=config.solver, **options)
