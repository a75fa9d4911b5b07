"""Which tensors of a model are weights, and which of them the caller means."""

import fnmatch
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from einops import EinopsError
from torch import Tensor, nn

from specscale.errors import nearest
from specscale.matrices import MatrixView
from specscale.parametrization import original, scaling_of
from specscale.rules import BUILT_IN, LayerRule

Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern] | None


@dataclass(frozen=True)
class Weight:
    """A weight tensor that can be scaled, and where it lives."""

    name: str
    """The module's name; with the tensor's behind it where the module has several weights."""
    module: nn.Module
    tensor: str
    view: MatrixView
    places: list[tuple[str, nn.Module]]
    """The layers that hold it, by name: a tied weight has several, of which `module` is the first."""

    @property
    def parameter(self) -> Tensor:
        """The weight: the parameter itself, under scaling too, or what is computed from others."""
        if scaling_of(self.module, self.tensor) is not None:
            return original(self.module, self.tensor)
        return getattr(self.module, self.tensor)  # type: ignore[no-any-return]

    @property
    def is_computed(self) -> bool:
        """Whether others make the tensor what it is, so that what is written to it would be lost."""
        return scaling_of(self.module, self.tensor) is None and self.tensor not in self.module._parameters

    @property
    def sources(self) -> dict[str, nn.Parameter]:
        """The layer's parameters that a computed weight may be made of; the weight alone where it is a parameter."""
        if not self.is_computed:
            return {self.tensor: self.parameter}  # type: ignore[dict-item]
        parameters = dict(self.module.named_parameters())
        return {name: parameters[name] for name in parameters if self.tensor in name} or parameters

    @property
    def is_trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.sources.values())


def weight_name(module_name: str, tensor: str, *, alone: bool) -> str:
    """What a weight is called: as its layer, and by the tensor behind it where the layer has several or no name."""
    return module_name if module_name and alone else f"{module_name}.{tensor}".lstrip(".")


def _weight(call: str, name: str, module: nn.Module, tensor: str, view: MatrixView) -> Weight | None:
    """A tensor that a rule names, or None where the layer leaves it out or empty; the shape must fit the rule."""
    if not hasattr(module, tensor):
        names = ", ".join(repr(own) for own, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(
            f"{call}: the rule for {type(module).__name__} names {tensor!r}, which {name!r} does not have; "
            f"its parameters are {names}"
        )
    weight = Weight(name, module, tensor, view, [(name, module)])
    parameter = weight.parameter
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return None
    if not isinstance(parameter, nn.parameter.UninitializedParameter):
        try:
            view.matrix_shape(parameter)
        except EinopsError:
            raise ValueError(
                f"{call}: the rule for {type(module).__name__} reads {tensor!r} of {name!r} as {view}, "
                f"which its shape {tuple(parameter.shape)} does not fit"
            ) from None
        if parameter.numel() == 0:
            return None
    return weight


def scalable(call: str, module: nn.Module, rules: Iterable[LayerRule] = ()) -> list[Weight]:
    """Every weight of the model that can be scaled, by the first rule that matches its layer: `rules`, then ours.

    A tensor under several names comes once.
    """
    own = list(rules)
    unused = list(own)
    # With the tensors themselves, since one that is computed anew could take a lost one's id.
    found: dict[int, tuple[Tensor, Weight]] = {}
    for name, child in module.named_modules():
        rule = next((rule for rule in (*own, *BUILT_IN) if rule.matches(name, child)), None)
        unused = [one for one in unused if one is not rule]
        views = rule.views(child) if rule is not None else {}
        weights = [one for tensor, view in views.items() if (one := _weight(call, name, child, tensor, view))]
        tensors = [weight.parameter for weight in weights]
        new = sum(id(tensor) not in found for tensor in tensors)
        for tensor, weight in zip(tensors, weights, strict=True):
            if id(tensor) in found:
                found[id(tensor)][1].places.append((name, child))
            else:
                full = weight_name(name, weight.tensor, alone=new == 1)
                found[id(tensor)] = tensor, replace(weight, name=full)
    if unused:
        layer = getattr(unused[0].layer, "__name__", repr(unused[0].layer))
        raise ValueError(f"{call}: the rule for {layer} matches no layer of {type(module).__name__}")
    return [weight for _, weight in found.values()]


def _chain(name: str) -> list[str]:
    """The module's name and those of all modules that it lies in, itself first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _matcher(call: str, option: str, patterns: Patterns, names: Iterable[str]) -> Callable[[str, nn.Module], bool]:
    """Whether a module, or one that it lies in, has a name that a pattern matches; else the module alone is seen."""
    if patterns is None:
        patterns = []
    elif isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    patterns, names = list(patterns), list(names)
    for pattern in patterns:
        if isinstance(pattern, nn.Module) or not (isinstance(pattern, str) or callable(pattern)):
            raise TypeError(
                f"{call}: {option} takes shell patterns on module names, types of layers, or predicates "
                f"(name, module) -> bool, found {type(pattern).__name__}"
            )
        if isinstance(pattern, str) and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{call}: {option} pattern {pattern!r} matches no module; "
                f"the nearest names are {nearest(pattern, names)}"
            )

    def matches(name: str, module: nn.Module, pattern: Pattern) -> bool:
        if isinstance(pattern, str):
            return any(fnmatch.fnmatchcase(one, pattern) for one in _chain(name))
        return isinstance(module, pattern) if isinstance(pattern, type) else pattern(name, module)

    return lambda name, module: any(matches(name, module, pattern) for pattern in patterns)


def select(
    call: str,
    module: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: Iterable[LayerRule] = (),
    *,
    frozen: bool = False,
) -> list[Weight]:
    """The weights that `rules` add and that `include` and `exclude` leave, in the model's order; `frozen` ones too.

    A pattern that matches a module takes everything below it too; a tied weight goes by any of its layers.

    Raises:
        TypeError: `module` is no module, a pattern is neither a string, a type nor a predicate, or a rule is no
            `LayerRule`.
        ValueError: a pattern or a rule matches nothing, a rule does not fit a layer, no weight is left, or one holds no
            numbers yet or is sharded.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{call}: expected a torch.nn.Module, found {type(module).__name__}")
    rules = [rules] if isinstance(rules, LayerRule) else list(rules)
    for rule in rules:
        if not isinstance(rule, LayerRule):
            raise TypeError(f"{call}: rules takes LayerRule objects, found {type(rule).__name__}")
    weights = scalable(call, module, rules)
    # What holds no weight cannot be included; to exclude it is no mistake.
    with_weights = dict.fromkeys(name for weight in weights for place, _ in weight.places for name in _chain(place))
    included = _matcher(call, "include", include, with_weights)
    excluded = _matcher(call, "exclude", exclude, [name for name, _ in module.named_modules()])
    chosen = [
        weight
        for weight in weights
        if (frozen or weight.is_trainable)
        and (include is None or any(included(*place) for place in weight.places))
        and not any(excluded(*place) for place in weight.places)
    ]
    for weight in chosen:
        if isinstance(weight.parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{call}: the weight of {weight.name!r} has no shape yet; call the lazy model once first")
        if weight.parameter.is_meta:
            raise ValueError(
                f"{call}: the weight of {weight.name!r} is on the meta device and holds no numbers; "
                "give the model memory (to_empty) and values first"
            )
    refuse_sharded(call, chosen)
    if not chosen:
        raise ValueError(
            f"{call}: no weight of {type(module).__name__} is selected; it has {len(weights)} that could be scaled "
            "(linear, convolution, attention and recurrent weights, and what rules add), "
            "of which include, exclude and requires_grad leave none"
        )
    return chosen


class Named(Protocol):
    """A weight of a model, by name."""

    @property
    def name(self) -> str: ...

    @property
    def parameter(self) -> Tensor: ...


def refuse_sharded(call: str, weights: Iterable[Named]) -> None:
    """Refuse weights of which this process holds a part."""
    # Whoever shards has imported it.
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for weight in weights:
        if isinstance(weight.parameter, sharded):
            raise ValueError(f"{call}: the weight of {weight.name!r} is sharded (a DTensor), which is not supported")


def refuse_computed(call: str, weights: Iterable[Weight]) -> None:
    """Refuse weights that are no parameters: what is written to one is overwritten by what it is computed from."""
    for weight in weights:
        if weight.is_computed:
            sources = ", ".join(map(repr, weight.sources))
            raise ValueError(
                f"{call}: {weight.tensor!r} of {weight.name!r} is computed from {sources}, "
                "as by pruning, weight normalisation or a parametrization; remove that first, or exclude the layer"
            )
