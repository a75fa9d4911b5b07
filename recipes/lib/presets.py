"""The configuration of a run, the presets that fill it in, and the choices that its options offer."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from specscale.apply import SOLVERS
from specscale.constraints import CONSTRAINTS
from specscale.norms import SpectralNormByDecomposition

NORMS = ("none", "decay", *CONSTRAINTS)
"""Everything that the norms can be left to, in the order of tables and figures: nothing, weight decay, a constraint."""
SPECTRAL_NORMS = tuple(name for name, one in CONSTRAINTS.items() if one.norm_type.name == "spectral")
"""The constraints that put the spectral norm on the target."""
TARGET_SOURCES = ("described", "published", "channels")
"""Where the gains of the init and the target norms come from, in the order of tables and figures."""

Norm = Literal[NORMS]
TargetSource = Literal[TARGET_SOURCES]


def waits_for_device(norm: str, solver: str = "block") -> bool:
    """Whether a scaling step takes exact decompositions: they make the host wait, and so no graph captures the step."""
    if norm not in CONSTRAINTS:
        return False
    return CONSTRAINTS[norm].norm_type is SpectralNormByDecomposition or (norm == "spectral" and solver == "svd")


def needs_whole(norm: str, solver: str = "block") -> bool:
    """Whether a scaling step needs whole matrices, of which shards will not do."""
    return norm in CONSTRAINTS and CONSTRAINTS[norm](solver=SOLVERS[solver]).needs_whole


@dataclass(frozen=True)
class Config:
    """Train one model under several norm constraints, one after another, and compare the runs."""

    preset: str = "digits"
    """Name of the results folder and of the W&B group."""
    model: str = "mlp"
    """mlp, resnet34, resnet50 or resnet18-quarter (variants for CIFAR), the name of any timm model, or pair-mlp, which
    embeds two numbers (for modular-addition)."""
    depth: int = 3
    """Number of weight matrices of the MLP."""
    width: int = 256
    """Hidden units in each layer of the MLP."""
    data: Literal["digits", "cifar100", "modular-addition"] = "digits"
    """Data set: the handwritten digits that come with scikit-learn, CIFAR-100 from data_root, or 40 % of all pairs of
    numbers below 97 and their sums modulo 97, with the other pairs for the test."""
    data_root: Path = Path("data")
    """Folder that contains cifar-100-python."""
    download: bool = False
    """Download CIFAR-100 into data_root if it is not there."""
    norms: tuple[Norm, ...] = ("none", "frobenius", "spectral")
    """Norms to constrain, one run for each. none: no constraint, but the same init as the others. decay: no constraint,
    and AdamW's weight decay. docs/norms.md says what the others do."""
    weight_decay: float = 1.0
    """Coefficient of AdamW under decay; the other runs have no weight decay."""
    init: Literal["scaled-orthogonal", "model"] = "scaled-orthogonal"
    """Init of the scaled weights: scaled orthogonal matrices, as in the post, or the model's own init, which also gives
    the target norms then."""
    targets: TargetSource = "described"
    """Source of the init's gains and of the target norms. described: from each layer's activation sizes.
    published: as in the post's code. channels: like described, but from the numbers of channels alone."""
    solver: Literal[tuple(SOLVERS)] = "block"
    """Solver of the spectral constraint; power is the post's: 500 iterations from random vectors at every step."""
    epochs: int = 20
    """Passes over the training data, or as many times steps_per_epoch steps. The model is tested after each."""
    steps_per_epoch: int | None = None
    """Steps of an epoch, over as many passes as they take; None is one pass."""
    batch_size: int = 128
    """Images per step, all processes together."""
    lr: float = 1e-3
    """Initial learning rate of Adam."""
    milestones: tuple[float, ...] = (0.3, 0.6)
    """Fractions of the epochs after which the learning rate drops."""
    gamma: float = 0.1
    """Factor on the learning rate at each milestone."""
    spectra: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 1.0)
    """Fractions of the epochs after which the singular values and ranks of every weight are logged; 0 is the init."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes train: ddp: each holds the whole model. fsdp: each holds a shard of every parameter
    (fully_shard), and the scaling step works on shards."""
    seed: int = 0
    """Seed of the init, of the order of the images and of their augmentation."""
    limit_train: int | None = None
    """Use only the first so many training images."""
    limit_test: int | None = None
    """Use only the first so many test images."""
    amp: bool = False
    """Autocast to bfloat16; weights and norm scaling stay in float32."""
    channels_last: bool = False
    """Keep images and convolutions in the channels_last memory format."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products in training: torch.set_float32_matmul_precision. Convolutions on CUDA follow
    torch.backends.cudnn, whose default is TF32."""
    data_on_device: bool = True
    """Keep the whole data set on the device and select batches there: CIFAR-100 takes 190 MB of each process's GPU.
    Without it, batches come from data loaders on the host. The results are the same."""
    num_workers: int = 0
    """Worker processes of each data loader, with --no-data-on-device; the results do not depend on it."""
    checkpoint_minutes: float = 5.0
    """Write a checkpoint after the first epoch of each start, the last, and those that end so many minutes after one;
    0: after every epoch. What was trained since the last one is trained again after an interruption."""
    out: Path = Path("runs")
    """Folder for the results; those of a preset go to OUT/PRESET."""
    resume: bool = False
    """Resume interrupted runs from their checkpoints; finished runs are kept."""
    overwrite: bool = False
    """Delete existing runs and train them again."""
    compare: bool = True
    """Compare the runs of the preset at the end; switch it off for runs in parallel and call compare.py once."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """W&B mode; offline needs no account."""
    wandb_project: str = "specscale"
    """W&B project."""

    def as_json(self) -> dict[str, Any]:
        """The options as plain JSON values: paths as strings, tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


WITHOUT_EFFECT = ("norms", "data_root", "download", "data_on_device", "num_workers", "checkpoint_minutes")
WITHOUT_EFFECT += ("out", "resume", "overwrite", "compare", "wandb", "wandb_project")
"""The options that do not change the results of a run."""


def condition_name(norm: str, targets: str) -> str:
    """The condition of a run: its norm, and its target source unless that is the default one."""
    return norm if targets == Config.targets else f"{norm}-{targets}"


PRESETS: dict[str, Callable[[], Config]] = {}
"""The presets by name."""


def preset(build: Callable[[], Config]) -> Callable[[], Config]:
    """Add a function that returns a configuration to the presets; its docstring is the help of the command line."""
    PRESETS[build().preset] = build
    return build


@preset
def modular_addition() -> Config:
    """Two minutes on two cores: a + b modulo 97, learned from 40 % of the pairs. Who gets the other pairs right?"""
    return Config(
        preset="modular-addition",
        model="pair-mlp",
        data="modular-addition",
        init="model",
        norms=("none", "decay", "frobenius", "spectral"),
        steps_per_epoch=50,
        batch_size=512,
        lr=1e-2,
        milestones=(0.8,),
        spectra=(0.0, 1.0),
    )


@preset
def digits() -> Config:
    """Seconds on a laptop: an MLP on the digits of scikit-learn."""
    return Config()


@preset
def mlp_5x2000() -> Config:
    """The post's medium MLP: 5 weight matrices, 2000 hidden units, CIFAR-100, 200 epochs."""
    return replace(digits(), preset="mlp-5x2000", data="cifar100", depth=5, width=2000, epochs=200, batch_size=512)


@preset
def mlp_7x4000() -> Config:
    """The post's large MLP: 7 weight matrices, 4000 hidden units."""
    return replace(mlp_5x2000(), preset="mlp-7x4000", depth=7, width=4000)


@preset
def resnet34() -> Config:
    """The post's ResNet-34: its first convolution is 3x3, without pooling after it."""
    return replace(mlp_5x2000(), preset="resnet34", model="resnet34")


@preset
def resnet50() -> Config:
    """The post's ResNet-50, with the same first convolution."""
    return replace(mlp_5x2000(), preset="resnet50", model="resnet50")


@preset
def mlp_5x256() -> Config:
    """The medium MLP at an eighth of its width, with an exact solver, and also clipped."""
    return replace(
        mlp_5x2000(), preset="mlp-5x256", width=256, epochs=30, solver="svd", norms=(*Config.norms, "clipped")
    )


@preset
def resnet18_quarter() -> Config:
    """A small ResNet on a quarter of the images, for CPUs: to compare targets from channels and from activations."""
    small = replace(resnet34(), preset="resnet18-quarter", model="resnet18-quarter", epochs=5, batch_size=128)
    return replace(small, limit_train=12800, limit_test=2560)
