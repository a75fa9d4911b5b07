"""Train a small GPT on the source of Python's standard library, with other targets for attention than for the MLPs.

Example: python recipes/gpt.py --norm frobenius

One call holds the attention at its initial norms and the MLPs at half of theirs, and leaves the head alone. After every
step, `metrics()` tells the drift of each weight: its norm before the step put it back, over its target. The table has
its mean, and the figure all of it.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from lib.console import format_cell, markdown, progress
from lib.files import write_atomically
from lib.provenance import provenance
from lib.python_source import draw_sequences, held_out_loss, loss_of, standard_library
from lib.runs import per_layer
from lib.workloads import GPT, GPTSizes
from specscale import NormScaler, Relative, apply_norm_scaling
from specscale.constraints import CONSTRAINTS


@dataclass(frozen=True)
class Options:
    """The model, its targets, and how it is trained."""

    norm: str = "frobenius"
    """Norm to constrain."""
    mlp_factor: float = 0.5
    """Target of the MLPs' weights over their initial norms."""
    num_blocks: int = 3
    """Blocks of attention and MLP."""
    width: int = 64
    """Features of each token."""
    num_tokens: int = 64
    """Bytes of a sequence."""
    batch_size: int = 16
    """Sequences of a step."""
    steps: int = 300
    """Steps of Adam."""
    lr: float = 1e-3
    """Learning rate."""
    seed: int = 0
    """Seed of the init and of the sequences."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None is torch's default."""
    out: Path = Path("runs/gpt")
    """Folder for the table, the JSON file and the figure."""


def scale(model: GPT, options: Options) -> NormScaler:
    """Put attention and MLPs under norm scaling, in one call."""
    targets = {"*.mlp": Relative(options.mlp_factor), "*": "initial"}
    return apply_norm_scaling(model, options.norm, target=targets, exclude="head")


def train(options: Options) -> dict[str, Any]:
    """Train, and return the losses, and by layer the initial norm, the target, and the drift of every step."""
    torch.manual_seed(options.seed)
    sizes = GPTSizes(options.num_blocks, options.width, max(1, options.width // 16), options.num_tokens, 256)
    model = GPT(sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    scaling = scale(model, options)
    initial = per_layer(scaling.metrics(), "norm")
    # The MLPs start on their targets: else the drift of the first step would be that of the way there.
    scaling.project()
    scaling.attach(optimizer)
    train_tokens, test_tokens = standard_library()
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    drifts: dict[str, list[float]] = {name: [] for name in initial}
    for _ in progress(options.steps, "steps"):
        optimizer.zero_grad()
        loss = loss_of(model, draw_sequences(train_tokens, options.batch_size, options.num_tokens, generator))
        loss.backward()
        optimizer.step()
        losses.append(float(f"{loss.item():.6g}"))
        metrics = scaling.metrics()
        for name, drift in per_layer(metrics, "drift").items():
            drifts[name].append(float(f"{drift:.7g}"))
    target, norm = per_layer(metrics, "target"), per_layer(metrics, "norm")
    layers = {
        name: {"initial norm": initial[name], "target": target[name], "norm": norm[name], "drift": drifts[name]}
        for name in initial
    }
    test_loss = held_out_loss(model.eval(), test_tokens, options.batch_size, options.num_tokens)
    return {"test bits per byte": test_loss, "train bits per byte": losses, "layers": layers}


def table_of(results: dict[str, Any]) -> str:
    """A row for each weight, in Markdown."""
    header = ["layer", "initial norm", "target", "target / initial", "drift - 1, mean", "largest"]
    rows = []
    for name, layer in results["layers"].items():
        target, drift = layer["target"], [one - 1 for one in layer["drift"]]
        numbers = [layer["initial norm"], target, target / layer["initial norm"]]
        rows.append([name, *map(format_cell, [*numbers, statistics.mean(drift), max(drift)])])
    losses = results["train bits per byte"]
    return (
        f"{markdown(header, rows)}\nBits per byte: {losses[0]:.2f} before the first step, "
        f"{results['test bits per byte']:.2f} on the test's bytes after {len(losses)}.\n"
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """The drift of every weight by step: a panel for each kind of weight, and in it a line for each block."""
    from lib.figures import grid, save, shade

    layers = results["layers"]
    kinds = list(dict.fromkeys(name.split(".", 2)[2] for name in layers))
    figure, axes = grid(1, len(kinds), (3.2, 3.4), sharey=True)
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = [name for name in layers if name.split(".", 2)[2] == kind]
        for position, name in enumerate(own):
            drift = [100 * (one - 1) for one in layers[name]["drift"]]
            steps = range(1, len(drift) + 1)
            axis.plot(steps, drift, color=shade(position, len(own)), label=f"block {position}", lw=1.1)
        factor = layers[own[0]]["target"] / layers[own[0]]["initial norm"]
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set_title(f"{kind}: target {factor:g} x initial", fontsize="medium")
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("drift - 1 (%)")
    axes[0][-1].legend(frameon=False, fontsize="small")
    save(figure, path)


def main(options: Options) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if options.norm not in CONSTRAINTS:
        raise SystemExit(f"gpt: unknown norm {options.norm!r}; choose {', '.join(CONSTRAINTS)}")
    results = train(options)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(options).items() if name != "out"}
    write_atomically(options.out / "gpt.json", json.dumps(settings | provenance() | results, indent=1) + "\n")
    text = table_of(results)
    write_atomically(options.out / "gpt.md", text)
    draw(results, options.out / "gpt.png")
    print(f"{text}\n{options.out}/gpt: .md, .json, .png", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
