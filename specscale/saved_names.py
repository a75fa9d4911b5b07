"""The names of scaled weights in what has been saved, and their plain names and order, told from the names alone."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

_PARAMETRIZATION = re.compile(r"(?:^|(?<=\.))parametrizations\.([^.]+)\.(\d+)(?=\.|$)")
_PARAMETER = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.original")
_RECURRENT = re.compile(r"(weight_(?:ih|hh|hr)|bias_(?:ih|hh))(?:_l(\d+)(_reverse)?)?")
_RECURRENT_ORDER = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class SavedParametrization(NamedTuple):
    """A parametrization, by what stands in a saved name: `<layer>parametrizations.<tensor>.<number>.`."""

    layer: str
    """The layer's name with a dot behind it; empty for the model itself."""
    tensor: str
    number: str
    """Its place among the tensor's parametrizations."""

    @property
    def home(self) -> str:
        """What the names of its buffers begin with."""
        return f"{self.parameter.removesuffix('original')}{self.number}."

    @property
    def parameter(self) -> str:
        """The name of the parameter behind it."""
        return f"{self.layer}parametrizations.{self.tensor}.original"


def parametrizations_in(name: object) -> Iterator[SavedParametrization]:
    """The parametrizations that a saved name lies in, the outermost first."""
    if isinstance(name, str) and "parametrizations." in name:
        for match in _PARAMETRIZATION.finditer(name):
            yield SavedParametrization(name[: match.start()], match[1], match[2])


def saved_scalings(names: Iterable[object]) -> list[SavedParametrization]:
    """The scalings that a state dict with these names holds, in its order.

    A scaling is known by its buffers: `norm`, `residual` and `target_<constraint>`, for which version 0.1.0 wrote
    `target` and `order`.
    """
    buffers: dict[SavedParametrization, set[str]] = defaultdict(set)
    for name in names:
        for one in parametrizations_in(name):
            buffers[one].add(str(name).removeprefix(one.home))
    return [one for one, own in buffers.items() if _are_of_a_scaling(own)]


def _are_of_a_scaling(buffers: set[str]) -> bool:
    has_target = {"target", "order"} <= buffers or any(name.startswith("target_") for name in buffers)
    return has_target and {"norm", "residual"} <= buffers


def is_parametrized(name: object) -> bool:
    """Whether it is the name of a parameter behind one parametrization or several, a scaling's or another's."""
    return isinstance(name, str) and _PARAMETER.fullmatch(name) is not None


def plain_name(name: str) -> str:
    """The name that the parameter behind a parametrization has in the plain model; other names as they are."""
    match = _PARAMETER.fullmatch(name)
    return match[1] + match[2] if match else name


def in_plain_order(names: Sequence[str], weights: Collection[str]) -> list[str]:
    """The names, as they are, in the order of the plain model; `weights` are the scaled ones among them.

    Registering moved a weight behind all else in its layer. It comes before all else again: before its own bias where
    `<tensor>_bias` is that, and in torch's order in a recurrent layer.
    """
    plain = [plain_name(name) if name in weights else name for name in names]
    layers = {_layer(one) for one, name in zip(plain, names, strict=True) if name in weights}
    place = {name: index for index, name in enumerate(plain)}
    first: dict[str, int] = {}
    own: dict[str, list[str]] = defaultdict(list)
    for index, name in enumerate(plain):
        for end in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            if name[:end] in layers:
                first.setdefault(name[:end], index)
        own[_layer(name)].append(name)

    # Ahead of what stands at that place: the outer layer's weight before the inner's, then in their own order.
    keys: dict[str, tuple[int, float, int]] = {name: (index, float("inf"), 0) for name, index in place.items()}
    for name, saved in zip(plain, names, strict=True):
        if saved in weights:
            layer = _layer(name)
            keys[name] = (place.get(f"{name}_bias", first[layer]), layer.count("."), place[name])
    for layer in layers:
        matches = {name: _RECURRENT.fullmatch(name.removeprefix(layer)) for name in own[layer]}
        if all(matches.values()):
            ordered = sorted(own[layer], key=lambda name: _recurrent_place(matches[name]))
            keys |= {name: (first[layer], layer.count("."), index) for index, name in enumerate(ordered)}
    return [name for _, name in sorted(zip(plain, names, strict=True), key=lambda pair: keys[pair[0]])]


def _layer(name: str) -> str:
    """The part of a tensor's name that is its layer's, with the dot."""
    return name[: name.rfind(".") + 1]


def _recurrent_place(match: re.Match[str] | None) -> tuple[int, bool, int]:
    assert match is not None
    return int(match[2] or 0), match[3] is not None, _RECURRENT_ORDER.index(match[1])
