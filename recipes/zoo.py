"""Apply norm scaling to every architecture of timm, torchvision and transformers, take a step, check it and remove it.

Example: python recipes/zoo.py --registries torchvision --max-params 3e7

Each architecture is one line of OUT/zoo.jsonl; those that have a line already are skipped. A model is built with random
weights and put under norm scaling. Then a spike is added to each weight: a matrix of rank one whose norm is 1.5 times
that of the weight. After it, a spectral step must end exactly on the target, because the second singular value cannot
be above it (Weyl's inequality), and so must a Frobenius step. Architectures that do not fit into memory are built on
the meta device: only their weights, shapes and targets by channels are checked.
"""

import gc
import inspect
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
from torch import Tensor, nn

from lib.console import markdown, progress
from lib.files import append_json_line, read_json_lines, write_atomically
from lib.provenance import commit
from specscale import NormScaler, apply_norm_scaling
from specscale.bounds import spectral_bounds
from specscale.linalg import smaller_gram
from specscale.targets import resolve_gains
from specscale.weights import Weight, find_weights

Builder = Callable[[], nn.Module]

EXACT_SIDE = 2048
"""The shorter side up to which the Gram matrix is decomposed, in a third of the time of Lanczos bounds."""


def timm_builders() -> dict[str, Builder]:
    import timm

    return {name: lambda name=name: timm.create_model(name, pretrained=False) for name in timm.list_models()}  # type: ignore[misc]


def torchvision_builders() -> dict[str, Builder]:
    import torchvision

    def build(name: str) -> nn.Module:
        # Detection and segmentation models download the weights of their backbones by default.
        parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in parameters else {}
        return torchvision.models.get_model(name, weights=None, **backbone)

    return {name: lambda name=name: build(name) for name in torchvision.models.list_models()}  # type: ignore[misc]


def transformers_builders() -> dict[str, Builder]:
    import transformers

    return {
        config.model_type: lambda config=config: transformers.AutoModel.from_config(config())  # type: ignore[misc]
        for config in transformers.MODEL_MAPPING
    }


REGISTRIES = {"timm": timm_builders, "torchvision": torchvision_builders, "transformers": transformers_builders}
"""For each registry, what returns a function for each of its architectures, which builds it with random weights."""


class Mismatch(Exception):
    """A check failed; the message names the weight."""


class NotBuilt(Exception):
    """The registry cannot build an architecture; the message is its error."""


def exact_norms(matrices: Tensor) -> Tensor:
    """The spectral norms `(k,)` of `matrices (k, m, n)`, in float64."""
    matrices = matrices.detach().double()
    if min(matrices.shape[-2:]) > EXACT_SIDE:
        return spectral_bounds(matrices, torch.arange(len(matrices)), tolerance=1e-3, miss=1e-6).lower
    return torch.linalg.eigvalsh(smaller_gram(matrices))[..., -1].clamp_min(0).sqrt()


def norms_of(scaling: NormScaler, weight_norms: Callable[[Tensor], Tensor]) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, target norms and exact norms of each weight; without the matrices that are skipped."""
    for weight in scaling.weights:
        is_scaled = weight.scaling.skip_mask == 0
        exact = weight_norms(weight.scaling.view.matrices(weight.parameter))
        yield weight.name, weight.scaling.target[is_scaled].double(), exact[is_scaled]


def worst_error(check: str, norms: Iterable[tuple[str, Tensor, Tensor]], tolerance: float) -> float:
    """The largest relative error of a norm against its target, to two digits.

    Raises:
        Mismatch: the error is larger than `tolerance`, or NaN.
    """
    errors = {name: (exact / target - 1).abs().max().item() for name, target, exact in norms}
    name = max(errors, key=lambda name: errors[name])
    if not errors[name] <= tolerance:
        raise Mismatch(f"{check}: {name} is {errors[name]:.1e} from its target")
    return float(f"{errors[name]:.1e}")


@torch.no_grad()
def spike_(scaling: NormScaler, seed: int) -> None:
    """Add to each matrix a random matrix of rank one, with 1.5 times its norm."""
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
    """Check both norms: apply the scaling, add a spike, take a step, compare every norm, and remove the scaling.

    Layers whose weights are computed, as by weight normalization, are excluded; the result names their types.

    Raises:
        Mismatch: a norm is off its target, or the model is changed after the removal.
    """
    original = {name: value.clone() for name, value in state_tensors(model).items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    types = [type(module) for module in model.modules()]
    computed = {weight.module for weight in find_weights(model) if weight.is_computed}
    results: dict[str, Any] = {"computed": ", ".join(sorted({type(module).__name__ for module in computed}))}
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "spectral": exact_norms,
        "frobenius": lambda matrices: torch.linalg.matrix_norm(matrices.detach().double()),
    }
    for norm, weight_norms in norms.items():
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaling = apply_norm_scaling(model, norm, exclude=lambda _, module: module in computed)
        results[f"{norm} apply s"] = round(time.monotonic() - start, 2)
        results["weights"] = len(scaling.weights)
        results["matrices"] = sum(weight.scaling.view.count for weight in scaling.weights)
        results["with zeros"] = sum("holds a zero matrix" in str(warning.message) for warning in caught)
        results[f"{norm} target error"] = worst_error(f"{norm} target", norms_of(scaling, weight_norms), 1e-4)
        spike_(scaling, seed=0)
        scaling.step()
        results[f"{norm} step error"] = worst_error(f"{norm} step", norms_of(scaling, weight_norms), 1e-3)
        with torch.no_grad():
            for weight in scaling.weights:
                weight.parameter.copy_(original[names[weight.parameter]])
        scaling.remove()
    state = state_tensors(model)
    if list(state) != list(original) or not all(torch.equal(value, original[name]) for name, value in state.items()):
        raise Mismatch("the model's state is not the plain one's again")
    if {parameter: name for name, parameter in model.named_parameters()} != names:
        raise Mismatch("the model's parameters are not the plain one's again")
    if [type(module) for module in model.modules()] != types:
        raise Mismatch("the model's layers are not the plain one's again")
    return results


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is not a tensor."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def check_on_meta(model: nn.Module) -> dict[str, Any]:
    """Check a model without values: every weight has a shape, and a target by its channels."""
    weights: list[Weight] = find_weights(model)
    targets = resolve_gains("channels", weights, model, None)
    if not weights or len(targets) != len(weights):
        raise Mismatch(f"{len(weights)} weights have {len(targets)} targets")
    return {"weights": len(weights), "matrices": sum(weight.view.count for weight in weights)}


def unscaled_parameters(model: nn.Module) -> list[str]:
    """The parameters with two axes or more that norm scaling does not cover, by layer type; without embeddings."""
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
    """Check every architecture of the registries."""

    registries: tuple[Literal[tuple(REGISTRIES)], ...] = tuple(REGISTRIES)
    """Registries to check."""
    names: str = "*"
    """Shell pattern for the names of the architectures."""
    max_params: float = 5e8
    """Skip larger architectures, for another run to check, unless they are above --meta-above."""
    meta_above: float = 5e8
    """Check architectures with more parameters on the meta device only."""
    max_memory: float = 10e9
    """Memory limit in bytes; an allocation above it fails, and the process is not killed."""
    retry: bool = False
    """Check again those that failed or were not built."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None is torch's default."""
    out: Path = Path("runs/zoo")
    """Folder for zoo.jsonl and the table."""


def check_architecture(build: Builder, options: Options) -> dict[str, Any] | None:
    """The results for one architecture; None if it is too large for this run."""
    model = build_on_meta(build) or build_with_weights(build)
    params = sum(parameter.numel() for parameter in model.parameters())
    is_large = params > options.meta_above
    if params > options.max_params and not is_large:
        return None
    results = {"family": type(model).__module__.rpartition(".")[2], "params": params, "on meta": is_large}
    results["left alone"] = unscaled_parameters(model)
    if is_large:
        return results | check_on_meta(model)
    torch.manual_seed(0)
    return results | check(build_with_weights(build))


def build_on_meta(build: Builder) -> nn.Module | None:
    """The model on the meta device; None if its constructor needs the values of its weights."""
    try:
        with torch.device("meta"):
            return build()
    except Exception:
        return None


def build_with_weights(build: Builder) -> nn.Module:
    """The model with random weights.

    Raises:
        NotBuilt: the constructor raises an error.
    """
    try:
        return build()
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {error}") from error


def one_line(text: str) -> str:
    """An error message as one short line."""
    return " ".join(text.split())[:300]


def check_all(options: Options) -> list[dict[str, Any]]:
    """Check what has no line yet, and append its lines to the file; returns all lines."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "zoo.jsonl"
    lines = {(line["registry"], line["name"]): line for line in read_json_lines(path)}
    done = {key for key, line in lines.items() if not (options.retry and "weights" not in line)}
    builders = {
        (registry, name): build
        for registry in options.registries
        for name, build in REGISTRIES[registry]().items()
        if fnmatch(name, options.names) and (registry, name) not in done
    }
    # Before the first check: the files may change while the checks run, the code that runs does not.
    commit_of_run = commit()
    for _, (key, build) in zip(progress(len(builders), "architectures"), builders.items(), strict=True):
        registry, name = key
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = check_architecture(build, options)
        except NotBuilt as error:
            results = {"not built": one_line(f"{error}")}
        except Exception as error:
            results = {"failed": one_line(f"{type(error).__name__}: {error}")}
        if results is None:
            continue
        line = {"registry": registry, "name": name} | results
        line |= {"seconds": round(time.monotonic() - start, 1), "commit": commit_of_run}
        lines[key] = line
        append_json_line(path, line)
        gc.collect()
    return list(lines.values())


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each registry, then the architectures that did not pass and those that passed in part, with reasons."""
    by_registry: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        by_registry[line["registry"]].append(line)
    header = ["registry", "families", "architectures", "for real", "on meta", "failed", "not built"]
    header += ["weights", "matrices", "worst initial target", "worst step, spectral", "worst step, Frobenius"]
    rows = []
    for registry, of_registry in by_registry.items():
        passed = [line for line in of_registry if "weights" in line]
        with_weights = [line for line in passed if not line["on meta"]]
        counts = [len({line["family"] for line in passed}), len(of_registry)]
        counts += [len(with_weights), len(passed) - len(with_weights)]
        counts += [sum(kind in line for line in of_registry) for kind in ("failed", "not built")]
        counts += [sum(line[key] for line in passed) for key in ("weights", "matrices")]
        keys = ("spectral target error", "spectral step error", "frobenius step error")
        errors = [f"{max((line[key] for line in with_weights), default=0):.1e}" for key in keys]
        rows.append([registry, *(f"{count:,}" for count in counts), *errors])
    text = markdown(header, rows)
    headings = {
        "failed": "Failed",
        "not built": "Not built",
        "computed": "Passed without layers whose weights are computed",
    }
    for kind, heading in headings.items():
        if listed := [line for line in lines if line.get(kind)]:
            text += f"\n{heading}:\n\n"
            text += "".join(f"- {line['registry']}, `{line['name']}`: {line[kind]}\n" for line in listed)
    return text


def main(options: Options) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    text = table(check_all(options))
    write_atomically(options.out / "zoo.md", text)
    print(f"{text}\n{options.out}: zoo.jsonl, zoo.md", flush=True)


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    resource.setrlimit(resource.RLIMIT_DATA, (int(options.max_memory), resource.RLIM_INFINITY))
    main(options)
