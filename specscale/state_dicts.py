"""What state dicts go into a scaled model and come out of it."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from specscale.constraints import CONSTRAINTS
from specscale.errors import Refusal, one_of, public_call
from specscale.state import NormScaling, original, others_on_top, scalings_of
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
    """Bring the buffers of a checkpoint of version 0.1.0 under today's names.

    It held `target`, 0 for a matrix that is skipped, and `order`: 2 for the Frobenius norm, 0 for the spectral. Its
    block had last directions, `direction`, which none has today.
    """
    saved.pop("direction", None)
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


def solve_what_was_missing(module: nn.Module, _: Any) -> None:
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
        if others := others_on_top(weight.module, weight.tensor):
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
