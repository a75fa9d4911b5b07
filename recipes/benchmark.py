"""Measure the solvers: how far from the exact singular value (`solver`), and at what price in time (`step`).

Example: python recipes/benchmark.py solver --preset mlp-5x2000 --data-root data
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import tyro
from clock import Clock
from data import Data, Prepare, load, synthetic, train_loader
from logs import progress, say, write_atomically
from models import build, start
from presets import PRESETS, Config
from provenance import provenance
from ranks import Ranks
from tables import markdown
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from specscale import SVD, Block, NormScaler, Power
from specscale.solvers import DenseMatrices

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam}


@dataclass(frozen=True)
class Options:
    """What both benchmarks share."""

    preset: Literal["mlp-5x2000", "mlp-7x4000", "resnet34", "resnet50"] = "mlp-5x2000"
    """Model and hyper-parameters."""
    width: int | None = None
    """Hidden units, where the preset is an MLP and its own are too many."""
    data_root: Path | None = None
    """Folder that holds cifar-100-python; without it, noise of the same shapes."""
    batch_size: int = 512
    """Images of a step."""
    lr: float = 1e-3
    """Learning rate."""
    optimizer: Literal["adam", "adamw", "nadam"] = "adam"
    """Optimizer that moves the weights."""
    steps: int = 200
    """Training steps."""
    seed: int = 0
    """Seed of the init and of the order of the images."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None leaves torch's choice."""
    out: Path = Path("runs/benchmark")
    """Folder for the table, the numbers and the figure."""

    def config(self) -> Config:
        (config,) = (preset() for preset in PRESETS if preset().preset == self.preset)
        root = config.data_root if self.data_root is None else self.data_root
        width = self.width or config.width
        return replace(config, batch_size=self.batch_size, seed=self.seed, data_root=root, width=width)


@dataclass(frozen=True)
class SolverOptions(Options):
    """Every solver beside the same training run, which the default solver steers, against an exact SVD in float64."""

    every: int = 10
    """Steps between two comparisons."""


@dataclass(frozen=True)
class StepOptions(Options):
    """Time of a training step under each condition, in turns, against no scaling."""

    steps: int = 12
    """Timed steps of each condition, after two that are not counted."""
    reference: bool = True
    """Also time the post's 500 iterations, which is slow."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images(options: Options) -> tuple[Data, Callable[[], Iterator[tuple[Tensor, Tensor]]]]:
    """The data set, and an endless stream of prepared batches."""
    config, ranks = options.config(), Ranks(0, 1, device())
    data = synthetic(10 * config.batch_size) if options.data_root is None else load(config, ranks)
    prepare = Prepare(data, ranks.device, torch.contiguous_format)

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            epoch += 1
            prepare.draw(config.seed, epoch)
            for image, label, index in train_loader(data, config, 0, 1, epoch):
                yield (
                    prepare.train(image.to(ranks.device), index.to(ranks.device)),
                    label.to(ranks.device),
                )

    return data, stream


def model_of(options: Options, data: Data, norm: str, **changes: Any) -> tuple[nn.Module, NormScaler | None]:
    config = replace(options.config(), **changes)
    torch.manual_seed(config.seed)
    model = build(config, data.shape, data.num_classes)
    scaling = start(config, norm, model, data.shape)
    return model.to(device()), scaling


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


class TorchSpectralNorm:
    """`torch.nn.utils.parametrizations.spectral_norm`: its estimate, by one warm power iteration a step."""

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        twins = [nn.Linear(*reversed(shape), bias=False, dtype=dtype, device=key.device) for _ in key]
        return {"twins": [spectral_norm(twin) for twin in twins]}

    def value(self, matrices: Tensor, state: dict[str, Any]) -> tuple[Tensor, int]:
        estimates = []
        for matrix, twin in zip(matrices, state["twins"], strict=True):
            twin.parametrizations.weight.original.copy_(matrix)
            estimates.append(matrix.norm() / twin.weight.norm())
        return torch.stack(estimates), 1


CANDIDATES: dict[str, Any] = {
    "block": Block(),
    "power, 1 warm": Power(1, warm=True),
    "power, 20 warm": Power(20, warm=True),
    "power, 500 cold": Power(),
    "torch spectral_norm": TorchSpectralNorm(),
    "svd": SVD(),
}


def value_of(candidate: Any, matrices: Tensor, state: dict[str, Any]) -> tuple[Tensor, int]:
    """The candidate's singular values and iterations; its state moves on."""
    if isinstance(candidate, TorchSpectralNorm):
        return candidate.value(matrices, state)
    triple, after = candidate.solve(DenseMatrices(matrices), state)
    state.update(after)
    return triple.value, triple.num_iterations


def reads(candidate: Any, num_iterations: float) -> float | None:
    """Passes over W of a step."""
    if isinstance(candidate, SVD) or candidate == Power():
        return None
    return 1 + 2 * num_iterations


def measure_solvers(options: SolverOptions) -> dict[str, Any]:
    """Relative errors of the first singular value, by candidate."""
    data, stream = images(options)
    model, scaling = model_of(options, data, "spectral")
    assert scaling is not None
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=options.lr)
    weights = {weight.name: weight for weight in scaling.weights}
    states: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in CANDIDATES}
    errors: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    iterations: dict[str, list[tuple[int, int]]] = {name: [] for name in CANDIDATES}
    count = 0

    @torch.no_grad()
    def before_scaling(*_: Any) -> None:
        compared = count % options.every == 0
        for layer, weight in weights.items():
            matrices = weight.scaling.matrices(weight.parameter)
            exact = torch.linalg.svdvals(matrices.double())[..., 0] if compared else None
            for name, candidate in CANDIDATES.items():
                state = states[name].setdefault(layer, {})
                if not state:
                    key = torch.arange(len(matrices), device=matrices.device)
                    state.update(candidate.init_state(key, matrices.shape[1:], matrices.dtype))
                remembers = not {"basis", "columns", "twins"}.isdisjoint(state)
                if compared or remembers:
                    value, taken = value_of(candidate, matrices, state)
                    # What is solved exactly takes none.
                    if taken:
                        iterations[name].append((count, taken))
                if exact is not None:
                    errors[name] += (value.double() / exact - 1).abs().tolist()

    optimizer.register_step_post_hook(before_scaling)
    scaling.attach(optimizer)
    held = 0.0
    for count, batch in zip(progress(options.steps, "steps"), stream(), strict=False):  # noqa: B007  the hook reads it
        train_step(model, optimizer, batch)
        held = max(held, worst_hold(scaling))
    table = []
    for name, candidate in CANDIDATES.items():
        taken = [n for _, n in iterations[name]]
        mean = statistics.mean(taken) if taken else 0.0
        phases = [
            statistics.mean([n for at, n in iterations[name] if low < at <= high] or [0])
            for low, high in ((0, 10), (10, options.steps // 2), (options.steps // 2, options.steps))
        ]
        table.append(
            {
                "solver": name,
                "mean error": statistics.mean(errors[name]),
                "max error": max(errors[name]),
                "iterations": mean,
                "iterations, first 10 / to half / rest": phases,
                "reads of W": reads(candidate, mean),
            }
        )
    return {"worst |u^T W' v / t - 1|": held, "solvers": table}


@torch.no_grad()
def worst_hold(scaling: NormScaler) -> float:
    """The worst relative distance of `u^T W' v` from the target, over the layers that keep a block."""
    worst = 0.0
    for weight in scaling.weights:
        state = weight.scaling.solver_state()
        if "basis" in state:
            matrices = weight.scaling.matrices(weight.parameter).double()
            matrices = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
            vector = state["basis"][..., :1].double()
            held = (matrices @ (vector / vector.norm(dim=-2, keepdim=True))).norm(dim=(-2, -1))
            worst = max(worst, (held / weight.scaling.target - 1).abs().max().item())
    return worst


def measure_steps(options: StepOptions) -> dict[str, Any]:
    """Median times of a training step and of its scaling, by condition, and their ratios to a plain step."""
    data, stream = images(options)
    conditions: dict[str, tuple[nn.Module, torch.optim.Optimizer, Clock, Clock]] = {}
    names = ["none", "frobenius", "spectral", "torch spectral_norm"] + ["power, 500 cold"] * options.reference
    for name in names:
        norm = {"torch spectral_norm": "none", "power, 500 cold": "spectral"}.get(name, name)
        solver = "power" if name == "power, 500 cold" else "block"
        model, scaling = model_of(options, data, norm, solver=solver)
        if name == "torch spectral_norm":
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    spectral_norm(module)
        optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=options.lr)
        whole, part = Clock(device()), Clock(device())
        if scaling is not None:
            optimizer.register_step_post_hook(part.start)
            scaling.attach(optimizer)
            optimizer.register_step_post_hook(part.stop)
        conditions[name] = model, optimizer, whole, part
    batches = stream()
    for count in progress(options.steps + 2, "rounds"):
        batch = next(batches)
        for name, (model, optimizer, whole, part) in conditions.items():
            if name == "power, 500 cold" and count > 5:
                continue
            with whole.span():
                train_step(model, optimizer, batch)
            if count == 2:
                whole.take_ms(), part.take_ms()
    times = {name: (whole.take_ms(), part.take_ms()) for name, (_, _, whole, part) in conditions.items()}
    none = times["none"][0]

    def ratio(spans: list[float]) -> float:
        """The median over the rounds: what slows the machine for a while slows both."""
        return statistics.median([mine / plain for mine, plain in zip(spans, none, strict=False)] or [0.0])

    table = [
        {
            "condition": name,
            "ms / step": statistics.median(step),
            "ms scaling": statistics.median(scaling or [0.0]),
            "scaling / none": ratio(scaling),
            "ratio to none": ratio(step),
        }
        for name, (step, scaling) in times.items()
    ]
    return {"conditions": table}


def cell(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(f"{x:.2f}" for x in value)
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3f}"
    return "-" if value is None else str(value)


def draw(kind: str, table: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    if kind == "solver":
        axis.set(xscale="log", yscale="log", xlabel="reads of W per step", ylabel="relative error of s, mean to max")
        axis.set(xlim=(2, 100), xticks=[2, 3, 5, 10, 20, 50, 100])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
        for index, row in enumerate(table):
            x, mean, largest = row["reads of W"], row["mean error"], row["max error"]
            if x is None:
                # Its price is not counted in reads: a line across.
                axis.axhline(largest, ls=":", color="grey")
                axis.annotate(f"{row['solver']}, max", (95, largest), fontsize="small", va="bottom", ha="right")
            else:
                axis.plot([x, x], [mean, largest], "-", color="#1b7fbd")
                axis.plot([x], [mean], "o", color="#1b7fbd")
                # Every other name stands at the other end: neighbours have about the same errors.
                at, side = (largest, "bottom") if index % 2 == 0 else (mean, "top")
                axis.annotate(row["solver"], (x, at), (7, 0), textcoords="offset points", fontsize="small", va=side)
    else:
        axis.barh([row["condition"] for row in table], [row["ratio to none"] for row in table], color="#1b7fbd")
        for row in table:
            axis.annotate(f" {row['ratio to none']:.3f}", (row["ratio to none"], row["condition"]), va="center")
        axis.axvline(1, color="grey", lw=1)
        axis.set(xlabel="time of a step, ratio to none", xscale="log")
    axis.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(options: SolverOptions | StepOptions) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if isinstance(options, SolverOptions):
        kind, found = "solver", measure_solvers(options)
        table = found["solvers"]
    else:
        kind, found = "step", measure_steps(options)
        table = found["conditions"]
    model = options.preset if options.width is None else f"{options.preset}-width-{options.width}"
    name = f"{kind}-{model}-{options.optimizer}-{options.lr:g}"
    options.out.mkdir(parents=True, exist_ok=True)
    data = "noise" if options.data_root is None else "CIFAR-100"
    said = {key: value for key, value in asdict(options).items() if key not in ("data_root", "out")}
    facts = {"benchmark": kind, "data": data} | said | provenance()
    write_atomically(options.out / f"{name}.json", json.dumps(facts | found, indent=2))
    title = f"{model}, {data}, {options.optimizer} {options.lr:g}, batch {options.batch_size}"
    draw(kind, table, title, options.out / f"{name}.png")
    text = markdown(list(table[0]), [[cell(value) for value in row.values()] for row in table])
    extra = "".join(f"\n{key}: {value:.1e}\n" for key, value in found.items() if isinstance(value, float))
    write_atomically(options.out / f"{name}.md", f"# {title}\n\n{text}{extra}")
    say(f"{title}\n\n{text}{extra}\n{options.out}/{name}: .md, .json, .png")


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"solver": SolverOptions, "step": StepOptions}, description=__doc__))
