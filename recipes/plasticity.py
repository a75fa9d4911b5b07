"""Train one MLP on task after task with new random labels, and see which norms keep it able to learn.

Example: python recipes/plasticity.py --jobs 2

Every task gives the same images of digits new labels, so what was learnt in one is of no use in the next. A network
that keeps its plasticity fits the last task as well as the first. Every method has the same learning rates, and its own
strengths: the coefficient of a decay, or the target over the initial norm. The grid is run on a few tasks with one
seed. The best cell of each method is run on more tasks with other seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean, mean

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
CONSTRAINTS = {"Frobenius norm": "frobenius", "spectral norm": "spectral"}
STRENGTHS: dict[str, tuple[float, ...]] = {
    "nothing": (0.0,),
    "new network": (0.0,),
    "Frobenius norm": (1.0, 1.5, 2.0, 3.0),
    "weight decay": (0.1, 0.3, 1.0, 3.0),
    "L2": (1e-4, 1e-3, 1e-2),
    "spectral norm": (1.0, 2.0),
    "L2 to the init": (1e-4, 1e-3, 1e-2),
}
"""The methods, each with the strengths that it is tried with."""


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
        strength = f" x {self.strength:g}" if self.method in CONSTRAINTS else f" {self.strength:g}"
        return f"{self.method}{strength if self.strength else ''}, Adam {self.lr:g}"


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
    """The grid with seed 0; then the best cells with the seeds from 1 on."""
    grids = {
        method: [
            Cell(method, lr, strength, 0, options.grid_tasks, options.steps)
            for lr in options.rates
            for strength in strengths
        ]
        for method, strengths in STRENGTHS.items()
    }
    best: list[Cell] = []
    for method, grid in grids.items():
        yield from grid
        if all(cell in results for cell in grid):
            best.append(max(grid, key=lambda cell: last_tasks(results[cell])))
            if method == "new network":
                # The same rate without the new networks: how the network does at the rate that suits a single task.
                best.append(replace(best[-1], method="nothing"))
    for cell in dict.fromkeys(best):
        for seed in range(1, options.seeds + 1):
            yield replace(cell, seed=seed, tasks=options.tasks)


def last_tasks(result: Result) -> float:
    """The mean accuracy at the end of the last tasks."""
    return mean(result["accuracy"][-NUM_LAST:])


def build(seed: int) -> nn.Sequential:
    """An MLP of three linear layers with torch's own init."""
    torch.manual_seed(seed)
    hidden = nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def measure(cell: Cell) -> Result:
    """The accuracy at the end of every task, and what has become of the network after the last one."""
    pixels = torch.tensor(load_digits().data[:NUM_IMAGES], dtype=torch.float32)
    images = (pixels - pixels.mean(0)) / pixels.std()
    generator = torch.Generator().manual_seed(cell.seed)
    accuracies: list[float] = []
    for task in range(cell.tasks):
        if task == 0 or cell.method == "new network":
            model = build(1000 * cell.seed + task)
            # Listed before scaling, which changes the order of a model's parameters.
            parameters = list(model.parameters())
            initial = [parameter.detach().clone() for parameter in parameters]
            optimizer = optimize(model, cell)
        labels = torch.randint(10, (NUM_IMAGES,), generator=generator)
        for batch in batches(cell.steps, generator):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            if cell.method == "L2 to the init":
                # The gradient of half the coefficient times the squared distance to the init.
                for parameter, start in zip(parameters, initial, strict=True):
                    parameter.grad.add_(parameter.detach() - start, alpha=cell.strength)
            optimizer.step()
        with torch.no_grad():
            accuracies.append(round((model(images).argmax(1) == labels).double().mean().item(), 4))
    growth = [
        (now.norm() / start.norm()).item() for now, start in zip(parameters, initial, strict=True) if now.dim() > 1
    ]
    return {
        "accuracy": accuracies,
        "growth": float(f"{geometric_mean(growth):.4g}"),
        "dead units": round(dead_units(model, images), 4),
    }


def optimize(model: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    """Adam, with the decay or the constraint of the cell."""
    decoupled = cell.method == "weight decay"
    decay = cell.strength if cell.method in ("weight decay", "L2") else 0.0
    optimizer = torch.optim.Adam(
        model.parameters(), cell.lr, weight_decay=decay, decoupled_weight_decay=decoupled, fused=True
    )
    if cell.method in CONSTRAINTS:
        # The weights are so small that an exact SVD is the fastest solver.
        norm, target = CONSTRAINTS[cell.method], Relative(cell.strength)
        apply_norm_scaling(model, norm, target=target, solver="svd").attach(optimizer).project()
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


def best_at(results: dict[Cell, Result], method: str, lr: float) -> Cell:
    """The best cell of the grid at a learning rate."""
    cells = [cell for cell in results if (cell.method, cell.lr, cell.seed) == (method, lr, 0)]
    return max(cells, key=lambda cell: last_tasks(results[cell]))


def by_seed(results: dict[Cell, Result]) -> dict[str, list[Result]]:
    """The results of the chosen cells, one for each of their seeds."""
    chosen = {str(cell): cell for cell in results if cell.seed}
    return {name: [results[one] for one in results if one.seed and str(one) == name] for name in chosen}


def table(results: dict[Cell, Result]) -> str:
    """The chosen cells over their seeds, and the grid."""
    rows = []
    for name, runs in by_seed(results).items():
        last = [100 * last_tasks(run) for run in runs]
        first, average = (
            100 * mean(map(pick, runs)) for pick in (lambda r: r["accuracy"][0], lambda r: mean(r["accuracy"]))
        )
        spread = f"{mean(last):.1f} ({min(last):.1f} to {max(last):.1f})"
        growth, dead = mean(run["growth"] for run in runs), mean(run["dead units"] for run in runs)
        rows.append([name, f"{first:.1f}", f"{average:.1f}", spread, f"{growth:.2f}", f"{100 * dead:.0f}"])
    header = ["method", "first task", "all tasks", f"last {NUM_LAST} tasks", "norm / initial", "dead units (%)"]
    rates = sorted({cell.lr for cell in results})
    grid = []
    for method, strengths in STRENGTHS.items():
        best = [best_at(results, method, lr) for lr in rates]
        shown = [f"{100 * last_tasks(results[cell]):.1f}" for cell in best]
        if len(strengths) > 1:
            shown = [f"{text} ({cell.strength:g})" for text, cell in zip(shown, best, strict=True)]
        grid.append([method, *shown])
    return f"{markdown(header, rows)}\n{markdown(['Adam', *(f'{lr:g}' for lr in rates)], grid)}"


def draw(results: dict[Cell, Result], path: Path) -> None:
    """The accuracy by task of the chosen cells, with a band over their seeds; and that of the grid by learning rate."""
    from lib.figures import PALETTE, grid, save

    figure, (axes,) = grid(1, 2, (5.4, 4.6), sharey=True)
    colours = dict(zip(STRENGTHS, PALETTE, strict=False))
    for name, runs in by_seed(results).items():
        colour = next(colours[method] for method in sorted(STRENGTHS, key=len, reverse=True) if name.startswith(method))
        points = list(zip(*(run["accuracy"] for run in runs), strict=True))
        tasks = range(1, len(points) + 1)
        axes[0].plot(tasks, [100 * mean(values) for values in points], color=colour, label=name)
        low, high = ([100 * pick(values) for values in points] for pick in (min, max))
        axes[0].fill_between(tasks, low, high, color=colour, alpha=0.15, lw=0)
    for method, colour in colours.items():
        rates = sorted({cell.lr for cell in results})
        shares = [100 * last_tasks(results[best_at(results, method, lr)]) for lr in rates]
        axes[1].plot(rates, shares, "o-", color=colour, label=method)
    axes[0].set(xlabel="task", ylabel="accuracy at the end of the task (%)", ylim=(0, 102))
    axes[1].set(xlabel="learning rate of Adam", xscale="log")
    save(figure, path)


def main(options: Options) -> None:
    run_study(Study("plasticity", Cell, partial(plan, options), measure, table, draw), options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
