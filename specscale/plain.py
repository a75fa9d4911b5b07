"""A scaled model made plain for a while: its scalings are taken off, kept, and put on what the layers then hold."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import EinopsError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specscale.errors import Refusal, public_call
from specscale.held import INSIDE_PLAIN, HeldWeights, Place, is_source, places_of, put_on
from specscale.layers import EMBEDDINGS, LayerRule, RuleBook
from specscale.linalg import at_least_float32, no_grad_full_precision, product
from specscale.parametrization import unregister
from specscale.shards import is_sharded, layout_of, local, summed
from specscale.state import PLAIN_LAYERS, NormScaling, original, scaling_of, version_of
from specscale.state_dicts import LoadCheck, end_unused_checks, refuse_others_on_top
from specscale.step import solve_anew_
from specscale.targets import Target, Targets, depends_on_norms, resolve_targets
from specscale.views import MatrixView
from specscale.weights import Weight, holds_tensor, is_flat_part, is_fully_sharded, scaled_weights, value_for


@dataclass(frozen=True)
class Rule:
    """What a call of `apply_norm_scaling` has said, and a weight of another shape needs again."""

    target: Targets = "initial"
    layers: tuple[LayerRule, ...] = ()

    def target_for(self, weight: Weight, model: nn.Module) -> Target:
        """What the call has said of a weight that is not scaled yet."""
        target: Target = value_for("target", self.target, weight, model)
        # The call's example input is not kept.
        return "initial" if isinstance(target, str) and target == "features" else target


class PlainModel:
    """The context in which a model is plain; see `NormScaler.plain`."""

    def __init__(self, held: HeldWeights, rule: Rule, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._model = held.model
        self._held = held
        self._rule = rule
        self._optimizers = optimizers
        self._entered: list[tuple[list[_Layer], _Hooks]] = []
        """The layers, and the checks of state dicts, that were taken off by each entry that has not been left."""

    @public_call("plain")
    def __enter__(self) -> nn.Module:
        refuse_fully_sharded(self._model)
        by_module: dict[nn.Module, list[Weight]] = defaultdict(list)
        for weight in scaled_weights(self._model):
            refuse_others_on_top(weight)
            by_module[weight.module].append(weight)
        if not by_module and PLAIN_LAYERS.isdisjoint(self._model.modules()):
            raise Refusal(f"no weight of {type(self._model).__name__} is under scaling")
        layers = [_Layer(module, weights) for module, weights in by_module.items()]
        checks = {taken.weight.scaling.load_check for layer in layers for taken in layer.taken}
        handles = (check.handle for check in checks if isinstance(check, LoadCheck))
        self._entered.append((layers, _Hooks(handle for handle in handles if handle is not None)))
        for layer in layers:
            layer.take_off()
        return self._model

    @public_call("plain")
    def __exit__(self, *_: Any) -> None:
        layers, checks = self._entered.pop()
        checks.put_back()
        PLAIN_LAYERS.difference_update(layer.module for layer in layers)
        own = {weight.scaling for weight in self._held.with_lost}
        finds = _find(self._model, self._rule, own, [taken for layer in layers for taken in layer.taken])
        modules = set(self._model.modules())
        for layer in layers:
            is_whole = all(isinstance(finds[taken], _Find) for taken in layer.taken)
            if is_whole and layer.module in modules and layer.is_as_it_was():
                layer.put_back()
        for taken, find in finds.items():
            if isinstance(find, _Find):
                try:
                    if not taken.weight.is_scaled:
                        put_on(taken.weight.scaling, find.place)
                    _renew(taken, find, self._model)
                except Exception as error:
                    finds[taken] = _failure(error)
                    if scaling_of(find.place.module, find.place.tensor) is taken.weight.scaling:
                        unregister(find.place.module, find.place.tensor)
        end_unused_checks(taken.weight for taken in finds)
        self._warn(finds)

    def _warn(self, finds: "dict[_Taken, _Find | str | None]") -> None:
        """Name the weights that are no longer scaled, and the parameters that no optimizer has."""
        gone = [f"{taken.weight.name!r} ({find})" for taken, find in finds.items() if isinstance(find, str)]
        if gone:
            warnings.warn(
                f"plain: no longer under scaling: {', '.join(gone)}; call apply_norm_scaling for layers that are new",
                stacklevel=4,
            )
        optimizers = list(self._optimizers)
        owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        found = [(taken, find) for taken, find in finds.items() if isinstance(find, _Find)]
        new = [find for taken, find in found if find.parameter is not taken.parameter]
        unowned = [repr(find.place.layer) for find in new if id(find.parameter) not in owned]
        if optimizers and unowned:
            warnings.warn(
                f"plain: the parameter of {', '.join(unowned)} is a new one, and no optimizer that this handle is "
                "attached to holds it: it would not be trained. Give it to an optimizer (add_param_group), or build a "
                "new one and attach that; wrap the model in DistributedDataParallel anew, if it was",
                stacklevel=4,
            )


class _Hooks:
    """Hooks that are taken off, to be put back under their numbers, so that their handles stay good."""

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self._taken: list[tuple[dict[int, Any], int, Any]] = []
        for handle in handles:
            hooks: dict[int, Any] | None = handle.hooks_dict_ref()
            if hooks is not None and handle.id in hooks:
                self._taken.append((hooks, handle.id, hooks.pop(handle.id)))

    def put_back(self) -> None:
        for hooks, number, hook in self._taken:
            hooks[number] = hook


class _Taken:
    """A weight whose scaling has been taken off, and what it was then."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.parameter = original(weight.module, weight.tensor)
        self.shape = self.parameter.shape
        self.checksum = _checksum(self.parameter)
        self.version = version_of(self.parameter)


class _Layer:
    """A layer whose scalings are taken off, with the objects that are put back if it is left as it is."""

    def __init__(self, module: nn.Module, weights: list[Weight]) -> None:
        self.module = module
        self.taken = [_Taken(weight) for weight in weights]
        self._scaled_class = type(module)
        self._parametrizations = module._modules["parametrizations"]
        self._module_order = list(module._modules)
        self._parameter_order = list(module._parameters)
        self._hooks: list[_Hooks] = []
        self._plain_class: type[nn.Module] = self._scaled_class.__bases__[0]
        self._rest: nn.Module | None = None
        """The parametrizations of other tensors, which stay."""
        own = {weight.tensor for weight in weights}
        assert isinstance(self._parametrizations, nn.ModuleDict)
        if rest := {name: one for name, one in self._parametrizations.items() if name not in own}:
            self._rest = nn.ModuleDict(rest)
            kept = {name: value for name, value in vars(self._scaled_class).items() if name not in own}
            self._plain_class = type(self._scaled_class.__name__, self._scaled_class.__bases__, kept)

    def take_off(self) -> None:
        """Make the layer plain."""
        module = self.module
        for taken in self.taken:
            self._hooks.append(_Hooks(taken.weight.scaling.load_hooks))
        del module._modules["parametrizations"]
        if self._rest is not None:
            module._modules["parametrizations"] = self._rest
        for taken in self.taken:
            module._parameters[taken.weight.tensor] = taken.parameter
        _reorder(module._parameters, [name for one in self.taken for name in one.weight.scaling.parameter_order])
        module.__class__ = self._plain_class
        PLAIN_LAYERS.add(module)

    def is_as_it_was(self) -> bool:
        """Whether the layer is the plain one that `take_off` has made of it, with the same parameters."""
        module = self.module
        return (
            type(module) is self._plain_class
            and module._modules.get("parametrizations") is self._rest
            and all(module._parameters.get(taken.weight.tensor) is taken.parameter for taken in self.taken)
        )

    def put_back(self) -> None:
        """Make the layer the scaled one again, of the same objects."""
        module = self.module
        for taken in self.taken:
            del module._parameters[taken.weight.tensor]
        _reorder(module._parameters, self._parameter_order)
        module._modules["parametrizations"] = self._parametrizations
        _reorder(module._modules, self._module_order)
        module.__class__ = self._scaled_class
        for hooks in self._hooks:
            hooks.put_back()


def refuse_fully_sharded(model: nn.Module) -> None:
    """Refuse to move the parameters of a model under `fully_shard`."""
    if is_fully_sharded(model):
        raise Refusal(
            "the model is under fully_shard, which does not let parameters move to another module; save "
            "scaling.plain_state_dict(), or make the model plain before fully_shard"
        )


def refuse_inside_plain(model: nn.Module) -> None:
    """Refuse a model that is plain for a while only."""
    if not PLAIN_LAYERS.isdisjoint(model.modules()):
        raise Refusal(INSIDE_PLAIN)


def _reorder(items: dict[str, Any], order: Iterable[str]) -> None:
    """Put the items of these names first, in this order, in place."""
    before = dict(items)
    items.clear()
    items.update({name: before[name] for name in dict.fromkeys([*order, *before]) if name in before})


class _Find(NamedTuple):
    """Where a weight is now, and as what it is to be scaled."""

    place: Place
    parameter: nn.Parameter
    view: MatrixView
    target: Target
    """What is to be held if the weight has another shape."""


def _find(
    model: nn.Module, rule: Rule, own: set[NormScaling], weights: list[_Taken]
) -> "dict[_Taken, _Find | str | None]":
    """What each weight has become; the rule is that of the scalings in `own`.

    A `str` says why it cannot be scaled any more; None, that it has become one with another.
    """
    places = places_of(model)
    by_name = dict(model.named_modules())
    layers = {module: layer for layer, module in by_name.items()}
    finds: dict[_Taken, _Find | str | None] = {}
    claimed: set[int] = set()
    for taken in weights:
        module, tensor = taken.weight.module, taken.weight.tensor
        same = [place for place in places.get(id(taken.parameter), []) if not is_source(place, tensor)]
        named = [(taken.weight.layer, by_name.get(taken.weight.layer))]
        if module in layers:
            # The same layer, though it may have another name now, comes first.
            same.sort(key=lambda place: place.module is not module)
            named.insert(0, (layers[module], module))
        homes = [
            Place(layer, one, tensor)
            for layer, one in named
            if one is not None and one._parameters.get(tensor) is not None
        ]
        place = next(iter(same or homes), None)
        if place is None:
            is_computed = any(one is not None and holds_tensor(one, tensor) for _, one in named)
            finds[taken] = "it is computed now" if is_computed else "it is not in the model any more"
            continue
        parameter = place.module._parameters[place.tensor]
        assert parameter is not None
        if id(parameter) in claimed:
            finds[taken] = None
            continue
        claimed.add(id(parameter))
        try:
            finds[taken] = _as_what(model, rule if taken.weight.scaling in own else Rule(), taken, place, parameter)
        except Exception as error:
            finds[taken] = _failure(error)
    return finds


def _failure(error: Exception) -> str:
    """Why a weight is let go that could not be scaled, whatever it has become."""
    return f"it cannot be scaled: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _as_what(model: nn.Module, rule: Rule, taken: _Taken, place: Place, parameter: nn.Parameter) -> _Find | str:
    """How the parameter that a weight has become is scaled, or why it cannot be."""
    constraint = taken.weight.scaling.constraint
    view, layer_view = taken.weight.view, None
    is_same_shape = parameter.shape == taken.shape
    if not (is_same_shape and (parameter is taken.parameter or place.module is taken.weight.module)):
        layer_view = RuleBook(model, rule.layers, EMBEDDINGS).views(place.layer).get(place.tensor)
    if is_sharded(parameter) != is_sharded(taken.parameter) or is_flat_part(parameter):
        return "it is sharded now, or was; shard a scaled model outside of plain()"
    if not parameter.is_floating_point() or parameter.numel() == 0 or parameter.is_inference():
        return f"it is a tensor of {parameter.dtype} and shape {tuple(parameter.shape)} that cannot be scaled"
    try:
        if layer_view is not None:
            view = constraint.view(layer_view, parameter)
        view.matrix_shape(parameter)
    except EinopsError:
        return f"its shape {tuple(parameter.shape)} does not fit {layer_view or view}"
    target: Target = "initial"
    if not (is_same_shape and view == taken.weight.view):
        target = rule.target_for(Weight(*place, layer_view or view, taken.weight.is_only), model)
        if depends_on_norms(target):
            if parameter.is_meta:
                return "it is on the meta device in another shape, and its target is relative to its norm"
            if not bool(local(parameter).isfinite().all()):
                return "it holds NaN or infinity"
    return _Find(place, parameter, view, target)


@torch.no_grad()
def _renew(taken: _Taken, find: _Find, model: nn.Module) -> None:
    """Bring a scaling that is on its layer again up to the weight that the layer has."""
    scaling, parameter = taken.weight.scaling, find.parameter
    is_same_matrix = parameter.shape == taken.shape and find.view == scaling.view
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    fits_state = is_same_matrix and scaling.norm.dtype == dtype and scaling.norm.device == parameter.device
    if fits_state and parameter is taken.parameter and _is_unchanged(taken):
        scaling.keep_current(parameter, taken.version)
        return
    held = {name: scaling.get_buffer(name) for name in scaling.held_buffers}
    # Where the values are still to come, those that are there now may be none.
    has_values = not (parameter.is_meta or scaling.is_unsolved)
    if not fits_state:
        scaling.reset_(find.view, parameter)
    if has_values or (not is_same_matrix and depends_on_norms(find.target)):
        solve_anew_(scaling, parameter)
    if is_same_matrix:
        for name, value in held.items():
            scaling.get_buffer(name).copy_(value)
    else:
        if scaling.schedule is not None:
            scaling.num_steps.fill_(held["num_steps"][0])
        weight = Weight(*find.place, find.view, scaling.is_only, scaling)
        (numbers,) = resolve_targets(find.target, {weight: scaling}, model, None, []).values()
        # What is relative to a norm is so to the one that the weight has at this step of the schedule.
        scaling.set_target_(numbers, is_base=not depends_on_norms(find.target))
    scaling.mark_current(parameter)


def _is_unchanged(taken: _Taken) -> bool:
    """Whether the weight has the values that it had: of a sharded one, in all processes, which solve it together."""
    is_changed = ~(_checksum(taken.parameter) == taken.checksum).all()
    layout = layout_of(taken.parameter, taken.weight.scaling.view)
    (count,) = summed([is_changed.float().reshape(1)], [() if layout is None else layout.sums])
    return not bool(count)


@no_grad_full_precision
def _checksum(tensor: Tensor) -> Tensor:
    """Five numbers that change with almost every change of the tensor's values or of their order."""
    tensor = local(tensor)
    if tensor.is_meta or not tensor.numel():
        return torch.zeros(5, dtype=torch.int64)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    rows = tensor.reshape(len(tensor), -1)
    bits = rows.view(integers[rows.element_size()])
    # Sums wrap. In int64 they take ten times as long.
    dtype = torch.int64 if bits.dtype == torch.int64 else torch.int32
    sums = [bits.sum(dim, dtype=dtype) for dim in (0, 1)]
    weighted = [one * torch.arange(1, len(one) + 1, device=one.device) ** 3 for one in sums]
    # Rows and columns together: sums of either alone are the same for a permutation of an identity matrix.
    values = at_least_float32(rows)
    left, right = ((torch.arange(size, device=values.device) * 0.618 % 1 + 0.5).to(values) for size in values.shape)
    both = product(left[None], product(values, right[:, None])).double().view(torch.int64).reshape(())
    return torch.stack([*(one.sum() for one in (*sums, *weighted)), both])
