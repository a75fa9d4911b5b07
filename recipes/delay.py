"""When a network generalizes on modular addition, by the norm of its layers and by the scale of its logits.

Example: python recipes/delay.py --jobs 2

Every linear layer is held at `layers` times its initial Frobenius norm. That multiplies the logits by the cube of
`layers`, for three layers. A constant factor puts them at the cube of `logits` times their initial scale instead,
whatever the norm. Three series meet at the factor 1: of layers and logits, of the layers alone, of the logits alone.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

from lib.console import markdown
from lib.modular_addition import pair_mlp, pairs
from lib.studies import Result, Study, StudyOptions, run_study
from specscale import Relative, apply_norm_scaling

LR = 1e-2
"""The constant learning rate of Adam."""
BATCH_SIZE = 512
LOOK_EVERY = 25
"""Steps between two looks at the accuracy."""
LEARNED = 0.95
"""The accuracy from which on pairs count as learned."""
DECAYS = (0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Cell:
    """One run."""

    layers: float | None
    """The held norm of every linear layer over its initial norm; None: no norm is held."""
    logits: float
    """Cube root of the scale of the logits at the start, over their scale at the initial norms."""
    decay: float
    """AdamW's weight decay, of all parameters."""
    seed: int
    """Seed of the split, of the init and of the batches."""
    steps: int
    """The most steps that are taken."""


@dataclass(frozen=True)
class Options(StudyOptions):
    """Where the study goes, and how large it is."""

    factors: tuple[float, ...] = (0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    """Factors of the norms and of the cube root of the logits' scale."""
    seeds: int = 3
    """Runs of each pair of factors."""
    reference_seeds: int = 5
    """Runs at the initial norms, without scaling, and with the best weight decay."""
    steps: int = 2500
    """The most steps of a run; one that has learned both halves stops before."""


SERIES = {
    "norms f, logits f³": lambda factor: (factor, factor),
    "norms f, logits 1": lambda factor: (factor, 1.0),
    "norms 1, logits f³": lambda factor: (1.0, factor),
}
"""The factors of layers and logits by the factor f of a row of the table."""


def prepare(cell: Cell) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """The model, which ends in a constant factor of the logits, and its optimizer, which holds the norms."""
    torch.manual_seed(cell.seed)
    model = pair_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=cell.decay)
    if cell.layers is None:
        return model, optimizer
    # With the biases on their way, each activation is exactly a multiple of what it is at the initial norms.
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for depth, linear in enumerate(linears, 1):
            linear.bias *= cell.layers**depth
    scaling = apply_norm_scaling(model, "frobenius", target=Relative(cell.layers))
    scaling.project()
    scaling.attach(optimizer)
    return model.append(Factor((cell.logits / cell.layers) ** len(linears))), optimizer


class Factor(nn.Module):
    """A constant factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def measure(cell: Cell) -> Result:
    """Train; returns the steps after which training and test pairs were learned, or None, and the last accuracies."""
    train, test = pairs(cell.seed)
    model, optimizer = prepare(cell)
    generator = torch.Generator().manual_seed(cell.seed)
    learned: dict[str, int | None] = {"train": None, "test": None}
    for step in range(1, cell.steps + 1):
        batch = torch.randperm(len(train[0]), generator=generator)[:BATCH_SIZE]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
        optimizer.step()
        if step % LOOK_EVERY and step < cell.steps:
            continue
        accuracy = {"train": accuracy_on(model, *train), "test": accuracy_on(model, *test)}
        for split in learned:
            if learned[split] is None and accuracy[split] >= LEARNED:
                learned[split] = step
        if None not in learned.values():
            break
    return learned | {f"{split} accuracy": round(value, 4) for split, value in accuracy.items()}


@torch.no_grad()
def accuracy_on(model: nn.Module, inputs: torch.Tensor, sums: torch.Tensor) -> float:
    return (model(inputs).argmax(1) == sums).float().mean().item()


def plan(results: dict[Cell, Result], options: Options) -> Iterable[Cell]:
    """The three series; no scaling; each decay once, and the one under which test pairs were learned first again.

    The initial norms have as many seeds as what they are compared with.

    Factors under which the first seed has not even learned the training pairs are not tried with others.
    """
    for seed in range(options.seeds):
        for factor in options.factors:
            # The series share the factor 1.
            for layers, logits in dict.fromkeys(series(factor) for series in SERIES.values()):
                first = results.get(Cell(layers, logits, 0.0, 0, options.steps))
                if seed == 0 or (first and first["train"]):
                    yield Cell(layers, logits, 0.0, seed, options.steps)
    for seed in range(options.reference_seeds):
        yield Cell(1.0, 1.0, 0.0, seed, options.steps)
        yield Cell(None, 1.0, 0.0, seed, options.steps)
    grid = [Cell(None, 1.0, decay, 0, options.steps) for decay in DECAYS]
    yield from grid
    if all(cell in results for cell in grid):
        best = min(grid, key=lambda cell: steps_until(results[cell], "test")).decay
        yield from (Cell(None, 1.0, best, seed, options.steps) for seed in range(1, options.reference_seeds))


def steps_until(result: Result, split: str) -> float:
    """The steps until these pairs were learned, infinite if they were not."""
    return math.inf if result[split] is None else result[split]


def select(results: dict[Cell, Result], layers: float | None, logits: float = 1.0, decay: float = 0.0) -> list[Result]:
    """The results of all seeds."""
    wanted = (layers, logits, decay)
    return [result for cell, result in results.items() if (cell.layers, cell.logits, cell.decay) == wanted]


def factors_of(results: dict[Cell, Result]) -> list[float]:
    return sorted({max(cell.layers, cell.logits, key=lambda one: abs(one - 1)) for cell in results if cell.layers})


def steps_text(seeds: list[Result], split: str) -> str:
    """The median of the steps, or a dash, and how many of the seeds got there if not all did."""
    steps = [steps_until(result, split) for result in seeds]
    median, reached = statistics.median_low(steps), sum(map(math.isfinite, steps))
    share = "" if reached == len(steps) else f" ({reached} of {len(steps)})"
    return (f"{median:g}" if math.isfinite(median) else "-") + share


def table(results: dict[Cell, Result]) -> str:
    """Two tables: by factor, and of what holds no norm."""
    splits = ("train", "test")
    rows = []
    for factor in factors_of(results):
        seeds = [select(results, *series(factor)) for series in SERIES.values()]
        rows.append([f"{factor:g}", *(steps_text(own, split) for own in seeds for split in splits)])
    text = markdown(["f", *(f"{name}: {split}" for name in SERIES for split in splits)], rows)
    free = {cell.decay: select(results, None, decay=cell.decay) for cell in results if cell.layers is None}
    rows = [
        [f"{decay:g}", str(len(own)), *(steps_text(own, split) for split in splits)]
        for decay, own in sorted(free.items())
    ]
    return f"{text}\n{markdown(['weight decay, no scaling', 'seeds', *splits], rows)}"


def draw(results: dict[Cell, Result], path: Path) -> None:
    """Steps by factor, a panel for each split: medians as lines, seeds as points, at the top those that failed."""
    from lib.figures import PALETTE, grid, save

    figure, axes = grid(1, 2, (5, 4), sharey=True)
    factors, most = factors_of(results), max(cell.steps for cell in results)
    failed = 1.25 * most
    # The decay that more than one seed has is the best.
    seeds_of = {cell.decay: select(results, None, decay=cell.decay) for cell in results if cell.decay}
    best = max(seeds_of, key=lambda decay: len(seeds_of[decay]))
    for axis, split in zip(axes[0], ("train", "test"), strict=True):
        for shift, (name, series), color, marker in zip((-1, 0, 1), SERIES.items(), PALETTE[1:], "osD", strict=False):
            points = [[steps_until(one, split) for one in select(results, *series(factor))] for factor in factors]
            medians = [min(statistics.median_low(own), failed) for own in points]
            axis.plot(factors, medians, color=color, label=name)
            for factor, own in zip(factors, points, strict=True):
                axis.plot([factor] * len(own), own, marker, color=color, ms=4, alpha=0.6)
                if math.inf in own:
                    axis.plot(factor + 0.02 * shift, failed, "x", color=color, ms=6)
        decayed = statistics.median_low(steps_until(one, split) for one in seeds_of[best])
        axis.axhline(decayed, color=PALETTE[0], ls="--", lw=1, label=f"no scaling, weight decay {best:g}")
        axis.axhline(most, color="black", lw=0.8, ls=":")
        axis.set(yscale="log", ylim=(most / 15, 1.6 * most), xlabel="factor f")
        axis.set_title(f"until {LEARNED:.0%} of the {split}{'ing' if split == 'train' else ''} pairs are right")
    axes[0][0].set_ylabel("steps")
    ticks = [most * share for share in (0.1, 0.2, 0.4, 0.8, 1)]
    axes[0][0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0][0].minorticks_off()
    axes[0][0].text(1.0, failed, f"x: not within {most} steps", va="center")
    axes[0][0].legend(frameon=False, fontsize="small", loc="center right", bbox_to_anchor=(1, 0.62))
    save(figure, path)


def study(options: Options) -> Study[Cell]:
    return Study("delay", Cell, lambda results: plan(results, options), measure, table, draw)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    run_study(study(options), options)
