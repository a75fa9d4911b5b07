"""Following an optimizer: hooks that scale, after each of its steps, the weights that it has moved."""

import inspect
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from specscale.errors import Refusal, public_call, some_of
from specscale.held import HeldWeights
from specscale.saved_names import plain_name
from specscale.shards import is_sharded
from specscale.state import version_of
from specscale.step import ScalingStep, solve_first_
from specscale.weights import Weight, refuse_flat, refuse_gathered, refuse_whole_only

HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(max).__code__  # type: ignore[attr-defined]
"""The code of the wrapper with which torch calls hooks around an optimizer's `step`."""

_ATTACHED: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()
"""The optimizers that any handle has been attached to."""


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's parameters, in the order in which its state dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def owned_by(optimizer: torch.optim.Optimizer, weights: Iterable[Weight]) -> list[Weight]:
    """The weights among the optimizer's parameters."""
    owned = set(map(id, _parameters(optimizer)))
    return [weight for weight in weights if id(weight.parameter) in owned]


class StepHook:
    """Takes the scaling step after each step of an optimizer, for the weights that the step may have moved."""

    def __init__(self, held: HeldWeights, step: ScalingStep) -> None:
        self.held = held
        self._step = step
        self._owned: list[tuple[Weight, dict[str, Any], int | None, bool]] = []
        """The optimizer's weights with their groups, and from before the step their version counters and whether their
        learning rate was 0."""

    @public_call("load_state_dict")
    def before_load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse a state whose parameters are in another order, before it is loaded."""
        if self.held.is_off:
            # Inside `plain()`, the layers hold their weights themselves.
            return
        groups = state_dict["param_groups"]
        parameters = _parameters(optimizer)
        states = [state_dict["state"].get(number, {}) for group in groups for number in group["params"]]
        owned = owned_by(optimizer, self.held.current())
        if len(states) != len(parameters) or not owned:
            return
        saved, own = _plain_names(groups), _plain_names(optimizer.param_groups)
        if len(saved) == len(own) == len(parameters):
            different = [name for name, other in zip(saved, own, strict=True) if name != other]
            if different and set(saved) == set(own):
                raise _other_order(f"{different[0]!r} is the first of its names that has another place")
            return
        _refuse_other_order(owned, parameters, states)

    @public_call("step")
    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _is_inner_step(optimizer):
            return
        is_compiling = torch.compiler.is_compiling()
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._owned.clear()
        weights = self.held.current()
        refuse_gathered(weights)
        for weight in weights:
            parameter = weight.parameter
            if (group := groups.get(id(parameter))) is not None:
                version = 0 if is_compiling else version_of(parameter)
                self._owned.append((weight, group, version, _is_zero(group.get("lr"))))
        if not is_compiling:
            self.held.warn_of_lost("step", stacklevel=5)
            warn_of_unowned(self.held, "step", stacklevel=5)

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
        for weight, group, version, was_zero in self._owned:
            parameter, rate = weight.parameter, group.get("lr")
            # A scheduler's own hook may have set it for the next step.
            if was_zero and _is_zero(rate):
                # The step has written the same values.
                if not is_compiling:
                    weight.scaling.keep_current(parameter, version)
            elif parameter.grad is not None or (not is_compiling and version_of(parameter) != version):
                stepped.append(weight)
                rates.append(rate if _is_on_device(rate) else None)
        # GradScaler calls a fused optimizer for skipped steps too, and the optimizer skips by `found_inf` itself.
        self._step.take(stepped, _skip(rates, getattr(optimizer, "found_inf", None)))


def _is_on_device(rate: Any) -> bool:
    """Whether a learning rate is a tensor that the host must not read: a compiler cannot trace it either."""
    return isinstance(rate, Tensor) and (torch.compiler.is_compiling() or not rate.is_cpu)


def _is_zero(rate: Any) -> bool:
    """Whether a learning rate is known to the host to be 0."""
    if _is_on_device(rate):
        return False
    return not bool(rate.any()) if isinstance(rate, Tensor) else bool(rate == 0)


def _skip(rates: list[Tensor | None], found_inf: Tensor | None) -> Tensor | None:
    """Which weights must not move, known to the device alone: those of a learning rate 0, or all of a skipped step.

    One number for each weight, or one for all of them; positive where the weight must not move.
    """
    skip = None if found_inf is None else found_inf.reshape(1)
    # Parameters of one group have the same tensor.
    known = {id(rate): rate for rate in rates if rate is not None}
    if not known:
        return skip
    is_zero = {key: (rate == 0).all().float().reshape(1) for key, rate in known.items()}
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
            weights, is attached already, has a state in another order, or the weights are on the meta device or have
            been sharded (ValueError).
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
    refuse_flat(weights)
    refuse_whole_only((weight, weight.scaling.constraint) for weight in weights)
    owned = owned_by(optimizer, weights)
    if not owned:
        is_frozen = not any(weight.parameter.requires_grad for weight in weights)
        is_any_sharded = any(is_sharded(weight.parameter) for weight in weights)
        when = ", after fully_shard, which puts others in their place" if is_any_sharded else ""
        advice = "all of them are frozen" if is_frozen else f"build it from this model's parameters{when}"
        raise Refusal(f"{kind} owns none of the scaled weights; {advice}")
    if on_meta := [weight.name for weight in owned if weight.parameter.is_meta]:
        raise Refusal(
            f"the weight of {on_meta[0]!r} is on the meta device, and to_empty puts another parameter in its place; "
            f"build this {kind} after that"
        )
    parameters = _parameters(optimizer)
    _refuse_other_order(owned, parameters, [optimizer.state.get(parameter, {}) for parameter in parameters])
    # Another handle of the same model scales the same weights, hence the look into the optimizer's own list.
    held_by_others = [weight for other in hooks_of(optimizer) for weight in other.held.with_lost]
    taken = {w.scaling for w in held_by_others} | {id(w.parameter) for w in held_by_others}
    if any(weight.scaling in taken or id(weight.parameter) in taken for weight in owned):
        raise Refusal(f"this {kind} is attached already; a second hook would scale twice")
    if sharded := [weight for weight in weights if is_sharded(weight.parameter) and not weight.parameter.is_meta]:
        # In all processes together, while they are, those of other optimizers and frozen ones too: a report, which one
        # process may make alone, cannot.
        solve_first_(sharded)
    hook = StepHook(held, step)
    _ATTACHED.add(optimizer)
    held.has_new_owner = True
    return (
        optimizer.register_step_pre_hook(hook.before_step),
        optimizer.register_step_post_hook(hook.after_step),
        optimizer.register_load_state_dict_pre_hook(hook.before_load),
    )


def hooks_of(optimizer: torch.optim.Optimizer) -> list[StepHook]:
    """What handles have put on the optimizer."""
    hooks = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values())
    return [hook for hook in hooks if isinstance(hook, StepHook)]


def warn_of_unowned(held: HeldWeights, call: str, stacklevel: int) -> None:
    """Name, once after an optimizer was attached, the weights that train and that no attached optimizer has.

    Not when it is attached: the optimizer of the others may be attached next, by this handle or by another.
    """
    if not held.has_new_owner:
        return
    held.has_new_owner = False
    owners = [optimizer for optimizer in _ATTACHED if hooks_of(optimizer)]
    owned = {id(parameter) for optimizer in owners for parameter in _parameters(optimizer)}
    weights = [weight for weight in held.current() if weight.parameter.requires_grad]
    unowned = [weight.name for weight in weights if id(weight.parameter) not in owned]
    if unowned:
        is_any_sharded = any(is_sharded(weight.parameter) for weight in weights)
        which = " (one that was built after fully_shard)" if is_any_sharded else ""
        warnings.warn(
            f"{call}: {len(unowned)} of {len(weights)} weights are in no attached optimizer, and no step scales them: "
            f"{some_of(unowned)}. Attach the optimizer that trains them{which}, or freeze or exclude what is not "
            "trained",
            stacklevel=stacklevel,
        )


def _refuse_other_order(weights: list[Weight], parameters: list[Tensor], states: list[Mapping[str, Any]]) -> None:
    """Refuse an optimizer's state, one for each parameter, that was saved from parameters in another order.

    An optimizer numbers its parameters, and scaling moves a weight behind the others of its layer. Told by the shapes:
    a weight's state has none of the weight's shape, which that of another parameter has in place of its own.
    """
    shapes = [{one.shape for one in state.values() if isinstance(one, Tensor) and one.ndim} for state in states]
    misplaced = [i for i, (p, own) in enumerate(zip(parameters, shapes, strict=True)) if own and p.shape not in own]
    found_elsewhere = {shape for i in misplaced for shape in shapes[i]}
    misplaced_ids = {id(parameters[i]) for i in misplaced}
    for weight in weights:
        if id(weight.parameter) in misplaced_ids and weight.parameter.shape in found_elsewhere:
            raise _other_order(f"that of {weight.name!r} has the shapes of another parameter")


def _plain_names(groups: list[dict[str, Any]]) -> list[str]:
    """The names of an optimizer's parameters that was built from named ones."""
    return [plain_name(name) for group in groups for name in group.get("param_names", ())]


def _other_order(how: str) -> Refusal:
    return Refusal(
        f"the optimizer's state is in another order than its parameters: {how}. Scaling moves a weight behind the "
        "others of its layer. For a state of the plain model, build the optimizer before scaling or inside "
        "`with scaling.plain():`; for one of the scaled model, from the scaled model's parameters"
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
