"""How to choose a spectral target: an MLP on small images, over targets, treatments of the head, sizes and lengths.

Example: python recipes/spectral_targets.py --data-root data

The images are CIFAR-100's at 16 x 16 pixels, mirrored at random. Every run starts from the same scaled orthogonal init,
whatever its targets. A grid with one seed comes first, then the other learning rates for its best spectral targets, and
then more seeds for what is best on the validation images. The test images are for the report alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lib.console import markdown, mean_and_deviation
from lib.datasets import Data, Preprocessing, load_data
from lib.distributed import Processes
from lib.models import build_model
from lib.presets import Config
from lib.studies import Result, Study, StudyOptions, run_study
from specscale import apply_norm_scaling, orthogonal_init_

BATCH = 256
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options(StudyOptions):
    """The images, and the grid."""

    data: Literal["cifar100", "digits"] = "cifar100"
    """digits: seconds, to see that it runs."""
    data_root: Path = Path("data")
    """Folder that contains cifar-100-python."""
    images: int = 5_000
    """Training images."""
    validation: int = 10_000
    """Validation images: the next ones of the training set."""
    width: int = 128
    """Hidden units of each layer."""
    epochs: int = 15
    """Passes over the training images in the short runs; the long ones have three times as many."""
    targets: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Targets of the hidden layers."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates; the grid of targets takes one or two of them."""
    heads: tuple[float, ...] = (0.2, 2.0)
    """Targets of the head, beside that of the hidden layers and none at all."""
    decays: tuple[float, ...] = (1.0, 3.0)
    """Decoupled weight decays of runs without norm scaling, beside none."""
    seeds: int = 5
    """Seeds of the best runs."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    width: int
    depth: int
    epochs: int
    lr: float
    norm: str = "none"
    hidden: float | str = "initial"
    """Target of every layer but the head: a number, or its initial norm."""
    head: float | str = "initial"
    """Target of the head: a number, its initial norm, or "free"."""
    decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """One model and length, and what is tried with it."""

    plain: Cell
    """Without norm scaling."""
    targets: tuple[float | str, ...]
    """Targets of the hidden layers; "initial" are those of the post's text."""
    heads: tuple[float | str, ...]
    """Treatments of the head: a target of its own, "same" as the hidden layers, or "free"."""
    grid_rates: tuple[float, ...]
    """Learning rates of the grid of targets."""
    rates: tuple[float, ...]
    """Learning rates of the baselines, and of the best targets."""
    seeds: int
    """Seeds of what is best."""

    def spectral(self, target: float | str, head: float | str, lr: float) -> Cell:
        return replace(self.plain, norm="spectral", hidden=target, head=target if head == "same" else head, lr=lr)


def settings(options: Options) -> dict[str, Setting]:
    """A model, a deeper one, and the first one trained for longer: where runs take longer, less is tried."""
    short = Cell(options.width, 3, options.epochs, options.rates[0])
    deep, long = replace(short, depth=5), replace(short, epochs=3 * options.epochs)
    rates, heads, targets = options.rates, options.heads, options.targets
    return {
        f"{one.plain.depth} layers of {options.width}, {one.plain.epochs} epochs": one
        for one in (
            Setting(short, ("initial", *targets), ("same", *heads, "free"), rates[:3:2], rates, options.seeds),
            Setting(deep, ("initial", *targets), ("same", *heads[:1], "free"), rates[2:3], rates, options.seeds),
            Setting(long, targets[:3], ("same", "free"), rates[:2], rates[:2], 1),
        )
    }


def grid(setting: Setting, options: Options) -> Iterator[Cell]:
    """The runs with one seed of one model and length."""
    plain = setting.plain
    yield from (replace(plain, lr=lr, decay=decay) for lr in setting.rates for decay in (0.0, *options.decays))
    yield from (replace(plain, lr=lr, norm="frobenius") for lr in setting.rates)
    for lr in setting.grid_rates:
        for target in setting.targets:
            heads = ("same", "free") if target == "initial" else setting.heads
            yield from (setting.spectral(target, head, lr) for head in heads)


def plan(options: Options, results: dict[Cell, Result]) -> Iterable[Cell]:
    """The grid of a setting, then the other rates for its best spectral targets, then more seeds for each side.

    Settings follow one another, so that a run that is stopped leaves whole ones.
    """
    cells: list[Cell] = []
    for setting in settings(options).values():
        own = list(grid(setting, options))
        if results.keys() >= set(own):
            best = [best for best in sides(results, own).values() if best.norm == "spectral"]
            own += [replace(one, lr=lr) for one in best for lr in setting.rates]
            if results.keys() >= set(own):
                own += [replace(one, seed=k) for one in sides(results, own).values() for k in range(setting.seeds)]
        cells += own
        if not results.keys() >= set(own):
            break
    return dict.fromkeys(cells)


def sides(results: dict[Cell, Result], cells: Iterable[Cell]) -> dict[str, Cell]:
    """The best runs with seed 0: of each norm, and of the spectral norm with the head held and with a free head."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.seed == 0:
            groups.setdefault(cell.norm + (", head free" if cell.head == "free" else ""), []).append(cell)
    return {name: max(own, key=lambda cell: results[cell]["validation accuracy"]) for name, own in groups.items()}


def train(options: Options, cell: Cell) -> Result:
    """Train one MLP: losses, accuracies in percent and the spread of the logits by split, and the spectral norms."""
    torch.manual_seed(cell.seed)
    data, validation = load(options)
    preprocessing = Preprocessing(data, CPU, torch.contiguous_format)
    images, labels, _ = data.train.tensors
    model = build_model(Config(depth=cell.depth, width=cell.width), data.image_shape, data.num_classes)
    orthogonal_init_(model)
    optimizer = torch.optim.AdamW(model.parameters(), cell.lr, weight_decay=cell.decay, fused=True)
    milestones = [max(1, round(fraction * cell.epochs)) for fraction in Config.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, Config.gamma)
    if cell.norm != "none":
        head, free = str(len(model) - 1), cell.head == "free"
        target = {"*": cell.hidden} if free else {head: cell.head, "*": cell.hidden}
        apply_norm_scaling(model, cell.norm, target=target, exclude=head if free else None).attach(optimizer)
    for _ in range(cell.epochs):
        mirrored = torch.rand(len(images), 1, 1, 1) < 0.5 * data.augment
        for batch in torch.randperm(len(images)).split(BATCH):
            inputs = torch.where(mirrored[batch], images[batch].flip(-1), images[batch])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(preprocessing.test(inputs)), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    norms = [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in model if isinstance(layer, nn.Linear)]
    results = {"norms": norms}
    for split, part in {"train": data.train, "validation": validation, "test": data.test}.items():
        images, labels, _ = part.tensors
        results |= {f"{split} {name}": value for name, value in evaluate(model, preprocessing.test(images), labels)}
    return results


@cache
def load(options: Options) -> tuple[Data, TensorDataset]:
    """The data set with images of at most 16 x 16 pixels, and what of its training images is for validation."""
    sizes = [options.images, options.validation]
    config = Config(data=options.data, data_root=options.data_root, limit_train=sum(sizes))
    data = load_data(config, Processes(0, 1, CPU))
    if len(data.train) != sum(sizes):
        raise ValueError(f"{len(data.train)} images for training and validation; give smaller numbers than {sizes}")
    train, validation = zip(*(tensor.split(sizes) for tensor in data.train.tensors), strict=True)
    data.train, validation, data.test = map(small, (train, validation, data.test.tensors))
    return data, validation


def small(split: tuple[Tensor, ...]) -> TensorDataset:
    """Images of 32 x 32 pixels at half that size."""
    images, *others = split
    if images.shape[-1] == 32:
        images = nn.functional.avg_pool2d(images.float(), 2).byte()
    return TensorDataset(images, *others)


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> Iterator[tuple[str, float]]:
    """Means: the loss, the accuracy, the deviation of an image's logits over the classes, and the inputs' norm."""
    logits = model(inputs)
    yield "loss", nn.functional.cross_entropy(logits, labels).item()
    yield "accuracy", 100 * (logits.argmax(1) == labels).float().mean().item()
    yield "logits", logits.std(1).mean().item()
    yield "input norm", inputs.flatten(1).norm(dim=1).mean().item()


def table(options: Options, results: dict[Cell, Result]) -> str:
    """What is best of each side, with its seeds, and then the test accuracy over the grid."""
    header = ["model and length", "norm", "target", "head", "rate", "decay", "test accuracy %"]
    means = ["test loss", "train loss", "test logits"]
    best, rows = [], []
    for name, setting in settings(options).items():
        for label, side in sides(results, of_setting(results, setting)).items():
            seeds = [results[replace(side, seed=k)] for k in range(setting.seeds)]
            accuracies = [result["test accuracy"] for result in seeds]
            targets = ["-", "-"] if side.norm == "none" else [target_text(side.hidden), target_text(side.head)]
            choice = [label, *targets, f"{side.lr:g}", f"{side.decay:g}", mean_and_deviation(accuracies, 2)]
            numbers = [f"{mean(result[key] for result in seeds):.2f}" for key in means]
            best.append([name, *choice, *numbers, f"{mean(prod(result['norms']) for result in seeds):.2g}"])
        for lr in setting.grid_rates:
            for head in setting.heads:
                cells = [setting.spectral(target, head, lr) for target in options.targets]
                row = [f"{results[cell]['test accuracy']:.1f}" if cell in results else "-" for cell in cells]
                rows.append([name, f"{lr:g}", target_text(head), *row])
    grid_header = ["model and length", "rate", "head", *(f"target {target:g}" for target in options.targets)]
    choices = markdown([*header, *means, "product of norms"], best)
    return f"{choices}\n{markdown(grid_header, rows)}"


def of_setting(results: dict[Cell, Result], setting: Setting) -> list[Cell]:
    """The runs of the same model and length."""
    plain = setting.plain
    size = (plain.width, plain.depth, plain.epochs)
    return [cell for cell in results if (cell.width, cell.depth, cell.epochs) == size]


def target_text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def draw(options: Options, results: dict[Cell, Result], path: Path) -> None:
    """Test accuracy by target above, and by the product of all norms below; a column for each grid of targets."""
    from lib.figures import COLORS, PALETTE, save
    from lib.figures import grid as panels

    columns = [
        (f"{name}\nAdam at {lr:g}", setting, lr)
        for name, setting in settings(options).items()
        for lr in setting.grid_rates
    ]
    figure, axes = panels(2, len(columns), (3.1, 3.2), sharex="row", sharey=True)
    styles = dict(zip(("same", "free", *options.heads), zip("o^sD", PALETTE[2:], strict=False), strict=False))
    for (upper, lower), (title, setting, lr) in zip(axes.T, columns, strict=True):
        for head in setting.heads:
            cells = {target: setting.spectral(target, head, lr) for target in options.targets}
            found = {target: results[cell] for target, cell in cells.items() if cell in results}
            marker, color = styles[head]
            style = {"marker": marker, "color": color, "ms": 5, "lw": 1.2}
            accuracies = [result["test accuracy"] for result in found.values()]
            label = {"same": "head: the same target", "free": "head: free"}.get(
                head, f"head: target {target_text(head)}"
            )
            upper.plot(list(found), accuracies, label=label, **style)
            lower.plot([prod(one["norms"]) for one in found.values()], accuracies, **style | {"ls": ""})
        plain = results[replace(setting.plain, lr=lr)]["test accuracy"]
        for axis in (upper, lower):
            axis.axhline(plain, color=COLORS["none"], ls="--", lw=1.2, label="none at this rate")
        for norm in ("none", "frobenius"):
            best = sides(results, of_setting(results, setting))[norm]
            for axis in (upper, lower):
                for seed in range(setting.seeds):
                    accuracy = results[replace(best, seed=seed)]["test accuracy"]
                    axis.axhline(
                        accuracy,
                        color=COLORS[norm],
                        lw=0.9,
                        alpha=0.7,
                        label=None if seed else f"{norm} at its best, each seed",
                    )
        upper.set(xscale="log", title=title, xlabel="spectral target of the hidden layers")
        upper.set_xticks(options.targets, [f"{target:g}" for target in options.targets])
        upper.minorticks_off()
        lower.set(xscale="log", xlabel="product of the norms of all layers")
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def study_of(options: Options) -> Study[Cell]:
    return Study("spectral_targets", Cell, *(partial(one, options) for one in (plan, train, table, draw)))


def main(options: Options) -> None:
    if options.data == "cifar100" and not (options.data_root / "cifar-100-python").is_dir():
        raise SystemExit(f"spectral_targets: {options.data_root} holds no cifar-100-python; give --data-root DIR")
    run_study(study_of(options), options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
