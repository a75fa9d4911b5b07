"""How a scaling gets onto a layer and off it, and what state dicts go in and come out while it is there."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from specscale.constraints import CONSTRAINTS
from specscale.errors import Refusal, one_of, public_call
from specscale.state import NormScaling, original, parametrizations_of, scaling_of, scalings_of
from specscale.step import solve_anew_
from specscale.weights import Weight, scaled_weights


def register(module: nn.Module, tensor: str, scaling: NormScaling) -> None:
    """Put a layer's tensor under a scaling; plain checkpoints still load into the layer."""
    parametrize.register_parametrization(module, tensor, scaling, unsafe=True)
    _shorten_access(module, tensor)
    scaling.load_hooks = (
        module.register_load_state_dict_pre_hook(_complete_state_dict),
        module.register_load_state_dict_post_hook(_solve_what_was_missing),
    )


def _shorten_access(module: nn.Module, tensor: str) -> None:
    """Let the layer find the weight without calling its parametrizations, where a scaling is the only one.

    A scaling returns the parameter as it is, and the two calls of modules on the way take the host 15 microseconds for
    every layer in every forward pass.
    """
    kind = type(module)
    computed: property = vars(kind)[tensor]

    def weight(layer: nn.Module) -> Any:
        chain = parametrizations_of(layer, tensor)
        if chain is not None and len(chain._modules) == 1 and isinstance(chain._modules["0"], NormScaling):
            return chain._parameters["original"]
        return computed.fget(layer)  # type: ignore[misc]

    setattr(kind, tensor, property(weight, computed.fset))


def unregister(module: nn.Module, tensor: str) -> None:
    """Take the scaling off: the same parameter, under its plain name and in its plain place.

    Another parametrization that has been registered on top stays.
    """
    scaling = scaling_of(module, tensor)
    assert scaling is not None
    for hook in scaling.load_hooks:
        hook.remove()
    if _others(module, tensor):
        chain = module.parametrizations[tensor]  # type: ignore[union-attr, index]
        del chain[list(chain).index(scaling)]  # type: ignore[union-attr]
        return
    # A deep copy shares the class that parametrize made for the layer, and would lose the tensor with it.
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    for name in scaling.parameter_order:
        if name in module._parameters:
            parameter = module._parameters[name]
            delattr(module, name)
            module.register_parameter(name, parameter)


def _others(module: nn.Module, tensor: str) -> list[nn.Module]:
    """The parametrizations that others have registered on top; the scaling holds the parameter behind them."""
    return [p for p in module.parametrizations[tensor] if not isinstance(p, NormScaling)]  # type: ignore[union-attr, index]


def _keys(module: nn.Module, tensor: str, scaling: NormScaling, prefix: str) -> tuple[str, str]:
    """A state dict's key of a scaled weight, and the prefix of the keys of its scaling's buffers."""
    home = f"{prefix}parametrizations.{tensor}."
    index = list(module.parametrizations[tensor]).index(scaling)  # type: ignore[union-attr, index]
    return f"{home}original", f"{home}{index}."


@public_call("load_state_dict")
def _complete_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Complete a checkpoint before torch loads it: rename a plain weight, add the state that this solver needs.

    Raises:
        ValueError: the checkpoint's targets are of another norm.
    """
    for tensor, scaling in scalings_of(module):
        # torch cannot swap a tensor that has a weak reference.
        scaling.mark_current(None)
        weight, home = _keys(module, tensor, scaling, prefix)
        if prefix + tensor in state_dict:
            state_dict[weight] = state_dict.pop(prefix + tensor)
        if weight not in state_dict:
            continue
        saved = {k.removeprefix(home): state_dict.pop(k) for k in list(state_dict) if k.startswith(home)}
        _rename_old_buffers(saved, scaling)
        _rename_target(saved, scaling, Weight(prefix.removesuffix("."), module, tensor, scaling.view, scaling.is_only))
        own = dict(scaling.named_buffers())
        # These need no solver; without one of the others, all of them are solved anew from the weight.
        kept = {scaling.target_name, "skip_mask"}
        if _shapes(own, kept) != _shapes(saved, kept):
            scaling.needs_solve = True
            saved = own | {name: saved[name] for name in kept if name in saved}
        state_dict.update({home + name: value for name, value in saved.items()})


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


def _rename_target(saved: dict[str, Any], scaling: NormScaling, weight: Weight) -> None:
    """Bring the checkpoint's targets under this constraint's name; refuse those that it could not hold."""
    norm = scaling.constraint.norm.name
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
        saved[scaling.target_name] = target


def _solve_what_was_missing(module: nn.Module, _: Any) -> None:
    for tensor, scaling in scalings_of(module):
        parameter = original(module, tensor)
        scaling.mark_current(parameter)
        if scaling.needs_solve:
            scaling.needs_solve = False
            solve_anew_(scaling, parameter)


@public_call()
def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """A scaled model's state dict as the plain model's: names, order and content.

    Raises:
        ValueError: a scaled weight has another parametrization on top.
    """
    by_module: dict[nn.Module, list[Weight]] = defaultdict(list)
    for weight in scaled_weights(model):
        if others := _others(weight.module, weight.tensor):
            kinds = ", ".join(type(one).__name__ for one in others)
            raise Refusal(
                f"{weight.tensor!r} of {weight.layer!r} has a parametrization on top of its scaling, {kinds}; "
                "remove that first"
            )
        by_module[weight.module].append(weight)

    # A module's hook sees all of its keys, and runs before those of the modules around it.
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        for weight in by_module[module]:
            scaled, home = _keys(module, weight.tensor, weight.scaling, prefix)
            own = {key: value for key, value in own.items() if not key.startswith(home)}
            if scaled in own:
                own[prefix + weight.tensor] = own.pop(scaled)
        # Registering moved the weight behind the layer's other parameters: back to its plain place.
        order = [prefix + name for weight in by_module[module] for name in weight.scaling.parameter_order]
        state.update({key: own.pop(key) for key in dict.fromkeys(order) if key in own})
        state.update(own)
        metadata = getattr(state, "_metadata", {})
        for key in [key for key in metadata if key.startswith(f"{prefix}parametrizations")]:
            del metadata[key]

    hooks = [module.register_state_dict_post_hook(rename) for module in by_module]
    try:
        return model.state_dict()
    finally:
        for hook in hooks:
            hook.remove()
