"""Train one MLP on task after task with new random labels, and see which norms keep it able to learn.

Example: python recipes/plasticity.py --jobs 2

Every task gives the same images of digits new labels, so what was learned in one is of no use in the next. A network
that keeps its plasticity fits the last task as well as the first. Every method has the same learning rates, and its own
strengths: the coefficient of a decay, or the target over the initial norm. The grid is run on a few tasks with one
seed. The best cell of each method is run on more tasks with other seeds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lib.console import markdown
from lib.studies import Result, Study, StudyOptions, run_study
from specscale import Relative, apply_norm_scaling

NUM_IMAGES, BATCH_SIZE, WIDTH = 250, 50, 64
NUM_LAST = 5
"""The tasks at the end whose mean accuracy chooses the best cell."""


@dataclass(frozen=True)
class Method:
    """What is done to the network, and the strengths that it is tried with."""

    color: str
    """matplotlib's name of its color in the figure."""
    strengths: tuple[float, ...] = (0.0,)
    """Coefficients of the decay, or targets over the initial norm."""
    norm: str | None = None
    """Norm to constrain."""
    decay: bool = False
    """Adam's weight decay."""
    decoupled: bool = False
    """The decay is AdamW's, not part of the gradient."""
    decays_vectors: bool = True
    """The decay acts on biases and on layer norm's gains too."""
    layer_norm: bool = False
    """Normalize before each ReLU."""
    anew: bool = False
    """Every task has a new network."""

    @property
    def is_bare(self) -> bool:
        """Nothing acts on the weights."""
        return self.norm is None and not self.decay and not self.anew


FACTORS, COEFFICIENTS = (1.0, 1.5, 2.0, 3.0), (0.1, 0.3, 1.0, 3.0)
METHODS = {
    "nothing": Method("black"),
    "new network": Method("tab:orange", anew=True),
    "Frobenius norm": Method("tab:blue", FACTORS, norm="frobenius"),
    "spectral norm": Method("tab:red", (1.0, 2.0), norm="spectral"),
    "weight decay": Method("tab:green", COEFFICIENTS, decay=True, decoupled=True),
    "L2": Method("tab:purple", (1e-4, 1e-3, 1e-2), decay=True),
    "layer norm": Method("black", layer_norm=True),
    "layer norm, Frobenius norm": Method("tab:blue", FACTORS, norm="frobenius", layer_norm=True),
    "layer norm, weight decay": Method("tab:green", COEFFICIENTS, decay=True, decoupled=True, layer_norm=True),
    "layer norm, decay of matrices": Method(
        "tab:cyan", COEFFICIENTS, decay=True, decoupled=True, decays_vectors=False, layer_norm=True
    ),
}


@dataclass(frozen=True)
class Cell:
    """One network on all its tasks."""

    method: str
    lr: float
    strength: float
    """The coefficient of a decay, or the target over the initial norm."""
    seed: int
    """Seed of the init, the labels and the batches."""
    tasks: int
    steps: int

    def __str__(self) -> str:
        factor = f" x {self.strength:g}" if METHODS[self.method].norm else f" {self.strength:g}"
        return f"{self.method}{factor if self.strength else ''}, Adam {self.lr:g}"


@dataclass(frozen=True)
class Options(StudyOptions):
    """The cells, and where the results go."""

    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates of Adam."""
    steps: int = 100
    """Steps of a task."""
    grid_tasks: int = 20
    """Tasks of a cell of the grid."""
    tasks: int = 25
    """Tasks of the best cells."""
    seeds: int = 5
    """Seeds of the best cells."""


def plan(options: Options, results: dict[Cell, Result]) -> Iterator[Cell]:
    """The grid with seed 0; then each method's best cell, and bare networks at every rate, with the seeds from 1 on."""
    grids = {
        method: [
            Cell(method, lr, strength, 0, options.grid_tasks, options.steps)
            for lr in options.rates
            for strength in details.strengths
        ]
        for method, details in METHODS.items()
    }
    chosen: list[Cell] = []
    for method, grid in grids.items():
        yield from grid
        if all(cell in results for cell in grid):
            best = max(grid, key=lambda cell: last_tasks(results[cell]))
            # A bare network at every rate: the more tasks there are, the smaller is its best one.
            chosen += grid if METHODS[method].is_bare else [best]
    for cell in chosen:
        for seed in range(1, options.seeds + 1):
            yield replace(cell, seed=seed, tasks=options.tasks)


def last_tasks(result: Result) -> float:
    """The mean accuracy at the end of the last tasks."""
    return mean(result["accuracy"][-NUM_LAST:])


def build(seed: int, layer_norm: bool) -> nn.Sequential:
    """An MLP of three linear layers with torch's own init."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for num_inputs in (64, WIDTH):
        layers += [nn.Linear(num_inputs, WIDTH), *([nn.LayerNorm(WIDTH)] if layer_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def measure(cell: Cell) -> Result:
    """The accuracy at the end of every task, and what has become of the network after the last one."""
    pixels = torch.tensor(load_digits().data[:NUM_IMAGES], dtype=torch.float32)
    images = (pixels - pixels.mean(0)) / pixels.std()
    generator = torch.Generator().manual_seed(cell.seed)
    accuracies: list[float] = []
    for task in range(cell.tasks):
        if task == 0 or METHODS[cell.method].anew:
            model = build(1000 * cell.seed + task, METHODS[cell.method].layer_norm)
            # Listed before scaling, which changes the order of a model's parameters.
            parameters = list(model.parameters())
            initial = [parameter.detach().clone() for parameter in parameters]
            optimizer = optimize(model, cell)
        labels = torch.randint(10, (NUM_IMAGES,), generator=generator)
        for batch in batches(cell.steps, generator):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(round((model(images).argmax(1) == labels).double().mean().item(), 4))
    growth = [
        (now.norm() / start.norm()).item() for now, start in zip(parameters, initial, strict=True) if now.dim() > 1
    ]
    return {
        "accuracy": accuracies,
        # The geometric mean. It is zero where a decay has taken all of a weight.
        "growth": float(f"{math.prod(growth) ** (1 / len(growth)):.4g}"),
        "dead units": round(dead_units(model, images), 4),
    }


def optimize(model: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    """Adam, with the decay or the constraint of the cell."""
    method = METHODS[cell.method]
    parameters = list(model.parameters())
    decay = cell.strength if method.decay else 0.0
    groups = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": decay},
        {"params": [one for one in parameters if one.dim() == 1], "weight_decay": decay * method.decays_vectors},
    ]
    optimizer = torch.optim.Adam(groups, cell.lr, decoupled_weight_decay=method.decoupled, fused=True)
    if method.norm:
        # The weights are so small that an exact SVD is the fastest solver.
        scaling = apply_norm_scaling(model, method.norm, target=Relative(cell.strength), solver="svd")
        scaling.attach(optimizer).project()
    return optimizer


def batches(steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The indices of each step's images; every image once in an epoch."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(NUM_IMAGES, generator=generator)
        yield order[:BATCH_SIZE]
        order = order[BATCH_SIZE:]


@torch.no_grad()
def dead_units(model: nn.Sequential, images: Tensor) -> float:
    """The share of hidden units that are zero on every image."""
    outputs, dead = images, []
    for layer in model:
        outputs = layer(outputs)
        if isinstance(layer, nn.ReLU):
            dead.append((outputs == 0).all(0))
    return torch.cat(dead).double().mean().item()


def by_rate(results: dict[Cell, Result], method: str) -> dict[float, Cell]:
    """The best cell of a method's grid at each learning rate."""
    best: dict[float, Cell] = {}
    for cell in sorted(results, key=lambda cell: (cell.lr, last_tasks(results[cell]))):
        if cell.method == method and cell.seed == 0:
            best[cell.lr] = cell
    return best


def by_seed(results: dict[Cell, Result]) -> dict[Cell, list[Result]]:
    """The results of the chosen cells for each of their seeds, by the cell with seed 1."""
    chosen: dict[Cell, list[Result]] = {}
    for cell, result in results.items():
        if cell.seed:
            chosen.setdefault(replace(cell, seed=1), []).append(result)
    return chosen


def table(results: dict[Cell, Result]) -> str:
    """The chosen cells over their seeds, and the grid."""
    rows = []
    for cell, runs in by_seed(results).items():
        first, last = [100 * run["accuracy"][0] for run in runs], [100 * last_tasks(run) for run in runs]
        everything = [100 * mean(run["accuracy"]) for run in runs]
        spread = f"{mean(last):.1f} ({min(last):.1f} to {max(last):.1f})"
        growth, dead = mean(run["growth"] for run in runs), mean(100 * run["dead units"] for run in runs)
        rows.append(
            [str(cell), f"{mean(first):.1f}", f"{mean(everything):.1f}", spread, f"{growth:.2f}", f"{dead:.0f}"]
        )
    header = ["method", "first task", "all tasks", f"last {NUM_LAST} tasks", "norm / initial", "dead units (%)"]
    grid = []
    for method, details in METHODS.items():
        best = by_rate(results, method)
        shares = [f"{100 * last_tasks(results[cell]):.1f}" for cell in best.values()]
        if len(details.strengths) > 1:
            shares = [f"{share} ({cell.strength:g})" for share, cell in zip(shares, best.values(), strict=True)]
        grid.append([method, *shares])
    rates = [f"{lr:g}" for lr in by_rate(results, "nothing")]
    return f"{markdown(header, rows)}\n{markdown(['Adam', *rates], grid)}"


def draw(results: dict[Cell, Result], path: Path) -> None:
    """The accuracy by task of the chosen cells, with a band over their seeds; and that of the grid by learning rate."""
    from lib.figures import grid, save

    figure, rows = grid(2, 2, (4.6, 3.4), sharex="col", sharey=True)
    rates = sorted({cell.lr for cell in results})
    for axes, has_layer_norm in zip(rows, (False, True), strict=True):
        own = {name: method for name, method in METHODS.items() if method.layer_norm == has_layer_norm}
        for cell, runs in by_seed(results).items():
            if cell.method in own:
                color = own[cell.method].color
                style = (":", "-.", "--", "-")[rates.index(cell.lr) % 4] if own[cell.method].is_bare else "-"
                points = list(zip(*(run["accuracy"] for run in runs), strict=True))
                low, middle, high = ([100 * pick(values) for values in points] for pick in (min, mean, max))
                tasks = range(1, cell.tasks + 1)
                axes[0].plot(tasks, middle, color=color, linestyle=style, label=str(cell))
                axes[0].fill_between(tasks, low, high, color=color, alpha=0.15, lw=0)
        for name, method in own.items():
            best = by_rate(results, name)
            shares = [100 * last_tasks(results[cell]) for cell in best.values()]
            axes[1].plot(list(best), shares, "o-", color=method.color)
        title = "with layer norm" if has_layer_norm else "without layer norm"
        handles = axes[0].get_legend_handles_labels()
        axes[1].legend(*handles, title=title, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), alignment="left")
        axes[0].set(ylabel="accuracy (%)", xlim=(1, None), ylim=(0, 102))
    rows[0][0].set_title("at the end of each task")
    rows[0][1].set_title(f"mean of the last {NUM_LAST} tasks")
    rows[1][0].set_xlabel("task")
    rows[1][1].set(xlabel="learning rate of Adam", xscale="log", xticks=rates, xticklabels=[f"{lr:g}" for lr in rates])
    rows[1][1].minorticks_off()
    save(figure, path)


STUDY = Study("plasticity", Cell, partial(plan, Options()), measure, table, draw)


def main(options: Options) -> None:
    run_study(replace(STUDY, plan=partial(plan, options)), options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
