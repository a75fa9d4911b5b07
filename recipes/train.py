"""Train a model without norm scaling, with Frobenius and with spectral norm scaling, and compare the three.

Example: torchrun --standalone --nproc-per-node=2 recipes/train.py digits
"""

import json
import shlex
import shutil
import statistics
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import checkpoint
import torch
import tyro
from clock import Clock
from compare import compare
from data import Data, Prepare, load, test_loader, train_loader
from logs import WandbRun, append, as_json, on_terminal, read_lines, say, write_atomically
from models import CIFAR_RESNETS, build, is_known, left_alone, start
from presets import HOUSEKEEPING, PRESETS, Config, condition
from provenance import provenance
from ranks import Ranks, distribute, join, leave, share_statistics
from spectra import snapshot
from summaries import HEADER
from tables import markdown
from torch import nn
from tqdm import tqdm

from specscale import NormScaler, spectral_norms


def main(config: Config) -> None:
    ranks = join()
    refuse(config, ranks)
    data = load(config, ranks)
    for norm in config.norms:
        train(config, norm, data, ranks)
        ranks.wait()
    if ranks.leads and config.compare:
        folder = config.out / config.preset
        rows = compare(folder)
        wandb_run = WandbRun(config, folder, "comparison")
        wandb_run.log_comparison(folder, HEADER, rows)
        wandb_run.finish()
        say(f"\n{markdown(HEADER, rows)}\n{folder}/: comparison.md, results.json and the figures")
    leave()


def refuse(config: Config, ranks: Ranks) -> None:
    """Stop before anything is trained or deleted if the options cannot work; the leader says why, once."""
    problem = ranks.agree(find_problem(config, ranks.world) if ranks.leads else None)
    if problem:
        if ranks.leads:
            print(f"train: {problem}", file=sys.stderr, flush=True)
        leave()
        raise SystemExit(1)


def find_problem(config: Config, world: int) -> str | None:
    """What is wrong with the options, as a sentence that says what would work."""
    if config.epochs < 1:
        return f"--epochs must be at least 1, found {config.epochs}"
    if config.batch_size % world:
        return f"batch size {config.batch_size} does not divide over {world} processes"
    if not is_known(config.model):
        return f"unknown model {config.model!r}; choose mlp, {', '.join(CIFAR_RESNETS)}, or one of timm.list_models()"
    if config.resume and config.overwrite:
        return "--resume and --overwrite exclude each other"
    if config.data == "cifar100" and not config.download and not (config.data_root / "cifar-100-python").is_dir():
        return f"{config.data_root} holds no cifar-100-python; give --data-root DIR, or --download to fetch it there"
    for norm in config.norms:
        folder = run_folder(config, norm)
        if not folder.exists() or config.overwrite:
            continue
        if not config.resume:
            state = "a finished" if (folder / "summary.json").exists() else "an unfinished"
            return f"{folder} holds {state} run; --resume goes on, --overwrite trains again"
        begun = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
        for name, value in as_json(config).items():
            if name not in HOUSEKEEPING and begun.get(name, value) != value:
                return (
                    f"{folder} was begun with {name} = {begun[name]}, found {value}; --resume with the same options, "
                    "or give another --out"
                )
    return None


def run_folder(config: Config, norm: str) -> Path:
    return config.out / config.preset / f"{condition(norm, config.targets)}-seed{config.seed}"


def train(config: Config, norm: str, data: Data, ranks: Ranks) -> None:
    """One run: one condition, from its init or its checkpoint to its summary."""
    folder = run_folder(config, norm)
    if (folder / "summary.json").exists() and config.resume:
        return
    ranks.wait()
    if ranks.leads and config.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    torch.manual_seed(config.seed)
    model = build(config, data.shape, data.num_classes)
    scaling = start(config, norm, model, data.shape)
    model.to(ranks.device, memory_format=memory_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    # At least one epoch goes by at the initial rate.
    milestones = [max(1, round(fraction * config.epochs)) for fraction in config.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, config.gamma)
    step_clock, scaling_clock, iterations = Clock(ranks.device), Clock(ranks.device), Iterations(scaling)
    if scaling is not None:
        optimizer.register_step_post_hook(scaling_clock.start)
        scaling.attach(optimizer)
        optimizer.register_step_post_hook(scaling_clock.stop)
        optimizer.register_step_post_hook(iterations.count)

    done, run_id, history, snapshots = 0, uuid.uuid4().hex[:8], [], []
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if config.resume and (folder / "checkpoint.pt").exists():
        facts = checkpoint.load(folder / "checkpoint.pt", parts, ranks.device)
        done, run_id = facts["epoch"], facts["run_id"]
        # A line that was written after the checkpoint belongs to the epoch that is trained again.
        history = [line for line in read_lines(folder / "metrics.jsonl") if line["epoch"] <= done]
        snapshots = [line for line in read_lines(folder / "spectra.jsonl") if line["epoch"] <= done]
    ranks.wait()
    if ranks.leads:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"norm": norm, "processes": ranks.world, "device": str(ranks.device), "torch": torch.__version__}
        write_atomically(folder / "config.json", json.dumps(as_json(config) | facts, indent=2))
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
        write_atomically(folder / "spectra.jsonl", "".join(json.dumps(line) + "\n" for line in snapshots))
        wandb_run = WandbRun(config, folder, "train", condition(norm, config.targets), run_id)
        for line in history:
            wandb_run.log(line)

    parallel = distribute(model, ranks)
    prepare = Prepare(data, ranks.device, memory_format)
    looks = {round(fraction * config.epochs) for fraction in config.spectra}

    def look(epoch: int) -> None:
        if ranks.leads and epoch in looks and all(line["epoch"] != epoch for line in snapshots):
            line = {"epoch": epoch} | snapshot(model, data.shape, left_alone(model))
            snapshots.append(line)
            append(folder / "spectra.jsonl", line)
            wandb_run.log({key: value for key, value in line.items() if not isinstance(value, list)})

    look(0)
    for epoch in range(done + 1, config.epochs + 1):
        lr = optimizer.param_groups[0]["lr"]
        label = f"{norm} {epoch}/{config.epochs}"
        train_loss, train_accuracy = train_epoch(config, parallel, optimizer, prepare, ranks, epoch, step_clock, label)
        schedule.step()
        share_statistics(model, ranks)
        test_loss, test_accuracy = evaluate(config, model, prepare, ranks)
        if ranks.leads:
            norms = spectral_norms(model, exclude=left_alone(model))
            line = {
                "epoch": epoch,
                "train/loss": train_loss,
                "train/accuracy": train_accuracy,
                "test/loss": test_loss,
                "test/accuracy": test_accuracy,
                "lr": lr,
                **{f"spectral_norm/{name}": value for name, value in norms.items()},
                **{f"iterations/{name}": value for name, value in iterations.means().items()},
                "time/step_ms": step_clock.median_ms(),
                "time/scaling_ms": scaling_clock.median_ms(),
            }
            history.append(line)
            append(folder / "metrics.jsonl", line)
            wandb_run.log(line)
            look(epoch)
            checkpoint.save(folder / "checkpoint.pt", parts, epoch=epoch, run_id=run_id)
            say(
                f"{norm:>9}  epoch {epoch}/{config.epochs}  train {train_loss:.4f} {train_accuracy:.2%}  "
                f"test {test_loss:.4f} {test_accuracy:.2%}  {line['time/step_ms']:.1f} ms/step"
            )
    if ranks.leads:
        metrics = scaling.metrics() if scaling is not None else {}
        targets = {key.removeprefix("target/"): value for key, value in metrics.items() if key.startswith("target/")}
        times = {key: statistics.median(e[key] for e in history) for key in ("time/step_ms", "time/scaling_ms")}
        final = {key: value for key, value in history[-1].items() if not key.startswith("time/")}
        made_by = provenance() | {"processes": ranks.world, "command": shlex.join(sys.argv)}
        summary = final | {"targets": targets} | times | {"provenance": made_by}
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
        wandb_run.finish()


def train_epoch(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    prepare: Prepare,
    ranks: Ranks,
    epoch: int,
    clock: Clock,
    label: str,
) -> tuple[float, float]:
    """Loss and accuracy on the training images, while it learns from them."""
    # Whatever the model draws (dropout) is a function of seed, epoch and rank, so that a resumed run draws the same.
    torch.manual_seed((config.seed * 100_003 + epoch) * 10_007 + ranks.rank)
    prepare.draw(config.seed, epoch)
    model.train()
    tally = Tally(ranks)
    loader = train_loader(prepare.data, config, ranks.rank, ranks.world, epoch)
    for images, labels, index in tqdm(loader, label, leave=False, disable=not (ranks.leads and on_terminal())):
        with clock.span():
            images, labels, index = (tensor.to(ranks.device) for tensor in (images, labels, index))
            optimizer.zero_grad()
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.amp):
                output = model(prepare.train(images, index)).float()
                loss = nn.functional.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()
        tally.add(loss.detach() * len(labels), output, labels)
    return tally.means()


@torch.no_grad()
def evaluate(config: Config, model: nn.Module, prepare: Prepare, ranks: Ranks) -> tuple[float, float]:
    """Loss and accuracy on the test images."""
    model.eval()
    tally = Tally(ranks)
    for images, labels, _ in test_loader(prepare.data, config, ranks.rank, ranks.world):
        labels = labels.to(ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.amp):
            output = model(prepare.test(images.to(ranks.device))).float()
        tally.add(nn.functional.cross_entropy(output, labels, reduction="sum"), output, labels)
    return tally.means()


class Iterations:
    """How many iterations the solver takes a step, by layer; the host knows without asking the device."""

    def __init__(self, scaling: NormScaler | None) -> None:
        self.scaling = scaling
        self.steps = 0
        self.sums: Counter[str] = Counter()

    def count(self, *_: Any) -> None:
        self.steps += 1
        self.sums.update(self.scaling.num_iterations)

    def means(self) -> dict[str, float]:
        """Their means over the steps since the last call."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        self.steps = 0
        self.sums.clear()
        return means


class Tally:
    """Loss and accuracy over many batches and all ranks, summed on the device."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)

    def add(self, loss: torch.Tensor, output: torch.Tensor, labels: torch.Tensor) -> None:
        correct = (output.argmax(1) == labels).sum()
        self.sums += torch.stack([loss, correct, torch.full_like(correct, len(labels))])

    def means(self) -> tuple[float, float]:
        loss, correct, count = self.ranks.total(self.sums).tolist()
        return loss / count, correct / count


if __name__ == "__main__":
    presets: dict[str, Any] = {preset().preset: (preset.__doc__ or "", preset()) for preset in PRESETS}
    main(tyro.extras.overridable_config_cli(presets, description=__doc__))
