"""A look at each optimizer's first two steps, for scaled weights that train and that nothing scales."""

import warnings
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from specscale.attach import hooks_of
from specscale.errors import some_of
from specscale.state import PLAIN_LAYERS, REGISTERED, NormScaling

_num_steps: "weakref.WeakKeyDictionary[torch.optim.Optimizer, int]" = weakref.WeakKeyDictionary()
"""The steps that each optimizer has begun, as far as they are looked at."""

_is_on = False


def watch_optimizers() -> None:
    """Look, from now on, at the first two steps of every optimizer.

    By torch's hook for all optimizers: who has forgotten to attach one has given no optimizer to put a hook on, and a
    hook on the parameters or the forward pass would cost something at every step for good.
    """
    global _is_on
    if not _is_on:
        _is_on = True
        register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # It runs for every optimizer of the process, and must break none: a class with `__eq__` alone is no key.
    if torch.compiler.is_compiling() or PLAIN_LAYERS or type(optimizer).__hash__ is None:
        return
    number = _num_steps.get(optimizer, 0)
    if number < 2:
        _num_steps[optimizer] = number + 1
        # What the first step has moved has been scaled by now, by a hook or by a call.
        if number == 1:
            _warn_of_unscaled(optimizer)


def _warn_of_unscaled(optimizer: torch.optim.Optimizer) -> None:
    attached = {weight.scaling for hook in hooks_of(optimizer) for weight in hook.held.with_lost}
    scalings: dict[int, NormScaling] = {
        one.recorded_id: one for one in REGISTERED if one.recorded_id is not None and one not in attached
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [(scalings[id(one)], one) for one in parameters if id(one) in scalings]
    if stale := [scaling.seed_name for scaling, parameter in found if scaling.is_stale(parameter)]:
        warnings.warn(
            f"{type(optimizer).__name__} trains scaled weights that nothing scales: its first step moved "
            f"{some_of(stale)}, and no scaling step came before its second. Call scaling.attach(optimizer), or "
            "scaling.step() after each of its steps; to train without scaling, scaling.remove()",
            stacklevel=4,
        )
