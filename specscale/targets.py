"""Gains and targets: from a name, a number or a function to one positive number for each weight."""

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from specscale.constraints import Constraint
from specscale.errors import Refusal, one_of
from specscale.weights import Weight, evaluation_mode

Gain = str | float | Callable[[str, nn.Module], float]
Target = Gain


def _by_channels(weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """`sqrt(d_out / d_in)` of the feature or channel counts."""
    return {weight.name: _ratio(*weight.view.channels(weight.parameter)) for weight in weights}


def _by_features(weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """`sqrt(d_out / d_in)` of the sizes of each layer's output and input, in a call of the model."""
    if example_input is None:
        raise Refusal('"features" needs example_input, a batch to read the activation sizes from')
    sizes = activation_sizes(model, [weight.module for weight in weights], example_input)
    gains = {}
    for weight in weights:
        d_out, d_in = weight.view.channels(weight.parameter)
        # Without a kernel, each position of the output comes from one position of the input: the ratio of the sizes is
        # that of the counts, and is known for a projection within attention too, which is never called as a module.
        if weight.view.has_kernel:
            if weight.module not in sizes:
                raise Refusal(
                    f'"features" needs the sizes of {weight.name!r}, which example_input did not reach; '
                    "exclude it, or choose another gain or target"
                )
            d_in, d_out = sizes[weight.module]
        gains[weight.name] = _ratio(d_out, d_in)
    return gains


def _by_matrix(weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """`sqrt(m / n)` of the weight's matrices `(m, n)`."""
    return {weight.name: _ratio(*weight.view.matrix_shape(weight.parameter)) for weight in weights}


def _ratio(d_out: int, d_in: int) -> float:
    return math.sqrt(d_out / d_in)


GAINS = {"channels": _by_channels, "features": _by_features, "matrix": _by_matrix}
"""The named gains."""


def check_setting(option: str, setting: Any, names: Iterable[str]) -> None:
    """Refuse what is no gain or target, before a model is looked at."""
    if isinstance(setting, str):
        if setting not in names:
            raise Refusal(
                f"unknown {option} {setting!r}; choose {one_of(names)}, a number, or a function (name, module) -> float"
            )
    elif not callable(setting):
        _positive(option, setting)


def resolve(
    option: str, setting: Gain, weights: list[Weight], model: nn.Module, example_input: Any
) -> dict[str, float]:
    """The number that a gain, a number or a function gives for each weight, by name.

    Raises:
        Refusal: a function's value is no number (TypeError); a value is not finite and positive, or `"features"`
            cannot be measured (ValueError).
    """
    if isinstance(setting, str):
        return GAINS[setting](weights, model, example_input)
    numbers = {}
    for weight in weights:
        try:
            number = setting(weight.name, weight.module) if callable(setting) else setting
        except Exception as error:
            error.add_note(f"raised by the {option} function for {weight.name!r}")
            raise
        numbers[weight.name] = _positive(option, number, f" for {weight.name!r}")
    return numbers


def resolve_gains(setting: Gain, weights: list[Weight], model: nn.Module, example_input: Any) -> dict[str, float]:
    """The init's gain for each weight, by name, within the range of the weight's dtype."""
    gains = resolve("gain", setting, weights, model, example_input)
    for weight in weights:
        _refuse_out_of_range("gain", gains[weight.name], weight, weight.parameter.dtype)
    return gains


def resolve_targets(
    setting: Target, constraint: Constraint, weights: list[Weight], model: nn.Module, example_input: Any
) -> dict[str, float] | None:
    """The target norm of each weight's matrices, by name, within the range of the buffer that holds it.

    A named gain means the norm of an orthogonal matrix with that gain; a number is the norm itself. None for
    `"initial"`: then the norm that `apply_norm_scaling` measures becomes the target (`NormScaling.retarget_`).
    """
    if setting == "initial":
        return None
    targets = resolve("target", setting, weights, model, example_input)
    for weight in weights:
        if isinstance(setting, str):
            gain = targets[weight.name]
            targets[weight.name] = constraint.of_orthogonal(gain, weight.view, weight.parameter)
        dtype = torch.promote_types(weight.parameter.dtype, torch.float32)
        _refuse_out_of_range("target", targets[weight.name], weight, dtype)
    return targets


def _positive(option: str, number: Any, where: str = "") -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise Refusal(f"{option} must be a number{where}, found {type(number).__name__}", TypeError)
    value = float(number)
    if not (math.isfinite(value) and value > 0):
        raise Refusal(f"{option} must be finite and positive{where}, found {value}")
    return value


def _refuse_out_of_range(option: str, number: float, weight: Weight, dtype: torch.dtype) -> None:
    """Refuse a number that the dtype does not hold: it would be zero, infinite, or have few digits."""
    if not torch.finfo(dtype).tiny <= number <= torch.finfo(dtype).max:
        raise Refusal(f"{option} {number:.3g} for {weight.name!r} is out of the range of {dtype}")


def activation_sizes(
    model: nn.Module, modules: list[nn.Module], example_input: Any
) -> Mapping[nn.Module, tuple[int, int]]:
    """Elements of each module's input and output in its first call; the model is left as it was.

    `example_input` is a tensor, a tuple of positional or a dictionary of keyword arguments. The model runs in
    evaluation mode, so that no running statistics move.
    """
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            sizes.setdefault(module, (args[0].numel(), output.numel()))

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        with evaluation_mode(model), torch.no_grad():
            if isinstance(example_input, Mapping):
                model(**example_input)
            else:
                model(*example_input if isinstance(example_input, tuple) else (example_input,))
    finally:
        for handle in handles:
            handle.remove()
    return sizes
