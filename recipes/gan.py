"""Train a Wasserstein critic on points in the plane under each constraint, and measure its weights after every step.

Example: python recipes/gan.py --widths 256 1024

A critic of a Wasserstein GAN must be 1-Lipschitz. With leaky ReLUs between its layers it is, if no weight has a
spectral norm above 1. Every constraint gets this target, on a critic of its own with a generator of its own, all from
one init whose norms are 1. In every step the critics take turns on the same batch. After it, the norm of each
weight is computed in float64: a look.
"""

import copy
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lib.clock import Clock
from lib.console import format_cell, markdown, progress
from lib.files import write_atomically
from lib.provenance import provenance
from lib.step_times import TORCH
from specscale import Cap, NormScaler, apply_norm_scaling
from specscale.linalg import smaller_gram

LIMIT = 1.001
"""A norm above it counts as above the target."""
FLOOR = 1e-6
"""The smallest distance above 1 that the figure shows."""
CRITIC_STEPS = 5
"""Steps of the critic for each of the generator, as in the first Wasserstein GANs."""


def torch_spectral_norm(critic: nn.Module) -> None:
    """torch's parametrization: every forward divides the weight by an estimate of its norm."""
    for layer in critic:
        if isinstance(layer, nn.Linear):
            spectral_norm(layer)


def hold(norm: Any) -> Callable[[nn.Module], NormScaler]:
    """A constraint of this package, on target 1."""
    return lambda critic: apply_norm_scaling(critic, norm, target=1.0)


CONDITIONS: dict[str, Callable[[nn.Module], NormScaler | None]] = {
    "none": lambda critic: None,
    TORCH: torch_spectral_norm,
    **{norm: hold(norm) for norm in ("spectral", "normalize", "clipped")},
    "cap, exact": hold(Cap(exact=True)),
    "cap": hold("cap"),
}
"""What the critic is put under, by name. The times are relative to the first one."""


@dataclass(frozen=True)
class Options:
    """The critics, and how they are trained."""

    widths: tuple[int, ...] = (256, 1024)
    """Hidden units in each of the critic's three hidden layers."""
    steps: int = 200
    """Steps of the critic."""
    batch_size: int = 256
    """Real and as many generated points in a step."""
    lr: float = 2e-4
    """Learning rate of Adam, for critic and generator."""
    seed: int = 0
    """Seed of the inits and of the points."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None is torch's default."""
    out: Path = Path("runs/gan")
    """Folder for the table, the JSON file and the figure."""


def perceptron(*sizes: int) -> nn.Sequential:
    """Linear layers with leaky ReLUs between them."""
    layers = [part for shape in itertools.pairwise(sizes) for part in (nn.Linear(*shape), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def spectral_norm_in_float64(weight: Tensor) -> float:
    """From the eigenvalues of the smaller Gram matrix: right to 1e-15, in half the time of an SVD."""
    return torch.linalg.eigvalsh(smaller_gram(weight))[-1].sqrt().item()


@torch.no_grad()
def start_on_target_(critic: nn.Module) -> None:
    """Divide each weight by its spectral norm, so that no constraint has a long way to go first."""
    for layer in critic:
        if isinstance(layer, nn.Linear):
            layer.weight.div_(spectral_norm_in_float64(layer.weight))


def eight_gaussians(count: int, generator: torch.Generator) -> Tensor:
    """Points `(count, 2)` around eight centers on a circle of radius 2."""
    device = generator.device
    angles = torch.randint(8, (count,), generator=generator, device=device) * (math.pi / 4)
    centers = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centers + 0.05 * torch.randn(count, 2, generator=generator, device=device)


@dataclass
class Player:
    """A critic under one constraint, and the generator that it trains."""

    name: str
    critic: nn.Sequential
    generator: nn.Sequential
    lr: float
    clock: Clock
    norms: list[list[float]] = field(default_factory=list)
    """The spectral norm of each weight, by step."""

    def __post_init__(self) -> None:
        self.critic, self.generator = copy.deepcopy(self.critic), copy.deepcopy(self.generator)
        scaling = CONDITIONS[self.name](self.critic)
        players = (self.critic, self.generator)
        self.optimizers = [torch.optim.Adam(one.parameters(), lr=self.lr, betas=(0.0, 0.9)) for one in players]
        if scaling is not None:
            scaling.attach(self.optimizers[0])

    def step_critic(self, real: Tensor, noise: Tensor) -> None:
        with torch.no_grad():
            fake = self.generator(noise)
        with self.clock.span():
            self.optimizers[0].zero_grad()
            of_real, of_fake = self.critic(torch.cat([real, fake])).chunk(2)
            (of_fake.mean() - of_real.mean()).backward()
            self.optimizers[0].step()

    def step_generator(self, noise: Tensor) -> None:
        self.optimizers[1].zero_grad()
        (-self.critic(self.generator(noise)).mean()).backward()
        self.optimizers[1].step()

    @torch.no_grad()
    def look(self) -> None:
        """Keep the norms of the weights as the next step will use them.

        Reading the weight of torch's parametrization takes an iteration and moves its vectors, as a step does: so a
        copy is read.
        """
        weights = [layer.weight for layer in copy.deepcopy(self.critic) if isinstance(layer, nn.Linear)]
        self.norms.append([spectral_norm_in_float64(weight) for weight in weights])


def play(options: Options, width: int, device: torch.device) -> list[Player]:
    """Train critics of one width under every constraint, in turns."""
    torch.manual_seed(options.seed)
    critic, generator = perceptron(2, width, width, width, 1).to(device), perceptron(2, 128, 128, 2).to(device)
    start_on_target_(critic)
    players = [Player(name, critic, generator, options.lr, Clock(device)) for name in CONDITIONS]
    for step, (real, noise) in zip(progress(options.steps, f"width {width}"), batches(options, device), strict=False):
        for player in players:
            player.step_critic(real, noise)
            player.look()
            if step % CRITIC_STEPS == 0:
                player.step_generator(noise)
    return players


def batches(options: Options, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless real points and noise."""
    source = torch.Generator(device).manual_seed(options.seed)
    while True:
        real = eight_gaussians(options.batch_size, source)
        yield real, torch.randn(options.batch_size, 2, generator=source, device=device)


def rows(width: int, players: list[Player]) -> list[dict[str, Any]]:
    """The numbers of one width, a row for each constraint."""
    times = {player.name: player.clock.take_ms() for player in players}
    base = times[players[0].name]
    return [
        {
            "width": width,
            "critic": player.name,
            "looks": sum(map(len, player.norms)),
            f"above {LIMIT}": sum(norm > LIMIT for norms in player.norms for norm in norms),
            "worst norm": max(map(max, player.norms)),
            "worst product of norms": max(map(math.prod, player.norms)),
            "ms / step": statistics.median(times[player.name]),
            # Within a step: a busy machine slows down both times of it.
            "ratio to none": statistics.median(a / b for a, b in zip(times[player.name], base, strict=True)),
        }
        for player in players
    ]


def draw(norms: dict[int, dict[str, list[float]]], path: Path) -> None:
    """How far the largest norm of any weight is above 1 after each step, by constraint, a panel for each width.

    What is less than float32's rounding above 1, or below it, is drawn at the bottom.
    """
    from lib.figures import grid, save

    figure, axes = grid(1, len(norms), (4.6, 3.8), sharey=True)
    for axis, (width, by_name) in zip(axes[0], norms.items(), strict=True):
        for name, values in by_name.items():
            if name != "none":
                above = [max(value - 1, FLOOR) for value in values]
                axis.plot(range(1, len(values) + 1), above, label=name, lw=1.2)
        axis.axhline(LIMIT - 1, color="black", lw=0.8, ls=":")
        axis.set(title=f"width {width}", xlabel="step of the critic", yscale="log")
    axes[0][0].set_ylabel("largest spectral norm - 1")
    axes[0][0].set_ylim(bottom=FLOOR / 1.5)
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    save(figure, path)


def main(options: Options) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if options.steps < 1 or not options.widths or min(options.widths) < 1:
        sys.exit(f"gan: --steps and --widths must be at least 1, found {options.steps} and {options.widths}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table: list[dict[str, Any]] = []
    norms: dict[int, dict[str, list[float]]] = {}
    for width in options.widths:
        players = play(options, width, device)
        table += rows(width, players)
        norms[width] = {player.name: [float(f"{max(step):.9g}") for step in player.norms] for player in players}
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    numbers = settings | provenance() | {"critics": table, "largest norm by step": norms}
    write_atomically(options.out / "gan.json", json.dumps(numbers, indent=1) + "\n")
    text = table_of(table)
    write_atomically(options.out / "gan.md", text)
    draw(norms, options.out / "gan.png")
    print(f"{text}\n{options.out}/gan: .md, .json, .png", flush=True)


def table_of(table: list[dict[str, Any]]) -> str:
    """The rows in Markdown, the norms to four digits behind the point."""
    cells = [
        [f"{value:.4f}" if key.startswith("worst") else format_cell(value) for key, value in row.items()]
        for row in table
    ]
    return markdown(list(table[0]), cells)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
