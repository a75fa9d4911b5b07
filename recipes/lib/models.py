"""The models, and the init and norm scaling of each condition."""

import math
from itertools import pairwise

import torch
from torch import nn

from lib.modular_addition import pair_mlp
from lib.presets import SPECTRAL_NORMS, Config
from specscale import NormScaler, apply_norm_scaling, orthogonal_init_
from specscale.constraints import CONSTRAINTS

# Channels and height of each layer's square activations, the input first, as listed in the post's code.
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
"""The ResNets whose first convolution becomes 3x3 and whose first pooling is removed."""


def build_model(config: Config, image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The configuration's model for images of shape `(C, H, W)`, or for pairs of numbers."""
    if config.model == "pair-mlp":
        return pair_mlp(num_classes)
    if config.model == "mlp":
        sizes = [math.prod(image_shape), *[config.width] * (config.depth - 1), num_classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for d_in, d_out in pairwise(sizes):
            layers += [nn.Linear(d_in, d_out, bias=False), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if config.model in CIFAR_RESNETS:
        model = _resnet(config.model, num_classes)
        model.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model
    import timm

    # Most vision transformers have a fixed image size: build them for the size of the data.
    size = {"img_size": image_shape[1:]} if timm.models.get_pretrained_cfg(config.model).fixed_input_size else {}
    return timm.create_model(config.model, num_classes=num_classes, in_chans=image_shape[0], **size)


def _resnet(name: str, num_classes: int) -> nn.Module:
    if name in PUBLISHED_SIZES:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=num_classes)
    import timm

    return timm.create_model("resnet18", num_classes=num_classes, channels=(16, 32, 64, 128))


def is_known_model(name: str) -> bool:
    """Whether `build_model` can build it."""
    if name in ("mlp", "pair-mlp", *CIFAR_RESNETS):
        return True
    import timm

    return timm.is_model(name)


def published_gains(config: Config, model: nn.Module) -> dict[str, float] | None:
    """The gain of each layer's init in the post's code; None for a model whose sizes that code does not list."""
    if config.model not in PUBLISHED_SIZES:
        return None
    sizes = [channels * height**2 for channels, height in PUBLISHED_SIZES[config.model]] + [100]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    return {n: math.sqrt(b / a) for n, a, b in zip(names, sizes[:-1], sizes[1:], strict=True)}


def published_target(gains: dict[str, float] | None, model: nn.Module) -> float:
    """The spectral norm that the post's code gives to every layer: it never advances past the first layer's target."""
    if gains is not None:
        return next(iter(gains.values()))
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return math.sqrt(first.weight.shape[0] / first.weight.shape[1])


def excluded_pattern(model: nn.Module) -> str | None:
    """The name pattern of the layers that are excluded from init and norm scaling; None if the model has none."""
    return "*downsample*" if any("downsample" in name for name, _ in model.named_modules()) else None


def init_and_scale(config: Config, norm: str, model: nn.Module, image_shape: tuple[int, ...]) -> NormScaler | None:
    """Initialize the weights as the configuration says, and put them under the norm constraint, if `norm` is one.

    The init does not depend on the norm.
    """
    exclude = excluded_pattern(model)
    gains = published_gains(config, model) if config.targets == "published" else None
    if config.init == "scaled-orthogonal":
        named_gain = "channels" if config.targets == "channels" else "features"
        gain = named_gain if gains is None else lambda name, module: gains[name]
        example_input = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
        generator = torch.Generator().manual_seed(config.seed)
        orthogonal_init_(model, gain, exclude=exclude, example_input=example_input, generator=generator)
    if norm not in CONSTRAINTS:
        return None
    use_published = config.targets == "published" and norm in SPECTRAL_NORMS
    target = published_target(gains, model) if use_published else "initial"
    return apply_norm_scaling(model, norm, target=target, solver=config.solver, exclude=exclude)
