"""A look at the norms in a checkpoint file, by its names alone, or of a timm model."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from specscale.constraints import CONSTRAINTS
from specscale.errors import Refusal
from specscale.files import ENDINGS, children, count_of, inner_path, is_of_an_optimizer, read
from specscale.linalg import no_grad_full_precision
from specscale.saved_names import in_plain_order, parametrizations_in, plain_name, saved_scalings
from specscale.spectra import ModelNorms, WeightNorms, measure, norms_of, spectral_and_frobenius

_WEIGHT = re.compile(r"(?:.*\.)?(?:weight|kernel|\w+_weight|weight_(?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?)")
"""The names of weights: torch's own layers', and `kernel`."""


class Found(NamedTuple):
    """A model, or a state dict of a file."""

    title: str
    norms: ModelNorms
    note: str = ""
    """What the norms do not say."""

    def __str__(self) -> str:
        note = f"\n{self.note}" if self.note else ""
        return f"{self.title}: {count_of(self.norms.weights, 'weight')}\n{self.norms}{note}"


@no_grad_full_precision
def inspect(source: str, *, pretrained: bool = False, trust_pickle: bool = False) -> list[Found]:
    """The norms in a checkpoint file, of each state dict in it, or of the timm model of that name.

    Raises:
        Refusal: the file cannot be read or holds no weight; timm is missing or has no such model.
    """
    path = Path(source)
    if path.is_file() or source.endswith(ENDINGS):
        if pretrained:
            raise Refusal(f"--pretrained is for names of timm models, and {source!r} is a file")
        found = [_found(title or source, state) for title, state in _states(read(path, trust_pickle=trust_pickle), "")]
        if not found:
            raise Refusal(
                f"{source!r} holds no state dict with a weight: a floating-point tensor of two axes or more whose name "
                "ends in weight or kernel"
            )
        return found
    return [_of_timm(source, pretrained)]


def _of_timm(name: str, pretrained: bool) -> Found:
    try:
        import timm
    except ImportError as error:
        raise Refusal(
            f"there is no file {name!r}, and for the name of a model timm is needed: pip install timm"
        ) from error
    # A name with a source in front would be looked up on the network.
    if ":" in name or not timm.is_model(name):
        near = ", ".join(map(repr, difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3))) or "none"
        raise Refusal(f"{name!r} is neither a file nor a model of timm; the nearest names are {near}")
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # Whatever a download or a model raises.
        lines = str(error).strip().splitlines() or [""]
        raise Refusal(f"timm cannot make {name!r}: {type(error).__name__}: {lines[0]}") from error
    return Found(f"{name}, {'pretrained' if pretrained else 'not trained'}", measure(model))


def _states(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every state dict in a file's content that holds a weight, with its path."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if is_of_an_optimizer(value):
        return
    if isinstance(value, dict):
        tensors = {key: one for key, one in value.items() if isinstance(key, str) and isinstance(one, Tensor)}
        if any(_weights(tensors)):
            yield path, tensors
    for key, child in children(value):
        yield from _states(child, inner_path(path, value, key))


def _weights(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are weights, in the plain model's order; not of what a weight is computed from."""
    scaled = {one.parameter for one in saved_scalings(state)}
    of_others = {one.parameter for name in state for one in parametrizations_in(name)} - scaled
    return [
        name
        for name in in_plain_order(list(state), scaled & set(state))
        if _is_matrix(state[name]) and name not in of_others and _WEIGHT.fullmatch(plain_name(name))
    ]


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0 and not tensor.is_meta


def _found(title: str, state: Mapping[str, Tensor]) -> Found:
    """The norms of a state dict's weights."""
    scalings = {one.parameter: one.home for one in saved_scalings(state)}
    own = _weights(state)
    norms = [_saved_norms(name, state[name], _buffers(state, scalings.get(name))) for name in own]
    notes = ["A file has no layers: a weight is read as one matrix, its first axis by the others"]
    if scalings:
        notes = [f"{notes[0]}, unless it is scaled"]
    inside = {key for home in scalings.values() for key in state if key.startswith(home)}
    others = [name for name in state if _is_matrix(state[name]) and name not in own and name not in inside]
    if others:
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        notes.append(f"Not read, by their names: {count_of(others, 'tensor')} of two axes or more ({named})")
    return Found(title, ModelNorms(norms), "\n".join(notes))


def _buffers(state: Mapping[str, Tensor], home: str | None) -> dict[str, Tensor]:
    """The buffers of a saved scaling, by their own names."""
    return {} if home is None else {key.removeprefix(home): one for key, one in state.items() if key.startswith(home)}


def _saved_norms(name: str, weight: Tensor, buffers: dict[str, Tensor]) -> WeightNorms:
    plain = plain_name(name)
    layer = plain.removesuffix(".weight")
    key = next((key for key in buffers if key.startswith("target")), None)
    if key is None:
        return norms_of(layer, weight.reshape(1, len(weight), -1))
    target = buffers[key]
    # Version 0.1.0 had the constraint's order in place of its name.
    constraint = key.removeprefix("target").lstrip("_") or ("frobenius" if int(buffers["order"]) == 2 else "spectral")
    if constraint in CONSTRAINTS and CONSTRAINTS[constraint].part != "matrix":
        # As `measure` does: of what is held in parts, the whole.
        whole = norms_of(layer, weight.reshape(1, len(weight), -1))
        return replace(whole, target=target.max().item(), constraint=constraint)
    is_frobenius = constraint in CONSTRAINTS and CONSTRAINTS[constraint].norm_type.name == "frobenius"

    saved = buffers["norm"].double()

    def distance(matrices: Tensor) -> float:
        spectral, frobenius = spectral_and_frobenius(matrices)
        return float(((frobenius if is_frobenius else spectral) - saved.to(spectral)).abs().max())

    # The file does not say as which matrices the weight is read: as usual, unless others have the saved norms by far.
    usual, *others = _readings(weight, len(target))
    best = min(others, key=distance, default=usual)
    if best is not usual and distance(best) < distance(usual) / 4:
        usual = best
    return replace(norms_of(layer, usual), target=target.max().item(), constraint=constraint)


def _readings(weight: Tensor, count: int) -> Iterator[Tensor]:
    """The tensor as `count` matrices, in the ways that layers hold them; the usual one first."""
    rows, columns, *kernel = weight.shape
    if rows % count == 0:
        yield weight.reshape(count, rows // count, -1)
        if kernel:
            # A transposed convolution.
            yield weight.unflatten(0, (count, -1)).transpose(1, 2).flatten(2)
    if count > 1 and columns % count == 0:
        yield weight.transpose(0, 1).reshape(count, columns // count, -1)
    if rows == count and kernel:
        yield weight.flatten(2)
