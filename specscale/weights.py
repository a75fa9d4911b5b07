"""The weights of a model: which tensors they are, what they are called, and which of them the caller selects."""

import fnmatch
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import EinopsError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from specscale.constraints import Constraint
from specscale.errors import Refusal, nearest, non_finite
from specscale.layers import LayerRule, RuleBook, Views, module_at
from specscale.shards import Groups, is_sharded, layout_of, local, summed
from specscale.state import NormScaling, original, scaling_of, scalings_of
from specscale.views import MatrixView

Predicate = Callable[[str, nn.Module], bool]
Pattern = str | type[nn.Module] | Predicate
Patterns = Pattern | Iterable[Pattern] | None


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put the module and all below it in evaluation mode, and each back in its own mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for child, training in modes:
            child.training = training


def _reading(module: nn.Module) -> AbstractContextManager[None]:
    """Read a layer's tensors without changing it: torch's spectral_norm takes a step at every look in training mode."""
    return evaluation_mode(module) if parametrize.is_parametrized(module) else nullcontext()


def holds_tensor(module: nn.Module, name: str) -> bool:
    """Whether the layer has a tensor of that name, be it a parameter, a buffer or computed."""
    with _reading(module):
        return isinstance(getattr(module, name, None), Tensor)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight tensor of a model: where it is, what it is called, and as which matrices it is read."""

    layer: str
    """The layer's name in the model."""
    module: nn.Module
    """The layer."""
    tensor: str
    """The tensor's name in the layer."""
    view: MatrixView
    is_only: bool = True
    """Whether the layer has no other weight, so that the layer's name is enough."""
    parametrization: NormScaling | None = None
    """Its scaling, where it has been put under one; `scaling` in code that knows that it has."""

    @property
    def name(self) -> str:
        """The layer's name, with the tensor's behind it where the layer has several weights or no name."""
        return self.layer if self.layer and self.is_only else f"{self.layer}.{self.tensor}".lstrip(".")

    @property
    def parameter(self) -> Tensor:
        """The weight: the parameter itself, under scaling too, or what is computed from other parameters."""
        if self.parametrization is not None or scaling_of(self.module, self.tensor) is not None:
            return original(self.module, self.tensor)
        with _reading(self.module):
            return getattr(self.module, self.tensor)  # type: ignore[no-any-return]

    @property
    def scaling(self) -> NormScaling:
        """Its scaling."""
        if self.parametrization is None:
            raise AttributeError(f"the weight of {self.name!r} is not under norm scaling")
        return self.parametrization

    @property
    def is_scaled(self) -> bool:
        """Whether its scaling is still on the layer."""
        own = self.parametrization
        return own is not None and scaling_of(self.module, self.tensor) is own

    @property
    def is_computed(self) -> bool:
        """Whether the tensor is computed from parameters, so that what is written to it would be lost."""
        return scaling_of(self.module, self.tensor) is None and self.tensor not in self.module._parameters

    @property
    def sources(self) -> dict[str, Tensor]:
        """The layer's parameters that a computed weight may be made of; the weight alone where it is a parameter."""
        if not self.is_computed:
            return {self.tensor: self.parameter}
        parameters: dict[str, Tensor] = dict(self.module.named_parameters())
        return {name: parameters[name] for name in parameters if self.tensor in name} or parameters

    @property
    def is_trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.sources.values())


def scaled_weights(model: nn.Module) -> Iterator[Weight]:
    """Every scaled weight of a model, in the model's order.

    The layer's name is the one in this model. Whether the tensor's follows was decided when the weight was put under
    scaling.
    """
    for layer, module in model.named_modules():
        for tensor, scaling in scalings_of(module):
            yield Weight(layer, module, tensor, scaling.view, scaling.is_only, scaling)


def find_weights(model: nn.Module, rules: Iterable[LayerRule] = ()) -> list[Weight]:
    """Every weight of the model, scaled or not, by the first rule that matches its layer: `rules`, then the built-in.

    A tensor that several layers share comes once, as the first one's.

    Raises:
        Refusal: a rule matches nothing, or does not fit a layer.
    """
    return [holders[0] for holders in _weights_with_holders(model, list(rules))]


def select(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: Iterable[LayerRule] = (),
    *,
    frozen: bool = False,
    named: Iterable[LayerRule] = (),
    naming: Iterable[Pattern] = (),
    on_meta: bool = False,
) -> list[Weight]:
    """The weights that `include` and `exclude` leave, in the model's order.

    With `frozen`, for calls that only read, frozen ones too, and those that are scaled by a rule that is not given
    here. A pattern that matches a module takes everything below it too; a tied weight matches by any of its layers. The
    rules in `named` come last, and the weights that only they find are those that a pattern of `include` or `naming`
    names: one that matches no other weight. With `on_meta`, weights may be on the meta device.

    Raises:
        Refusal: `model` is no module, a pattern is neither a string, a type nor a predicate, or a rule is no
            `LayerRule` (TypeError); a pattern or a rule matches nothing, a rule does not fit a layer, no weight is
            left, or one is lazy, on the meta device or sharded (ValueError).
    """
    if not isinstance(model, nn.Module):
        raise Refusal(f"expected a torch.nn.Module, found {type(model).__name__}", TypeError)
    rules = list(rules) if isinstance(rules, Iterable) else [rules]
    for rule in rules:
        if not isinstance(rule, LayerRule):
            raise Refusal(f"rules takes LayerRule objects, found {type(rule).__name__}", TypeError)
    weights = _weights_with_holders(model, rules, as_scaled=frozen)
    usual = {(one.layer, one.tensor): one for holders in weights for one in holders}
    by_norm: list[Predicate] = []
    for pattern in naming:
        _refuse_no_pattern("norm", pattern)
        by_norm.append(functools.partial(_matches, pattern))
    if named and (include is not None or by_norm):
        every = _weights_with_holders(model, rules, named)
        weights = [[usual.get((one.layer, one.tensor), one) for one in holders] for holders in every]
    # A module without weights cannot be included; to exclude it is no mistake.
    with_weights = dict.fromkeys(name for holders in weights for one in holders for name in _with_parents(one.layer))
    layers = dict(model.named_modules())
    including = _predicates("include", include, with_weights, layers)
    excluding = _predicates("exclude", exclude, layers, layers)

    def matches(one: Weight, predicates: Iterable[Predicate]) -> bool:
        return any(predicate(one.layer, one.module) for predicate in predicates)

    held = weights
    if named:
        known = set(usual.values())
        fresh = [one for one in (*including, *by_norm) if not any(matches(weight, [one]) for weight in known)]
        held = [[one for one in holders if one in known or matches(one, fresh)] for holders in weights]
    selected = [
        holders[0]
        for holders in held
        if holders
        and (frozen or holders[0].is_trainable)
        and (include is None or any(matches(one, including) for one in holders))
        and not any(matches(one, excluding) for one in holders)
    ]
    refuse_without_values(selected, on_meta=on_meta)
    refuse_flat(selected)
    if not selected:
        raise Refusal(
            f"no weight of {type(model).__name__} is selected; it has {len(weights)} that could be scaled "
            "(linear, convolution, attention and recurrent weights, and what rules add), "
            "of which include, exclude and requires_grad leave none"
        )
    return selected


def _weights_with_holders(
    model: nn.Module, rules: list[LayerRule], named: Iterable[LayerRule] = (), *, as_scaled: bool = False
) -> list[list[Weight]]:
    """Each weight of the model as a list: as its first layer holds it, then as each layer that shares it does.

    With `as_scaled`, a tensor that is scaled by a rule that is not given here is a weight too.
    """
    book = RuleBook(model, rules, named)
    # The tensors are kept alive, so that no id is used twice: one that is computed is a new tensor at every look.
    seen: dict[int, tuple[Tensor, list[Weight]]] = {}
    for layer, module in model.named_modules():
        with _reading(module):
            number, paths = book.look_up(layer)
            for path in paths:
                if not _has(module, path):
                    raise _missing(layer, module, path)
            views = dict(book.views(layer))
            if as_scaled and number >= len(rules):
                views |= _views_of_scaled(module)
            weights = [Weight(layer, module, tensor, view) for tensor, view in views.items()]
            weights = [weight for weight in weights if _is_read(weight)]
            tensors = [weight.parameter for weight in weights]
        is_only = sum(id(tensor) not in seen for tensor in tensors) == 1
        for tensor, weight in zip(tensors, weights, strict=True):
            # A weight keeps the name that it was put under scaling with.
            scaling = scaling_of(module, weight.tensor)
            holder = replace(weight, is_only=is_only if scaling is None else scaling.is_only)
            seen.setdefault(id(tensor), (tensor, []))[1].append(holder)
    if unused := book.unused:
        kind = getattr(unused[0].layer, "__name__", repr(unused[0].layer))
        raise Refusal(f"the rule for {kind} matches no layer of {type(model).__name__}")
    return [holders for _, holders in seen.values()]


def _views_of_scaled(module: nn.Module) -> Views:
    """The matrices that a layer's tensors are scaled as, where the constraint does not hold parts of them."""
    return {tensor: scaling.view for tensor, scaling in scalings_of(module) if scaling.constraint.part == "matrix"}


def _has(layer: nn.Module, path: str) -> bool:
    """Whether the layer, or one within it, has the attribute."""
    within, _, name = path.rpartition(".")
    holder = module_at(layer, within)
    if holder is None:
        return False
    with _reading(holder):
        return hasattr(holder, name)


def _missing(layer: str, module: nn.Module, path: str) -> Refusal:
    names = ", ".join(repr(own) for own, _ in module.named_parameters(recurse="." in path)) or "none"
    return Refusal(
        f"the rule for {type(module).__name__} names {path!r}, which {layer!r} does not have; "
        f"its parameters are {names}"
    )


def _is_read(weight: Weight) -> bool:
    """Whether the layer's tensor has elements to be read as matrices; refuses one that does not fit its rule."""
    kind = type(weight.module).__name__
    parameter = weight.parameter
    if isinstance(parameter, nn.Module):
        raise Refusal(
            f"the rule for {kind} names {weight.tensor!r} of {weight.layer!r}, which is a layer of its own, "
            f"{type(parameter).__name__}; write a rule for that"
        )
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return False
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return True
    try:
        weight.view.matrix_shape(parameter)
    except EinopsError:
        raise Refusal(
            f"the rule for {kind} reads {weight.tensor!r} of {weight.layer!r} as {weight.view}, "
            f"which its shape {tuple(parameter.shape)} does not fit"
        ) from None
    return parameter.numel() > 0


def _with_parents(name: str) -> list[str]:
    """The module's name and those of all modules that it lies in, itself first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _predicates(
    option: str, patterns: Patterns, names: Iterable[str], layers: Mapping[str, nn.Module]
) -> list[Predicate]:
    """Whether each pattern matches a module: a string by its name or that of a module it lies in, others by itself.

    A string must match one of `names`, which are of those of the model's `layers` that can be named.
    """
    if patterns is None:
        patterns = []
    elif isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    patterns, names = list(patterns), list(names)
    for pattern in patterns:
        _refuse_no_pattern(option, pattern)
        if isinstance(pattern, str) and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            for name in fnmatch.filter(layers, pattern):
                if isinstance(layers[name], nn.Embedding):
                    raise Refusal(
                        f"{option} pattern {pattern!r} matches no weight that this norm scales, but the embedding "
                        f"{name!r}: embeddings are scaled by 'rows' and 'columns' alone, and by a LayerRule"
                    )
            raise Refusal(f"{option} pattern {pattern!r} matches no module; {nearest(pattern, names)}")
    return [functools.partial(_matches, pattern) for pattern in patterns]


def pattern_name(pattern: Any) -> str:
    """A pattern as an error text shows it."""
    return repr(pattern) if isinstance(pattern, str) else str(getattr(pattern, "__name__", repr(pattern)))


def _refuse_no_pattern(option: str, pattern: Any) -> None:
    if isinstance(pattern, nn.Module) or not (isinstance(pattern, str) or callable(pattern)):
        raise Refusal(
            f"{option} takes shell patterns on module names, types of layers, or predicates "
            f"(name, module) -> bool, found {type(pattern).__name__}",
            TypeError,
        )


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(one, pattern) for one in _with_parents(name))
    return isinstance(module, pattern) if isinstance(pattern, type) else pattern(name, module)


def by_pattern(option: str, setting: Any, weights: list[Weight], model: nn.Module) -> list[tuple[Any, list[Weight]]]:
    """Each value of a setting, with the weights that it is for: those that its pattern is the first to match.

    A setting that is no mapping is for all weights. A tied weight matches by any of its layers.

    Raises:
        Refusal: no pattern matches a weight, a pattern matches none, or none that is left for it (ValueError); a key is
            no pattern (TypeError).
    """
    if not isinstance(setting, Mapping):
        return [(setting, weights)]
    for pattern in setting:
        _refuse_no_pattern(option, pattern)
    layers = _layers_of(weights, model)
    left = list(weights)
    parts = []
    for pattern, value in setting.items():
        matched = [weight for weight in weights if any(_matches(pattern, *layer) for layer in layers[weight])]
        own = [weight for weight in left if weight in matched]
        if not own:
            shown = pattern_name(pattern)
            if matched:
                raise Refusal(
                    f"{option} pattern {shown} is left no weight: patterns before it match all of its own, and the "
                    "first match wins; put it in front of them"
                )
            names = dict.fromkeys(name for weight in weights for name in _with_parents(weight.layer))
            raise Refusal(f"{option} pattern {shown} matches no selected weight; {nearest(str(pattern), names)}")
        left = [weight for weight in left if weight not in own]
        parts.append((value, own))
    if left:
        raise _no_pattern(option, left)
    return parts


def value_for(option: str, setting: Any, weight: Weight, model: nn.Module) -> Any:
    """The value of a setting for one weight: see `by_pattern`.

    Raises:
        Refusal: no pattern matches the weight.
    """
    if not isinstance(setting, Mapping):
        return setting
    layers = _layers_of([weight], model)[weight]
    for pattern, value in setting.items():
        if any(_matches(pattern, *layer) for layer in layers):
            return value
    raise _no_pattern(option, [weight])


def _no_pattern(option: str, weights: list[Weight]) -> Refusal:
    names = ", ".join(repr(weight.name) for weight in weights[:3]) + ", ..." * (len(weights) > 3)
    # A weight without a schedule is still scaled, and one that is excluded is not.
    advice = "add '*': None for the rest" if option == "schedule" else "add '*' for the rest, or exclude it"
    return Refusal(f"no pattern of {option} matches {names}; {advice}")


def _layers_of(weights: Iterable[Weight], model: nn.Module) -> dict[Weight, list[tuple[str, nn.Module]]]:
    """The layers that hold each weight, its own first, with their names."""
    layers = {weight: [(weight.layer, weight.module)] for weight in weights}
    by_id = {id(weight.parameter): own for weight, own in layers.items()}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            own = by_id.get(id(parameter), [])
            if own and not isinstance(module, parametrize.ParametrizationList) and module is not own[0][1]:
                own.append((name, module))
    return layers


def refuse_without_values(weights: Iterable[Weight], *, on_meta: bool = False) -> None:
    """Refuse weights that have no values yet: lazy ones, and those on the meta device, unless they may be there."""
    for weight in weights:
        parameter = weight.parameter
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise Refusal(f"the weight of {weight.name!r} has no shape yet; call the lazy model once first")
        if parameter.is_meta and not on_meta:
            raise without_numbers(weight, "give the model memory (to_empty) and values first")


def without_numbers(weight: Weight, advice: str) -> Refusal:
    """The refusal of a call that needs the values of a weight on the meta device."""
    return Refusal(f"the weight of {weight.name!r} is on the meta device and holds no numbers; {advice}")


def is_flat_part(tensor: Tensor) -> bool:
    """Whether the tensor is a part of a flat parameter of FullyShardedDataParallel."""
    # torch marks them so.
    return hasattr(tensor, "_fsdp_flattened")


def refuse_flat(weights: Iterable[Weight]) -> None:
    """Refuse weights that are parts of a flat parameter."""
    for weight in weights:
        parameter = weight.parameter
        kind = "a part of" if is_flat_part(parameter) else None
        if kind is None and not isinstance(parameter, nn.Parameter) and weight.is_scaled:
            kind = "a view of"
        if kind is not None:
            raise Refusal(
                f"the weight of {weight.name!r} is {kind} a flat parameter, as of FullyShardedDataParallel, which is "
                "not supported; shard the scaled model by fully_shard, or train with DistributedDataParallel"
            )


def refuse_gathered(weights: Iterable[Weight]) -> None:
    """Refuse to write sharded weights while `fully_shard` has them gathered: the shards would not be written."""
    for weight in weights:
        # Of a weight that was not sharded, its parameter need not be looked at.
        if weight.scaling.placements and weight.scaling.is_gathered(weight.parameter):
            raise Refusal(
                f"the weight of {weight.name!r} is gathered, as fully_shard may leave it after a forward pass without "
                "a backward pass; call reshard() of every FSDPModule in model.modules() first"
            )


def refuse_whole_only(constraints: Iterable[tuple[Weight, Constraint]]) -> None:
    """Refuse sharded weights under constraints that need whole matrices."""
    for weight, constraint in constraints:
        if constraint.needs_whole and is_sharded(weight.parameter):
            solver = getattr(constraint.norm, "solver", None)
            by = f" with {type(solver).__name__}" if solver is not None and not solver.reads_shards else ""
            raise Refusal(
                f"the weight of {weight.name!r} is sharded, and {constraint.name!r}{by} needs it whole; choose "
                "'spectral', 'cap' or 'normalize' with the solver 'block', or 'frobenius', 'rows' or 'columns'"
            )


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been called on the model or a part of it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return any(isinstance(module, kind) for module in model.modules())


def refuse_unwritable(weights: Iterable[Weight]) -> None:
    """Refuse weights that a step cannot write: made under `torch.inference_mode()`, or computed from parameters."""
    # A compiler cannot trace the question.
    may_be_inference = not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
    for weight in weights:
        if may_be_inference and weight.parameter.is_inference():
            raise Refusal(
                f"the weight of {weight.name!r} was made under torch.inference_mode(), so that no step can write it; "
                "build the model outside of it"
            )
        if weight.is_computed:
            sources = ", ".join(map(repr, weight.sources))
            raise Refusal(
                f"{weight.tensor!r} of {weight.name!r} is computed from {sources}, "
                "as by pruning, weight normalization or a parametrization; remove that first, or exclude the layer"
            )


def refuse_scaled(weights: Iterable[Weight]) -> None:
    """Refuse weights that are under scaling already."""
    for weight in weights:
        if scaling_of(weight.module, weight.tensor) is not None:
            raise Refusal(f"{weight.name!r} is scaled already; call remove_norm_scaling(model) first, or exclude it")


def refuse_shared_memory(weights: Iterable[Weight]) -> None:
    """Refuse two parameters in the same memory, which would be scaled twice, and elements that share theirs.

    A parameter that layers share is one weight.
    """
    first: dict[int, Weight] = {}
    for weight in weights:
        shape, strides = weight.parameter.shape, weight.parameter.stride()
        if any(size > 1 and stride == 0 for size, stride in zip(shape, strides, strict=True)):
            raise Refusal(
                f"the weight of {weight.name!r} is expanded, so that its elements share memory; "
                "give the layer a parameter of its own, such as weight.clone()"
            )
        if weight.parameter.is_meta:
            # Nothing there has an address.
            continue
        own = local(weight.parameter)
        if own.numel() == 0:
            continue
        other = first.setdefault(own.data_ptr(), weight)
        if other is not weight:
            raise Refusal(
                f"the weights of {other.name!r} and {weight.name!r} are two parameters in the same memory; "
                "exclude one, which then follows the other, or tie them as one parameter"
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model under DistributedDataParallel, FullyShardedDataParallel or fully_shard."""
    sharding = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, sharding) for module in model.modules()):
        raise Refusal(
            "the model is under FullyShardedDataParallel, which holds flat shards of its weights, and these are not "
            "supported; scale the model first, then shard it by fully_shard or wrap it in DistributedDataParallel"
        )
    if is_fully_sharded(model):
        raise Refusal(
            "the model is under fully_shard already, whose forward pass knows the parameters by where they are; the "
            "order is parallelize_module, apply_norm_scaling, fully_shard"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise Refusal(
            "the model is under DistributedDataParallel already, which would wait for the parameters by their "
            "old names; scale the model first, then wrap it"
        )


def refuse_non_finite(weights: Iterable[Weight], advice: str) -> None:
    """Refuse weights that hold NaN or infinity, by `NonFiniteWeightError`; all processes hear of a sharded one."""
    weights = list(weights)
    counts = [(~local(weight.parameter).isfinite()).sum(dtype=torch.float32).reshape(1) for weight in weights]
    groups: list[Groups] = []
    for weight in weights:
        layout = layout_of(weight.parameter, weight.view)
        groups.append(() if layout is None else layout.sums)
    if bad := [weight.name for weight, count in zip(weights, summed(counts, groups), strict=True) if bool(count > 0)]:
        raise non_finite(bad, advice)
