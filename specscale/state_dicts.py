"""What state dicts go into a scaled model and come out of it."""

import copy
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specscale.block import is_of_another_side
from specscale.constraints import CONSTRAINTS
from specscale.errors import Refusal, one_of, public_call
from specscale.saved_names import SavedParametrization, in_plain_order, parametrizations_in, plain_name, saved_scalings
from specscale.shards import is_sharded, shard_of
from specscale.state import MEASURED, NOT_SAVED, SCHEDULED, NormScaling, original, others_on_top, scalings_of
from specscale.step import solve_anew_
from specscale.weights import Weight, scaled_weights


def _keys(module: nn.Module, tensor: str, scaling: NormScaling, prefix: str) -> tuple[str, str]:
    """A state dict's key of a scaled weight, and the prefix of the keys of its scaling's buffers."""
    home = f"{prefix}parametrizations.{tensor}."
    index = list(module.parametrizations[tensor]).index(scaling)  # type: ignore[union-attr, index]
    return f"{home}original", f"{home}{index}."


@public_call("load_state_dict")
def complete_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a checkpoint before torch loads it: rename a plain weight, add the state that this solver needs.

    Raises:
        ValueError: the checkpoint's targets are of another norm.
    """
    for tensor, scaling in scalings_of(module):
        # torch's `set_model_state_dict` has asked for the buffers before, and not given all processes the new ones.
        is_behind = scaling.follow_sharding_(original(module, tensor))
        weight, home = _keys(module, tensor, scaling, prefix)
        is_plain = prefix + tensor in state_dict
        if is_plain:
            state_dict[weight] = _like(original(module, tensor), state_dict.pop(prefix + tensor))
        if weight not in state_dict:
            continue
        saved = {k.removeprefix(home): state_dict.pop(k) for k in list(state_dict) if k.startswith(home)}
        if is_plain:
            # torch's `set_model_state_dict` adds the model's own, which tell of the weight that goes.
            saved = {name: one for name, one in saved.items() if name in scaling.held_buffers}
        _rename_old_buffers(saved, scaling)
        layer = prefix.removesuffix(".")
        _rename_target(saved, Weight(layer, module, tensor, scaling.view, scaling.is_only, scaling))
        own = {name: buffer for name, buffer in scaling.named_buffers() if name not in NOT_SAVED}
        if scaling.norm.is_meta:
            own = _beside(state_dict[weight], own)
        _complete_schedule(saved, scaling)
        # These need no solver; without one of the others, all of them are solved anew from the weight.
        kept = set(scaling.held_buffers)
        if is_behind or _shapes(own, kept) != _shapes(saved, kept) or _is_of_another_side(saved):
            scaling.needs_solve = True
            norms = {n for n in MEASURED if n in own and n in saved and saved[n].shape == own[n].shape}
            saved = _unsolved(own, scaling) | {name: saved[name] for name in kept | norms if name in saved}
        state_dict.update({home + name: value for name, value in saved.items()})


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """A whole value as the shards of a sharded weight, into which torch copies no whole one."""
    return shard_of(value, weight) if is_sharded(weight) and not is_sharded(value) else value


def _is_of_another_side(saved: Mapping[str, Tensor]) -> bool:
    """Whether norms have been saved with the block of another sharding, as distributed checkpoints load it."""
    if saved["norm"].is_meta or bool(saved["norm"].isnan().any()):
        return False
    return is_of_another_side(saved)


def _unsolved(buffers: Mapping[str, Tensor], scaling: NormScaling) -> dict[str, Tensor]:
    """The buffers of a weight that is to be solved: its norms are not known, and the solver has no state."""
    state = scaling.solver_state()
    return {
        name: torch.zeros_like(one) if name in state else torch.full_like(one, torch.nan) if name in MEASURED else one
        for name, one in buffers.items()
    }


def follow_sharding(module: nn.Module, *_: Any) -> None:
    """Give the buffers the names and shapes that they have for sharded weights, before a state dict is made of them."""
    for tensor, scaling in scalings_of(module):
        scaling.follow_sharding_(original(module, tensor))


def _beside(weight: Tensor, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of a weight on the meta device, for the one that is loaded in its place, where that is assigned."""
    if weight.is_meta:
        return buffers
    return {
        name: torch.zeros_like(one, device=weight.device) if one.is_meta else one.to(weight.device)
        for name, one in buffers.items()
    }


class LoadCheck:
    """Refuses a checkpoint before torch has loaded any of it, from the module that was put under scaling.

    torch loads module by module, and a layer's own hook comes too late for the layers before it. The scalings of one
    call share one check.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root: weakref.ref[nn.Module] | None = weakref.ref(root)
        self.handle: RemovableHandle | None = root.register_load_state_dict_pre_hook(self._refuse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadCheck":
        copied = memo[id(self)] = LoadCheck.__new__(LoadCheck)
        root = memo.get(id(self._root())) if self._root is not None else None
        # A copy of a layer alone must not bring the whole model with it.
        copied._root = None if root is None else weakref.ref(root)
        copied.handle = None if root is None else copy.deepcopy(self.handle, memo)
        return copied

    def __getstate__(self) -> NoReturn:
        # It is met before the layers, of which pickle would refuse the first.
        refuse_pickling()

    def _weights(self, root: nn.Module) -> Iterator[Weight]:
        return (weight for weight in scaled_weights(root) if weight.scaling.load_check is self)

    @public_call("load_state_dict")
    def _refuse(self, root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        by_home: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in state_dict.items():
            home, dot, buffer = key.rpartition(".")
            by_home[home + dot][buffer] = value
        without_schedule = False
        for weight in self._weights(root):
            layer = f"{prefix}{weight.layer}".removesuffix(".")
            own = f"{layer}." if layer else ""
            key, home = _keys(weight.module, weight.tensor, weight.scaling, own)
            if key in state_dict or own + weight.tensor in state_dict:
                saved = dict(by_home[home])
                _rename_old_buffers(saved, weight.scaling)
                _rename_target(saved, replace(weight, layer=layer))
                without_schedule |= weight.scaling.schedule is None and "base_target" in saved
        if without_schedule:
            warnings.warn(
                "load_state_dict: the checkpoint's targets followed a schedule, which the model was not given: they "
                "stay as they were at its last step. To go on, give apply_norm_scaling the schedule before loading",
                stacklevel=7,
            )

    def end_if_unused(self) -> None:
        """Leave the module as it was before the check, once none of the check's weights is scaled any more."""
        root = self._root() if self._root is not None else None
        if root is not None and self.handle is not None and not any(True for _ in self._weights(root)):
            self.handle.remove()


def check_before_loading(root: nn.Module, weights: Iterable[Weight]) -> None:
    """Refuse, at the root, a checkpoint that these scaled weights below it could not hold."""
    check = LoadCheck(root)
    for weight in weights:
        weight.scaling.load_check = check


def refuse_pickling() -> NoReturn:
    """Refuse a pickle of a scaled model, of which torch's classes for parametrized layers allow none."""
    raise RuntimeError(
        "pickle: the model is under norm scaling, and a parametrized module cannot be pickled; save "
        "model.state_dict(), or pickle the model inside `with scaling.plain():`"
    )


def end_unused_checks(weights: Iterable[Weight]) -> None:
    """Once these weights are not scaled any more: take the checks off that no other weight needs."""
    for check in {weight.scaling.load_check for weight in weights}:
        if isinstance(check, LoadCheck):
            check.end_if_unused()


def _shapes(buffers: Mapping[str, Tensor], without: set[str]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in buffers.items() if name not in without}


def _rename_old_buffers(saved: dict[str, Any], scaling: NormScaling) -> None:
    """Bring the buffers of an older checkpoint under today's names.

    Version 0.1.0 held `target`, 0 for a matrix that is skipped, and `order`: 2 for the Frobenius norm, 0 for the
    spectral. Its block had last directions, `direction`. Until 0.3.0, `age` was an integer, and `key` seeded the noise.
    """
    for name in ("direction", "key"):
        saved.pop(name, None)
    if "age" in saved:
        saved["age"] = saved["age"].to(scaling.norm.dtype)
    if "target" in saved:
        target, order = saved.pop("target"), saved.pop("order", None)
        names = {2: "frobenius", 0: "spectral"}
        name = scaling.constraint.name if order is None else names.get(int(order), f"order {int(order)}")
        saved[f"target_{name}"] = target


def _rename_target(saved: dict[str, Any], weight: Weight) -> None:
    """Bring the checkpoint's targets under this constraint's name; refuse those that it could not hold."""
    norm = weight.scaling.constraint.norm.name
    for key in [key for key in saved if key.startswith("target_")]:
        name = key.removeprefix("target_")
        if name not in CONSTRAINTS:
            raise Refusal(
                f"the checkpoint's target of {weight.name!r} is of {name!r}, which is none of the constraints "
                f"{one_of(CONSTRAINTS)}"
            )
        if CONSTRAINTS[name].norm_type.name != norm:
            raise Refusal(
                f"the checkpoint's target of {weight.name!r} is not of the {norm} norm; "
                "apply_norm_scaling with the other norm before loading, or load a plain state dict"
            )
        target = saved.pop(key)
        # Without a mask, 0 marks a matrix that is skipped, as version 0.1.0 wrote it.
        saved.setdefault("skip_mask", (target == 0).to(target.dtype))
        scaled = target[saved["skip_mask"] == 0]
        if not scaled.is_meta and not bool((scaled.isfinite() & (scaled > 0)).all()):
            raise Refusal(
                f"the checkpoint's target of {weight.name!r} must be finite and positive, found {target.tolist()}"
            )
        saved[weight.scaling.target_name] = target


def _complete_schedule(saved: dict[str, Any], scaling: NormScaling) -> None:
    """Bring a checkpoint's targets under this scaling's schedule, or under none.

    Without a schedule, the targets that were in force are held. Under one, those of a checkpoint without are the base
    targets, at step 0.
    """
    if scaling.schedule is None:
        for name in SCHEDULED:
            saved.pop(name, None)
    elif scaling.target_name in saved and not all(name in saved for name in SCHEDULED):
        base = saved[scaling.target_name]
        saved["base_target"], saved["num_steps"] = base, torch.zeros_like(base)
        if not base.is_meta:
            saved[scaling.target_name] = base * scaling.factors(saved["num_steps"])


def solve_what_was_missing(module: nn.Module, _: Any) -> None:
    for tensor, scaling in scalings_of(module):
        parameter = original(module, tensor)
        # A sharded one at the next step, which all processes take.
        waits = scaling.needs_solve and is_sharded(parameter)
        if scaling.needs_solve and not waits and not parameter.is_meta:
            solve_anew_(scaling, parameter)
        scaling.needs_solve = False
        scaling.take_as_loaded_(parameter, is_unsolved=waits)


def take_as_loaded(scaling: NormScaling, _: Any) -> None:
    """Where a loader takes each module alone, such as Lightning's for sharded models, the layer is not asked."""
    scaling.take_as_loaded_(scaling.owned)


@public_call()
def plain_state_dict(model_or_state_dict: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the plain model, names, order and content, from the scaled model or from its state dict.

    Examples:
        >>> saved = torch.load("checkpoint.pt")["state_dict_ema"]
        >>> plain.load_state_dict(plain_state_dict(saved))

    A state dict needs no model, and its names may have a prefix, such as `module.`. It is not changed, and the tensors
    are not copied. A weight comes first in its layer, since its plain place is not in the state dict, but for layers of
    torch that have another order. A model or state dict without a scaled weight gives its state dict as it is.

    Raises:
        TypeError: it is neither a module nor a mapping.
        ValueError: a scaled weight has another parametrization on top.
    """
    if isinstance(model_or_state_dict, nn.Module):
        return _plain_from_model(model_or_state_dict)
    if isinstance(model_or_state_dict, Mapping):
        return plain_from_saved(model_or_state_dict)
    found = type(model_or_state_dict).__name__
    raise Refusal(f"expected a torch.nn.Module or a state dict, found {found}", TypeError)


def refuse_others_on_top(weight: Weight) -> None:
    """Refuse a weight with another parametrization on top of its scaling."""
    if others := others_on_top(weight.module, weight.tensor):
        raise _refusal_on_top(weight.tensor, weight.layer, (type(one).__name__ for one in others))


def _plain_from_model(model: nn.Module) -> dict[str, Any]:
    by_module: dict[nn.Module, list[Weight]] = defaultdict(list)
    for weight in scaled_weights(model):
        refuse_others_on_top(weight)
        by_module[weight.module].append(weight)

    # A module's hook sees all of its keys, and runs before those of the modules around it.
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        for weight in by_module[module]:
            scaled, home = _keys(module, weight.tensor, weight.scaling, prefix)
            own = {key: value for key, value in own.items() if not key.startswith(home)}
            if scaled in own:
                own[prefix + weight.tensor] = own.pop(scaled)
            _forget(getattr(state, "_metadata", {}), prefix, weight.tensor)
        # Registering moved the weight behind the layer's other parameters: back to its plain place.
        order = [prefix + name for weight in by_module[module] for name in weight.scaling.parameter_order]
        state.update({key: own.pop(key) for key in dict.fromkeys(order) if key in own})
        state.update(own)

    hooks = [module.register_state_dict_post_hook(rename) for module in by_module]
    try:
        return model.state_dict()
    finally:
        for hook in hooks:
            hook.remove()


def plain_from_saved(state: Mapping[str, Any], weights: Collection[str] = ()) -> dict[str, Any]:
    """The plain state dict from a saved one, by its names alone.

    `weights` are names of scaled weights that are known from elsewhere: an average of parameters has no buffers.
    """
    scalings = set(saved_scalings(state))
    if not (scalings or weights):
        return state if isinstance(state, dict) else dict(state)
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    _refuse_on_top(scalings, [*state, *metadata])
    kept = [key for key in state if scalings.isdisjoint(parametrizations_in(key))]
    scaled = {one.parameter for one in scalings} | set(weights)
    ordered = in_plain_order(kept, scaled)
    plain = {plain_name(key) if key in scaled else key: state[key] for key in ordered}
    if not isinstance(state, OrderedDict):
        return plain
    plain = OrderedDict(plain)
    if metadata:
        left = OrderedDict(metadata)
        for one in scalings:
            _forget(left, one.layer, one.tensor)
        plain._metadata = left  # type: ignore[attr-defined]
    return plain


def _refuse_on_top(scalings: Collection[SavedParametrization], names: Iterable[str]) -> None:
    """Refuse a tensor that has another parametrization beside its scaling, as far as the names show it."""
    tensors = {(one.layer, one.tensor) for one in scalings}
    for name in names:
        for one in parametrizations_in(name):
            if (one.layer, one.tensor) in tensors and one not in scalings:
                raise _refusal_on_top(one.tensor, one.layer.removesuffix("."), [repr(one.home.removesuffix("."))])


def _forget(metadata: dict[str, Any], prefix: str, tensor: str) -> None:
    """Take the entries of a tensor's parametrizations out of a state dict's metadata."""
    home = f"{prefix}parametrizations"
    for key in [key for key in metadata if f"{key}.".startswith(f"{home}.{tensor}.")]:
        del metadata[key]
    if not any(key.startswith(f"{home}.") for key in metadata):
        metadata.pop(home, None)


def _refusal_on_top(tensor: str, layer: str, others: Iterable[str]) -> Refusal:
    return Refusal(
        f"{tensor!r} of {layer!r} has a parametrization on top of its scaling, {', '.join(others)}; remove that first"
    )
