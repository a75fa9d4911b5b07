"""What a run is: one configuration, and the presets that fill it in."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Condition = Literal["none", "frobenius", "spectral", "clipped"]
Targets = Literal["described", "published", "channels"]


@dataclass(frozen=True)
class Config:
    """Train one model under several conditions, one after another, and compare them."""

    preset: str = "digits"
    """Name of the results' folder and of the W&B group."""
    model: str = "mlp"
    """mlp, resnet34, resnet50 or resnet18-quarter (CIFAR variants), or the name of any timm model."""
    depth: int = 3
    """Weight matrices of the mlp."""
    width: int = 256
    """Hidden units of each of the mlp's layers."""
    data: Literal["digits", "cifar100"] = "digits"
    """Data set: scikit-learn's embedded digits, or CIFAR-100 from data_root."""
    data_root: Path = Path("data")
    """Folder that holds cifar-100-python."""
    download: bool = False
    """Download CIFAR-100 into data_root if it is not there."""
    norms: tuple[Condition, ...] = ("none", "frobenius", "spectral")
    """Conditions to train under; none starts from the same scaled orthogonal init. clipped is spectral, and brings
    every other singular value that is above the target down to it too."""
    targets: Targets = "described"
    """described: gains from real activation sizes, own targets. published: as the post's code did. channels: as
    described, from the channel counts alone."""
    solver: Literal["block", "power", "svd"] = "block"
    """Solver of the spectral condition; power is the post's, 500 iterations from noise at every step."""
    epochs: int = 20
    """Passes over the training data."""
    batch_size: int = 128
    """Images of a step, over all processes together."""
    lr: float = 1e-3
    """Initial learning rate of Adam."""
    milestones: tuple[float, ...] = (0.3, 0.6)
    """Fractions of the epochs after which the learning rate drops."""
    gamma: float = 0.1
    """Factor of the learning rate at a milestone."""
    spectra: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 1.0)
    """Fractions of the epochs after which every weight's spectrum and ranks are recorded; 0 is the init."""
    seed: int = 0
    """Seed of the init, the order of the images and their augmentation."""
    limit_train: int | None = None
    """Use only so many training images."""
    limit_test: int | None = None
    """Use only so many test images."""
    amp: bool = False
    """Compute in bfloat16 by autocast; weights and scaling stay float32."""
    channels_last: bool = False
    """Keep images and convolutions in channels_last memory format."""
    num_workers: int = 0
    """Loader processes of each rank; the results do not depend on it."""
    out: Path = Path("runs")
    """Folder for the results; a preset's go to OUT/PRESET."""
    resume: bool = False
    """Go on after an interruption; finished runs are kept."""
    overwrite: bool = False
    """Train again what is there already."""
    compare: bool = True
    """Compare the preset's runs at the end; runs side by side leave that to one call of compare.py."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """W&B mode; offline needs no account."""
    wandb_project: str = "specscale"
    """W&B project."""


HOUSEKEEPING = ("norms", "data_root", "download", "num_workers", "out", "resume", "overwrite", "compare")
HOUSEKEEPING += ("wandb", "wandb_project")
"""The fields that leave a run's numbers alone."""


def condition(norm: str, targets: str) -> str:
    """The name of what a run trains under: the norm, and the rule of its targets where it is not the usual one."""
    return norm if targets == "described" else f"{norm}-{targets}"


def digits() -> Config:
    """Seconds on a laptop: an MLP on scikit-learn's embedded digits."""
    return Config()


def mlp_5x2000() -> Config:
    """The post's medium MLP: 5 weight matrices, 2000 hidden units, CIFAR-100, 200 epochs."""
    return replace(digits(), preset="mlp-5x2000", data="cifar100", depth=5, width=2000, epochs=200, batch_size=512)


def mlp_7x4000() -> Config:
    """The post's large MLP: 7 weight matrices, 4000 hidden units."""
    return replace(mlp_5x2000(), preset="mlp-7x4000", depth=7, width=4000)


def resnet34() -> Config:
    """The post's ResNet-34, with a 3x3 first convolution and no pooling after it."""
    return replace(mlp_5x2000(), preset="resnet34", model="resnet34")


def resnet50() -> Config:
    """The post's ResNet-50, likewise."""
    return replace(mlp_5x2000(), preset="resnet50", model="resnet50")


def mlp_5x256() -> Config:
    """The medium MLP at an eighth of its width, under an exact solver, and with every singular value brought down."""
    norms: tuple[Condition, ...] = ("none", "frobenius", "spectral", "clipped")
    return replace(mlp_5x2000(), preset="mlp-5x256", width=256, epochs=30, solver="svd", norms=norms)


def resnet18_quarter() -> Config:
    """A small ResNet on a quarter of the images, for hours without a GPU: channels or activation sizes as targets?"""
    small = replace(resnet34(), preset="resnet18-quarter", model="resnet18-quarter", epochs=5, batch_size=128)
    return replace(small, limit_train=12800, limit_test=2560)


PRESETS = (digits, mlp_5x2000, mlp_7x4000, resnet34, resnet50, mlp_5x256, resnet18_quarter)
