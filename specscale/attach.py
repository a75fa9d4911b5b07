"""Following an optimizer: hooks that scale, after each of its steps, the weights that it has moved."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from specscale.errors import Refusal, public_call
from specscale.held import HeldWeights
from specscale.step import ScalingStep
from specscale.weights import Weight, refuse_sharded

HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(max).__code__  # type: ignore[attr-defined]
"""The code of the wrapper with which torch calls hooks around an optimizer's `step`."""


def owned_by(optimizer: torch.optim.Optimizer, weights: Iterable[Weight]) -> list[Weight]:
    """The weights among the optimizer's parameters."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [weight for weight in weights if id(weight.parameter) in owned]


class StepHook:
    """Takes the scaling step after each step of an optimizer, for the weights that the step may have moved."""

    def __init__(self, held: HeldWeights, step: ScalingStep) -> None:
        self.held = held
        self._step = step
        self._owned: list[tuple[Weight, dict[str, Any], int]] = []
        """The optimizer's weights with their groups, and their version counters before the step."""

    @public_call("load_state_dict")
    def before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse a state whose parameters are in another order, before it is loaded."""
        if self.held.is_off:
            # Inside `plain()`, the layers hold their weights themselves.
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        states = {id(p): state_dict["state"].get(number, {}) for p, number in zip(parameters, numbers, strict=False)}
        _refuse_other_order(owned_by(optimizer, self.held.current()), states)

    @public_call("step")
    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _is_inner_step(optimizer):
            return
        is_compiling = torch.compiler.is_compiling()
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._owned.clear()
        for weight in self.held.current():
            parameter = weight.parameter
            if (group := groups.get(id(parameter))) is not None:
                self._owned.append((weight, group, 0 if is_compiling else parameter._version))
        if not is_compiling:
            self.held.warn_of_lost("step", stacklevel=5)

    @public_call("step")
    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the weights that were stepped; the others must not move: the spectral update is not idempotent.

        A stepped weight has a gradient, or its version counter has changed. Neither alone is enough: an optimizer may
        clear the gradients in its step, and a write to `.data` does not change the counter. Its learning rate is not 0:
        to make an optimizer's state, torch's distributed checkpoints take a step with zero gradients at that rate. To
        compare the weight before and after the step would see more, and would have to read it twice.
        """
        if _is_inner_step(optimizer):
            return
        is_compiling = torch.compiler.is_compiling()
        stepped: list[Weight] = []
        rates: list[Tensor | None] = []
        for weight, group, version in self._owned:
            parameter, rate = weight.parameter, group.get("lr")
            is_on_device = isinstance(rate, Tensor) and (is_compiling or not rate.is_cpu)
            if not is_on_device and rate == 0:
                # The step has written the same values.
                if not is_compiling:
                    weight.scaling.keep_current(parameter, version)
            elif parameter.grad is not None or (not is_compiling and parameter._version != version):
                stepped.append(weight)
                rates.append(rate if is_on_device else None)
        # GradScaler calls a fused optimizer for skipped steps too, and the optimizer skips by `found_inf` itself.
        self._step.take(stepped, _skip(rates, getattr(optimizer, "found_inf", None)))


def _skip(rates: list[Tensor | None], found_inf: Tensor | None) -> Tensor | None:
    """Which weights must not move, known to the device alone: those of a learning rate 0, or all of a skipped step.

    One number for each weight, or one for all of them; positive where the weight must not move.
    """
    skip = None if found_inf is None else found_inf.reshape(1)
    # Parameters of one group have the same tensor.
    known = {id(rate): rate for rate in rates if rate is not None}
    if not known:
        return skip
    is_zero = {key: (rate == 0).float().reshape(1) for key, rate in known.items()}
    if len(known) == 1 and None not in rates:
        (each,) = is_zero.values()
    else:
        never = torch.zeros_like(next(iter(is_zero.values())))
        each = torch.cat([never if rate is None else is_zero[id(rate)].to(never.device) for rate in rates])
    return each if skip is None else torch.maximum(each, skip.to(each))


def attach(optimizer: torch.optim.Optimizer, held: HeldWeights, step: ScalingStep) -> tuple[RemovableHandle, ...]:
    """Take the step for those of the held weights that the optimizer owns, after each of its steps.

    Raises:
        Refusal: `optimizer` is no torch optimizer (TypeError); it would never call a step hook, owns none of the
            weights, is attached already, has a state in another order, or the weights have been sharded (ValueError).
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Refusal(f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}", TypeError)
    kind = type(optimizer).__name__
    if not getattr(type(optimizer).step, "hooked", False):
        raise Refusal(
            f"{kind} never calls step hooks; call scaling.step() after each of its steps, or attach to the optimizer "
            f"that it wraps, if {kind} does not write to the weights after that one's step"
        )
    weights = held.current()
    refuse_sharded(weights)
    owned = owned_by(optimizer, weights)
    if not owned:
        is_frozen = not any(weight.parameter.requires_grad for weight in weights)
        advice = "all of them are frozen" if is_frozen else "build it from this model's parameters"
        raise Refusal(f"{kind} owns none of the scaled weights; {advice}")
    _refuse_other_order(owned, {id(parameter): state for parameter, state in optimizer.state.items()})
    # Another handle of the same model scales the same weights, hence the look into the optimizer's own list.
    others = [getattr(other, "__self__", None) for other in optimizer._optimizer_step_post_hooks.values()]
    taken = {weight.scaling for other in others if isinstance(other, StepHook) for weight in other.held.with_lost}
    if any(weight.scaling in taken for weight in owned):
        raise Refusal(f"this {kind} is attached already; a second hook would scale twice")
    hook = StepHook(held, step)
    return (
        optimizer.register_step_pre_hook(hook.before_step),
        optimizer.register_step_post_hook(hook.after_step),
        optimizer.register_load_state_dict_pre_hook(hook.before_load),
    )


def _refuse_other_order(weights: Iterable[Weight], states: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse an optimizer's state, by the parameters' ids, that was saved from parameters in another order.

    An optimizer numbers its parameters, and scaling moves a weight behind the others of its layer.
    """
    for weight in weights:
        shape = weight.parameter.shape
        for name, other in weight.module._parameters.items():
            tensors = (value for value in states.get(id(other), {}).values() if isinstance(value, Tensor))
            if other is not None and any(value.shape == shape != other.shape for value in tensors):
                raise Refusal(
                    f"the optimizer's state is in another order than its parameters: that of {name!r} of "
                    f"{weight.layer!r} has the shape {tuple(shape)} of {weight.tensor!r}, which scaling moves behind "
                    "the layer's other parameters. For a state of the plain model, build the optimizer before scaling "
                    "or inside `with scaling.plain():`; for one of the scaled model, from the scaled model's parameters"
                )


def _is_inner_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that begins or ends was called by one that overrides it: torch calls the hooks of both."""
    if torch.compiler.is_compiling():
        return False
    if sum(getattr(vars(kind).get("step"), "hooked", False) for kind in type(optimizer).__mro__) < 2:
        return False
    # A count of the steps that have begun would be wrong for good after one that raises; the call stack never is.
    running, frame = 0, inspect.currentframe()
    while frame is not None:
        running += frame.f_code is HOOKED_STEP and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back
    return running > 1
