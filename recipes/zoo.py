"""Norm scaling on every architecture of timm, torchvision and transformers: applied, stepped, checked and taken off.

Example: python recipes/zoo.py --registries torchvision --max-params 3e7

Each architecture is a line of OUT/zoo.jsonl, and one that has its line is not done again. It is built with random
weights, put under scaling, and each weight gets a spike: a matrix of rank one and of 1.5 times its norm is added. A
spectral step must then end on the target exactly, since the second singular value cannot be above it (Weyl's
inequality), and so must a Frobenius step. Architectures that are too large for memory are read on the meta device:
their weights, shapes, and targets by rule.
"""

import gc
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from logs import append, progress, read_lines, say, write_atomically
from provenance import commit
from tables import markdown
from torch import Tensor, nn

from specscale import NormScaler, apply_norm_scaling
from specscale.bounds import spectral_bounds
from specscale.linalg import smaller_gram
from specscale.targets import resolve
from specscale.weights import Weight, find_weights

Registry = Literal["timm", "torchvision", "transformers"]

EXACT_SIDE = 2048
"""The longest shorter side of a matrix whose Gram matrix is decomposed, which takes a third of Lanczos' time."""


def architectures(registry: Registry) -> dict[str, Callable[[], nn.Module]]:
    """What builds each architecture of a registry, by name, with random weights."""
    if registry == "timm":
        import timm

        return {name: lambda name=name: timm.create_model(name, pretrained=False) for name in timm.list_models()}  # type: ignore[misc]
    if registry == "torchvision":
        import torchvision

        return {
            name: lambda name=name: torchvision.models.get_model(name, weights=None, **_no_backbone_weights(name))  # type: ignore[misc]
            for name in torchvision.models.list_models()
        }
    import transformers

    return {
        config.model_type: lambda config=config: transformers.AutoModel.from_config(config())  # type: ignore[misc]
        for config in transformers.MODEL_MAPPING
    }


def _no_backbone_weights(name: str) -> dict[str, None]:
    """Detection and segmentation models load their backbones' weights unless told otherwise."""
    import inspect

    import torchvision

    builder = torchvision.models.get_model_builder(name)
    return {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}


class Mismatch(Exception):
    """A weight whose norm is not what it must be, by name."""


class NotBuilt(Exception):
    """An architecture that its own package does not build, and why."""


def exact_norms(matrices: Tensor) -> Tensor:
    """The spectral norm of each of `matrices (k, m, n)`, in float64."""
    matrices = matrices.detach().double()
    if min(matrices.shape[-2:]) > EXACT_SIDE:
        return spectral_bounds(matrices, torch.arange(len(matrices)), tolerance=1e-3, miss=1e-6).lower
    return torch.linalg.eigvalsh(smaller_gram(matrices))[..., -1].clamp_min(0).sqrt()


def norms_of(scaling: NormScaler, weight_norms: Callable[[Tensor], Tensor]) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, targets and true norms of each weight, without the matrices that are left alone."""
    for weight in scaling.weights:
        held = weight.scaling.skip_mask == 0
        true = weight_norms(weight.scaling.view.matrices(weight.parameter))
        yield weight.name, weight.scaling.target[held].double(), true[held]


def worst(what: str, found: Iterable[tuple[str, Tensor, Tensor]], tolerance: float) -> float:
    """The largest relative distance from the target, to two digits.

    Raises:
        Mismatch: it is larger than `tolerance`; the message names the layer.
    """
    distances = {name: (true / target - 1).abs().max().item() for name, target, true in found}
    name = max(distances, key=lambda name: distances[name])
    if not distances[name] <= tolerance:
        raise Mismatch(f"{what}: {name} is {distances[name]:.1e} from its target")
    return float(f"{distances[name]:.1e}")


@torch.no_grad()
def spike_(scaling: NormScaler, seed: int) -> None:
    """Add to each matrix one of rank one and of 1.5 times its norm."""
    generator = torch.Generator().manual_seed(seed)
    for weight in scaling.weights:
        view, parameter = weight.scaling.view, weight.parameter
        matrices = view.matrices(parameter)
        left = torch.randn(matrices.shape[:2], generator=generator)
        right = torch.randn(matrices.shape[::2], generator=generator)
        size = 1.5 * weight.scaling.norm.cpu().float() / (left.norm(dim=1) * right.norm(dim=1))
        spike = (size[:, None] * left)[:, :, None] * right[:, None, :]
        view.write_(parameter, matrices + spike.to(matrices))


def check(model: nn.Module) -> dict[str, Any]:
    """Scale the model, disturb it, step, check every norm and take the scaling off, for both norms.

    Layers whose weights are computed, as by weight normalisation, are excluded, and named by type.

    Raises:
        Mismatch: a norm is off, or the model is not the plain one again.
    """
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    types = [type(module) for module in model.modules()]
    computed = {weight.module for weight in find_weights(model) if weight.is_computed}
    found: dict[str, Any] = {"computed": ", ".join(sorted({type(module).__name__ for module in computed}))}
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "spectral": exact_norms,
        "frobenius": lambda matrices: torch.linalg.matrix_norm(matrices.detach().double()),
    }
    for norm, weight_norms in norms.items():
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as skipped:
            warnings.simplefilter("always")
            scaling = apply_norm_scaling(model, norm, exclude=lambda _, module: module in computed)
        found[f"{norm} apply s"] = round(time.monotonic() - start, 2)
        found["weights"] = len(scaling.weights)
        found["matrices"] = sum(weight.scaling.view.count for weight in scaling.weights)
        found["with zeros"] = sum("holds a zero matrix" in str(one.message) for one in skipped)
        found[f"{norm} target error"] = worst(f"{norm} target", norms_of(scaling, weight_norms), 1e-4)
        spike_(scaling, seed=0)
        scaling.step()
        found[f"{norm} step error"] = worst(f"{norm} step", norms_of(scaling, weight_norms), 1e-3)
        with torch.no_grad():
            for weight in scaling.weights:
                weight.parameter.copy_(before[names[weight.parameter]])
        scaling.remove()
    after = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if list(after) != list(before) or not all(torch.equal(value, before[name]) for name, value in after.items()):
        raise Mismatch("the model's state is not the plain one's again")
    if {parameter: name for name, parameter in model.named_parameters()} != names:
        raise Mismatch("the model's parameters are not the plain one's again")
    if [type(module) for module in model.modules()] != types:
        raise Mismatch("the model's layers are not the plain one's again")
    return found


def read_on_meta(model: nn.Module) -> dict[str, Any]:
    """The weights of a model that holds no numbers: that each is found, has a shape, and a target by rule."""
    weights: list[Weight] = find_weights(model)
    targets = resolve("target", "channels", weights, model, None)
    if not weights or len(targets) != len(weights):
        raise Mismatch(f"{len(weights)} weights have {len(targets)} targets")
    return {"weights": len(weights), "matrices": sum(weight.view.count for weight in weights)}


def left_alone(model: nn.Module) -> list[str]:
    """Parameters of two axes or more that no rule names, embeddings apart, by the type of their layer."""
    scaled = {id(weight.parameter) for weight in find_weights(model)}
    return sorted(
        {
            f"{type(module).__name__}.{name}"
            for module in model.modules()
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag)
            for name, parameter in module.named_parameters(recurse=False)
            if sum(size > 1 for size in parameter.shape) > 1 and id(parameter) not in scaled
        }
    )


@dataclass(frozen=True)
class Options:
    """Every architecture of the registries, each as a line."""

    registries: tuple[Registry, ...] = ("timm", "torchvision", "transformers")
    """Whose architectures."""
    names: str = "*"
    """Shell pattern on the architectures' names."""
    max_params: float = 5e8
    """Larger ones are left for another run."""
    meta_above: float = 5e8
    """The parameters above which an architecture is read on the meta device alone."""
    max_memory: float = 10e9
    """Bytes; what asks for more fails, and is not killed."""
    retry: bool = False
    """Do again what failed or was not built."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None leaves torch's choice."""
    out: Path = Path("runs/zoo")
    """Folder for the lines and the table."""


def one(build: Callable[[], nn.Module], options: Options) -> dict[str, Any] | None:
    """What is found about one architecture; None if it is too large for this run."""
    model = on_meta(build) or for_real(build)
    params = sum(parameter.numel() for parameter in model.parameters())
    is_large = params > options.meta_above
    if params > options.max_params and not is_large:
        return None
    facts = {"family": type(model).__module__.rpartition(".")[2], "params": params, "on meta": is_large}
    facts["left alone"] = left_alone(model)
    if is_large:
        return facts | read_on_meta(model)
    torch.manual_seed(0)
    return facts | check(for_real(build))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module | None:
    """The model without its numbers; None where it looks at them while it is built."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:
        return None


def for_real(build: Callable[[], nn.Module]) -> nn.Module:
    """The model.

    Raises:
        NotBuilt: what building it raises.
    """
    try:
        return build()
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error


def reason(text: str) -> str:
    """An error's text in one short line."""
    return " ".join(text.split())[:300]


def sweep(options: Options) -> list[dict[str, Any]]:
    """The lines of all architectures that are done."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "zoo.jsonl"
    lines = {(line["registry"], line["name"]): line for line in read_lines(path)}
    done = {key for key, line in lines.items() if not (options.retry and "weights" not in line)}
    builders = {
        (registry, name): build
        for registry in options.registries
        for name, build in architectures(registry).items()
        if fnmatch(name, options.names) and (registry, name) not in done
    }
    # Of the code that runs, whatever the files come to be while it does.
    made_by = commit()
    for _, (key, build) in zip(progress(len(builders), "architectures"), builders.items(), strict=True):
        registry, name = key
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = one(build, options)
        except NotBuilt as error:
            found = {"not built": reason(f"{error}")}
        except Exception as error:
            found = {"failed": reason(f"{type(error).__name__}: {error}")}
        if found is None:
            continue
        line = {"registry": registry, "name": name} | found
        line |= {"seconds": round(time.monotonic() - start, 1), "commit": made_by}
        lines[key] = line
        append(path, line)
        gc.collect()
    return list(lines.values())


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each registry, and every architecture that did not pass, with its reason."""
    by_registry: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_registry[line["registry"]].append(line)
    header = ["registry", "families", "architectures", "for real", "on meta", "failed", "not built"]
    header += ["weights", "matrices", "worst initial target", "worst step, spectral", "worst step, Frobenius"]
    rows = []
    for registry, own in by_registry.items():
        passed = [line for line in own if "weights" in line]
        real = [line for line in passed if not line["on meta"]]
        counts = [len({line["family"] for line in passed}), len(own), len(real), len(passed) - len(real)]
        counts += [sum(kind in line for line in own) for kind in ("failed", "not built")]
        counts += [sum(line[key] for line in passed) for key in ("weights", "matrices")]
        keys = ("spectral target error", "spectral step error", "frobenius step error")
        errors = [f"{max((line[key] for line in real), default=0):.1e}" for key in keys]
        rows.append([registry, *(f"{count:,}" for count in counts), *errors])
    text = markdown(header, rows)
    headings = {
        "failed": "Failed",
        "not built": "Not built",
        "computed": "Passed without layers whose weights are computed",
    }
    for kind, heading in headings.items():
        if named := [line for line in lines if line.get(kind)]:
            text += f"\n{heading}:\n\n"
            text += "".join(f"- {line['registry']}, `{line['name']}`: {line[kind]}\n" for line in named)
    return text


def main(options: Options) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    text = table(sweep(options))
    write_atomically(options.out / "zoo.md", text)
    say(f"{text}\n{options.out}: zoo.jsonl, zoo.md")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    resource.setrlimit(resource.RLIMIT_DATA, (int(chosen.max_memory), resource.RLIM_INFINITY))
    main(chosen)
