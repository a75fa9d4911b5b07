"""Gains and targets: from a rule, a number or a function to one positive number per weight."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from specscale.errors import one_of
from specscale.selection import Weight

Rule = str | float | Callable[[str, nn.Module], float]

GAINS = ("channels", "features", "matrix")


def _positive(call: str, option: str, found: Any, where: str = "") -> float:
    if isinstance(found, bool) or not isinstance(found, Real):
        raise TypeError(f"{call}: {option} must be a number{where}, found {type(found).__name__}")
    value = float(found)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{call}: {option} must be finite and positive{where}, found {value}")
    return value


def check_rule(call: str, option: str, rule: Any, names: tuple[str, ...]) -> None:
    """Refuse what is no rule, before a model is looked at."""
    if isinstance(rule, str):
        if rule not in names:
            raise ValueError(
                f"{call}: unknown {option} {rule!r}; choose {one_of(names)}, a number, "
                "or a function (name, module) -> float"
            )
    elif not callable(rule):
        _positive(call, option, rule)


def evaluate(
    call: str, option: str, rule: Rule, weights: list[Weight], model: nn.Module, example_input: Any
) -> dict[str, float]:
    """The value of the rule for each weight, by name; a named rule is a gain.

    `"channels"`: sqrt(d_out / d_in) of the feature or channel counts; `"features"`: of the sizes of the module's output
    and input; `"matrix"`: sqrt(m / n) of the matrix view.

    Raises:
        TypeError: a function's value is no number.
        ValueError: a value is not finite and positive, or `"features"` cannot be measured.
    """
    if rule == "features":
        return _features(call, weights, model, example_input)
    values = {}
    for weight in weights:
        if rule == "channels":
            d_out, d_in = weight.view.channels(weight.parameter)
        elif rule == "matrix":
            d_out, d_in = weight.view.matrices(weight.parameter).shape[1:]
        else:
            value = rule(weight.name, weight.module) if callable(rule) else rule
            values[weight.name] = _positive(call, option, value, f" for {weight.name!r}")
            continue
        values[weight.name] = math.sqrt(d_out / d_in)
    return values


def _features(call: str, weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    if example_input is None:
        raise ValueError(f'{call}: "features" needs example_input, a batch to read the activation sizes from')
    sizes = activation_sizes(model, [weight.module for weight in weights], example_input)
    gains = {}
    for weight in weights:
        d_out, d_in = weight.view.channels(weight.parameter)
        # Without a kernel, each position's output is made of the same position's input: the counts' ratio is the
        # sizes' ratio, and holds for a projection within attention that is never called as a module.
        if weight.view.split(weight.parameter).ndim > 3:
            if weight.module not in sizes:
                raise ValueError(
                    f'{call}: "features" needs the sizes of {weight.name!r}, which example_input did not reach; '
                    "exclude it, or choose another rule"
                )
            d_in, d_out = sizes[weight.module]
        gains[weight.name] = math.sqrt(d_out / d_in)
    return gains


def activation_sizes(
    model: nn.Module, modules: list[nn.Module], example_input: Any
) -> Mapping[nn.Module, tuple[int, int]]:
    """Elements of each module's input and output in its first call; the model is left as it was.

    `example_input`: a tensor, a tuple of positional or a dictionary of keyword arguments. The model runs in evaluation
    mode, so that no running statistics move.
    """
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            sizes.setdefault(module, (args[0].numel(), output.numel()))

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(record) for module in modules]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(example_input, Mapping):
                model(**example_input)
            else:
                model(*example_input if isinstance(example_input, tuple) else (example_input,))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return sizes
