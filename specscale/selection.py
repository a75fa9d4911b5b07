"""Which tensors of a model are weights, as which matrices, and which of them the user means."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from specscale.errors import nearest
from specscale.matrices import MatrixView

Pattern = str | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern] | None


@dataclass(frozen=True)
class Weight:
    """A weight tensor that can be scaled, and where it lives."""

    name: str
    """The module's name; with the tensor's behind it where the module has several weights."""
    module_name: str
    module: nn.Module
    tensor: str
    view: MatrixView

    @property
    def is_parametrized(self) -> bool:
        return parametrize.is_parametrized(self.module, self.tensor)

    @property
    def parameter(self) -> Tensor:
        if self.is_parametrized and self.module.parametrizations[self.tensor].is_tensor:  # type: ignore[union-attr, index]
            return self.module.parametrizations[self.tensor].original  # type: ignore[union-attr, index, return-value]
        return getattr(self.module, self.tensor)  # type: ignore[no-any-return]


def _is_fused_qkv(name: str, module: nn.Module) -> bool:
    """Whether a linear layer is three projections in one, by the name that it has in most vision transformers."""
    last = name.rpartition(".")[2].lower()
    return isinstance(module, nn.Linear) and last.endswith("qkv") and module.out_features == 3 * module.in_features


def _grouped(axes: str) -> Callable[[nn.Module], dict[str, MatrixView]]:
    return lambda module: {"weight": MatrixView(axes, count=module.groups)}  # type: ignore[arg-type]


Rule = tuple[Callable[[str, nn.Module], bool], Callable[[nn.Module], dict[str, MatrixView]]]


def _is(kind: type[nn.Module]) -> Callable[[str, nn.Module], bool]:
    return lambda name, module: isinstance(module, kind)


RULES: list[Rule] = [
    (_is_fused_qkv, lambda module: {"weight": MatrixView("(k o) i", count=3)}),
    (_is(nn.Linear), lambda module: {"weight": MatrixView("(k o) i")}),
    (_is(nn.Conv1d), _grouped("(k o) i w")),
    (_is(nn.Conv2d), _grouped("(k o) i h w")),
    (_is(nn.Conv3d), _grouped("(k o) i d h w")),
    (_is(nn.ConvTranspose1d), _grouped("(k i) o w")),
    (_is(nn.ConvTranspose2d), _grouped("(k i) o h w")),
    (_is(nn.ConvTranspose3d), _grouped("(k i) o d h w")),
    (
        _is(nn.MultiheadAttention),
        lambda module: {
            "in_proj_weight": MatrixView("(k o) i", count=3),
            **{f"{x}_proj_weight": MatrixView("(k o) i") for x in "qkv"},
        },
    ),
]
"""Predicate and weights of each kind of layer; the first match wins."""


def _weights_of(name: str, module: nn.Module) -> dict[str, MatrixView]:
    for matches, weights in RULES:
        if matches(name, module):
            return weights(module)
    return {}


def scalable(module: nn.Module) -> Iterator[Weight]:
    """Every weight of the model that can be scaled; a tensor under several names comes once."""
    seen: set[int] = set()
    for name, child in module.named_modules():
        found = []
        for tensor, view in _weights_of(name, child).items():
            weight = Weight(name, name, child, tensor, view)
            parameter = weight.parameter
            if not (isinstance(parameter, nn.Parameter) or weight.is_parametrized):
                continue
            if parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((tensor, view))
        for tensor, view in found:
            full = name if name and len(found) == 1 else f"{name}.{tensor}".lstrip(".")
            yield Weight(full, name, child, tensor, view)


def _chain(name: str) -> list[str]:
    """The module's name and those of all modules that it lies in, itself first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _matcher(call: str, option: str, patterns: Patterns, names: Iterable[str]) -> Callable[[str, nn.Module], bool]:
    """Whether a module, or one that it lies in, has a name that a pattern matches; predicates see the module alone."""
    if patterns is None:
        patterns = []
    elif isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    patterns, names = list(patterns), list(names)
    for pattern in patterns:
        if not isinstance(pattern, str) and not callable(pattern):
            raise TypeError(
                f"{call}: {option} takes shell patterns on module names, or predicates (name, module) -> bool, "
                f"found {type(pattern).__name__}"
            )
        if isinstance(pattern, str) and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{call}: {option} pattern {pattern!r} matches no module; "
                f"the nearest names are {nearest(pattern, names)}"
            )

    def matches(name: str, module: nn.Module) -> bool:
        return any(
            any(fnmatch.fnmatchcase(one, pattern) for one in _chain(name))
            if isinstance(pattern, str)
            else pattern(name, module)
            for pattern in patterns
        )

    return matches


def select(call: str, module: nn.Module, include: Patterns = None, exclude: Patterns = None) -> list[Weight]:
    """The weights that `include` and `exclude` leave, in the model's order.

    A pattern that matches a module takes everything below it too.

    Raises:
        TypeError: `module` is no module, or a pattern is neither a string nor callable.
        ValueError: a pattern matches nothing, no weight is left, or one holds no numbers yet.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{call}: expected a torch.nn.Module, found {type(module).__name__}")
    weights = list(scalable(module))
    # What holds no weight cannot be included; to exclude it is no mistake.
    with_weights = dict.fromkeys(name for weight in weights for name in _chain(weight.module_name))
    included = _matcher(call, "include", include, with_weights)
    excluded = _matcher(call, "exclude", exclude, [name for name, _ in module.named_modules()])
    chosen = [
        weight
        for weight in weights
        if weight.parameter.requires_grad
        and (include is None or included(weight.module_name, weight.module))
        and not excluded(weight.module_name, weight.module)
    ]
    for weight in chosen:
        if isinstance(weight.parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{call}: the weight of {weight.name!r} has no shape yet; call the lazy model once first")
        if weight.parameter.is_meta:
            raise ValueError(
                f"{call}: the weight of {weight.name!r} is on the meta device and holds no numbers; "
                "give the model memory (to_empty) and values first"
            )
    if not chosen:
        raise ValueError(
            f"{call}: no weight of {type(module).__name__} is selected; it has {len(weights)} that could be scaled "
            f"(linear, convolution and attention weights), of which include, exclude and requires_grad leave none"
        )
    return chosen
