"""Benchmark the solvers: errors against the exact singular value (`solver`), and the time of a step (`step`).

Example: python recipes/benchmark.py solver --preset mlp-5x2000 --data-root data
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lib.clock import Clock, attach_timed
from lib.console import markdown, progress
from lib.datasets import Data, Preprocessing, load_data, random_data, train_loader
from lib.distributed import Processes
from lib.files import write_atomically
from lib.models import build_model, init_and_scale
from lib.post import POST_PRESETS
from lib.presets import PRESETS, Config
from lib.provenance import provenance
from specscale import SVD, Block, NormScaler, Power
from specscale.solvers import DenseMatrices

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam}


@dataclass(frozen=True)
class Options:
    """The options of both benchmarks."""

    preset: Literal[POST_PRESETS] = "mlp-5x2000"
    """Model and hyperparameters."""
    width: int | None = None
    """Hidden units in each layer, for an MLP that is to be smaller than that of its preset."""
    data_root: Path | None = None
    """Folder that contains cifar-100-python; without it, random images of the same shape."""
    batch_size: int = 512
    """Images per step."""
    lr: float = 1e-3
    """Learning rate."""
    optimizer: Literal[tuple(OPTIMIZERS)] = "adam"
    """Optimizer of the training steps."""
    steps: int = 200
    """Training steps."""
    seed: int = 0
    """Seed of the init and of the order of the images."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None is torch's default."""
    out: Path = Path("runs/benchmark")
    """Folder for the table, the JSON file and the figure."""

    def config(self) -> Config:
        config = PRESETS[self.preset]()
        root = config.data_root if self.data_root is None else self.data_root
        width = self.width or config.width
        return replace(config, batch_size=self.batch_size, seed=self.seed, data_root=root, width=width)


@dataclass(frozen=True)
class SolverOptions(Options):
    """Compare every solver with an exact SVD in float64, on the weights of one run under the default solver."""

    every: int = 10
    """Steps between two comparisons."""


@dataclass(frozen=True)
class StepOptions(Options):
    """Time a training step under each norm, one step of each in turn, against no scaling."""

    steps: int = 12
    """Timed steps of each condition, after two warm-up steps."""
    reference: bool = True
    """Also time the post's 500 iterations, which are slow."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_batches(options: Options) -> tuple[Data, Iterator[tuple[Tensor, Tensor]]]:
    """The data set, and an endless iterator over its preprocessed batches."""
    config, processes = options.config(), Processes(0, 1, device())
    data = random_data(10 * config.batch_size) if options.data_root is None else load_data(config, processes)
    preprocessing = Preprocessing(data, device(), torch.contiguous_format)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in count(1):
            preprocessing.draw_augmentation(config.seed, epoch)
            for images, labels, index in train_loader(data, config, 0, 1, epoch):
                yield preprocessing.train(images.to(device()), index.to(device())), labels.to(device())

    return data, batches()


def build(options: Options, data: Data, norm: str, **changes: Any) -> tuple[nn.Module, NormScaler | None]:
    """The model of the preset, under the norm constraint; `changes` replace fields of its configuration."""
    config = replace(options.config(), **changes)
    torch.manual_seed(config.seed)
    model = build_model(config, data.image_shape, data.num_classes)
    scaling = init_and_scale(config, norm, model, data.image_shape)
    return model.to(device()), scaling


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


class TorchSpectralNorm:
    """The estimate of `torch.nn.utils.parametrizations.spectral_norm`: one warm power iteration at every step."""

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
        layers = [nn.Linear(*reversed(shape), bias=False, dtype=dtype, device=key.device) for _ in key]
        return {"layers": [spectral_norm(layer) for layer in layers]}

    def value(self, matrices: Tensor, state: dict[str, Any]) -> tuple[Tensor, int]:
        estimates = []
        for matrix, layer in zip(matrices, state["layers"], strict=True):
            layer.parametrizations.weight.original.copy_(matrix)
            estimates.append(matrix.norm() / layer.weight.norm())
        return torch.stack(estimates), 1


TORCH, COLD_POWER = "torch spectral_norm", "power, 500 cold"
CANDIDATES: dict[str, Any] = {
    "block": Block(),
    "power, 1 warm": Power(1, warm=True),
    "power, 20 warm": Power(20, warm=True),
    COLD_POWER: Power(),
    TORCH: TorchSpectralNorm(),
    "svd": SVD(),
}
"""The solvers to compare, by their name in the results."""


def solve_(candidate: Any, matrices: Tensor, state: dict[str, Any]) -> tuple[Tensor, int]:
    """The largest singular values and the number of iterations; updates `state` in place."""
    if isinstance(candidate, TorchSpectralNorm):
        return candidate.value(matrices, state)
    ((triple, new_state),) = candidate.solve([DenseMatrices(matrices)], [state])
    state.update(new_state)
    return triple.value, triple.num_iterations


def weight_reads(candidate: Any, num_iterations: float) -> float | None:
    """How often a step reads W: once, and twice in each iteration. None for SVD and cold power iteration."""
    if isinstance(candidate, SVD) or candidate == Power():
        return None
    return 1 + 2 * num_iterations


class SolverErrors:
    """Runs every candidate on the weights of a model, and collects its errors and iterations."""

    def __init__(self, scaling: NormScaler, every: int) -> None:
        self.scaling, self.every = scaling, every
        self.step = 0
        self.states: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in CANDIDATES}
        self.errors: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        self.iterations: dict[str, list[tuple[int, int]]] = {name: [] for name in CANDIDATES}
        """The step and the number of iterations."""

    @torch.no_grad()
    def measure(self, *_: Any) -> None:
        """Run the candidates on the weights before they are scaled; every `every` steps, against an exact SVD."""
        self.step += 1
        compare = self.step % self.every == 0
        for weight in self.scaling.weights:
            matrices = weight.scaling.matrices(weight.parameter)
            exact = torch.linalg.svdvals(matrices.double())[..., 0] if compare else None
            for name, candidate in CANDIDATES.items():
                state = self.states[name].setdefault(weight.name, {})
                if not state:
                    key = torch.arange(len(matrices), device=matrices.device)
                    state.update(candidate.init_state(key, matrices.shape[1:], matrices.dtype))
                # A warm candidate must see every step.
                is_warm = not {"basis", "columns", "layers"}.isdisjoint(state)
                if compare or is_warm:
                    value, num_iterations = solve_(candidate, matrices, state)
                    # Exact solvers report no iterations.
                    if num_iterations:
                        self.iterations[name].append((self.step, num_iterations))
                if exact is not None:
                    self.errors[name] += (value.double() / exact - 1).abs().tolist()

    def table(self, num_steps: int) -> list[dict[str, Any]]:
        phases = ((0, 10), (10, num_steps // 2), (num_steps // 2, num_steps))
        rows = []
        for name, candidate in CANDIDATES.items():
            mean = statistics.mean([n for _, n in self.iterations[name]] or [0.0])
            by_phase = [
                statistics.mean([n for step, n in self.iterations[name] if first < step <= last] or [0])
                for first, last in phases
            ]
            rows.append(
                {
                    "solver": name,
                    "mean error": statistics.mean(self.errors[name]),
                    "max error": max(self.errors[name]),
                    "iterations": mean,
                    "iterations, first 10 / to half / rest": by_phase,
                    "reads of W": weight_reads(candidate, mean),
                }
            )
        return rows


def measure_solvers(options: SolverOptions) -> dict[str, Any]:
    """Relative errors of the first singular value, by candidate."""
    data, batches = load_batches(options)
    model, scaling = build(options, data, "spectral")
    assert scaling is not None
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=options.lr)
    solver_errors = SolverErrors(scaling, options.every)
    # Registered before the norm scaling, so that the candidates see the weights that it is about to scale.
    optimizer.register_step_post_hook(solver_errors.measure)
    scaling.attach(optimizer)
    worst = 0.0
    for _, batch in zip(progress(options.steps, "steps"), batches, strict=False):
        train_step(model, optimizer, batch)
        worst = max(worst, worst_target_error(scaling))
    return {"worst |u^T W' v / t - 1|": worst, "solvers": solver_errors.table(options.steps)}


@torch.no_grad()
def worst_target_error(scaling: NormScaler) -> float:
    """The largest relative distance of `u^T W' v` from the target, over the layers whose solver keeps a block."""
    worst = 0.0
    for weight in scaling.weights:
        state = weight.scaling.solver_state()
        if "basis" in state:
            matrices = weight.scaling.matrices(weight.parameter).double()
            matrices = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
            vector = state["basis"][..., :1].double()
            norm = (matrices @ (vector / vector.norm(dim=-2, keepdim=True))).norm(dim=(-2, -1))
            worst = max(worst, (norm / weight.scaling.target - 1).abs().max().item())
    return worst


class TimedCondition:
    """A model to time: under a norm constraint, or under torch's own spectral normalization."""

    def __init__(self, options: StepOptions, data: Data, name: str) -> None:
        norm = {TORCH: "none", COLD_POWER: "spectral"}.get(name, name)
        self.model, scaling = build(options, data, norm, solver="power" if name == COLD_POWER else "block")
        if name == TORCH:
            for module in self.model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    spectral_norm(module)
        self.optimizer = OPTIMIZERS[options.optimizer](self.model.parameters(), lr=options.lr)
        self.step_clock, self.scaling_clock = Clock(device()), Clock(device())
        if scaling is not None:
            attach_timed(scaling, self.optimizer, self.scaling_clock)

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        with self.step_clock.span():
            train_step(self.model, self.optimizer, batch)

    def take_ms(self) -> tuple[list[float], list[float]]:
        """The times of the steps and of the norm scaling in them, since the last call."""
        return self.step_clock.take_ms(), self.scaling_clock.take_ms()


def measure_steps(options: StepOptions) -> dict[str, Any]:
    """Median times of a training step and of its scaling, by condition, and their ratios to an unconstrained step."""
    data, batches = load_batches(options)
    names = [*Config.norms, TORCH] + [COLD_POWER] * options.reference
    conditions = {name: TimedCondition(options, data, name) for name in names}
    for number in progress(options.steps + 2, "rounds"):
        batch = next(batches)
        for name, condition in conditions.items():
            # These steps are slow: three timed ones must do.
            if name == COLD_POWER and number > 5:
                continue
            condition.step(batch)
            if number == 2:
                # The first two steps are the warm-up.
                condition.take_ms()
    times = {name: condition.take_ms() for name, condition in conditions.items()}
    plain_ms, _ = times["none"]

    def ratio(spans: list[float]) -> float:
        """The median ratio over the rounds: a busy machine slows down both times of a round."""
        return statistics.median([span / plain for span, plain in zip(spans, plain_ms, strict=False)] or [0.0])

    table = [
        {
            "condition": name,
            "ms / step": statistics.median(step_ms),
            "ms scaling": statistics.median(scaling_ms or [0.0]),
            "scaling / none": ratio(scaling_ms),
            "ratio to none": ratio(step_ms),
        }
        for name, (step_ms, scaling_ms) in times.items()
    ]
    return {"conditions": table}


def format_cell(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(f"{x:.2f}" for x in value)
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3f}"
    return "-" if value is None else str(value)


def draw_errors(axis: Axes, table: list[dict[str, Any]]) -> None:
    """The errors of each solver, mean to max, by what a step costs."""
    axis.set(xscale="log", yscale="log", xlabel="reads of W per step", ylabel="relative error of s, mean to max")
    axis.set(xlim=(2, 100), xticks=[2, 3, 5, 10, 20, 50, 100])
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    for index, row in enumerate(table):
        x, mean, largest = row["reads of W"], row["mean error"], row["max error"]
        if x is None:
            # Without a number of reads: a horizontal line.
            axis.axhline(largest, ls=":", color="grey")
            axis.annotate(f"{row['solver']}, max", (95, largest), fontsize="small", va="bottom", ha="right")
        else:
            axis.plot([x, x], [mean, largest], "-", color="#1b7fbd")
            axis.plot([x], [mean], "o", color="#1b7fbd")
            # Names alternate between the two ends: neighbours have similar errors, and would overlap.
            at, side = (largest, "bottom") if index % 2 == 0 else (mean, "top")
            axis.annotate(row["solver"], (x, at), (7, 0), textcoords="offset points", fontsize="small", va=side)


def draw_times(axis: Axes, table: list[dict[str, Any]]) -> None:
    """The time of a step under each condition, as a ratio to the unconstrained one."""
    axis.barh([row["condition"] for row in table], [row["ratio to none"] for row in table], color="#1b7fbd")
    for row in table:
        axis.annotate(f" {row['ratio to none']:.3f}", (row["ratio to none"], row["condition"]), va="center")
    axis.axvline(1, color="grey", lw=1)
    axis.set(xlabel="time of a step, ratio to none", xscale="log")


def main(options: SolverOptions | StepOptions) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if isinstance(options, SolverOptions):
        kind, results, draw = "solver", measure_solvers(options), draw_errors
        table = results["solvers"]
    else:
        kind, results, draw = "step", measure_steps(options), draw_times
        table = results["conditions"]
    model = options.preset if options.width is None else f"{options.preset}-width-{options.width}"
    name = f"{kind}-{model}-{options.optimizer}-{options.lr:g}"
    data = "noise" if options.data_root is None else "CIFAR-100"
    title = f"{model}, {data}, {options.optimizer} {options.lr:g}, batch {options.batch_size}"
    options.out.mkdir(parents=True, exist_ok=True)

    settings = {key: value for key, value in asdict(options).items() if key not in ("data_root", "out")}
    numbers = {"benchmark": kind, "data": data} | settings | provenance() | results
    write_atomically(options.out / f"{name}.json", json.dumps(numbers, indent=2))

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    draw(axis, table)
    axis.set_title(title, fontsize="medium")
    figure.savefig(options.out / f"{name}.png", dpi=130)
    plt.close(figure)

    text = markdown(list(table[0]), [[format_cell(value) for value in row.values()] for row in table])
    text += "".join(f"\n{key}: {value:.1e}\n" for key, value in results.items() if isinstance(value, float))
    write_atomically(options.out / f"{name}.md", f"# {title}\n\n{text}")
    print(f"{title}\n\n{text}\n{options.out}/{name}: .md, .json, .png", flush=True)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"solver": SolverOptions, "step": StepOptions}, description=__doc__))
