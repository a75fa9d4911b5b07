"""A small GPT on the source of Python's standard library: Adam with Frobenius scaling against AdamW.

Example: python recipes/language_model.py --jobs 2

Pilots, one seed each, ask what must be held, and at which norms. Then a grid of learning rates compares targets that
are held with weight decay, where AdamW starts from the same norms; at the best of each side there are more seeds. The
losses are bits per byte of held-out source: one half of it for what is chosen, the other half for what is reported.
"""

import itertools
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from lib.console import format_cell, markdown, mean_and_deviation
from lib.python_source import draw_sequences, held_out_loss, loss_of, standard_library
from lib.studies import Result, Study, StudyOptions, run_study
from lib.workloads import GPT, GPTSizes
from specscale import Relative, apply_norm_scaling
from specscale.schedules import Linear

SIZES = GPTSizes(num_blocks=2, width=64, num_heads=4, num_tokens=64, vocabulary=256)
BATCH_SIZE = 16
WARM_UP = 0.05
"""The share of the steps in which the learning rate rises; then it falls to zero on half a period of a cosine."""
DECAYS = (0.0, 0.1, 0.3, 1.0)
MARGIN = 0.15
"""A learning rate works if it ends within this many bits of the side's best: 0.1 nats."""

WITH_EMBEDDINGS = {"norm": {nn.Embedding: "rows", "*": "frobenius"}}
EVERYTHING = WITH_EMBEDDINGS | {"target": {nn.Embedding: 1.0, "head": Relative(2.0)}}
HELD: dict[str, dict[str, Any]] = {
    "all": {},
    "all but the head": {"exclude": "head"},
    "attention": {"include": ["*.qkv", "*.projection"]},
    "MLPs": {"include": "*.mlp"},
    "rows": {"exclude": "head", "norm": "rows"},
    "orthogonal init": {"exclude": "head", "init": "orthogonal", "gain": 1.0},
    "all, the head at 2": {"target": {"head": Relative(2.0)}},
    "embeddings": WITH_EMBEDDINGS | {"exclude": "head", "target": {nn.Embedding: 1.0}},
    "everything": EVERYTHING,
    "everything, rising to 2": EVERYTHING | {"schedule": 2.0},
    "everything, rising to 4": EVERYTHING | {"schedule": 4.0},
    "everything, each row": EVERYTHING | {"norm": {nn.Embedding: "rows", "*": "rows"}},
    "everything, head at 4": WITH_EMBEDDINGS | {"target": {nn.Embedding: 1.0, "head": Relative(4.0)}},
}
"""What is held, as options of `apply_norm_scaling`: "frobenius" where no norm is named, and at `Setting.factor` where
no target is. A schedule is the factor that all targets rise to on a straight line."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    held: str
    """Which weights are held: a key of `HELD`, or "nothing"."""
    factor: float = 1.0
    """Targets over initial norms, of weights that have no target of their own."""
    released: bool = False
    """Whether the weights only start on their targets, and are free from then on."""
    decay: float = 0.0
    """AdamW's weight decay, of matrices and embeddings."""
    lr: float = 1e-2
    seed: int = 0
    """Seed of the init and of the sequences."""
    steps: int = 500


@dataclass(frozen=True)
class Options(StudyOptions):
    """Where the study goes, and how large it is."""

    rates: tuple[float, ...] = (3e-3, 5.5e-3, 1e-2, 1.8e-2, 3e-2, 5.5e-2)
    """The grid's learning rates."""
    seeds: int = 5
    """Runs at the best of each side."""
    pilots: bool = True
    """Whether the pilots are run."""
    steps: int = 500
    """Steps of every run."""


SIDES = {
    "Frobenius": {
        "held": Cell("everything"),
        "held, rising to twice": Cell("everything, rising to 2"),
        "held, rising to 4 times": Cell("everything, rising to 4"),
        "held, each row": Cell("everything, each row"),
    },
    "AdamW": {f"AdamW, decay {decay:g}": Cell("everything", released=True, decay=decay) for decay in DECAYS},
}
"""The two sides of the grid; all start from the same norms."""

LOW, ONE, HIGH = (3e-3, 1e-2), (1e-2,), (1e-2, 3e-2)
PILOTS = (
    ("nothing", Cell("nothing"), (1e-3, *LOW, 3e-2, 1e-1)),
    ("all linear layers", Cell("all"), (*LOW, 3e-2)),
    ("all but the head", Cell("all but the head"), (1e-3, *LOW, 3e-2, 1e-1)),
    ("all but the head, at half", Cell("all but the head", 0.5), ONE),
    ("all but the head, at 4 times", Cell("all but the head", 4.0), LOW),
    ("all but the head, orthogonal init of gain 1", Cell("orthogonal init"), ONE),
    ("all but the head, each row", Cell("rows"), ONE),
    ("attention alone", Cell("attention"), LOW),
    ("MLPs alone", Cell("MLPs"), ONE),
    ("all linear layers, the head at twice", Cell("all, the head at 2"), HIGH),
    ("all but the head; embeddings' rows at 1", Cell("embeddings"), HIGH),
    ("the same at the start only", Cell("embeddings", released=True), LOW),
    ("everything: embeddings' rows at 1, the head at twice", Cell("everything"), (*LOW, 3e-2)),
    ("the same at the start only", Cell("everything", released=True), (*LOW, 3e-2)),
    ("everything, the blocks at half", Cell("everything", 0.5), ONE),
    ("everything, the blocks at twice", Cell("everything", 2.0), LOW[:1]),
    ("everything, the head at 4 times", Cell("everything, head at 4"), ONE),
)
"""What was tried first, and at which learning rates. Targets are the initial norms, or multiples of them."""


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of a step over its highest."""
    warm_up = WARM_UP * steps
    done = max(0.0, (step + 1 - warm_up) / (steps - warm_up))
    return min((step + 1) / warm_up, (1 + math.cos(math.pi * done)) / 2)


def measure(cell: Cell) -> Result:
    """Train; returns the losses, and the norm of each linear layer over its initial norm."""
    torch.manual_seed(cell.seed)
    model = GPT(SIZES)
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": matrices, "weight_decay": cell.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cell.lr, fused=True)  # Adam, without decay
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, cell.steps))
    layers = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    initial = {name: weight.norm().item() for name, weight in layers.items()}
    if cell.held != "nothing":
        hold(model, optimizer, cell)
    train, held_out = standard_library()
    validation, test = held_out.tensor_split(2)
    generator = torch.Generator().manual_seed(cell.seed)
    for _ in range(cell.steps):
        optimizer.zero_grad()
        loss_of(model, draw_sequences(train, BATCH_SIZE, SIZES.num_tokens, generator)).backward()
        optimizer.step()
        schedule.step()
    halves = {"validation": validation, "test": test}
    losses = {name: held_out_loss(model, tokens, BATCH_SIZE, SIZES.num_tokens) for name, tokens in halves.items()}
    norms = {name: round(weight.norm().item() / initial[name], 3) for name, weight in layers.items()}
    return losses | {"norms": norms, "python": platform.python_version()}


def hold(model: GPT, optimizer: torch.optim.Optimizer, cell: Cell) -> None:
    """Put the weights on their targets, and keep them there unless they are released."""
    options = {"norm": "frobenius", "target": {}} | HELD[cell.held]
    options["target"] = options["target"] | {"*": Relative(cell.factor)}
    if "schedule" in options:
        options["schedule"] = Linear(final=options["schedule"], steps=cell.steps)
    scaling = apply_norm_scaling(model, **options)
    scaling.project()
    if cell.released:
        scaling.remove()
    else:
        scaling.attach(optimizer)


def plan(results: dict[Cell, Result], options: Options) -> Iterable[Cell]:
    """The pilots, then the grid, then more seeds at the best of each side."""
    for _, setting, rates in PILOTS if options.pilots else ():
        yield from (replace(setting, lr=lr, steps=options.steps) for lr in rates)
    grids = [list(itertools.chain(*rows_of(side, options.rates, options.steps).values())) for side in SIDES.values()]
    yield from itertools.chain(*grids)
    for grid in grids:
        if all(cell in results for cell in grid):
            yield from (replace(best_of(grid, results), seed=seed) for seed in range(1, options.seeds))


def rows_of(side: dict[str, Cell], rates: Iterable[float], steps: int) -> dict[str, list[Cell]]:
    """The runs of each setting, by learning rate."""
    return {title: [replace(one, lr=lr, steps=steps) for lr in rates] for title, one in side.items()}


def best_of(cells: Iterable[Cell], results: dict[Cell, Result]) -> Cell:
    return min(cells, key=lambda cell: results[cell]["validation"])


def measured(side: dict[str, Cell], results: dict[Cell, Result]) -> tuple[dict[str, list[Cell]], list[Cell], Cell]:
    """The side's rows of the grid, the best run at each learning rate, and the best of all."""
    # The pilots have other learning rates too, but no decay.
    rates = sorted({cell.lr for cell in results if cell.decay})
    rows = rows_of(side, rates, steps_of(results))
    best_at = [best_of(column, results) for column in zip(*rows.values(), strict=True)]
    return rows, best_at, best_of(best_at, results)


def steps_of(results: dict[Cell, Result]) -> int:
    return next(iter(results)).steps


def losses_of(cells: Iterable[Cell], results: dict[Cell, Result]) -> dict[float, float]:
    """Test losses by learning rate."""
    return {cell.lr: results[cell]["test"] for cell in cells}


def seeds_of(first: Cell, results: dict[Cell, Result]) -> list[float]:
    """Test losses of a run with all its seeds."""
    return [result["test"] for cell, result in results.items() if replace(cell, seed=first.seed) == first]


def working_range(losses: dict[float, float]) -> tuple[float, float]:
    """The learning rates below and above the best one from which on the loss is more than `MARGIN` above its own.

    Between two rates, the loss is taken to be linear in the logarithm of the rate. The range ends with the grid.
    """
    rates = sorted(losses)
    place = rates.index(min(rates, key=lambda lr: losses[lr]))
    limit = losses[rates[place]] + MARGIN

    def last(way: list[float]) -> float:
        for inner, outer in itertools.pairwise(way):
            if losses[outer] > limit:
                return inner * (outer / inner) ** ((limit - losses[inner]) / (losses[outer] - losses[inner]))
        return way[-1]

    return last(rates[place::-1]), last(rates[place:])


def range_text(losses: dict[float, float]) -> str:
    low, high = working_range(losses)
    is_cut = low == min(losses) or high == max(losses)
    return f"{low:.4f} to {high:.4f}, {'at least ' if is_cut else ''}{high / low:.1f} times"


def table(results: dict[Cell, Result]) -> str:
    """The grid with the rates that work, the seeds at the best of each side, and the pilots."""
    grid_rows, best_rows = [], []
    for name, side in SIDES.items():
        rows, best_at, best = measured(side, results)
        for title, cells in (rows | {f"{name}, the best of these": best_at}).items():
            losses = losses_of(cells, results)
            grid_rows.append([title, *(f"{loss:.3f}" for loss in losses.values()), range_text(losses)])
        seeds = seeds_of(best, results)
        title = next(title for title, cells in rows.items() if best in cells)
        best_rows.append([title, f"{best.lr:g}", str(len(seeds)), mean_and_deviation(seeds, 3)])
    text = markdown(["test loss by learning rate", *map("{:g}".format, losses), "rates that work"], grid_rows)
    text += "\n" + markdown(["the best of its side", "learning rate", "seeds", "test loss"], best_rows)
    if has_pilots(results):
        text += "\n" + pilot_table(results)
    python = ", ".join(sorted({result["python"] for result in results.values()}))
    return f"{text}\nTest losses in bits per byte of the source of Python {python}, after {steps_of(results)} steps.\n"


def has_pilots(results: dict[Cell, Result]) -> bool:
    return any(cell.held == PILOTS[0][1].held for cell in results)


def pilot_table(results: dict[Cell, Result]) -> str:
    all_rates = sorted({lr for _, _, rates in PILOTS for lr in rates})
    rows = []
    for title, setting, rates in PILOTS:
        losses = losses_of(rows_of({title: setting}, rates, steps_of(results))[title], results)
        rows.append([title, *(format_cell(losses.get(lr)) for lr in all_rates)])
    return markdown(["pilots, by what is held: test loss", *map("{:g}".format, all_rates)], rows)


def draw(results: dict[Cell, Result], path: Path) -> None:
    """Test loss by learning rate, from the model's own init if the pilots were run, and from the norms of the grid."""
    from lib.figures import COLORS, Axes, grid, save

    figure, axes = grid(1, 1 + has_pilots(results), (5.2, 4.4), sharey=True)
    free, held, other = COLORS["none"], COLORS["frobenius"], COLORS["spectral"]
    rates: dict[Axes, list[float]] = {}
    if has_pilots(results):
        axis = axes[0][0]
        for (title, setting, own_rates), color in zip(PILOTS[:3], (free, other, held), strict=True):
            losses = losses_of(rows_of({title: setting}, own_rates, steps_of(results))[title], results)
            axis.plot(losses.keys(), losses.values(), "o-", color=color, ms=4, lw=2, label=f"{title} held")
        axis.set_title("from the model's own init")
        rates[axis] = list(PILOTS[0][2])
    axis = axes[0][-1]
    for (name, side), color, shift in zip(SIDES.items(), (held, free), (1.03, 0.97), strict=True):
        rows, best_at, best = measured(side, results)
        for cells in rows.values():
            losses = losses_of(cells, results)
            axis.plot(losses.keys(), losses.values(), color=color, lw=0.8, alpha=0.6)
        axis.lines[-1].set_label(f"{name}: {len(rows)} {'decays' if best.released else 'targets'}")
        losses = losses_of(best_at, results)
        axis.plot(losses.keys(), losses.values(), color=color, lw=2.6, label=f"{name}: the best of them")
        # Side by side, so that the seeds of both are seen.
        seeds = seeds_of(best, results)
        axis.plot([shift * best.lr] * len(seeds), seeds, "o", color=color, ms=4, mfc="white")
    axis.set_title("embeddings and head start larger")
    rates[axis] = list(losses)
    for axis, ticks in rates.items():
        axis.set(xscale="log", xlabel="learning rate")
        axis.set_xticks(ticks, map("{:g}".format, ticks))
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize="small", loc="upper left")
    axes[0][0].set_ylabel("test loss (bits per byte)")
    save(figure, path)


def study(options: Options) -> Study[Cell]:
    return Study("language-model", Cell, lambda results: plan(results, options), measure, table, draw)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    run_study(study(options), options)
